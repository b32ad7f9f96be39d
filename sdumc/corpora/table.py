"""A corpus as a table: a CSV or TSV file with a line a clip, and media files beside it.

Columns are known by their names, in any case and order: what is said (``text``), by whom (``speaker``), the ``label``,
the set (``split``) and the media file (``path``), or the ``video_id`` and ``clip_id`` of the common toolkit, which
hands on MOSI, MOSEI, CH-SIMS and CH-SIMS v2 as ``label.csv`` and ``Raw/<video_id>/<clip_id>.mp4``.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdumc.corpora.importing import FOLDS, ClipMedia, Corpus, Fold, format_number, split_name, utterance_id
from sdumc.data.tables import Sheet, parse_number, read_csv
from sdumc.errors import UserError
from sdumc.scale import LabelScale, ask_for_scale, parse_scale

log = logging.getLogger("sdumc")

# What a column is, and the names by which it is known; the first one that the table has counts.
COLUMNS: dict[str, tuple[str, ...]] = {
    "video_id": ("video_id", "videoid", "video_name"),
    "clip_id": ("clip_id", "clipid", "segment_id"),
    "id": ("id", "utt_id", "utt", "utterance", "utterance_id", "name"),
    "media": ("path", "file", "filename", "file_name", "media", "clip", "clip_path", "file_path"),
    "audio": ("audio", "wav", "audio_path", "wav_path", "sound"),
    "video": ("video", "video_path"),
    "label": ("label", "sentiment", "score", "valence", "stars", "rating"),
    "text": ("text", "transcript", "transcription", "sentence", "words"),
    "speaker": ("speaker", "speaker_id", "spk", "participant", "subject"),
    "split": ("split", "mode", "set", "fold", "partition"),
    "label_text": ("label_t",),
    "label_audio": ("label_a",),
    "label_video": ("label_v",),
    "annotation": ("annotation",),
    "start": ("start", "start_time", "starttime", "begin", "start_sec", "start_seconds"),
    "end": ("end", "end_time", "endtime", "stop", "end_sec", "end_seconds"),
}
EXTRA = {"label_text": "utt2label_text", "label_audio": "utt2label_audio", "label_video": "utt2label_video"}
EXTRA_TABLES = {**EXTRA, "annotation": "utt2annotation"}  # column -> table of data/<set>/
_SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
}
_SPLITS |= {"test": "test", "testing": "test", "eval": "test"}
_PICTURES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".flv", ".mpg", ".mpeg", ".m4v", ".wmv")
_SOUNDS = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac", ".amr")
_SHARES = {"test": 0.15, "valid": 0.15}  # of the utterances, where a table has no split


# ------------------------------------------------------------------------------------------------ from rows to a corpus


def read_table_corpus(
    path: Path,
    media_dir: Path | None = None,
    columns: Mapping[str, str] | None = None,
    scale: LabelScale | None = None,
    label_map: Mapping[str, float] | None = None,
    no_media: bool = False,
) -> Corpus:
    """Read a table and find its media.

    Args:
        path: the CSV or TSV file.
        media_dir: where the media are; by default the table's folder, and ``Raw`` in it.
        columns: names of columns by what they are (keys of :data:`COLUMNS`), where the table calls them otherwise.
        scale: that of the labels; None: it has to be clear that it is CMU's.
        label_map: labels by word or class, for labels that are no numbers.
        no_media: the corpus has transcripts alone; columns of media are not read, and neither is an id needed.

    Raises:
        UserError: the table cannot be read, a column is missing or not clear, the labels' scale is not clear, or labels
            are words and there is no map.
    """
    table = read_csv(path)
    names = find_columns(table, columns or {}, no_media)
    labels, scale = read_labels(table, names["label"], scale, label_map or {})
    places = None if no_media else Places(path.parent, media_dir)
    folds = {name: Fold(name, scale=scale) for name in FOLDS}
    entries = [_entry(table, number, row, names) for number, row in table.rows]
    sets = _splits(table, names, entries)
    owners: dict[tuple[Path | None, tuple[float, float] | None], int] = {}  # media file and place in it -> line
    for (number, row), entry, label, name in zip(table.rows, entries, labels, sets, strict=True):
        fold = folds[name]
        if label is None:
            fold.unlabelled[entry.utt] = f"no label (line {number})"
            continue
        text = row[names["text"]] if "text" in names else ""
        found = places.find(entry) if places else None
        if isinstance(found, ClipMedia) and entry.times:
            found = replace(
                found, recording=places.recording(found) if places else "", start=entry.times[0], end=entry.times[1]
            )
        if places is None and not text:
            fold.unlabelled[entry.utt] = f"no text (line {number})"
            continue
        if isinstance(found, ClipMedia):
            for file in {found.sound, found.pictures} - {None}:
                if before := owners.get((file, entry.times)):
                    raise UserError(f"{path}:{number}: {file} is the media file of line {before} too; remove one")
                owners[file, entry.times] = number
        try:
            fold.add(entry.utt, entry.speaker, label, text, None if isinstance(found, str) else found)
        except UserError as e:
            raise UserError(f"{path}:{number}: {e}") from None
        if isinstance(found, str) and entry.utt in fold.utterances:
            fold.leave_out(entry.utt, found)
        if entry.utt in fold.left_out:
            fold.left_out[entry.utt] += f" (line {number})"
        for column, extra in EXTRA_TABLES.items():
            if column in names and row[names[column]]:
                fold.extra.setdefault(extra, {})[entry.utt] = row[names[column]]
    corpus = Corpus([fold for fold in folds.values() if fold.utterances or fold.left_out or fold.name != "test"])
    used = ", ".join(f"{what} from {name!r}" for what, name in names.items())
    others = [name for name in table.columns if name and name not in names.values()]
    not_read = f"; not read: {', '.join(others)}" if others else ""
    corpus.notes = [f"{path.name}: {len(table.rows)} lines; {used}{not_read}", f"labels: from {scale.named_ends}"]
    if places:
        corpus.unused = {
            str(file): "a media file not in the table" for file in places.listed() - {file for file, _ in owners}
        }
    else:
        corpus.notes.append("transcripts alone: there are no media")
    if "split" not in names:
        corpus.notes.append("no column of sets: speakers were shared out, about 70, 15 and 15 of 100 utterances")
    if "speaker" not in names and len({e.speaker for e in entries}) == len(entries):
        corpus.notes.append("no column of speakers: each utterance counts as one, and intervals are over utterances")
    without = sum(not u.text for fold in folds.values() for u in fold.utterances.values())
    if "text" in names and without:
        corpus.notes.append(f"{without} utterances have no text")
    return corpus


_OF_MEDIA = ("media", "audio", "video")
_ABOUT_MEDIA = (*_OF_MEDIA, "start", "end")


def find_columns(table: Sheet, given: Mapping[str, str], no_media: bool = False) -> dict[str, str]:
    """What each column is: key of :data:`COLUMNS` -> the table's name.

    Raises:
        UserError: a column is missing, is not there, or two could be meant.
    """
    by_name = {name.casefold().replace(" ", "_"): name for name in table.columns}
    found: dict[str, str] = {}
    for what, name in given.items():
        if what not in COLUMNS:
            raise UserError(f"--columns: {what!r} is none of {', '.join(COLUMNS)}")
        if name == "-":
            continue
        if name.casefold().replace(" ", "_") not in by_name:
            raise UserError(f"{table.path}:1: has no column {name!r}; it has {', '.join(table.columns)}")
        found[what] = by_name[name.casefold().replace(" ", "_")]
    taken = set(found.values())
    for what, aliases in COLUMNS.items():
        candidates = [by_name[a] for a in aliases if a in by_name and by_name[a] not in taken]
        if what in found or given.get(what) == "-" or not candidates:
            continue
        if what in ("label", "text", "split") and len(candidates) > 1:
            raise UserError(
                f"{table.path}:1: which column is the {what}: {' or '.join(candidates)}? Say with --columns "
                f"{what}={candidates[0]}"
            )
        found[what] = candidates[0]
        taken.add(candidates[0])
    if "label" not in found:
        raise UserError(
            f"{table.path}:1: no column with labels among {', '.join(table.columns)}; name it: --columns label=NAME"
        )
    if no_media:
        if "text" not in found:
            raise UserError(f"{table.path}:1: --no-media needs a column of texts; name it: --columns text=NAME")
        return {what: name for what, name in found.items() if what not in _ABOUT_MEDIA}
    _check_times(table, found, given)
    if not found.keys() & {"media", "audio", "video", "id"} and not {"video_id", "clip_id"} <= found.keys():
        raise UserError(
            f"{table.path}:1: no column with the media file, an id, or video_id and clip_id among "
            f"{', '.join(table.columns)}; name it: --columns media=NAME, or say --no-media if there are texts alone"
        )
    return found


def _check_times(table: Sheet, found: dict[str, str], given: Mapping[str, str]) -> None:
    """Keep the columns of times where clips are parts of files, which is clear where a file is in several rows.

    Raises:
        UserError: it is not clear, or one of the two columns is missing.
    """
    here = found.keys() & {"start", "end"}
    media = [found[what] for what in _OF_MEDIA if what in found]
    if here and len(here) < 2 and here & given.keys():
        other = next(iter({"start", "end"} - here))
        raise UserError(f"{table.path}:1: where does a clip {other}? Name that column too: --columns {other}=NAME")
    if len(here) < 2 or not media:
        for what in here:
            del found[what]
    elif not here <= given.keys() and len({row[media[0]] for _, row in table.rows}) == len(table.rows):
        names = f"{found['start']!r} and {found['end']!r}"
        raise UserError(
            f"{table.path}:1: {names}: is each clip that part of its file, or the whole file, cut out before? Say "
            f"--columns 'start={found['start']} end={found['end']}' for the part, 'start=- end=-' for the file"
        )


_WITH_COMMA = re.compile(r"([-+]?\d+(,\d+)?)?")
_NO_LABEL = ("n/a", "na", "nan", "null", "none", "nil", "-", "--", "?", "missing", "#n/a", "inf", "-inf")


def read_labels(
    table: Sheet, column: str, scale: LabelScale | None, label_map: Mapping[str, float]
) -> tuple[list[float | None], LabelScale]:
    """The label of each row, None where it is empty, and their scale.

    Raises:
        UserError: a label is neither a number nor in the map, or the scale is not clear.
    """
    by_word = {word.casefold(): value for word, value in label_map.items()}
    labels: list[float | None] = []
    unknown: dict[str, int] = {}
    values = [row[column].strip('" ').replace("\N{MINUS SIGN}", "-") for _, row in table.rows]
    if any(values) and all(value.endswith("%") for value in values if value):
        values = [value.rstrip("% ") for value in values]
    if all(map(_WITH_COMMA.fullmatch, values)):  # as spreadsheets write numbers in many countries
        values = [value.replace(",", ".") for value in values]
    for (number, _), value in zip(table.rows, values, strict=True):
        if not value:
            labels.append(None)
        elif by_word:
            if value.casefold() not in by_word:
                raise UserError(
                    f"{table.path}:{number}: label {value!r} is not in --label-map {_pairs(label_map)!r}; add it"
                )
            labels.append(by_word[value.casefold()])
        else:
            y = parse_number(value)
            if not math.isfinite(y):
                unknown.setdefault(value, number)
            labels.append(y)
    if unknown:
        word, line = next(iter(unknown.items()))
        if re.fullmatch(r"[-+]?\d+,\d+", word):
            other, place = next(
                (v, n) for v, (n, _) in zip(values, table.rows, strict=True) if not _WITH_COMMA.fullmatch(v)
            )
            raise UserError(
                f"{table.path}:{line}: label {word!r}: a decimal comma is read only where all labels have one or are "
                f"whole, and line {place} has {other!r}; write decimal points"
            )
        if word.casefold().strip(".") in _NO_LABEL:
            raise UserError(
                f"{table.path}:{line}: label {word!r} is no number; where there is no label, leave the cell empty: the "
                "line is then left out and listed"
            )
        shown = " ".join(f"{w}=?" for w in list(unknown)[:12])
        raise UserError(
            f"{table.path}:{line}: label {word!r} is no number. If labels are words, give each its number, such as "
            f"--label-map 'negative=-1 neutral=0 positive=1'; here: {shown}"
        )
    known = [y for y in labels if y is not None]
    if len(known) > 1 and len(set(known)) == 1:
        raise UserError(f"{table.path}: all labels of column {column!r} are {known[0]:g}: there is nothing to learn")
    if scale is None and label_map:
        ends = sorted(label_map.values())
        scale = parse_scale(f"{ends[0]!r} {ends[-1]!r}", label_map)
    if scale is None:
        if question := ask_for_scale(known):
            raise UserError(f"{table.path}: column {column!r}: {question}")
        scale = LabelScale()
    return labels, scale


def _pairs(label_map: Mapping[str, float]) -> str:
    return " ".join(f"{word}={value:g}" for word, value in label_map.items())


@dataclass(frozen=True)
class Entry:
    """Who and what a row is: utterance and speaker, and where its media may be, as the table says."""

    utt: str
    speaker: str
    media: str = ""
    audio: str = ""
    video: str = ""
    clip: tuple[str, str] | None = None  # video_id, clip_id
    times: tuple[float, float] | None = None  # seconds in the file; None: all of it


def _entry(table: Sheet, number: int, row: Mapping[str, str], names: Mapping[str, str]) -> Entry:
    def value(what: str) -> str:
        return row[names[what]] if what in names else ""

    files = {what: value(what) for what in ("media", "audio", "video")}
    times = _times(table, number, value("start"), value("end")) if "start" in names else None
    speaker = _as_id(value("speaker"))
    if {"video_id", "clip_id"} <= names.keys():
        video, clip = value("video_id"), value("clip_id").removesuffix(".0")
        if not video or not clip:
            raise UserError(f"{table.path}:{number}: video_id {video!r}, clip_id {clip!r}: both are needed")
        name = utterance_id(_as_id(video), _as_id(clip))
        speaker = speaker or _as_id(video)
        files_of = (video, clip)
    else:
        files_of = None
        stem = value("id") or next(filter(None, files.values()), "")
        if not stem and not names.keys() & {"id", *_OF_MEDIA}:  # transcripts alone
            stem = f"line{number:06d}"
        if not stem:
            raise UserError(f"{table.path}:{number}: neither a media file nor an id")
        if value("id"):
            found_speaker, name = split_name(_as_id(stem))
            if "$_$" in stem or not any(files.values()):
                video, _, clip = stem.rpartition("$_$") if "$_$" in stem else stem.rpartition("_")
                files_of = (video, clip) if video else None
                speaker = speaker or found_speaker
            else:
                name = _as_id(stem)
        else:
            name = _as_id(str(Path(_relative(stem)).with_suffix("")))
        if times:  # parts of a file are of one speaker, or at least in one set
            speaker = speaker or _as_id(str(Path(_relative(next(filter(None, files.values()), stem))).with_suffix("")))
            name = name if value("id") else utterance_id(name, f"{round(1000 * times[0]):08d}")
    speaker = speaker or name
    utt = name if name.startswith(f"{speaker}-") or name == speaker else utterance_id(speaker, name)
    return Entry(utt, speaker, **files, clip=files_of, times=times)


def _times(table: Sheet, number: int, start: str, end: str) -> tuple[float, float]:
    """Seconds of the two times of a row: numbers, or minutes and seconds such as 1:02.5."""
    found = []
    for text in (start, end):
        *before, seconds = text.replace(",", ".").split(":")
        minutes = [parse_number(part) for part in before]
        found.append(sum(60.0 ** (i + 1) * m for i, m in enumerate(reversed(minutes))) + parse_number(seconds))
        if not math.isfinite(found[-1]) or found[-1] < 0 or len(before) > 2:
            raise UserError(f"{table.path}:{number}: {text!r} is no time such as 62.5 or 1:02.5 (in seconds)")
    if not found[0] < found[1]:
        raise UserError(f"{table.path}:{number}: the clip ends at {end}, not after its start at {start}")
    return found[0], found[1]


def _relative(name: str) -> str:
    """A file's name for an id: of a path from the root, on this machine or on another, the last two parts."""
    plain = name.replace("\\", "/")
    parts = [p for p in plain.split("/") if p not in ("", ".", "..")]
    return "/".join(parts[-2:] if re.match(r"/|[A-Za-z]:/", plain) else parts)


def _as_id(text: str) -> str:
    """A name as an id: without white space and folders."""
    return re.sub(r"\s+", "_", text.strip()).replace("\\", "/").strip("/").replace("/", "_")


def _splits(table: Sheet, names: Mapping[str, str], entries: Sequence[Entry]) -> list[str]:
    """The set of each row: as the table says, or by speaker."""
    if "split" in names:
        sets = []
        for number, row in table.rows:
            word = row[names["split"]].casefold()
            if word not in _SPLITS:
                raise UserError(
                    f"{table.path}:{number}: {names['split']} is {row[names['split']]!r}, none of {', '.join(_SPLITS)}"
                )
            sets.append(_SPLITS[word])
        for name in ("train", "valid"):
            if name not in sets:
                raise UserError(
                    f"{table.path}: no line of column {names['split']!r} says {name!r}; both are needed: mark about "
                    "15 of 100 clips of train `valid`, whole speakers, or have all sets drawn: --columns split=-"
                )
        return sets
    by_speaker: dict[str, int] = {}
    for entry in entries:
        by_speaker[entry.speaker] = by_speaker.get(entry.speaker, 0) + 1
    if len(by_speaker) < 3:
        raise UserError(
            f"{table.path}: {len(by_speaker)} speakers cannot be shared out to three sets; add a column `split` with "
            "train, valid and test"
        )
    order = sorted(by_speaker, key=lambda s: hashlib.sha256(s.encode()).digest())
    owner = dict.fromkeys(order, "train")
    for name, share in _SHARES.items():
        count = 0
        while count < share * len(entries) and len(order) > 1:
            speaker = order.pop()
            owner[speaker], count = name, count + by_speaker[speaker]
    return [owner[entry.speaker] for entry in entries]


@dataclass
class Places:
    """Where media files are looked for: the folder of the table, or the one that was given; and ``Raw`` in it."""

    table_dir: Path
    media_dir: Path | None

    def __post_init__(self) -> None:
        given = self.media_dir or self.table_dir
        if not given.is_dir():
            raise UserError(f"{given}: no such folder of media")
        self.roots = [given, given / "Raw"] if (given / "Raw").is_dir() else [given]
        self._listed: dict[Path, dict[str, list[Path]]] = {}
        self._recordings: dict[str, Path] = {}

    def find(self, entry: Entry) -> ClipMedia | str:
        """The media of an entry, or why there are none."""
        if entry.audio or entry.video:
            sound = self._file(entry.audio or entry.video)
            pictures = self._file(entry.video) if entry.video else None
            if sound is None or (entry.video and pictures is None):
                return f"no media file {entry.audio if sound is None and entry.audio else entry.video}"
            return ClipMedia(entry.utt, sound, pictures)
        if entry.media:
            found = self._file(entry.media)
            wanted = entry.media
        elif entry.clip:
            found, wanted = self._clip(*entry.clip), "/".join(entry.clip)
        else:
            found, wanted = self._file(entry.utt), entry.utt
        if found is None:
            return f"no media file {wanted}"
        return ClipMedia(entry.utt, found, found if found.suffix.lower() in _PICTURES else None)

    def recording(self, media: ClipMedia) -> str:
        """The name of a file of which clips are parts: its own without extension, unless another file has that."""
        for name in (_as_id(media.sound.stem), _as_id(str(media.sound.absolute()))):
            if self._recordings.setdefault(name, media.sound) == media.sound:
                break
        return name

    def _file(self, name: str) -> Path | None:
        """A file as the table names it: with its extension, in any case, or without; from Windows, with backslashes;
        of a path from the root that is not there, its end, as far as it is in the folder of media."""
        plain = name.replace("\\", "/")
        ways = [name, plain]
        if re.match(r"/|[A-Za-z]:/", plain):  # the corpus was moved, or made on another machine
            parts = plain.split("/")
            ways += ["/".join(parts[i:]) for i in range(1, len(parts)) if all(parts[i:])]
        for path in (root / way for way in dict.fromkeys(ways) for root in self.roots):
            if path.is_file():
                return path
            names = self._names(path.parent)
            full, stem = (unicodedata.normalize("NFC", part) for part in (path.name, path.stem))
            for other in names.get(full, []):
                return other
            for other in names.get(stem, []):
                if other.suffix.lower() == path.suffix.lower():
                    return other
        return None

    def _clip(self, video: str, clip: str) -> Path | None:
        """``<video>/<clip>.mp4`` or ``<video>_<clip>.mp4``; numbers with or without leading zeros."""
        wanted = clip.lstrip("0") or "0"
        for root in self.roots:
            folder = self._names(root / video)
            for name in (clip, *(n for n in folder if (n.lstrip("0") or "0") == wanted)):
                if name in folder:
                    return folder[name][0]
            files = self._names(root)
            for name in (f"{video}_{clip}", f"{video}-{clip}", f"{video}$_${clip}"):
                if name in files:
                    return files[name][0]
        return None

    def listed(self) -> set[Path | None]:
        """All media files of the folders that were looked through."""
        return {path for names in self._listed.values() for paths in names.values() for path in paths}

    def _names(self, folder: Path) -> dict[str, list[Path]]:
        """Media files of a folder by name without extension, pictures first."""
        if folder not in self._listed:
            found: dict[str, list[Path]] = {}
            if folder.is_dir():
                files = [p for p in folder.iterdir() if p.suffix.lower() in _PICTURES + _SOUNDS]
                for path in sorted(files, key=lambda p: (p.suffix.lower() not in _PICTURES, p.name)):
                    # macOS takes an umlaut apart in names of files; tables mostly do not.
                    found.setdefault(unicodedata.normalize("NFC", path.stem), []).append(path)
            self._listed[folder] = found
        return self._listed[folder]


def parse_pairs(text: str, option: str) -> dict[str, str]:
    """``a=x b=y`` as a mapping; a value in quotation marks may have spaces.

    Raises:
        UserError: a word is no pair, or a name is there twice.
    """
    result: dict[str, str] = {}
    for match in re.finditer(r"\"([^\"]*)\"|'([^']*)'|(\S+)", text.replace(",", " ")):
        word = next(group for group in match.groups() if group is not None)
        name, sign, value = word.rpartition("=") if option == "--label-map" else word.partition("=")
        if not sign or not name or not value or name in result:
            raise UserError(f'{option}: {word!r} is no NAME=VALUE, or given twice; quote names with spaces: "a b=1"')
        result[name] = value
    return result


def parse_label_map(text: str) -> dict[str, float]:
    """``negative=-1 neutral=0`` as labels by word.

    Raises:
        UserError: a value is no number.
    """
    found = {}
    for word, value in parse_pairs(text, "--label-map").items():
        found[word] = parse_number(value)
        if not math.isfinite(found[word]):
            raise UserError(f"--label-map: {word}={value}: {value!r} is no number")
    if found and len(set(found.values())) < 2:
        raise UserError(f"--label-map: all words have the label {format_number(next(iter(found.values())))}")
    return found
