"""Reading features: batches from archives at the released dimensions, against plain reading and the page cache.

Every side reads all archives of a generated corpus once a run: the training loader; ``kaldiio.load_mat`` in file order
with padding; torch's DataLoader with worker processes; and a raw sequential read, which no loader can beat by much.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdumc.bench.measure import goal, interleaved, median, peak_memory, ratio, seconds, spread, table
from sdumc.data.batches import BatchLoader, GlobalBatchSampler, UtteranceDataset, collate
from sdumc.data.dump import Dump, load_dump, split_rxspecifier
from sdumc.data.shards import ShardWriter, merge_shards
from sdumc.data.tables import write_table
from sdumc.errors import UserError

BATCH = 96
NAMES = ("audio", "text", "text_sim", "video")
DIMS = {"audio": 1024, "text": 4096, "text_sim": 4096, "video": 1024}
RATES = {"audio": 50.0, "text": 4.1, "text_sim": 4.1, "video": 30.0}  # frames a second; the mean clip has 7.3 seconds
_JOBS = 4
_RAW_PIECE = 2**20  # bytes; small enough for the processor's cache: the fastest way to read on the machines tried
_BUDGET = 60_000  # frames of a batch, padded: 96 clips of average length


def lengths(count: int) -> dict[str, list[int]]:
    """Frames of each utterance by feature: durations as of MOSEI's clips, 0.5 to 60 s, mean 7.3 s."""
    rng = np.random.default_rng(0)
    duration = np.clip(rng.lognormal(0, 0.65, count), 0.08, 8.2)
    duration *= 7.3 / duration.mean()
    words = {name: rng.normal(1, 0.15, count).clip(0.5) if name.startswith("text") else 1 for name in NAMES}
    return {name: np.maximum(1, duration * RATES[name] * words[name]).astype(int).tolist() for name in NAMES}


def generate(folder: Path, count: int) -> int:
    """Write a dump folder of ``count`` utterances; its archives' bytes."""
    frames = lengths(count)
    needed = 4 * sum(sum(frames[name]) * DIMS[name] for name in NAMES)
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB free, the corpus needs {needed / 1e9:.1f}; give another --dir, or fewer "
            "--utterances"
        )
    utts = [f"spk{i // 20:04d}-{i:05d}" for i in range(count)]
    values = np.random.default_rng(1).standard_normal(2**25, dtype=np.float32)
    place = np.random.default_rng(2)
    for name in NAMES:
        for job in range(1, _JOBS + 1):
            with ShardWriter(folder, name, job, {}, utts[job - 1 :: _JOBS]) as writer:
                for utt, length in zip(utts[job - 1 :: _JOBS], frames[name][job - 1 :: _JOBS], strict=True):
                    size = length * DIMS[name]
                    start = int(place.integers(len(values) - size))
                    writer.write(utt, values[start : start + size].reshape(length, -1))
        merge_shards(folder, name, _JOBS, {}, utts)
    write_table(folder / "utt2label", {utt: i % 19 / 3 - 3 for i, utt in enumerate(utts)})
    return needed


def archives(dump: Dump) -> list[str]:
    """The archives behind a dump folder."""
    return sorted({split_rxspecifier(e)[0] for feature in dump.features.values() for e in feature.entries.values()})


def read_raw(paths: Sequence[str], memory: bytearray) -> None:
    """One byte after the other into ``memory``, from its beginning again when it is full."""
    view, place = memoryview(memory), 0
    for path in paths:
        with open(path, "rb", buffering=0) as f:
            while count := f.readinto(view[place : place + _RAW_PIECE]):
                place = place + count if place + count + _RAW_PIECE <= len(view) else 0


def plain_batches(dump: Dump) -> Iterator[dict[str, torch.Tensor]]:
    """What a few lines with kaldiio do: file order, batches of 96, zeros, and every matrix copied into them."""
    import kaldiio

    def place(utt: str) -> tuple[str, int]:
        return split_rxspecifier(dump.features["audio"].entries[utt])

    utts = sorted(dump.utterances, key=place)
    for first in range(0, len(utts), BATCH):
        batch = {}
        for name in NAMES:
            matrices = [kaldiio.load_mat(dump.features[name].entries[utt]) for utt in utts[first : first + BATCH]]
            padded = torch.zeros(len(matrices), max(map(len, matrices)), DIMS[name])
            for row, matrix in zip(padded.numpy(), matrices, strict=True):
                row[: len(matrix)] = matrix
            batch[name] = padded
        yield batch


def sampler_of(dataset: UtteranceDataset, budget: int | None = None) -> GlobalBatchSampler:
    """Training's."""
    return GlobalBatchSampler(dataset.frames, BATCH, budget, seed=1)


def process_loader(dataset: UtteranceDataset, workers: int) -> torch.utils.data.DataLoader:
    """The same batches by torch's DataLoader."""
    sampler = sampler_of(dataset, _BUDGET)
    anything: Any = dataset  # a map-style dataset in all but its base class
    return torch.utils.data.DataLoader(anything, batch_sampler=sampler, collate_fn=collate, num_workers=workers)


def unchecked(loader: BatchLoader) -> BatchLoader:
    """The loader as before its first epoch, in which it checks that values are finite, but with its memory."""
    for flags in loader._checked.values():
        flags[:] = bytes(len(flags))
    return loader


def exhaust(batches) -> None:
    """Take every batch, and let it go when the next one has come, as a training loop does."""
    for _batch in batches:
        pass


def epochs_of(folder: Path, count: int, workers: int) -> None:
    """What memory is measured on: tables of the corpus, and about as many batches whatever the number of utterances."""
    dump = load_dump(folder, NAMES)
    epochs = -(-2 * len(dump.utterances) // count)
    dump.utterances = dump.utterances[:count]
    dataset = UtteranceDataset(dump, NAMES)
    sampler = sampler_of(dataset, _BUDGET)
    loader = BatchLoader(dataset, sampler, workers)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        exhaust(loader)


def forget(paths: Sequence[str]) -> None:
    """Put files out of the page cache (no rights needed; a virtual machine's host may still have them)."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def main(repeats: int, utterances: int = 2000, folder: str | None = None, keep: bool = False, workers: int = 2) -> bool:
    """Print throughput of each side with a warm and a cold page cache, and resident memory by size of the corpus;
    whether the goals are reached, with a warm one."""
    with contextlib.ExitStack() as stack:
        if keep and folder:
            path = Path(folder)
            path.mkdir(parents=True, exist_ok=True)
        else:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdumc-bench-", dir=folder)))
        if not (path / "utt2label").exists():
            generate(path, utterances)
        return _measure(path, repeats, workers)


def cpu_seconds() -> float:
    """Of this process, its threads, and the processes that it has ended."""
    return sum(os.times()[:4])


def _measure(path: Path, repeats: int, workers: int) -> bool:
    dump = load_dump(path, NAMES)
    paths = archives(dump)
    size = sum(os.path.getsize(p) for p in paths)
    dataset = UtteranceDataset(dump, NAMES)
    small, large = bytearray(_RAW_PIECE), bytearray(4 * _BUDGET * 1310)  # a frame has 1310 values on average
    limited = BatchLoader(dataset, sampler_of(dataset, _BUDGET), workers)
    whole = BatchLoader(dataset, sampler_of(dataset), workers)
    ours, raw, plain = (
        f"ours, {workers} threads",
        "raw sequential read into 1 MiB",
        "kaldiio.load_mat in file order, padded",
    )
    sides: dict[str, tuple[int, Callable[[], object]]] = {
        ours: (len(limited), lambda: exhaust(limited)),
        "ours, first epoch: checks values": (len(limited), lambda: exhaust(unchecked(limited))),
        "ours, no limit of frames": (len(whole), lambda: exhaust(whole)),
        raw: (0, lambda: read_raw(paths, small)),
        "the same into memory of a batch": (0, lambda: read_raw(paths, large)),
        plain: (-(-len(dataset) // BATCH), lambda: exhaust(plain_batches(dump))),
    }
    print(f"{len(dataset)} utterances, {size / 1e9:.2f} GB; batches of {BATCH}, ours of {_BUDGET} frames at most.\n")
    cpu: dict[str, list[float]] = {name: [] for name in sides}

    def timed(name: str) -> None:
        before = cpu_seconds()
        sides[name][1]()
        cpu[name].append(cpu_seconds() - before)

    read_raw(paths, large)  # what was generated may not all be in the page cache
    for loader in (limited, whole, limited):  # until their memory no longer grows
        exhaust(loader)
    times = interleaved({name: partial(timed, name) for name in sides}, repeats, warm_up=0)
    rows = [_row(name, t, times[raw], sides[name][0], size, cpu[name]) for name, t in times.items()]
    header = ["page cache warm", "epoch (s)", "range (s)", "batches/s", "GB/s", "of the raw read", "range", "CPU (s)"]
    print(table(header, rows), flush=True)
    pairs = [a / b for a, b in zip(times[plain], times[ours], strict=True)]
    processes = seconds(lambda: exhaust(process_loader(dataset, workers)))
    print(
        f"\nOurs is {median(pairs):.1f} ({spread(pairs)}) times as fast as kaldiio with padding. torch's DataLoader "
        f"with {workers} worker processes took {processes:.1f} s for the same batches.\n"
    )

    cold: dict[str, list[float]] = {name: [] for name in (ours, raw, plain)}
    for _ in range(min(repeats, 3)):
        for name in cold:
            forget(paths)
            cold[name].append(seconds(sides[name][1]))
    rows = [_row(name, t, cold[raw], sides[name][0], size) for name, t in cold.items()]
    print(table(["page cache cold", *header[1:-1]], rows), flush=True)

    steps = sorted({min(500, len(dataset)), len(dataset)})
    peaks = [f"{peak_memory(partial(epochs_of, path, n, workers)):.0f} MiB with {n} utterances" for n in steps]
    print(f"\nResident memory at its peak, tables of the corpus and batches together: {', '.join(peaks)}.\n")
    share = goal("share of the raw read's bytes a second", ratio(times[raw], times[ours]), least=0.6)
    return goal("times as fast as kaldiio with padding", median(pairs), least=3) and share


def _row(
    name: str, times: list[float], raw: list[float], count: int, size: int, cpu: list[float] | None = None
) -> list[str]:
    shares = [100 * b / a for a, b in zip(times, raw, strict=True)]
    return [
        name,
        f"{median(times):.2f}",
        spread(times),
        f"{count / median(times):.1f}" if count else "-",
        f"{size / median(times) / 1e9:.2f}",
        f"{median(shares):.0f}%",
        f"{min(shares):.0f}-{max(shares):.0f}%",
        *([f"{median(cpu):.2f}"] if cpu else []),
    ]
