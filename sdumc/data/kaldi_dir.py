"""Kaldi data directories: read, validate and fix them, and write what is derived.

A directory ``data/<set>/`` holds the tables of :mod:`sdumc.data.tables`:

=============  =========================================  ==========================================
file           line                                       needed
=============  =========================================  ==========================================
``wav.scp``    utt path of any media file with sound      unless there are transcripts alone
``utt2spk``    utt speaker (a prefix of utt)              yes
``video.scp``  utt path of a media file with pictures     when there is video
``text``       utt words                                  when there are transcripts
``text.absent`` utt reason                                of utterances that have none, where others have
``utt2label``  utt number                                 when there are labels
``scale.yaml`` lowest and highest label, classes          when labels are not CMU's, -3 to 3
``segments``   utt recording start end (seconds)          when clips are cut from longer files
``spk2utt``    speaker utt utt ...                        derived, see :func:`finish_kaldi_dir`
``utt2dur``    utt seconds                                derived, see :func:`finish_kaldi_dir`
=============  =========================================  ==========================================

With ``segments``, the first column of ``wav.scp`` and ``video.scp`` is the recording instead of the utterance. Media
paths are taken as they stand: relative ones count from the directory that a command is started in, as in Kaldi.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdumc.data.tables import (
    LABEL_RANGE,
    MediaSpan,
    Problem,
    Row,
    Table,
    fail_on,
    label_problems,
    parse_number,
    read_dropped,
    scan_table,
    write_dropped,
    write_table,
)
from sdumc.errors import UserError
from sdumc.scale import CMU, declared_scale, looks_like_classes, scale_of

TEXT_ABSENT = "text.absent"
REQUIRED = ("wav.scp", "utt2spk")
SOURCE_TABLES = ("wav.scp", "utt2spk", "video.scp", "text", TEXT_ABSENT, "utt2label", "segments")
DERIVED_TABLES = ("utt2dur", "spk2utt")
MEDIA_TABLES = ("wav.scp", "video.scp")
_TOLERANCE = 0.5  # seconds by which a segment may end after its recording, as stated lengths are not exact


@dataclass(frozen=True)
class Segment:
    """A line of ``segments``: where in ``recording`` an utterance lies, in seconds."""

    recording: str
    start: float
    end: float


@dataclass
class KaldiDir:
    """The tables of a validated data directory; a table whose file is absent is empty."""

    path: Path
    wav: dict[str, str] = field(default_factory=dict)
    video: dict[str, str] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    utt2spk: dict[str, str] = field(default_factory=dict)
    utt2label: dict[str, float] = field(default_factory=dict)
    utt2dur: dict[str, float] = field(default_factory=dict)
    segments: dict[str, Segment] = field(default_factory=dict)

    @property
    def utterances(self) -> list[str]:
        """All utterance ids, sorted bytewise."""
        return sorted(self.segments or self.wav or self.utt2spk)

    def audio_source(self, utt: str) -> MediaSpan:
        """Where the sound of ``utt`` is."""
        return self._span(self.wav, utt)

    def video_source(self, utt: str) -> MediaSpan | None:
        """Where the pictures of ``utt`` are; None when the directory has no ``video.scp``."""
        return self._span(self.video, utt) if self.video else None

    def _span(self, table: Mapping[str, str], utt: str) -> MediaSpan:
        if not self.segments:
            return MediaSpan(table[utt], utterance=utt)
        segment = self.segments[utt]
        return MediaSpan(table[segment.recording], segment.start, segment.end, utt)


def shard(utterances: Sequence[str], job: str) -> list[str]:
    """The utterances of job J of N, given as ``"J/N"`` with J from 1: every N-th one of the sorted ids.

    More jobs than utterances is fine: some shards are empty.

    Raises:
        UserError: ``job`` is not of that form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", job)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"shard {job!r}: expected JOB/JOBS such as 1/4, with JOB from 1 to JOBS")
    return sorted(utterances)[int(match[1]) - 1 :: int(match[2])]


# ---------------------------------------------------------------------------------------------- reading and checking


def load_kaldi_dir(path: str | os.PathLike, label_range: tuple[float, float] | None = None) -> KaldiDir:
    """Read a data directory and check all that is cheap to check; media are not opened.

    Args:
        path: the directory.
        label_range: lowest and highest label allowed; None: as its ``scale.yaml`` says.

    Raises:
        UserError: listing the first problems (file, line, utterance): a file missing, lines unsorted or doubled, ids
            that differ between files, a label that is not a number within ``label_range``, a text of zero words, a
            speaker that is not a prefix of its utterances, a segment that ends before it starts, a pipe.
    """
    data, problems = _read(Path(path), label_range)
    fail_on(problems, f"{path}: not a valid data directory; utils/validate_data_dir.py {path} lists every problem")
    return data


def validate_kaldi_dir(
    path: str | os.PathLike, *, check_media: bool, label_range: tuple[float, float] | None = None
) -> list[Problem]:
    """All problems of a data directory; an empty list means that it is valid.

    Args:
        path: the directory.
        check_media: also open every media file (present, not cut short, has the tracks and covers the segments).
        label_range: lowest and highest label allowed; None: as its ``scale.yaml`` says.

    Raises:
        UserError: there is no such directory, or one of its files cannot be read.
    """
    data, problems = _read(Path(path), label_range)
    return problems + (media_problems(data) if check_media else [])


def _read(path: Path, label_range: tuple[float, float] | None) -> tuple[KaldiDir, list[Problem]]:
    tables, problems = read_tables(path, SOURCE_TABLES + DERIVED_TABLES)
    declared = declared_scale(path)
    scale = declared or CMU
    data, found = check_tables(path, tables, label_range or (scale.low, scale.high))
    question = None if declared or label_range else looks_like_classes(data.utt2label.values())
    return data, [*problems, *found, *([Problem(path / "utt2label", question)] if question else [])]


def has_transcripts_alone(path: Path) -> bool:
    """Whether a data directory is of a corpus without sound and pictures: it has ``text`` and no media table."""
    media = ("wav.scp", "video.scp", "segments")
    return (path / "text").exists() and not any((path / name).exists() for name in media)


def read_tables(path: Path, names: Iterable[str]) -> tuple[dict[str, Table], list[Problem]]:
    """Those of the named tables that a directory has, and what is wrong with them line by line.

    Raises:
        UserError: there is no such directory, or a file cannot be read.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such data directory")
    tables: dict[str, Table] = {}
    problems: list[Problem] = []
    segmented = (path / "segments").exists()
    transcripts = has_transcripts_alone(path)
    for name in names:
        file = path / name
        if not file.exists():
            if name in REQUIRED and not (transcripts and name == "wav.scp"):
                problems.append(Problem(file, "missing; every data directory needs it"))
            continue
        tables[name], found = scan_table(file, of_recordings=segmented and name in MEDIA_TABLES)
        problems += found
        if not tables[name].values:
            problems.append(Problem(file, "empty"))
    return tables, problems


def check_tables(
    path: Path, tables: Mapping[str, Table], label_range: tuple[float, float] = LABEL_RANGE
) -> tuple[KaldiDir, list[Problem]]:
    """Check the values of tables, and the tables against each other; media are not opened.

    Returns:
        the directory, without values that cannot be used, and every problem found.
    """
    problems: list[Problem] = []
    values = {name: table.values for name, table in tables.items()}
    for name in MEDIA_TABLES:
        if name in tables:
            texts = {key: _path_problem(value) for key, value in values[name].items()}
            problems += [tables[name].problem(key, text) for key, text in texts.items() if text]
    labels: dict[str, float] = {}
    durations: dict[str, float] = {}
    segments: dict[str, Segment] = {}
    if "utt2label" in tables:
        found = label_problems(tables["utt2label"], label_range)
        bad = {problem.utterance for problem in found}
        labels = {utt: float(value) for utt, value in values["utt2label"].items() if value and utt not in bad}
        problems += found
    if "utt2dur" in tables:
        durations, found = _check_durations(tables["utt2dur"])
        problems += found
    if "segments" in tables:
        segments, found = _check_segments(tables["segments"])
        problems += found
    for utt, speaker in values.get("utt2spk", {}).items():
        if speaker and not utt.startswith(speaker):
            text = f"speaker {speaker!r} is not a prefix of the utterance id; rename one of them"
            problems.append(tables["utt2spk"].problem(utt, text))
    problems += _differing_recordings(tables, segments)
    problems += _differing_utterances(tables)
    problems += _check_spk2utt(tables)
    data = KaldiDir(
        path=path,
        wav=values.get("wav.scp", {}),
        video=values.get("video.scp", {}),
        text=values.get("text", {}),
        utt2spk=values.get("utt2spk", {}),
        utt2label=labels,
        utt2dur=durations,
        segments=segments,
    )
    return data, problems


def _path_problem(value: str) -> str | None:
    if value.startswith("|") or value.endswith("|"):
        return "a command (pipe) instead of a path; give the media file itself, any format with sound is read directly"
    return None


def _check_durations(table: Table) -> tuple[dict[str, float], list[Problem]]:
    durations: dict[str, float] = {}
    problems = []
    for utt, value in table.values.items():
        if 0 < parse_number(value) < math.inf:
            durations[utt] = float(value)
        else:
            problems.append(table.problem(utt, f"duration {value!r} is not a positive number of seconds"))
    return durations, problems


def _check_segments(table: Table) -> tuple[dict[str, Segment], list[Problem]]:
    segments: dict[str, Segment] = {}
    problems = []
    for utt, value in table.values.items():
        segment = _parse_segment(value)
        if isinstance(segment, str):
            problems.append(table.problem(utt, segment))
        else:
            segments[utt] = segment
    return segments, problems


def _parse_segment(value: str) -> Segment | str:
    """The value of a ``segments`` line; a string says what is wrong with it."""
    fields = value.split()
    if len(fields) != 3:
        return f"expected `utterance recording start end`, found {len(fields)} columns after the id"
    start, end = parse_number(fields[1]), parse_number(fields[2])
    if not (math.isfinite(start) and math.isfinite(end)):
        return f"start {fields[1]!r} and end {fields[2]!r} must be seconds"
    if start < 0 or end <= start:
        return f"start {start:g} and end {end:g} must satisfy 0 <= start < end"
    return Segment(fields[0], start, end)


def _differing_recordings(tables: Mapping[str, Table], segments: Mapping[str, Segment]) -> list[Problem]:
    """A problem for each recording that ``segments`` or a media table lacks."""
    if "segments" not in tables:
        return []
    problems = []
    user = {segment.recording: utt for utt, segment in segments.items()}
    for table in (tables[name] for name in MEDIA_TABLES if name in tables):
        for recording in sorted(user.keys() - table.values.keys()):
            text = f"missing here; segments cuts utterance {user[recording]!r} from it"
            problems.append(table.problem(recording, text))
        for recording in sorted(table.values.keys() - user.keys()):
            text = "used by no line of segments"
            problems.append(table.problem(recording, text, lossless=True))
    return problems


def _differing_utterances(tables: Mapping[str, Table]) -> list[Problem]:
    """A problem for each utterance that one table lacks and another one has."""
    names = ("segments", "wav.scp", "video.scp", "utt2spk", "text", "utt2label", "utt2dur")
    by_utterance = [tables[name] for name in names if name in tables and not tables[name].of_recordings]
    problems = []
    without = tables[TEXT_ABSENT].values.keys() if TEXT_ABSENT in tables else frozenset()
    for utt in sorted(without & tables["text"].values.keys() if "text" in tables else ()):
        problems.append(tables[TEXT_ABSENT].problem(utt, "is in text too; remove one of the two lines"))
    for table in by_utterance:
        missing = set().union(*(t.values for t in by_utterance)) - table.values.keys()
        for utt in sorted(missing - without if table.file.name == "text" else missing):
            others = ", ".join(t.file.name for t in by_utterance if utt in t.values)
            problems.append(table.problem(utt, f"missing here, but is in {others}"))
    return problems


def _check_spk2utt(tables: Mapping[str, Table]) -> list[Problem]:
    if "spk2utt" not in tables or "utt2spk" not in tables:
        return []
    derived, found = utterances_by_speaker(tables["utt2spk"].values), tables["spk2utt"]
    differing = [
        speaker
        for speaker in sorted(derived.keys() | found.values.keys())
        if derived.get(speaker, "").split() != found.values.get(speaker, "").split()
    ]
    text = "differs from utt2spk; remove spk2utt, it is derived"
    return [Problem(found.file, f"speaker {speaker!r}: {text}", lossless=True) for speaker in differing]


def media_problems(data: KaldiDir) -> list[Problem]:
    """The first problem of each utterance's sound or pictures. A file is opened once, however many segments it has."""
    from sdumc.data.media import check_media_file  # PyAV takes a while to import; most readers do not need it

    # A file that is in both wav.scp and video.scp is opened for both at once.
    tracks: dict[str, set[str]] = {}
    for track, table in (("audio", data.wav), ("video", data.video)):
        for file in table.values():
            if not _path_problem(file):
                tracks.setdefault(file, set()).add(track)
    durations: dict[str, float] = {}
    errors: dict[str, str] = {}
    for file, wanted in tracks.items():
        try:
            durations[file] = check_media_file(file, audio="audio" in wanted, video="video" in wanted).duration
        except UserError as e:
            errors[file] = str(e)
    problems = []
    for utt in data.utterances:
        segment = data.segments.get(utt)
        recording = segment.recording if segment else utt
        for name, table in (("wav.scp", data.wav), ("video.scp", data.video)):
            file = table.get(recording, "")
            if file in errors:
                problems.append(Problem(data.path / name, errors[file], utterance=utt))
                break
            if segment and file in durations and segment.end > durations[file] + _TOLERANCE:
                text = f"ends at {segment.end:g} s, but {file} has {durations[file]:g} s"
                problems.append(Problem(data.path / "segments", text, utterance=utt))
                break
    return problems


def first_problems(problems: Iterable[Problem], segments: Mapping[str, Segment]) -> dict[str, Problem]:
    """Utterance -> the first problem because of which it cannot be kept, its recording's among them."""
    by_utterance: dict[str, Problem] = {}
    by_recording: dict[str, Problem] = {}
    for problem in problems:
        if not problem.lossless and problem.utterance is not None:
            by_utterance.setdefault(problem.utterance, problem)
        elif not problem.lossless and problem.recording is not None:
            by_recording.setdefault(problem.recording, problem)
    for utt, segment in segments.items():
        if segment.recording in by_recording:
            by_utterance.setdefault(utt, by_recording[segment.recording])
    return by_utterance


# ---------------------------------------------------------------------------------------------------- derived files


def utterances_by_speaker(utt2spk: Mapping[str, str]) -> dict[str, str]:
    """The table ``spk2utt``: speaker -> its utterances, sorted, with spaces."""
    speakers: dict[str, list[str]] = {}
    for utt in sorted(utt2spk):
        speakers.setdefault(utt2spk[utt], []).append(utt)
    return {speaker: " ".join(utts) for speaker, utts in speakers.items()}


def finish_kaldi_dir(path: str | os.PathLike) -> None:
    """Write what follows from the other files: ``spk2utt`` from ``utt2spk``, and ``utt2dur`` (seconds, three decimals)
    from ``segments`` or else from the media.

    Raises:
        UserError: the directory is not valid, or a media file cannot be opened.
    """
    path = Path(path)
    for derived in ("spk2utt", "utt2dur"):
        (path / derived).unlink(missing_ok=True)
    data = load_kaldi_dir(path)
    if not data.wav:
        durations = {}
    elif data.segments:
        durations = {utt: s.end - s.start for utt, s in data.segments.items()}
    else:
        from sdumc.data.media import probe

        durations = {utt: probe(file).duration for utt, file in data.wav.items()}
    for utt, seconds in durations.items():
        if not seconds > 0:
            raise UserError(
                f"{data.audio_source(utt)}: has no sound in it; replace the file or leave the utterance out"
            )
    if durations:
        write_table(path / "utt2dur", {utt: f"{seconds:.3f}" for utt, seconds in durations.items()})
    write_table(path / "spk2utt", utterances_by_speaker(data.utt2spk))


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
