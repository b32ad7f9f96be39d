"""What ``sdumc predict`` is given, as its command line names it: files to score, and their transcripts.

A transcript is words, a text file, a table, or subtitles, which are read as timed transcripts (SubRip, WebVTT,
SubStation, MicroDVD, ...). Subtitles with scores are written here too.
"""

from __future__ import annotations

import html
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from sdumc.errors import UserError

if TYPE_CHECKING:
    from pysubs2 import SSAFile


# Extensions of the files that are taken from a folder. A file named by itself may have any extension.
SOUND = (
    *(".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mp2", ".mp3"),
    *(".oga", ".ogg", ".opus", ".qta", ".wav", ".w64", ".wma", ".wv"),
)
VIDEO = (
    *(".3g2", ".3gp", ".asf", ".avi", ".dv", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)


def media_files(names: Sequence[str], list_file: str | None) -> tuple[list[Path], list[tuple[str, str]]]:
    """The media files that ``names`` and the lines of ``list_file`` stand for.

    Returns:
        The files in the order given, each once, those of a folder and its subfolders sorted by path; and
        (name, reason) for each name that gives none.

    Raises:
        UserError: nothing is named, or the list cannot be read.
    """
    wanted = list(names)
    if list_file:
        try:
            lines = Path(list_file).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{list_file}: cannot be read as a list of files ({e})") from None
        wanted += [line.strip() for line in lines if line.strip()]
    if not wanted:
        raise UserError("name at least one video or audio file, a folder, or a --list")
    files: dict[Path, None] = {}
    failures = []
    for name in wanted:
        path = Path(name)
        if not path.is_dir():
            files[path] = None
            continue
        found = sorted(
            Path(folder) / f
            for folder, _, inner in os.walk(path)
            for f in inner
            if Path(f).suffix.lower() in (*SOUND, *VIDEO) and not f.startswith(".") and ".sdumc." not in f
        )
        files.update(dict.fromkeys(found))
        if not found:
            failures.append((name, "no video or audio files in this folder"))
    return list(files), failures


def transcripts(text: str | None, files: Sequence[Path]) -> dict[Path, str | list[Cue]]:
    """The transcript of each file, from the value of ``--text``: words, a text file, subtitles, or a table.

    Raises:
        UserError: the file cannot be read, or does not fit the files to score.
    """
    if text is None or not files:
        return {}
    path = Path(text)
    is_file = len(text) < 4096 and path.is_file()  # a longer text is no path, and asking would be an OSError
    if not is_file and (path.suffix.lower() in (*SUFFIXES, ".txt") and " " not in text):
        raise UserError(f"--text {text}: no such file")
    if not is_file:
        if len(files) == 1:
            return {files[0]: text}
        raise UserError(
            "--text with several files must be a table file of lines `name words`; or score the files one by one"
        )
    if path.suffix.lower() in SUFFIXES or is_subtitles(content := read_text(path)):
        if len(files) == 1:
            return {files[0]: read_subtitles(path)}
        raise UserError(f"--text {path}: subtitles are of one file; score the files one by one")
    refuse_other_forms(path, content)
    stems = [f.stem for f in files]
    if len(files) == 1 and not _is_table(content, stems[0]):
        return {files[0]: " ".join(content.split())}
    if doubled := sorted({s for s in stems if stems.count(s) > 1}):
        raise UserError(f"--text {path}: several files are called {doubled[0]!r}; score them one by one")
    table = _table(path, content)
    if missing := [s for s in stems if s not in table]:
        raise UserError(f"{path}: no line for {missing[0]!r}; every file needs one")
    return {f: table[f.stem] for f in files}


def _is_table(content: str, stem: str) -> bool:
    """Whether the text given with one file is a table: a line begins with the file's name; or it has several lines and
    a tab in one of them, or each begins with a name that has a digit and is no number."""
    lines = [line.strip() for line in content.split("\n") if line.strip()]
    named = [_name_and_words(line) for line in lines]
    if any(name == stem and words for name, words in named):
        return True
    coded = all(words and any(c.isdigit() for c in name) and not name.isdigit() for name, words in named)
    return len(lines) > 1 and (coded or any("\t" in line for line in lines))


def _name_and_words(line: str) -> tuple[str, str]:
    """The two parts of a line ``name words``. If it has a tab, the name ends there and may contain spaces."""
    name, *rest = line.strip().split("\t" if "\t" in line.strip() else None, 1)
    return name.strip(), " ".join(" ".join(rest).split())


def _table(path: Path, content: str) -> dict[str, str]:
    """Read lines ``name words`` in any order."""
    found: dict[str, str] = {}
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        name, words = _name_and_words(line)
        if not words:
            raise UserError(f"{path}:{number}: {name!r} has no words; expected `name words`")
        if name in found:
            raise UserError(f"{path}:{number}: a second line for {name!r}; remove one")
        found[name] = words
    return found


# Extension -> pysubs2's name of the format.
_FORMATS = {
    ".srt": "srt",
    ".vtt": "vtt",
    ".ass": "ass",
    ".ssa": "ssa",
    ".sub": "microdvd",
    ".smi": "sami",
    ".sami": "sami",
    ".ttml": "ttml",
}
SUFFIXES = tuple(_FORMATS)
_KINDS = {*_FORMATS.values(), "mpl2"}  # mpl2: MPL2, found in .sub and .txt files
_ARROW = re.compile(r"(\S*?)\s*-->\s*(\S*)")
_TIME = re.compile(r"(?:\d+:)?\d{1,2}:\d{1,2}(?:[.,]\d{1,3})?$")
_FRAMES = {"microdvd": re.compile(r"\s*\{\d+\}\{\d+\}"), "mpl2": re.compile(r"\s*\[-?\d+\]\[-?\d+\]")}
_MARKUP = re.compile(r"</?[a-zA-Z][^>]*>|<\d[\d:.]*>|\{\\[^}]*\}")
_SENTENCE_END = re.compile(r"[.?!…。？！][\"'”’)\]]*$")
_PAUSE = 0.5  # seconds; a longer pause between two cues starts a new utterance
_FOLLOWS = 0.1  # seconds; cues that are nearer to each other than this follow each other without a pause
_ROLLING = 0.5  # share of the cues that follow another one and repeat its words, in captions that roll


@dataclass(frozen=True)
class Cue:
    """One subtitle: ``start`` and ``end`` in seconds, and the words."""

    start: float
    end: float
    text: str


class Cues(list[Cue]):
    """The cues of a file, and ``notes``: what had to be changed in them."""

    def __init__(self, cues: Sequence[Cue], notes: Sequence[str] = ()):
        super().__init__(cues)
        self.notes = list(notes)


def read_subtitles(path: Path) -> Cues:
    """The cues of a subtitle file in time order, each word once, without markup and without empty cues.

    Captions that roll (a cue repeats the lines before it and adds one) become cues with only the new words. The words
    of a cue whose end is its start go to the nearer neighbour. Of two cues that overlap, the earlier ends where the
    later begins; a cue within another one is joined to it.

    Raises:
        UserError: the file is not text or no subtitles, a time cannot be read, or a cue ends before it starts. The
            message names the file and, where there is one, the line.
    """
    text = _converted(read_text(path))
    kind = _kind(path, text)
    _check_lines(path, text, kind)
    found = _cues(_parsed(path, text, kind), path, kind)
    if not found:
        raise UserError(f"{path}: no subtitles in it; expected lines such as 00:00:01,000 --> 00:00:04,000")
    notes: list[str] = []
    cues = _unroll(sorted(found, key=lambda c: (c.start, c.end)), notes)
    cues = _one_at_a_time(_join_instants(cues, path, notes), notes)
    return Cues([replace(c, text=" ".join(c.text.split())) for c in cues], notes)


def read_text(path: Path) -> str:
    """A text file: UTF-8 or UTF-16, with or without byte order mark; line ends become newlines.

    Raises:
        UserError: it cannot be read, or is no such text.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    encoding = "utf-8-sig"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif 0 in raw[:2]:  # without a byte order mark: the zero is half of a character of ASCII
        encoding = "utf-16-be" if raw[0] == 0 else "utf-16-le"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 or UTF-16 text; save the file as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: not a text file; subtitles that are pictures cannot be read")
    # Characters that control a terminal are nothing that is said.
    return re.sub(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]", " ", re.sub(r"\r\n?", "\n", text))


def is_subtitles(text: str) -> bool:
    """Whether a text has times as SubRip or WebVTT have them, or is SubStation, TTML, YouTube's SBV or Whisper's table:
    whatever the file is called."""
    if text.lstrip().startswith(("WEBVTT", "[Script Info]")) or re.match(r"\s*(<\?xml[^>]*>\s*)?<tt[\s:]", text):
        return True
    if _converted(text) != text:
        return True
    arrows = [a for line in text.split("\n") if (a := _ARROW.match(line.strip()))]
    return any(_TIME.match(a[1]) and _TIME.match(a[2]) for a in arrows)


def refuse_other_forms(path: Path, text: str) -> None:
    """Raise :class:`UserError` for a text that is something else than words: markup, data, times of an unknown form."""
    start = text.lstrip()[:200].lower()
    form = next(
        (name for mark, name in _OTHER_FORMS.items() if start.startswith(mark)),
        "JSON" if re.match(r"[\[{]\s*[\[{\"]", start) else None,
    )
    lines = [line for line in text.split("\n") if line.strip()]
    if form is None and lines and sum(bool(_TIMED.match(line)) for line in lines) * 2 > len(lines):
        form = "lines with times of a form that is not known"
    if form:
        raise UserError(f"{path}: {form}, no words to be read; save it as .srt or .vtt, or as text without times")


# How files begin that are other things than words.
_OTHER_FORMS = {
    "<?xml": "XML",
    "<!doctype": "HTML",
    "<html": "HTML",
    "<timedtext": "XML",
    "{\\rtf": "RTF",
    "%pdf": "PDF",
    "scenarist_scc": "Scenarist captions",
    "# vobsub": "an index of subtitles that are pictures",
    "850stl": "EBU STL subtitles",
}
_TIMED = re.compile(r"\s*[\[(<]?(\d{1,2}:)?\d{1,2}:\d{2}([.,:]\d{1,3})?(\s*-->|[\])>:,\s])")
_SBV = re.compile(r"(\d+:\d\d:\d\d\.\d{3}),(\d+:\d\d:\d\d\.\d{3})$", re.MULTILINE)


def _converted(text: str) -> str:
    """YouTube's SBV (``0:00:01.000,0:00:02.500``) and Whisper's table (start, end, text; times in ms) as SubRip."""
    if _SBV.match(text.lstrip()):
        return _SBV.sub(r"\1 --> \2", text)
    header, _, rest = text.lstrip().partition("\n")
    if header.strip().split("\t") != ["start", "end", "text"]:
        return text
    rows = [line.split("\t", 2) for line in rest.split("\n") if line.strip()]
    if not all(len(row) == 3 and row[0].isdigit() and row[1].isdigit() for row in rows):
        return text
    return "\n\n".join(f"{_clock(int(a) / 1000, 'srt')} --> {_clock(int(b) / 1000, 'srt')}\n{t}" for a, b, t in rows)


def _kind(path: Path, text: str) -> str:
    """The format that the content shows, else that of the extension."""
    from pysubs2.exceptions import FormatAutodetectionError
    from pysubs2.formats import autodetect_format

    try:
        kind = autodetect_format(text[:10000])
    except FormatAutodetectionError:
        kind = ""
    if kind not in _KINDS:
        kind = "ass" if text.lstrip().startswith("[Script Info]") else _FORMATS.get(path.suffix.lower(), "srt")
    return kind


def _check_lines(path: Path, text: str, kind: str) -> None:
    """Refuse what pysubs2 would leave out without a word: lines whose times cannot be read."""
    for number, line in enumerate(text.split("\n"), start=1):
        times: Sequence[str] = ()
        if kind in ("srt", "vtt") and (arrow := _ARROW.search(line.strip())):
            times = arrow.groups()
        elif kind in ("ass", "ssa") and line.startswith("Dialogue:"):
            fields = line.partition(":")[2].split(",", 9)
            if len(fields) < 10:
                raise UserError(f"{path}:{number}: {len(fields)} fields, expected 10 (Layer, Start, End, ..., Text)")
            times = [t.strip() for t in fields[1:3]]
        elif kind in _FRAMES and line.strip() and not _FRAMES[kind].match(line):
            raise UserError(f"{path}:{number}: does not begin with two numbers in brackets; correct the line")
        for time in times:
            if not _TIME.match(time):
                raise UserError(f"{path}:{number}: {time or line.strip()!r} is not a time such as 00:00:01.000")
        if times and _seconds(times[1]) < _seconds(times[0]):
            raise UserError(f"{path}:{number}: the end is not after the start; correct the times")


def _seconds(time: str) -> float:
    *hours, minutes, seconds = time.replace(",", ".").split(":")
    return 3600 * int(hours[0] if hours else 0) + 60 * int(minutes) + float(seconds)


def _parsed(path: Path, text: str, kind: str) -> SSAFile:
    import pysubs2

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of colours and margins
            if kind in ("srt", "vtt"):
                return pysubs2.SSAFile.from_string(_plain_blocks(text, kind), format_="srt", keep_html_tags=True)
            return pysubs2.SSAFile.from_string(text, format_=kind)
    except pysubs2.exceptions.UnknownFPSError:
        raise UserError(
            f"{path}: its times are numbers of pictures, and it does not say how many there are in a second; "
            "put a line such as {1}{1}25 before the others"
        ) from None
    except Exception as e:  # pysubs2 raises whatever its formats meet: ValueError, ParseError, NotImplementedError
        raise UserError(f"{path}: cannot be read as {kind} subtitles ({e})") from None


def _plain_blocks(text: str, kind: str) -> str:
    """SubRip or WebVTT as SubRip in its plainest form, so that pysubs2 takes each cue's own lines and no others: it
    takes a last line of digits for the next cue's number, what stands between cues for words, and a line with two times
    in it for a new cue (colons become zeros until it has read them)."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        if arrow := _ARROW.search(line.strip()):
            if inside and lines[-1].strip().isdigit() and "-->" not in lines[-2]:
                lines.pop()  # the number of this cue, without a blank line before it
            lines += ["", "0", " --> ".join(_clock(_seconds(t), "srt") for t in arrow.groups())]
            inside = True
        elif inside and not (line if kind == "vtt" else line.strip()):
            inside = False  # in WebVTT a line of spaces is part of the cue
        elif inside:
            lines.append(line.replace(":", "\0"))
    return "\n".join([*lines, "", "0", ""])


def _cues(subtitles: SSAFile, path: Path, kind: str) -> list[Cue]:
    cues = []
    for event in subtitles:
        if kind in ("ass", "ssa") and not event.is_text:  # a comment or a drawing
            continue
        if event.end < event.start:
            raise UserError(f"{path}: the cue at {event.start / 1000:.2f} s ends before it starts; correct the times")
        words = event.text.replace("\\N", "\n").replace("\0", ":") if kind in ("srt", "vtt") else event.plaintext
        words = _MARKUP.sub("", re.sub(r"<br\s*/?>", "\n", words))
        if kind in ("srt", "vtt", "sami"):
            words = html.unescape(words)
        lines = [" ".join(line.split()) for line in words.split("\n")]
        cues.append(Cue(event.start / 1000, event.end / 1000, "\n".join(line for line in lines if line)))
    return [c for c in cues if c.text]


def _repeated(before: str, text: str) -> int:
    """How many words at the beginning of a cue repeat what was shown before: all of it, its last lines, or at least
    two of its last words. ``before`` and ``text`` have lines."""
    words = text.split()
    shown = before.split()
    whole_lines = {len(" ".join(before.split("\n")[i:]).split()) for i in range(before.count("\n") + 1)}
    for count in range(min(len(shown), len(words)), 0, -1):
        if shown[-count:] == words[:count] and (count > 1 or count in whole_lines):
            return count
    return 0


def _unroll(cues: list[Cue], notes: list[str]) -> list[Cue]:
    """Leave out the words that a cue repeats, where the captions roll: in most cues that follow another one directly.
    Elsewhere a repetition is what was said."""
    pairs = [(a, b) for a, b in pairwise(cues) if b.start - a.end < _FOLLOWS]
    repeats = sum(_repeated(a.text, b.text) > 0 for a, b in pairs)
    more = sum(0 < _repeated(a.text, b.text) < len(b.text.split()) for a, b in pairs)
    if not more or repeats < _ROLLING * len(pairs):
        return list(dict.fromkeys(cues))  # SubStation draws the same words several times, for shadows
    found = cues[:1]
    for before, cue in pairwise(cues):
        count = _repeated(before.text, cue.text) if cue.start - before.end < _FOLLOWS else 0
        if words := cue.text.split()[count:]:
            found.append(replace(cue, text=" ".join(words)))
    notes.append("its captions repeat the lines before; each word is taken once")
    return found


def _join_instants(cues: list[Cue], path: Path, notes: list[str]) -> list[Cue]:
    """Join each cue that lasts no time to the nearer of its neighbours that do."""
    lasting = [i for i, c in enumerate(cues) if c.end > c.start]
    if not lasting:
        raise UserError(f"{path}: each subtitle ends when it starts; correct the times")
    groups = {i: [i] for i in lasting}
    for i, cue in enumerate(cues):
        if cue.end > cue.start:
            continue
        # Of neighbours that are equally near, the earlier one.
        near = min(lasting, key=lambda j: (max(cues[j].start - cue.start, cue.start - cues[j].end, 0.0), abs(i - j)))
        groups[near].append(i)
        notes.append(f"a subtitle at {cue.start:.2f} s lasts no time; its words were joined to the nearest one")
    return [replace(cues[i], text=" ".join(cues[k].text for k in sorted(group))) for i, group in groups.items()]


def _one_at_a_time(cues: list[Cue], notes: list[str]) -> list[Cue]:
    """Cues in time order that do not overlap."""
    found: list[Cue] = []
    cut = joined = 0
    for cue in sorted(cues, key=lambda c: (c.start, c.end)):
        last = found[-1] if found else None
        if last is None or cue.start >= last.end:
            found.append(cue)
        elif cue.end <= last.end or cue.start == last.start:
            found[-1] = Cue(last.start, max(last.end, cue.end), f"{last.text} {cue.text}")
            joined += 1
        else:
            found[-1] = replace(last, end=cue.start)
            found.append(cue)
            cut += 1
    if cut:
        notes.append(f"{cut} subtitles overlap the next one; they end where it begins")
    if joined:
        notes.append(f"{joined} subtitles lie within another one and were joined to it")
    return found


def sentences(cues: Sequence[Cue], max_seconds: float) -> list[Cue]:
    """Join cues into utterances, which end with a sentence, at a pause of half a second, or before ``max_seconds``."""
    joined: list[Cue] = []
    for cue in cues:
        last = joined[-1] if joined else None
        if (
            last is not None
            and not _SENTENCE_END.search(last.text)
            and cue.start - last.end < _PAUSE
            and cue.end - last.start <= max_seconds
        ):
            joined[-1] = Cue(last.start, max(last.end, cue.end), f"{last.text} {cue.text}")
        else:
            joined.append(cue)
    return joined


def format_subtitles(cues: Sequence[Cue], kind: str) -> str:
    """The text of an ``srt`` or ``vtt`` file."""
    blocks = []
    for number, cue in enumerate(cues, start=1):
        # A blank line would end the cue, and "-->" would start another.
        text = " ".join(cue.text.split()).replace("-->", "->")
        if kind == "vtt":
            text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        times = f"{_clock(cue.start, kind)} --> {_clock(cue.end, kind)}"
        blocks.append(f"{number}\n{times}\n{text}\n")
    return ("WEBVTT\n\n" if kind == "vtt" else "") + "\n".join(blocks)


def _clock(seconds: float, kind: str) -> str:
    total = round(seconds * 1000)
    mark = "," if kind == "srt" else "."
    return f"{total // 3600000:02d}:{total // 60000 % 60:02d}:{total // 1000 % 60:02d}{mark}{total % 1000:03d}"
