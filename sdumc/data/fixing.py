"""Fix a data directory: sort its tables, and keep the utterances that are whole in every one of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdumc.data.kaldi_dir import (
    MEDIA_TABLES,
    REQUIRED,
    SOURCE_TABLES,
    KaldiDir,
    check_tables,
    first_problems,
    has_transcripts_alone,
    media_problems,
    read_tables,
    utterances_by_speaker,
)
from sdumc.data.tables import Problem, Row, Table, read_dropped, write_dropped, write_table
from sdumc.errors import UserError
from sdumc.scale import scale_of

FIX_STAGE = "fix_data_dir"  # the stage column of dropped.tsv for what fix_kaldi_dir left out


def fix_kaldi_dir(
    path: str | os.PathLike,
    dropped_path: str | os.PathLike,
    max_drop: float,
    *,
    check_media: bool = False,
    label_range: tuple[float, float] | None = None,
) -> list[Row]:
    """Sort the tables and keep the utterances that are whole in every one of them.

    What is left out is listed in ``dropped_path`` with its reason. The share left out counts over all runs on this
    directory. Lines that only repeat an earlier line are removed without dropping the utterance.

    Args:
        path: the data directory; changed only on success.
        dropped_path: a ``dropped.tsv``; written in any case, so that a failure can be looked into.
        max_drop: the largest share of utterances that may be left out, between 0 and 1.
        check_media: also leave out utterances whose media file is missing, broken or cut short.
        label_range: lowest and highest label allowed; None: as its ``scale.yaml`` says.

    Returns:
        The rows (id, stage, reason) left out by this run.

    Raises:
        UserError: more than ``max_drop`` of the utterances, or all of them, would be left out, or a required file is
            missing. The data directory is then as it was.
    """
    path = Path(path)
    tables, problems = read_tables(path, SOURCE_TABLES)
    for name in REQUIRED:
        if name not in tables and not (name == "wav.scp" and has_transcripts_alone(path)):
            raise UserError(f"{path / name}: missing; every data directory needs it")
    scale = scale_of(path)
    data, found = check_tables(path, tables, label_range or (scale.low, scale.high))
    reasons = first_problems(problems + found, data.segments)
    listed = set().union(*(t.values for t in tables.values() if not t.of_recordings))
    data = _restricted(data, listed - reasons.keys())
    if check_media:
        reasons |= first_problems(media_problems(data), {})
        data = _restricted(data, listed - reasons.keys())
    kept = sorted(data.utt2spk)
    rows = [(utt, FIX_STAGE, _reason(problem)) for utt, problem in sorted(reasons.items())]
    _list_dropped(path, Path(dropped_path), rows, kept, max_drop)
    _write_fixed(path, tables, data, kept)
    return rows


def _reason(problem: Problem) -> str:
    """A problem as ``dropped.tsv`` has it: without the line, so that reports can count equal reasons."""
    return f"{problem.file.name}: {' '.join(problem.text.split())}"


def _restricted(data: KaldiDir, kept: set[str]) -> KaldiDir:
    """Speakers, segments and media of some utterances; the other tables are left empty."""
    segments = {utt: segment for utt, segment in data.segments.items() if utt in kept}
    media = {segment.recording for segment in segments.values()} if data.segments else kept
    return KaldiDir(
        path=data.path,
        wav={key: file for key, file in data.wav.items() if key in media},
        video={key: file for key, file in data.video.items() if key in media},
        utt2spk={utt: speaker for utt, speaker in data.utt2spk.items() if utt in kept},
        segments=segments,
    )


def _list_dropped(path: Path, dropped_path: Path, rows: list[Row], kept: Sequence[str], max_drop: float) -> None:
    """Bring ``dropped.tsv`` up to date; raise a UserError when too many utterances are left out."""
    # An utterance that an earlier, failed run listed and that is whole now is no longer left out.
    earlier = [row for row in read_dropped(dropped_path) if row[1] != FIX_STAGE or row[0] not in set(kept)]
    merged = {(row[0], row[1]): row for row in earlier + rows}
    if merged or dropped_path.exists():
        write_dropped(dropped_path, merged.values())
    gone = {utt for utt, stage in merged if stage == FIX_STAGE}
    share = len(gone) / max(len(gone) + len(kept), 1)
    if not kept or share > max_drop:
        first = "; ".join(f"{utt}: {reason}" for utt, _, reason in rows[:3])
        raise UserError(
            f"{path}: {len(gone)} of {len(gone) + len(kept)} utterances ({100 * share:.1f}%) cannot be kept, more than "
            f"the {100 * max_drop:g}% allowed; nothing was changed. {dropped_path} lists them with their reasons, the "
            f"first: {first}. Mend the files, or allow more with --max-drop"
        )


def _write_fixed(path: Path, tables: Mapping[str, Table], data: KaldiDir, kept: Sequence[str]) -> None:
    fixed: dict[str, Mapping[str, str]] = {"wav.scp": data.wav} if "wav.scp" in tables else {}
    if "video.scp" in tables:
        fixed["video.scp"] = data.video
    for name, table in tables.items():
        if name not in MEDIA_TABLES:
            fixed[name] = {utt: table.values[utt] for utt in kept if utt in table.values}
    fixed["spk2utt"] = utterances_by_speaker(data.utt2spk)
    if (path / "utt2dur").exists():
        durations, problems = read_tables(path, ["utt2dur"])
        wrong = first_problems(problems + check_tables(path, durations)[1], {})
        usable = {utt: value for utt, value in durations["utt2dur"].values.items() if utt not in wrong}
        if all(utt in usable for utt in kept):
            fixed["utt2dur"] = {utt: usable[utt] for utt in kept}
        else:
            (path / "utt2dur").unlink()  # finish_kaldi_dir makes it again
    for name, values in fixed.items():
        write_table(path / name, values)
