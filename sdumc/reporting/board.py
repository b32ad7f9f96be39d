"""The report for TensorBoard: the figures, and the curves' means over runs."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from sdumc.files import atomic_write
from sdumc.reporting.curves import mean_curve
from sdumc.reporting.runs import Run

SUFFIX = ".report"


def write_board(runs: Sequence[Run], images: Sequence[Path], directory: Path) -> Path:
    """Write one event file with ``images`` (PNG) and the mean curves, in place of the one of an earlier report.

    Its time is that of the last epoch, not the current time, so that the same runs give the same file.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    time = max((run.path / "metrics.jsonl").stat().st_mtime for run in runs)
    last = max(run.history[-1]["epoch"] for run in runs)
    path = directory / f"events.out.tfevents.{int(time):010d}{SUFFIX}"
    with atomic_write(path, "wb") as f:
        records = RecordWriter(f)
        records.write(Event(wall_time=time, file_version="brain.Event:2").SerializeToString())
        # A run's own folder has its curves from training.
        own = any(directory.resolve() == (run.path / "tensorboard").resolve() for run in runs)
        for keys in [] if own else _curves(runs):
            for epoch, value in zip(*(a.tolist() for a in mean_curve(runs, *keys)), strict=True):
                entry = Summary.Value(tag="/".join(keys), simple_value=value)
                event = Event(wall_time=time, step=epoch, summary=Summary(value=[entry]))
                records.write(event.SerializeToString())
        for image in images:
            png = image.read_bytes()
            width, height = Image.open(io.BytesIO(png)).size
            picture = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
            entry = Summary.Value(tag=f"figures/{image.stem}", image=picture)
            event = Event(wall_time=time, step=last, summary=Summary(value=[entry]))
            records.write(event.SerializeToString())
        records.flush()
    for old in directory.glob(f"events.out.tfevents.*{SUFFIX}"):
        if old != path:
            old.unlink()
    return path


def _curves(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The entries of metrics.jsonl that are numbers, by where they are in it."""
    found: dict[tuple[str, ...], None] = {}
    for run in runs:
        for entry in run.history:
            found.update(dict.fromkeys(path for path in _numbers(entry) if path not in (("epoch",), ("step",))))
    return list(found)


def _numbers(entry: dict, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*above, key))
        elif isinstance(value, (int, float)):
            yield (*above, key)
