"""A corpus as a table: a CSV or TSV file with a line a clip, and media files beside it.

Columns are known by their names, in any case and order: what is said (``text``), by whom (``speaker``), the ``label``,
the set (``split``) and the media file (``path``), or the ``video_id`` and ``clip_id`` of the common toolkit, which
hands on MOSI, MOSEI, CH-SIMS and CH-SIMS v2 as ``label.csv`` and ``Raw/<video_id>/<clip_id>.mp4``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdumc.corpora.importing import FOLDS, ClipMedia, Corpus, Fold, format_number, split_name, utterance_id
from sdumc.data.tables import parse_number
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


# ------------------------------------------------------------------------------------------------------ reading a table


@dataclass
class Table:
    """The lines of a table: for each its number in the file, and its values by column as the table calls it."""

    path: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, str]]] = field(default_factory=list)


def read_csv(path: Path) -> Table:
    """Read a CSV (comma, semicolon) or TSV file with a header; every line must have the header's number of columns.

    Raises:
        UserError: naming the line: another number of columns, a quotation mark that is not closed or closed too late, a
            column name given twice; or the file cannot be read or is not UTF-8 (or UTF-16 with its mark).
    """
    content = _decode(path)
    first = content.split("\n", 1)[0]
    if re.fullmatch(r"sep=.", first.strip(), re.IGNORECASE):  # a spreadsheet's note to itself
        content = content[len(first) :]
        first = content[1:].split("\n", 1)[0]
    delimiter = max("\t;,", key=lambda c: (first.count(c), c == ","))
    if not first.strip():
        raise UserError(f"{path}:1: no header; the first line must name the columns")
    plain = _unquoted(content) if delimiter == "\t" else []
    lines = plain or list(_quoted(path, content, delimiter))
    header = [" ".join(name.split()) for name in lines[0][1]]
    lowered = [name.casefold() for name in header]
    if doubled := [name for name in header if lowered.count(name.casefold()) > 1]:
        raise UserError(f"{path}:1: two columns are called {doubled[0]!r}; rename one")
    table = Table(path, header)
    for number, values in lines[1:]:
        if len(values) != len(header):
            kind = {"\t": "tab", ",": "comma", ";": "semicolon"}[delimiter]
            raise UserError(
                f"{path}:{number}: {len(values)} columns, but the header has {len(header)}; is there a {kind} in a "
                f"text without quotation marks around it? It begins {delimiter.join(values)[:60]!r}"
            )
        table.rows.append((number, dict(zip(header, (v.strip() for v in values), strict=True))))
    if not table.rows:
        raise UserError(f"{path}: no line below the header")
    return table


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if raw.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise UserError(f"{path}: a workbook or an archive, no text; save the table as CSV (UTF-8)")
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text; convert it, such as: iconv -f WINDOWS-1252 -t UTF-8 (or -f GB18030)"
        ) from None
    if "\0" in text:
        raise UserError(f"{path}: holds zero bytes; it is no text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unquoted(content: str) -> list[tuple[int, list[str]]]:
    """The lines of a TSV file without quoting, if all have the same number of columns; else nothing."""
    lines = [(n, line.split("\t")) for n, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if len({len(values) for _, values in lines}) > 1:
        return []
    return [(n, [_unquote(v) for v in values]) for n, values in lines]


def _unquote(value: str) -> str:
    inner = value[1:-1].replace('""', "")
    return (
        value[1:-1].replace('""', '"')
        if len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner
        else value
    )


def _quoted(path: Path, content: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Number of its first line and values of every row. A field with a line break in which the rest of the break looks
    like rows of the table is taken for a quotation mark that was not closed.
    """
    reader = csv.reader(io.StringIO(content, newline=""), strict=True, delimiter=delimiter)
    start, width = 1, 0
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise UserError(
                f"{path}:{start}: cannot be read as {'TSV' if delimiter == chr(9) else 'CSV'} ({e}); is a quotation "
                "mark open, or one inside a text not doubled?"
            ) from None
        for value in values:
            for part in value.split("\n")[1:]:
                if width and part.count(delimiter) >= width - 1:
                    raise UserError(
                        f"{path}:{start}: a text with a line break, and the line {part[:60]!r} in it looks like a row "
                        "of its own; close the quotation mark, or write the text in one line"
                    )
        if any(values):
            width = width or len(values)
            yield start, values
        start = reader.line_num + 1


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
    owners: dict[Path | None, int] = {}  # media file -> line
    for (number, row), entry, label, name in zip(table.rows, entries, labels, sets, strict=True):
        fold = folds[name]
        if label is None:
            fold.unlabelled[entry.utt] = f"no label (line {number})"
            continue
        text = row[names["text"]] if "text" in names else ""
        found = places.find(entry) if places else None
        if places is None and not text:
            fold.unlabelled[entry.utt] = f"no text (line {number})"
            continue
        if isinstance(found, ClipMedia):
            for file in {found.sound, found.pictures} - {None}:
                if before := owners.get(file):
                    raise UserError(f"{path}:{number}: {file} is the media file of line {before} too; remove one")
                owners[file] = number
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
    corpus.notes = [f"{path.name}: {len(table.rows)} lines; {used}", f"labels: from {scale.named_ends}"]
    if places:
        corpus.unused = {str(file): "a media file not in the table" for file in places.listed() - owners.keys()}
    else:
        corpus.notes.append("transcripts alone: there are no media")
    if "split" not in names:
        corpus.notes.append("no column of sets: speakers were shared out, about 70, 15 and 15 of 100 utterances")
    without = sum(not u.text for fold in folds.values() for u in fold.utterances.values())
    if "text" in names and without:
        corpus.notes.append(f"{without} utterances have no text")
    return corpus


_OF_MEDIA = ("media", "audio", "video")


def find_columns(table: Table, given: Mapping[str, str], no_media: bool = False) -> dict[str, str]:
    """What each column is: key of :data:`COLUMNS` -> the table's name.

    Raises:
        UserError: a column is missing, is not there, or two could be meant.
    """
    by_name = {name.casefold().replace(" ", "_"): name for name in table.columns}
    found: dict[str, str] = {}
    for what, name in given.items():
        if what not in COLUMNS:
            raise UserError(f"--columns: {what!r} is none of {', '.join(COLUMNS)}")
        if name.casefold().replace(" ", "_") not in by_name:
            raise UserError(f"{table.path}:1: has no column {name!r}; it has {', '.join(table.columns)}")
        found[what] = by_name[name.casefold().replace(" ", "_")]
    taken = set(found.values())
    for what, aliases in COLUMNS.items():
        candidates = [by_name[a] for a in aliases if a in by_name and by_name[a] not in taken]
        if what in found or not candidates:
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
        return {what: name for what, name in found.items() if what not in _OF_MEDIA}
    if not found.keys() & {"media", "audio", "video", "id"} and not {"video_id", "clip_id"} <= found.keys():
        raise UserError(
            f"{table.path}:1: no column with the media file, an id, or video_id and clip_id among "
            f"{', '.join(table.columns)}; name it: --columns media=NAME, or say --no-media if there are texts alone"
        )
    return found


_WITH_COMMA = re.compile(r"([-+]?\d+(,\d+)?)?")
_NO_LABEL = ("n/a", "na", "nan", "null", "none", "nil", "-", "--", "?", "missing", "#n/a", "inf", "-inf")


def read_labels(
    table: Table, column: str, scale: LabelScale | None, label_map: Mapping[str, float]
) -> tuple[list[float | None], LabelScale]:
    """The label of each row, None where it is empty, and their scale.

    Raises:
        UserError: a label is neither a number nor in the map, or the scale is not clear.
    """
    by_word = {word.casefold(): value for word, value in label_map.items()}
    labels: list[float | None] = []
    unknown: dict[str, int] = {}
    values = [row[column].strip('" ').replace("\N{MINUS SIGN}", "-") for _, row in table.rows]
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


def _entry(table: Table, number: int, row: Mapping[str, str], names: Mapping[str, str]) -> Entry:
    def value(what: str) -> str:
        return row[names[what]] if what in names else ""

    files = {what: value(what) for what in ("media", "audio", "video")}
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
            name = _as_id(str(Path(stem).with_suffix("")))
    speaker = speaker or name
    utt = name if name.startswith(f"{speaker}-") or name == speaker else utterance_id(speaker, name)
    return Entry(utt, speaker, **files, clip=files_of)


def _as_id(text: str) -> str:
    """A name as an id: without white space and folders."""
    return re.sub(r"\s+", "_", text.strip()).replace("\\", "/").strip("/").replace("/", "_")


def _splits(table: Table, names: Mapping[str, str], entries: Sequence[Entry]) -> list[str]:
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

    def _file(self, name: str) -> Path | None:
        """A file as the table names it: with its extension, in any case, or without; from Windows, with backslashes."""
        for path in (root / way for root in self.roots for way in dict.fromkeys((name, name.replace("\\", "/")))):
            if path.is_file():
                return path
            names = self._names(path.parent)
            for other in names.get(path.name, []):
                return other
            for other in names.get(path.stem, []):
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
                    found.setdefault(path.stem, []).append(path)
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
