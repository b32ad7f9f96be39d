"""The raw distributions of CMU-MOSEI and CMU-MOSI: videos, transcripts and labels in their folders.

``Raw/Videos/Full/Combined/<video>.mp4``, ``Raw/Videos/Segmented/Combined/<video>_<clip>.mp4``,
``Raw/Audio/Full/WAV_16000/<video>.wav``, ``Raw/Transcript/Segmented/Combined/<video>.txt`` with lines
``video___clip___start___end___text``, and labels: ``Raw/Labels/*.csv`` with a row per annotator, or a ``.csd`` file.

MOSI's older folders differ: ``Raw/Video/{Full,Segmented}``, ``Raw/Audio/WAV_16000/{Full,Segmented}``,
``Raw/Transcript/Segmented/<video>.annotprocessed`` with lines ``clip_DELIM_text``, and the clips' times beside their
labels in ``Raw/Labels/OpinionLevelSentiment.csv`` (no header; start, end, video, clip, label).
"""

from __future__ import annotations

import csv
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdumc.corpora.csd import read_csd
from sdumc.corpora.sets import Fold, format_number, plain_tables, utterance_id
from sdumc.data.kaldi_dir import LABEL_RANGE, fix_kaldi_dir, read_dropped, write_table
from sdumc.errors import UserError

log = logging.getLogger("sdumc")

TOLERANCE = 0.02  # seconds by which a label's times may differ from its clip's
_VIDEO_KINDS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".flv", ".mpg", ".mpeg", ".m4v")
_SOUND_KINDS = (".wav", ".flac", ".mp3", ".m4a", ".ogg")


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


@dataclass
class Labels:
    """Sentiment by video and clip or, in computational sequences, by video and time; and what was refused.

    ``times`` are the clips' (start, end) where the labels have them.
    """

    by_clip: dict[str, dict[str, float]] = field(default_factory=dict)
    times: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    by_time: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def videos(self) -> set[str]:
        """All videos that have labels."""
        return self.by_clip.keys() | self.by_time.keys() | self.refused.keys()

    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------ transcripts


def raw_root(corpus_dir: str | Path) -> Path:
    """The folder that holds Videos, Transcript and so on: ``corpus_dir`` or its subfolder ``Raw``."""
    path = Path(corpus_dir)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of the raw distribution (--corpus-dir)")
    return path / "Raw" if (path / "Raw").is_dir() else path


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
        _read_transcript(file, result)
    return result


def _read_transcript(file: Path, result: Transcripts) -> None:
    video = file.stem
    timed = file.suffix == ".txt"
    clips = result.clips.setdefault(video, {})
    refused: dict[str, str] = {}
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            line = raw.decode("cp1252", "replace")  # some were typed on Windows
        if not line.strip():
            continue
        where = f"{file}:{number}"
        # The video id can have underscores, also at its end; the text can have three in a row.
        if not timed:
            fields = [video, *line.split("_DELIM_", 1)]
            fields[2:2] = ["", ""]
        elif line.startswith(f"{video}___"):
            fields = [video, *line[len(video) + 3 :].split("___", 3)]
        else:
            fields = line.split("___", 4)
        fields = [f.strip() for f in fields]
        start, end = (_seconds(f) for f in fields[2:4]) if len(fields) >= 4 else (math.nan, math.nan)
        if len(fields) != 5 or fields[0] != video or not fields[1] or (timed and math.isnan(start + end)):
            form = "video___clip___start___end___text of this video" if timed else "clip_DELIM_text"
            refused[f"line{number}"] = f"not a line {form} ({where})"
            continue
        found = Clip(video, "".join(fields[1].split()), start, end, " ".join(fields[4].split()), where)
        before = clips.get(found.clip)
        if before is not None:
            if before.text != found.text or (timed and (before.start, before.end) != (found.start, found.end)):
                refused[found.clip] = f"clip twice in the transcript ({before.where} and {where})"
            continue
        clips[found.clip] = found
    if refused:
        result.refused[video] = refused
    for clip in refused:
        clips.pop(clip, None)


def give_times(transcripts: Transcripts, labels: Labels) -> None:
    """Put the labels' times into transcripts that have none."""
    for video, times in labels.times.items():
        clips = transcripts.clips.get(video, {})
        for name, (start, end) in times.items():
            if name in clips and math.isnan(clips[name].end):
                clips[name] = replace(clips[name], start=start, end=end)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


# ----------------------------------------------------------------------------------------------------------- labels


def find_labels(root: Path) -> Path:
    """Where the labels are when the user does not say: the CSV files, or else a single .csd file."""
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
    """Labels of either form: a .csv file or a folder of them, or a .csd file."""
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
    return len(fields) == 5 and not any(math.isnan(_seconds(fields[i])) for i in (0, 1, 4))


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
        start, end, value = (_seconds(row[i]) if len(row) == 5 else math.nan for i in (0, 1, 4))
        if not video or not clip or math.isnan(start + end) or not LABEL_RANGE[0] <= value <= LABEL_RANGE[1]:
            raise UserError(
                f"{file}:{number}: not a row start,end,video,clip,label with a label from {LABEL_RANGE[0]:g} to "
                f"{LABEL_RANGE[1]:g}; correct or remove it"
            )
        labels, times = result.by_clip.setdefault(video, {}), result.times.setdefault(video, {})
        if (labels.setdefault(clip, value), times.setdefault(clip, (start, end))) != (value, (start, end)):
            raise UserError(f"{file}:{number}: video {video!r}, clip {clip!r}: given twice, differently; remove one")
    count = sum(map(len, result.by_clip.values()))
    result.notes.append(f"labels: {count} clips with their times in {file.name}")
    return result


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
    for file in files:
        try:
            with open(file, newline="", encoding="utf-8-sig") as f:
                reader = csv.DictReader(f)
                columns = {(name or "").strip(): name for name in reader.fieldnames or []}
                for wanted in ("Input.VIDEO_ID", "Input.CLIP", "Answer.sentiment"):
                    if wanted not in columns:
                        raise UserError(f"{file}: has no column {wanted!r}; expected CMU-MOSEI's annotation files")
                who = columns.get("AssignmentId") or columns.get("WorkerId")
                for row in reader:
                    video, clip, answer = (
                        (row[columns[c]] or "").strip() for c in ("Input.VIDEO_ID", "Input.CLIP", "Answer.sentiment")
                    )
                    where = f"{file}:{reader.line_num}"
                    if not answer:
                        empty += 1
                        continue
                    value = _seconds(answer)
                    if not video or not clip or not LABEL_RANGE[0] <= value <= LABEL_RANGE[1]:
                        raise UserError(
                            f"{where}: video {video!r}, clip {clip!r}: sentiment {answer!r} is not a number from "
                            f"{LABEL_RANGE[0]:g} to {LABEL_RANGE[1]:g} of a named clip; correct or remove the line"
                        )
                    clip = clip.removesuffix(".0")
                    if who:
                        key = (video, clip, (row[who] or "").strip())
                        if key[2] and key in by_annotator:
                            if by_annotator[key] != value:
                                refused = result.refused.setdefault(video, {})
                                refused[clip] = f"annotator {key[2]!r} gave two answers ({where})"
                            continue
                        by_annotator[key] = value
                    answers.setdefault((video, clip), []).append(value)
        except OSError as e:
            raise UserError(f"{file}: cannot be read ({e.strerror})") from None
        except (UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"{file}: not a CSV file in UTF-8 ({e})") from None
    for (video, clip), values in answers.items():
        if clip not in result.refused.get(video, {}):
            result.by_clip.setdefault(video, {})[clip] = math.fsum(values) / len(values)
    counts = [len(v) for v in answers.values()]
    result.notes.append(
        f"labels: {sum(counts)} answers for {len(counts)} clips, {min(counts, default=0)} to {max(counts, default=0)} "
        f"a clip, averaged; {empty} empty answers ignored"
    )
    return result


def read_label_sequence(path: Path) -> Labels:
    """Sentiment by video and time from a .csd file of labels."""
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
    result.notes.append(f"labels: {rows} rows of {len(result.by_time)} videos in {path.name}, matched by start and end")
    return result


def match_times(
    clips: Mapping[str, Clip], rows: Iterable[tuple[float, float, float]], tolerance: float = TOLERANCE
) -> tuple[dict[str, float], dict[str, str]]:
    """Give label rows (start, end, value) of one video to its clips of the same start and end.

    Row numbers say nothing: rows can be in any order, and clips can lack a row. A negative start means the file's
    beginning, on either side.

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


# ------------------------------------------------------------------------------------------------------------ media


@dataclass
class Media:
    """Media files by name without extension; ``segmented`` files are one a clip, named ``video_clip``.

    ``used`` are the names that :meth:`find` has given out.
    """

    segmented: bool
    video: dict[str, Path] = field(default_factory=dict)
    audio: dict[str, Path] = field(default_factory=dict)
    has_video: bool = True
    used: set[str] = field(default_factory=set)

    def find(self, video: str, clip: str) -> tuple[str, Path | None, Path | None]:
        """(file's name, its sound, its pictures) of a clip."""
        for stem in (f"{video}_{clip}", f"{video}-{clip}", f"{video}$_${clip}") if self.segmented else (video,):
            pictures = self.video.get(stem)
            sound = self.audio.get(stem) or pictures
            if sound or pictures:
                self.used.add(stem)
                return stem, sound, pictures
        return (f"{video}_{clip}" if self.segmented else video), None, None


def find_media(root: Path, kind: str = "auto") -> Media:
    """Index the media files below ``root``.

    Args:
        kind: ``full`` (clips are cut from whole videos by their times), ``segmented`` (a file a clip), or ``auto``:
            full where there are any, since the cutting is then exact.

    Raises:
        UserError: there are none.
    """

    def index(*folders: str, kinds: tuple[str, ...]) -> dict[str, Path]:
        for name in folders:
            folder = root / name
            if folder.is_dir():
                found = {
                    os.path.splitext(e.name)[0]: Path(folder, e.name)
                    for e in sorted(os.scandir(folder), key=lambda e: e.name)
                    if os.path.splitext(e.name)[1].lower() in kinds and not e.name.startswith(".")
                }
                if found:
                    return found
        return {}

    for name in ("full", "segmented") if kind == "auto" else (kind,):
        part = name.capitalize()
        video = index(f"Videos/{part}/Combined", f"Videos/{part}", f"Video/{part}", kinds=_VIDEO_KINDS)
        places = (f"Audio/{part}/WAV_16000", f"Audio/WAV_16000/{part}", f"Audio/{part}/Combined", f"Audio/{part}")
        audio = index(*places, kinds=_SOUND_KINDS)
        if video or audio:
            return Media(name == "segmented", video, audio, has_video=bool(video))
    raise UserError(
        f"{root}: no media files in Videos/Full/Combined, Videos/Segmented/Combined or Audio/Full/WAV_16000; complete "
        "the corpus or correct --corpus-dir"
    )


@dataclass
class Source:
    """Where one utterance's media are; times None for a file of its own."""

    recording: str
    sound: Path
    pictures: Path | None
    start: float | None = None
    end: float | None = None


def locate(clip: Clip | None, video: str, name: str, media: Media) -> Source | str:
    """The media of a clip, or why there are none. A start before the beginning becomes the beginning."""
    stem, sound, pictures = media.find(video, name)
    if sound is None:
        return f"no media file ({stem})"
    if media.has_video and pictures is None:
        return f"sound, but no video file ({stem})"
    if media.segmented:
        return Source(stem, sound, pictures)
    if clip is None:
        return "no transcript line with its start and end"
    if math.isnan(clip.end):
        return f"neither transcript nor labels say when it starts and ends ({clip.where})"
    start = max(clip.start, 0.0)
    if not clip.end > start:
        return f"ends before it starts ({clip.where})"
    return Source(stem, sound, pictures, start, clip.end)


def drop_broken_media(work: Path, fold: Fold, sources: Mapping[str, Source], segmented: bool) -> None:
    """Open the media files and move utterances whose files are broken to ``fold.left_out``.

    A file has to be whole, to have the tracks wanted, and to be as long as its segments; each is read once.

    Args:
        work: a folder for the time of this call.
    """
    if not fold.label:
        return
    _remove(work)
    work.mkdir(parents=True)
    for name, table in media_tables(fold, sources, segmented).items():
        write_table(work / name, table)
    try:
        rows = fix_kaldi_dir(work, work / "dropped.tsv", max_drop=1.0, check_media=True)
    except UserError:
        rows = read_dropped(work / "dropped.tsv")
        if {utt for utt, _, _ in rows} != fold.label.keys():  # the one thing it refuses at 1.0 is to keep none
            raise
    finally:
        _remove(work)
    for utt, _, reason in rows:
        fold.drop(utt, reason.rpartition(f"utterance {utt!r}: ")[2])


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def media_tables(fold: Fold, sources: Mapping[str, Source], segmented: bool) -> dict[str, dict[str, object]]:
    """The tables of a data directory with media, by file name; ``segments`` unless each clip has a file of its own."""
    tables = plain_tables(fold)
    kept = {utt: sources[utt] for utt in fold.label}
    wav: dict[str, object] = {}
    video: dict[str, object] = {}
    for utt, source in kept.items():
        key = utt if segmented else source.recording
        wav[key] = os.path.abspath(source.sound)
        if source.pictures:
            video[key] = os.path.abspath(source.pictures)
    tables["wav.scp"] = wav
    if video:
        tables["video.scp"] = video
    if not segmented:
        times = {u: (s.start or 0.0, s.end or 0.0, s.recording) for u, s in kept.items()}
        tables["segments"] = {u: f"{r} {format_number(s)} {format_number(e)}" for u, (s, e, r) in times.items()}
        tables["utt2dur"] = {u: f"{e - s:.3f}" for u, (s, e, _) in times.items()}
    return tables


# ---------------------------------------------------------------------------------------------------------- folds


def collect_fold(
    name: str, videos: Iterable[str], transcripts: Transcripts, labels: Labels, media: Media
) -> tuple[Fold, dict[str, Source]]:
    """Bring together what belongs to the videos of one fold.

    Every labelled clip ends up in the fold, or in ``left_out`` with its reason; clips with a transcript or a media file
    but no label in ``unlabelled``, and videos of the fold of which there is nothing at all in ``left_out``.
    """
    fold, sources = Fold(name), {}
    for video in videos:
        clips = transcripts.clips.get(video, {})
        refused = {**transcripts.refused.get(video, {}), **labels.refused.get(video, {})}
        values = labels.by_clip.get(video, {})
        if labels.by_time:
            values, why = match_times(clips, labels.by_time.get(video, []))
            refused.update(why)
        if not clips and not values and not refused:
            fold.left_out[video] = "a video of the fold without transcript and labels"
            continue
        for clip, reason in refused.items():
            fold.left_out[utterance_id(video, clip)] = reason
        for clip, value in values.items():
            utt = utterance_id(video, clip)
            if utt in fold.left_out:
                continue
            line = clips.get(clip)
            source = locate(line, video, clip, media)
            if line is None:
                fold.left_out[utt] = "label without a transcript"
            elif not line.text:
                fold.left_out[utt] = f"empty transcript ({line.where})"
            elif isinstance(source, str):
                fold.left_out[utt] = source
            else:
                fold.add(utt, video, value, line.text)
                sources[utt] = source
        for clip in clips:
            if clip not in values and clip not in refused:
                fold.unlabelled[utterance_id(video, clip)] = "transcript without a label"
    return fold, sources


def unused_media(media: Media) -> list[str]:
    """Names of the media files that no utterance has asked for, sorted."""
    return sorted((media.video.keys() | media.audio.keys()) - media.used)


def strays(assigned: set[str], transcripts: Transcripts, labels: Labels, media: Media) -> dict[str, str]:
    """Videos and media files that belong to no utterance of a fold: name -> what they are."""
    found = dict.fromkeys(transcripts.clips, "a transcript of a video in no fold")
    found.update(dict.fromkeys(unused_media(media), "a media file not used"))
    found.update(dict.fromkeys(labels.videos, "labels of a video in no fold"))
    return {name: reason for name, reason in found.items() if name not in assigned}
