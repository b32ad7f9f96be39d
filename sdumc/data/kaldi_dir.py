"""Kaldi data directories: read, write, validate, fix.

A directory ``data/<set>/`` holds plain text tables, one ``id value`` per line, sorted bytewise (``LC_ALL=C sort``):

=============  =========================================  ==========================================
file           line                                       needed
=============  =========================================  ==========================================
``wav.scp``    utt path of any media file with sound      yes
``utt2spk``    utt speaker (a prefix of utt)              yes
``video.scp``  utt path of a media file with pictures     when there is video
``text``       utt words                                  when there are transcripts
``utt2label``  utt number                                 when there are labels
``segments``   utt recording start end (seconds)          when clips are cut from longer files
``spk2utt``    speaker utt utt ...                        derived, see :func:`finish_kaldi_dir`
``utt2dur``    utt seconds                                derived, see :func:`finish_kaldi_dir`
=============  =========================================  ==========================================

With ``segments``, the first column of ``wav.scp`` and ``video.scp`` is the recording instead of the utterance. Media
paths are taken as they stand: relative ones count from the directory that a command is started in, as in Kaldi.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdumc.errors import UserError
from sdumc.files import write_text

log = logging.getLogger(__name__)

LABEL_RANGE = (-3.0, 3.0)
FIX_STAGE = "fix_data_dir"  # the stage column of dropped.tsv for what fix_kaldi_dir left out
_SHOWN = 10  # problems spelt out in one error message


@dataclass(frozen=True)
class MediaSpan:
    """A part of a media file: ``start`` to ``end`` in seconds, to the file's end when ``end`` is None.

    ``utterance`` only makes error messages better.
    """

    path: str
    start: float = 0.0
    end: float | None = None
    utterance: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.path if self.utterance is None else f"{self.path}: utterance {self.utterance!r}"


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
        return sorted(self.segments or self.wav)

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


# ---------------------------------------------------------------------------------------------------------- tables


def _scan(path: str | os.PathLike, allow_empty: bool = False) -> tuple[list[tuple[int, str, str]], list[str]]:
    """Rows (line number, id, value) of a table as they stand, and everything that is wrong with its lines."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if lines[-1] == b"":
        lines.pop()
    rows, problems = [], []
    first_line: dict[str, int] = {}
    previous = None
    for number, raw in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            key = raw.split(maxsplit=1)[0].decode("utf-8", "replace")
            problems.append(f"{where}: utterance {key!r}: not UTF-8 text; convert the file with iconv")
            continue
        if line.endswith("\r"):
            problems.append(f"{where}: Windows line end; remove them with: sed -i 's/\\r$//' {path}")
            line = line[:-1]
        if line.startswith("\ufeff"):
            problems.append(
                f"{where}: starts with a byte order mark; remove it with: sed -i '1s/^\\xef\\xbb\\xbf//' {path}"
            )
            line = line[1:]
        if not line.strip():
            problems.append(f"{where}: empty line; remove it")
            continue
        if line[0].isspace():
            problems.append(f"{where}: starts with white space; the id must come first")
            line = line.lstrip()
        # Only space and tab separate columns: str.split() would also cut at, say, a no-break space in an id.
        key, _, value = re.sub(r"[ \t]+", " ", line, count=1).partition(" ")
        value = value.strip()
        if not value and not allow_empty:
            problems.append(f"{where}: utterance {key!r}: nothing after the id; give a value or remove the line")
        if key in first_line:
            problems.append(f"{where}: utterance {key!r}: given twice (first in line {first_line[key]}); remove one")
        elif previous is not None and key < previous:  # code points order as UTF-8 bytes do
            problems.append(
                f"{where}: utterance {key!r}: out of order after {previous!r}; sort with: "
                f"LC_ALL=C sort -o {path} {path}"
            )
        first_line.setdefault(key, number)
        previous = key
        rows.append((number, key, value))
    return rows, problems


def _fail(problems: Sequence[str], advice: str = "") -> None:
    """Raise a UserError with the first problems when there are any."""
    if problems:
        shown = list(problems[:_SHOWN])
        if len(problems) > _SHOWN:
            shown.append(f"... and {len(problems) - _SHOWN} more problems")
        raise UserError("\n".join(shown + ([advice] if advice else [])))


def read_table(path: str | os.PathLike, allow_empty: bool = False) -> dict[str, str]:
    """Read ``id value...`` lines into a mapping, in file order.

    Args:
        path: the table.
        allow_empty: accept an id with nothing after it (a recogniser's empty hypothesis) as an empty string.

    Raises:
        UserError: naming file, line and id, when the file cannot be read, is not UTF-8, gives an id twice, is not
            sorted bytewise, or has an empty value.
    """
    rows, problems = _scan(path, allow_empty)
    _fail(problems)
    return {key: value for _, key, value in rows}


def write_table(path: str | os.PathLike, mapping: Mapping[str, object]) -> None:
    """Write a mapping as ``id value`` lines, sorted bytewise, atomically; an empty value gives the id alone.

    Raises:
        UserError: an id is empty or has white space, or a value has a line break.
    """
    lines = []
    for key in sorted(mapping):
        value = str(mapping[key])
        check_id(key, path)
        if "\n" in value or "\r" in value:
            raise UserError(f"{path}: utterance {key!r}: the value has a line break: {value!r}")
        lines.append(f"{key} {value}\n" if value else f"{key}\n")
    write_text(path, "".join(lines))


def check_id(utt: str, where: str | os.PathLike) -> None:
    """Raise a UserError when ``utt`` cannot be the first column of a table."""
    if not utt or re.search(r"\s", utt):
        raise UserError(f"{where}: utterance {utt!r}: an id must have at least one character and no white space")


def _number(value: str) -> float:
    """A float as written in a table; NaN for what is not a number (float() would take 1_0 for ten)."""
    try:
        return math.nan if "_" in value else float(value)
    except ValueError:
        return math.nan


def label_problem(value: str, label_range: tuple[float, float] = LABEL_RANGE) -> str | None:
    """What is wrong with a label as written, or None."""
    number = _number(value)
    if math.isnan(number) or math.isinf(number):
        return f"label {value!r} is not a finite number; correct it or leave the utterance out"
    if not label_range[0] <= number <= label_range[1]:
        return (
            f"label {value} is outside [{label_range[0]:g}, {label_range[1]:g}]; correct it or leave the utterance out"
        )
    return None


def read_labels(path: str | os.PathLike, label_range: tuple[float, float] = LABEL_RANGE) -> dict[str, float]:
    """Read ``utt2label``: utt -> sentiment.

    Raises:
        UserError: as :func:`read_table`, and when a label is not a finite number within ``label_range``.
    """
    rows, problems = _scan(path)
    for number, key, value in rows:
        if value and (problem := label_problem(value, label_range)):
            problems.append(f"{path}:{number}: utterance {key!r}: {problem}")
    _fail(problems)
    return {key: float(value) for _, key, value in rows}


def _segment(value: str) -> Segment | str:
    """Parse the value of a ``segments`` line; a string says what is wrong."""
    fields = value.split()
    if len(fields) != 3:
        return f"expected `utterance recording start end`, found {len(fields)} columns after the id"
    start, end = _number(fields[1]), _number(fields[2])
    if not (math.isfinite(start) and math.isfinite(end)):
        return f"start {fields[1]!r} and end {fields[2]!r} must be seconds"
    if start < 0 or end <= start:
        return f"start {start:g} and end {end:g} must satisfy 0 <= start < end"
    return Segment(fields[0], start, end)


def _media_path_problem(value: str) -> str | None:
    if value.startswith("|") or value.endswith("|"):
        return "a command (pipe) instead of a path; give the media file itself, any format with sound is read directly"
    return None


# ------------------------------------------------------------------------------------------------------ directories

_REQUIRED = ("wav.scp", "utt2spk")
_OPTIONAL = ("video.scp", "text", "utt2label", "segments", "utt2dur", "spk2utt")


def _collect(path: Path, label_range: tuple[float, float]) -> tuple[KaldiDir, list[str]]:
    """Read all tables of a directory and list everything wrong with them, short of opening media."""
    if not path.is_dir():
        raise UserError(f"{path}: no such data directory")
    problems: list[str] = []
    tables: dict[str, dict[str, str]] = {}
    line_of: dict[tuple[str, str], int] = {}
    for name in _REQUIRED + _OPTIONAL:
        file = path / name
        if not file.exists():
            if name in _REQUIRED:
                problems.append(f"{file}: missing; every data directory needs it")
            continue
        rows, found = _scan(file)
        problems += found
        tables[name] = {}
        for number, key, value in rows:
            tables[name].setdefault(key, value)
            line_of.setdefault((name, key), number)
        if not rows:
            problems.append(f"{file}: empty")

    def bad(name: str, key: str, problem: str) -> None:
        problems.append(f"{path / name}:{line_of[name, key]}: utterance {key!r}: {problem}")

    for name in ("wav.scp", "video.scp"):
        for key, value in tables.get(name, {}).items():
            if problem := _media_path_problem(value):
                bad(name, key, problem)
    labels, durations, segments = {}, {}, {}
    for utt, value in tables.get("utt2label", {}).items():
        if not value:
            continue  # reported as an empty value already; so below
        if problem := label_problem(value, label_range):
            bad("utt2label", utt, problem)
        else:
            labels[utt] = float(value)
    for utt, value in tables.get("utt2dur", {}).items():
        if not 0 < _number(value) < math.inf:
            bad("utt2dur", utt, f"duration {value!r} is not a positive number of seconds")
        else:
            durations[utt] = float(value)
    for utt, value in tables.get("segments", {}).items():
        segment = _segment(value)
        if isinstance(segment, str):
            bad("segments", utt, segment)
        else:
            segments[utt] = segment
    for utt, speaker in tables.get("utt2spk", {}).items():
        if speaker and not utt.startswith(speaker):
            bad("utt2spk", utt, f"speaker {speaker!r} is not a prefix of the utterance id; rename one of them")

    problems += _id_differences(path, tables, segments)
    if "spk2utt" in tables and "utt2spk" in tables:
        truth = _spk2utt(tables["utt2spk"])
        for speaker in sorted(truth.keys() | tables["spk2utt"].keys()):
            if truth.get(speaker, "").split() != tables["spk2utt"].get(speaker, "").split():
                problems.append(
                    f"{path / 'spk2utt'}: speaker {speaker!r}: differs from utt2spk; remove spk2utt, it is derived"
                )
    result = KaldiDir(
        path=path,
        wav=tables.get("wav.scp", {}),
        video=tables.get("video.scp", {}),
        text=tables.get("text", {}),
        utt2spk=tables.get("utt2spk", {}),
        utt2label=labels,
        utt2dur=durations,
        segments=segments,
    )
    return result, problems


def _id_differences(path: Path, tables: Mapping[str, Mapping], segments: Mapping[str, Segment]) -> list[str]:
    """One line for each id that a file lacks and another one has."""
    problems = []
    media = [n for n in ("wav.scp", "video.scp") if n in tables]
    keyed = [n for n in ("utt2spk", "text", "utt2label", "utt2dur") if n in tables]
    if "segments" in tables:
        recordings = {s.recording: utt for utt, s in segments.items()}
        for name in media:
            for recording in sorted(recordings.keys() - tables[name].keys()):
                problems.append(
                    f"{path / name}: recording {recording!r} is missing; segments cuts utterance "
                    f"{recordings[recording]!r} from it"
                )
            for recording in sorted(tables[name].keys() - recordings.keys()):
                problems.append(f"{path / name}: recording {recording!r} is used by no line of segments")
        keyed.insert(0, "segments")
    else:
        keyed = media + keyed
    everything = sorted(set().union(*(tables[name] for name in keyed)))
    for name in keyed:
        for utt in everything:
            if utt not in tables[name]:
                others = ", ".join(n for n in keyed if utt in tables[n])
                problems.append(f"{path / name}: utterance {utt!r} is missing here, but is in {others}")
    return problems


def load_kaldi_dir(path: str | os.PathLike, label_range: tuple[float, float] = LABEL_RANGE) -> KaldiDir:
    """Read a data directory and check all that is cheap to check; media are not opened.

    Raises:
        UserError: listing the first problems (file, line, utterance): a file missing, lines unsorted or doubled, ids
            that differ between files, a label that is not a number within ``label_range``, a text of zero words, a
            speaker that is not a prefix of its utterances, a segment that ends before it starts, a pipe.
    """
    result, problems = _collect(Path(path), label_range)
    _fail(problems, f"{path}: not a valid data directory; utils/validate_data_dir.py {path} lists every problem")
    return result


def validate_kaldi_dir(
    path: str | os.PathLike, *, check_media: bool, label_range: tuple[float, float] = LABEL_RANGE
) -> list[str]:
    """All problems of a data directory, one string each; an empty list means that it is valid.

    Args:
        path: the directory.
        check_media: also open every media file (present, not cut short, has the tracks and covers the segments).
        label_range: lowest and highest label allowed.
    """
    try:
        result, problems = _collect(Path(path), label_range)
    except UserError as e:
        return [str(e)]
    if check_media:
        problems += _media_problems(result).values()
    return problems


def _media_problems(data: KaldiDir) -> dict[str, str]:
    """utt -> what is wrong with its sound or pictures. Each file is opened once, however many segments it has."""
    from sdumc.data.media import check_media_file  # PyAV takes a while to import; most readers do not need it

    problems: dict[str, str] = {}
    # A file that is in both wav.scp and video.scp is opened for both at once.
    needs: dict[str, set[str]] = {}
    for kind, table in (("audio", data.wav), ("video", data.video)):
        for file in table.values():
            if not _media_path_problem(file):
                needs.setdefault(file, set()).add(kind)
    checked: dict[str, float | str] = {}
    for file, kinds in needs.items():
        try:
            checked[file] = check_media_file(file, audio="audio" in kinds, video="video" in kinds).duration
        except UserError as e:
            checked[file] = str(e)
    for utt in data.utterances:
        recording = data.segments[utt].recording if data.segments else utt
        for name, table in (("wav.scp", data.wav), ("video.scp", data.video)):
            state = checked.get(table.get(recording, ""))
            if isinstance(state, str):
                problems.setdefault(utt, f"{data.path / name}: utterance {utt!r}: {state}")
            elif state is not None and data.segments and data.segments[utt].end > state + 0.5:
                problems.setdefault(
                    utt,
                    f"{data.path / 'segments'}: utterance {utt!r}: ends at {data.segments[utt].end:g} s, but "
                    f"{table[recording]} has {state:g} s",
                )
    return problems


# ---------------------------------------------------------------------------------------------------- derived files


def _spk2utt(utt2spk: Mapping[str, str]) -> dict[str, str]:
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
    if data.segments:
        durations = {utt: s.end - s.start for utt, s in data.segments.items()}
    else:
        from sdumc.data.media import probe

        durations = {utt: probe(file).duration for utt, file in data.wav.items()}
    for utt, seconds in durations.items():
        if not seconds > 0:
            raise UserError(
                f"{data.audio_source(utt)}: has no sound in it; replace the file or leave the utterance out"
            )
    write_table(path / "utt2dur", {utt: f"{seconds:.3f}" for utt, seconds in durations.items()})
    write_table(path / "spk2utt", _spk2utt(data.utt2spk))


# ----------------------------------------------------------------------------------------------- what was left out


def append_dropped(path: str | os.PathLike, rows: Iterable[tuple[str, str, str]]) -> None:
    """Add lines ``id<TAB>stage<TAB>reason`` to a ``dropped.tsv``, atomically.

    A line of the same id and stage is replaced, so that a stage that runs again does not list an utterance twice.
    """
    merged = {(utt, stage): reason for utt, stage, reason in read_dropped(path)}
    merged.update({(utt, stage): " ".join(reason.split()) for utt, stage, reason in rows})
    _write_dropped(path, [(utt, stage, reason) for (utt, stage), reason in merged.items()])


def read_dropped(path: str | os.PathLike) -> list[tuple[str, str, str]]:
    """The (id, stage, reason) lines of a ``dropped.tsv``; none when there is no such file."""
    if not Path(path).exists():
        return []
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if line:
            fields = line.split("\t")
            if len(fields) != 3:
                raise UserError(f"{path}:{number}: expected id, stage and reason separated by tabs")
            rows.append((fields[0], fields[1], fields[2]))
    return rows


def _write_dropped(path: str | os.PathLike, rows: Iterable[tuple[str, str, str]]) -> None:
    write_text(path, "".join("\t".join(row) + "\n" for row in sorted(rows)))


def fix_kaldi_dir(
    path: str | os.PathLike,
    dropped_path: str | os.PathLike,
    max_drop: float,
    *,
    check_media: bool = False,
    label_range: tuple[float, float] = LABEL_RANGE,
) -> list[tuple[str, str, str]]:
    """Sort the tables and keep the utterances that are whole in every one of them.

    What is left out is listed in ``dropped_path`` with its reason. The share left out counts over all runs on this
    directory. Lines that only repeat an earlier line are removed without dropping the utterance.

    Args:
        path: the data directory; changed only on success.
        dropped_path: a ``dropped.tsv``; written in any case, so that a failure can be looked into.
        max_drop: the largest share of utterances that may be left out, between 0 and 1.
        check_media: also leave out utterances whose media file is missing, broken or cut short.
        label_range: lowest and highest label allowed.

    Returns:
        The rows (id, stage, reason) left out by this run.

    Raises:
        UserError: more than ``max_drop`` of the utterances, or all of them, would be left out, or a required file is
            missing. The data directory is then as it was.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such data directory")
    names = [n for n in ("wav.scp", "utt2spk", "video.scp", "text", "utt2label", "segments") if (path / n).exists()]
    for name in _REQUIRED:
        if name not in names:
            raise UserError(f"{path / name}: missing; every data directory needs it")
    tables, line_reasons = _salvage(path, names)
    by_recording = "segments" in tables
    keyed = [n for n in names if not (by_recording and n in ("wav.scp", "video.scp"))]
    everything = set().union(*(tables[n] for n in keyed))
    if by_recording:
        # A recording that cannot be used takes its utterances with it.
        recording_reasons = {k: r for n in ("wav.scp", "video.scp") for k, r in line_reasons.get(n, {}).items()}
    reasons: dict[str, str] = {}
    for name in keyed:
        for utt, why in line_reasons[name].items():
            reasons.setdefault(utt, why)
            everything.add(utt)
    segments: dict[str, Segment] = {}
    for utt in sorted(everything):
        for name in keyed:
            if utt not in tables[name]:
                reasons.setdefault(utt, f"missing in {name}")
        if utt in reasons:
            continue
        reason: str | None = None
        if "utt2label" in tables:
            reason = label_problem(tables["utt2label"][utt], label_range)
        if not utt.startswith(tables["utt2spk"][utt]):
            reason = f"speaker {tables['utt2spk'][utt]!r} is not a prefix of the utterance id"
        media_key = utt
        if by_recording:
            segment = _segment(tables["segments"][utt])
            if isinstance(segment, str):
                reasons[utt] = f"segments: {segment}"
                continue
            segments[utt] = segment
            media_key = segment.recording
            if media_key in recording_reasons:
                reason = recording_reasons[media_key]
        for name in ("wav.scp", "video.scp"):
            if name in tables:
                if media_key not in tables[name]:
                    reason = f"recording {media_key!r} is missing in {name}"
                else:
                    reason = _media_path_problem(tables[name][media_key]) or reason
        if reason:
            reasons[utt] = reason
    kept = sorted(everything - reasons.keys())
    data = _restrict(path, tables, segments, kept)
    if check_media:
        broken = _media_problems(data)
        reasons.update(broken)
        kept = sorted(set(kept) - broken.keys())
        data = _restrict(path, tables, segments, kept)

    rows = [(utt, FIX_STAGE, " ".join(reason.split())) for utt, reason in sorted(reasons.items())]
    # An utterance that an earlier, failed run listed and that is whole now is no longer left out.
    earlier = [row for row in read_dropped(dropped_path) if not (row[1] == FIX_STAGE and row[0] in set(kept))]
    merged = {(row[0], row[1]): row for row in earlier + rows}
    if merged or Path(dropped_path).exists():
        _write_dropped(dropped_path, merged.values())
    gone = {utt for utt, stage in merged if stage == FIX_STAGE}
    share = len(gone) / max(len(gone | set(kept)), 1)
    if not kept or share > max_drop:
        raise UserError(
            f"{path}: {len(gone)} of {len(gone | set(kept))} utterances ({100 * share:.1f}%) cannot be kept, more than "
            f"the {100 * max_drop:g}% allowed; nothing was changed. {dropped_path} lists them with their reasons, the "
            f"first: {'; '.join(f'{u}: {r}' for u, _, r in rows[:3])}. Mend the files, or allow more with --max-drop"
        )
    _write_fixed(path, tables, data, kept)
    return rows


def _salvage(path: Path, names: Sequence[str]) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Tables with what can be read of them, and for each table id -> why a line of it cannot be used."""
    tables: dict[str, dict[str, str]] = {}
    reasons: dict[str, dict[str, str]] = {}
    for name in names:
        rows, problems = _scan(path / name)
        table, wrong = tables.setdefault(name, {}), reasons.setdefault(name, {})
        for _, key, value in rows:
            if not value:
                wrong[key] = f"nothing after the id in {name}"
            elif table.setdefault(key, value) != value:
                wrong[key] = f"given twice with different values in {name}"
        for problem in problems:
            if match := re.search(r": utterance '(.*)': not UTF-8", problem):
                wrong[match[1]] = f"not UTF-8 text in {name}"
    return tables, reasons


def _restrict(path: Path, tables: Mapping, segments: Mapping[str, Segment], kept: Sequence[str]) -> KaldiDir:
    media = sorted({segments[u].recording for u in kept}) if segments else kept
    return KaldiDir(
        path=path,
        wav={k: tables["wav.scp"][k] for k in media},
        video={k: tables["video.scp"][k] for k in media} if "video.scp" in tables else {},
        segments={u: segments[u] for u in kept} if segments else {},
    )


def _write_fixed(path: Path, tables: Mapping[str, Mapping[str, str]], data: KaldiDir, kept: Sequence[str]) -> None:
    new: dict[str, Mapping[str, str]] = {"wav.scp": data.wav}
    if "video.scp" in tables:
        new["video.scp"] = data.video
    for name in ("utt2spk", "text", "utt2label", "segments"):
        if name in tables:
            new[name] = {utt: tables[name][utt] for utt in kept}
    new["spk2utt"] = _spk2utt(new["utt2spk"])
    if (path / "utt2dur").exists():
        durations = {key: value for _, key, value in _scan(path / "utt2dur")[0]}
        if all(utt in durations for utt in kept):
            new["utt2dur"] = {utt: durations[utt] for utt in kept}
        else:
            (path / "utt2dur").unlink()  # finish_kaldi_dir makes it again
    for name, table in new.items():
        write_table(path / name, table)
