"""What CMU's raw distributions say about each clip: its words, its start and end, and its label.

Transcripts:

* ``Transcript/Segmented/Combined/<video>.txt`` of MOSEI with lines ``video___clip___start___end___text``
* ``Transcript/Segmented/<video>.annotprocessed`` of MOSI with lines ``clip_DELIM_text``

Labels, in the three forms in which they are found:

* ``Raw/Labels/*.csv`` of MOSEI: a row per annotator, with the columns ``Input.VIDEO_ID``, ``Input.CLIP`` and
  ``Answer.sentiment``.
* ``Raw/Labels/OpinionLevelSentiment.csv`` of MOSI: rows ``start,end,video,clip,label`` without a header.
* a ``.csd`` file (computational sequence) of the CMU SDK: HDF5, labels by video and time.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdumc.corpora.importing import format_number
from sdumc.data.tables import LABEL_RANGE, parse_number
from sdumc.errors import UserError


@dataclass(frozen=True)
class Clip:
    """A line of a transcript: ``start`` and ``end`` in seconds as written, ``where`` the file and line.

    The times are NaN in transcripts that have none, until :func:`give_times`.
    """

    video: str
    clip: str
    start: float
    end: float
    text: str
    where: str


@dataclass
class Transcripts:
    """Clips by video and clip id, and what could not be used: video -> clip or line -> reason."""

    clips: dict[str, dict[str, Clip]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def lack_times(self) -> bool:
        """Whether there is a clip without start and end."""
        return any(math.isnan(clip.end) for clips in self.clips.values() for clip in clips.values())


def read_transcripts(root: Path) -> Transcripts:
    """Read all transcripts below ``root``; a line that cannot be used is refused, with its reason.

    A clip id that a file gives twice is used when the lines are the same, and refused when they are not.

    Raises:
        UserError: there is no transcript folder, or it is empty.
    """
    folder = next(
        (f for f in (root / "Transcript/Segmented/Combined", root / "Transcript/Segmented") if f.is_dir()), None
    )
    if folder is None:
        raise UserError(f"{root}: has no Transcript/Segmented/Combined; complete the corpus or correct --corpus-dir")
    kinds = (".txt", ".annotprocessed")
    files = sorted(f for f in folder.iterdir() if f.suffix in kinds and not f.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: has no .txt or .annotprocessed files; complete the corpus")
    result = Transcripts()
    for file in files:
        clips, refused = _read_transcript(file)
        result.clips.setdefault(file.stem, {}).update(clips)
        if refused:
            result.refused.setdefault(file.stem, {}).update(refused)
    return result


def _read_transcript(file: Path) -> tuple[dict[str, Clip], dict[str, str]]:
    """The clips of one video, and clip or line -> why it is refused."""
    timed = file.suffix == ".txt"
    form = "video___clip___start___end___text of this video" if timed else "clip_DELIM_text"
    clips: dict[str, Clip] = {}
    refused: dict[str, str] = {}
    for number, line in _lines(file):
        where = f"{file}:{number}"
        clip = _parse_timed(line, file.stem, where) if timed else _parse_untimed(line, file.stem, where)
        if clip is None:
            refused[f"line{number}"] = f"not a line {form} ({where})"
        elif not _same(clip, clips.setdefault(clip.clip, clip)):
            refused[clip.clip] = f"clip twice in the transcript ({clips[clip.clip].where} and {where})"
    return {name: clip for name, clip in clips.items() if name not in refused}, refused


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and lines that are not empty; some transcripts were typed on Windows."""
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            line = raw.decode("cp1252", "replace")
        if line.strip():
            yield number, line


def _parse_timed(line: str, video: str, where: str) -> Clip | None:
    """A line ``video___clip___start___end___text`` of ``video``; None if it is not one."""
    # The video id can have underscores, also at its end; the text can have three in a row.
    if line.startswith(f"{video}___"):
        fields = [video, *line[len(video) + 3 :].split("___", 3)]
    else:
        fields = [f.strip() for f in line.split("___", 4)]
    if len(fields) != 5 or fields[0] != video or not fields[1].strip():
        return None
    start, end = seconds(fields[2]), seconds(fields[3])
    return None if math.isnan(start + end) else _clip(video, fields[1], start, end, fields[4], where)


def _parse_untimed(line: str, video: str, where: str) -> Clip | None:
    """A line ``clip_DELIM_text``; None if it is not one."""
    clip, delimiter, text = line.partition("_DELIM_")
    if not delimiter or not clip.strip():
        return None
    return _clip(video, clip, math.nan, math.nan, text, where)


def _clip(video: str, clip: str, start: float, end: float, text: str, where: str) -> Clip:
    return Clip(video, "".join(clip.split()), start, end, " ".join(text.split()), where)


def _same(a: Clip, b: Clip) -> bool:
    """Whether two lines say the same; NaN times are equal."""
    times = [(x, y) for x, y in ((a.start, b.start), (a.end, b.end)) if not math.isnan(x)]
    return a.text == b.text and all(x == y for x, y in times)


def give_times(transcripts: Transcripts, times: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Put start and end, by video and clip, into clips that have none."""
    for video, by_clip in times.items():
        clips = transcripts.clips.get(video, {})
        for name, (start, end) in by_clip.items():
            if name in clips and math.isnan(clips[name].end):
                clips[name] = replace(clips[name], start=start, end=end)


def seconds(text: str) -> float:
    """A finite number as written; NaN for anything else."""
    value = parse_number(text)
    return value if math.isfinite(value) else math.nan


@dataclass
class Sequence:
    """``intervals`` (m, 2) in seconds and ``features`` (m, D) by video, and the file's metadata."""

    intervals: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def column(self, name: str, default: int) -> int:
        """The column that the metadata call ``name``; ``default`` where they do not name the columns."""
        names = self.metadata.get("dimension names")
        if isinstance(names, (list, tuple)):
            lowered = [str(n).strip().lower() for n in names]
            if name in lowered:
                return lowered.index(name)
        return default


def read_csd(path: str | Path) -> Sequence:
    """Read ``<root>/data/<video>/{intervals,features}`` and ``<root>/metadata``.

    Entries named ``video[3]``, as sequences aligned to others have them, count to their video. Rows are as in the file:
    they can be out of time order and overlap, and start below zero.

    Raises:
        UserError: the file cannot be read, is cut short, or is not of this structure; h5py is not installed.
    """
    path = Path(path)
    try:
        import h5py
    except ImportError:
        raise UserError(
            f"{path}: reading .csd files needs h5py: tools/setup_env.sh --extras mosei (or pip install h5py)"
        ) from None
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            return _read(path, file)
    except (OSError, RuntimeError, KeyError) as e:
        raise UserError(f"{path}: not an HDF5 file that can be read, or cut short ({e}); copy it again") from None


def _read(path: Path, file: Any) -> Sequence:
    roots = [name for name in file if "data" in file[name]]
    if len(roots) != 1:
        raise UserError(f"{path}: expected one sequence in the file, found {len(roots)}; is it a .csd file?")
    result = Sequence()
    group = file[roots[0]]
    for key, value in group.get("metadata", {}).items():
        result.metadata[key] = _metadata(value)
    parts: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for entry, content in group["data"].items():
        if "intervals" not in content or "features" not in content:
            raise UserError(f"{path}: {roots[0]}/data/{entry}: has no intervals or no features")
        intervals = np.asarray(content["intervals"][()], dtype=np.float64)
        features = np.asarray(content["features"][()], dtype=np.float64)
        if intervals.ndim != 2 or intervals.shape[1] != 2 or features.ndim != 2 or len(features) != len(intervals):
            raise UserError(
                f"{path}: {roots[0]}/data/{entry}: intervals {intervals.shape} and features {features.shape} do not "
                "fit together, expected (m, 2) and (m, D)"
            )
        match = re.fullmatch(r"(.+)\[(\d+)\]", entry)
        video, index = (match[1], int(match[2])) if match else (entry, 0)
        parts.setdefault(video, []).append((index, intervals, features))
    for video, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0])
        if len({f.shape[1] for _, _, f in pieces}) > 1:
            raise UserError(f"{path}: {roots[0]}/data/{video}: parts of different width")
        result.intervals[video] = np.concatenate([i for _, i, _ in pieces])
        result.features[video] = np.concatenate([f for _, _, f in pieces])
    return result


def _metadata(value: Any) -> Any:
    """A metadata entry: JSON in an array of one string."""
    try:
        content = value[()]
        if isinstance(content, np.ndarray):
            content = content.reshape(-1)[0]
        text = content.decode("utf-8") if isinstance(content, bytes) else str(content)
    except (IndexError, UnicodeDecodeError, AttributeError, TypeError):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


TOLERANCE = 0.02  # seconds by which a label's times may differ from its clip's


@dataclass
class Labels:
    """Sentiment by video and clip or, from a ``.csd`` file, by video and time; and what was refused.

    ``times`` are the clips' (start, end) where the labels have them.
    """

    by_clip: dict[str, dict[str, float]] = field(default_factory=dict)
    by_time: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    times: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    note: str = ""  # what was read, for the summary

    @property
    def videos(self) -> set[str]:
        """All videos that have labels."""
        return self.by_clip.keys() | self.by_time.keys() | self.refused.keys()


def find_labels(root: Path) -> Path:
    """Where the labels are when the user does not say: the CSV files, or else a single .csd file.

    Raises:
        UserError: there are none, or several .csd files.
    """
    folder = root / "Labels"
    if folder.is_dir() and any(f.suffix == ".csv" for f in folder.iterdir()):
        return folder
    found = [f for d in (folder, root, root.parent) if d.is_dir() for f in sorted(d.iterdir()) if f.suffix == ".csd"]
    named = [f for f in found if "label" in f.name.lower()] or found
    if len(named) == 1:
        return named[0]
    raise UserError(
        f"{root}: {'several .csd files' if named else 'no Labels/*.csv and no .csd file'}; say with --labels which "
        "file or folder has the labels"
    )


def read_labels(path: str | Path) -> Labels:
    """Labels of any form: a .csv file or a folder of them, or a .csd file."""
    path = Path(path)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() == ".csv")
        if not files:
            raise UserError(f"{path}: has no .csv files; give the folder or file that has the labels")
        opinions = [f for f in files if _is_opinions(f)]
        return read_opinions(opinions[0]) if len(opinions) == 1 else read_annotations(files)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; --labels names the labels")
    if path.suffix.lower() == ".csd":
        return read_label_sequence(path)
    return read_opinions(path) if _is_opinions(path) else read_annotations([path])


def _is_opinions(file: Path) -> bool:
    """Whether a CSV file is MOSI's table of opinions, which begins with a row of it and not with names of columns."""
    with open(file, "rb") as f:
        fields = f.readline().decode("utf-8-sig", "replace").split(",")
    return len(fields) == 5 and not any(math.isnan(seconds(fields[i])) for i in (0, 1, 4))


def _in_range(value: float) -> bool:
    return LABEL_RANGE[0] <= value <= LABEL_RANGE[1]


def read_opinions(file: Path) -> Labels:
    """Labels and times of MOSI: rows ``start,end,video,clip,label`` without a header, times in seconds.

    Raises:
        UserError: a row is not of that form, or a clip has two different rows.
    """
    result = Labels()
    try:
        rows = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{file}: not a CSV file in UTF-8 ({e})") from None
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        video, clip = (row[2].strip(), row[3].strip()) if len(row) == 5 else ("", "")
        start, end, value = (seconds(row[i]) if len(row) == 5 else math.nan for i in (0, 1, 4))
        if not video or not clip or math.isnan(start + end) or not _in_range(value):
            raise UserError(
                f"{file}:{number}: not a row start,end,video,clip,label with a label from {LABEL_RANGE[0]:g} to "
                f"{LABEL_RANGE[1]:g}; correct or remove it"
            )
        labels, times = result.by_clip.setdefault(video, {}), result.times.setdefault(video, {})
        if (labels.setdefault(clip, value), times.setdefault(clip, (start, end))) != (value, (start, end)):
            raise UserError(f"{file}:{number}: video {video!r}, clip {clip!r}: given twice, differently; remove one")
    count = sum(map(len, result.by_clip.values()))
    result.note = f"labels: {count} clips with their times in {file.name}"
    return result


@dataclass(frozen=True)
class _Answer:
    """A row of MOSEI's annotation files; ``value`` is None where the annotator gave no answer."""

    where: str
    video: str
    clip: str
    annotator: str
    value: float | None


def read_annotations(files: Iterable[Path]) -> Labels:
    """Average ``Answer.sentiment`` over annotators, by ``Input.VIDEO_ID`` and ``Input.CLIP``.

    With a column ``AssignmentId`` or ``WorkerId``, an annotator counts once for a clip: the same answer given again is
    ignored, and a clip with two different answers of one annotator is refused. Empty answers are counted and ignored.

    Raises:
        UserError: a column is missing, an answer is no number from -3 to 3, or a file is not UTF-8 CSV.
    """
    answers: dict[tuple[str, str], list[float]] = {}
    by_annotator: dict[tuple[str, str, str], float] = {}
    result = Labels()
    empty = 0
    for answer in (a for file in files for a in _read_answers(file)):
        if answer.value is None:
            empty += 1
            continue
        if answer.annotator:
            key = (answer.video, answer.clip, answer.annotator)
            if key in by_annotator:
                if by_annotator[key] != answer.value:
                    reason = f"annotator {answer.annotator!r} gave two answers ({answer.where})"
                    result.refused.setdefault(answer.video, {})[answer.clip] = reason
                continue
            by_annotator[key] = answer.value
        answers.setdefault((answer.video, answer.clip), []).append(answer.value)
    for (video, clip), values in answers.items():
        if clip not in result.refused.get(video, {}):
            result.by_clip.setdefault(video, {})[clip] = math.fsum(values) / len(values)
    counts = [len(v) for v in answers.values()]
    result.note = (
        f"labels: {sum(counts)} answers for {len(counts)} clips, {min(counts, default=0)} to {max(counts, default=0)} "
        f"a clip, averaged; {empty} empty answers ignored"
    )
    return result


def _read_answers(file: Path) -> Iterator[_Answer]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            columns = {(name or "").strip(): name for name in reader.fieldnames or []}
            for wanted in ("Input.VIDEO_ID", "Input.CLIP", "Answer.sentiment"):
                if wanted not in columns:
                    raise UserError(f"{file}: has no column {wanted!r}; expected CMU-MOSEI's annotation files")
            annotator = columns.get("AssignmentId") or columns.get("WorkerId")
            for row in reader:
                video, clip, value = (
                    (row[columns[c]] or "").strip() for c in ("Input.VIDEO_ID", "Input.CLIP", "Answer.sentiment")
                )
                who = (row[annotator] or "").strip() if annotator else ""
                yield _parse_answer(f"{file}:{reader.line_num}", video, clip, who, value)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{file}: not a CSV file in UTF-8 ({e})") from None


def _parse_answer(where: str, video: str, clip: str, annotator: str, answer: str) -> _Answer:
    if not answer:
        return _Answer(where, video, clip, annotator, None)
    value = seconds(answer)
    if not video or not clip or not _in_range(value):
        raise UserError(
            f"{where}: video {video!r}, clip {clip!r}: sentiment {answer!r} is not a number from "
            f"{LABEL_RANGE[0]:g} to {LABEL_RANGE[1]:g} of a named clip; correct or remove the line"
        )
    return _Answer(where, video, clip.removesuffix(".0"), annotator, value)


def read_label_sequence(path: Path) -> Labels:
    """Sentiment by video and time from a .csd file of labels.

    Raises:
        UserError: the file is not such a file, or a video has no column of sentiment.
    """
    sequence = read_csd(path)
    column = sequence.column("sentiment", 0)
    result = Labels()
    for video, intervals in sequence.intervals.items():
        values = sequence.features[video]
        if column >= values.shape[1]:
            raise UserError(f"{path}: {video}: {values.shape[1]} columns, none of which is sentiment")
        result.by_time[video] = [
            (float(s), float(e), float(y)) for (s, e), y in zip(intervals, values[:, column], strict=True)
        ]
    rows = sum(map(len, result.by_time.values()))
    result.note = f"labels: {rows} rows of {len(result.by_time)} videos in {path.name}, matched by start and end"
    return result


def match_times(
    clips: Mapping[str, Clip], rows: Iterable[tuple[float, float, float]], tolerance: float = TOLERANCE
) -> tuple[dict[str, float], dict[str, str]]:
    """Give label rows (start, end, value) of one video to its clips of the same start and end.

    The order of rows means nothing, and clips can lack a row. A negative start means the file's beginning, on either
    side.

    Returns:
        clip id -> value; and clip id, or ``start-end`` of a row, -> why it was refused: no such clip, several clips or
        several different rows of the same times.
    """
    labels: dict[str, float] = {}
    refused: dict[str, str] = {}
    for start, end, value in rows:
        near = [
            c.clip
            for c in clips.values()
            if abs(max(c.start, 0.0) - max(start, 0.0)) <= tolerance and abs(c.end - end) <= tolerance
        ]
        if not near:
            refused[f"{format_number(start)}-{format_number(end)}"] = "label without a transcript clip of its times"
        elif len(near) > 1:
            for clip in near:
                refused[clip] = f"{len(near)} transcript clips of the same start and end"
        elif labels.get(near[0], value) != value:
            refused[near[0]] = "two label rows with different values for the same start and end"
        else:
            labels[near[0]] = value
    return {clip: y for clip, y in labels.items() if clip not in refused}, refused
