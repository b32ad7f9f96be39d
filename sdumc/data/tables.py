"""Tables of a data directory: one ``id value`` per line, sorted bytewise (``LC_ALL=C sort``), UTF-8.

:func:`read_table` takes a valid table or raises. :func:`scan_table` reads what can be read of any table and returns
everything wrong with it as :class:`Problem` values, for validation to print and for fixing to act on. Also here:
:class:`MediaSpan`, the part of a file that a row means, and ``dropped.tsv``, which lists the utterances that a stage
left out, with its name and the reason.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdumc.errors import UserError
from sdumc.files import shown, write_text
from sdumc.scale import CMU


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
        path = shown(self.path)
        return path if self.utterance is None else f"{path}: utterance {self.utterance!r}"


@dataclass(frozen=True)
class MediaInfo:
    """What a media file states about itself; ``duration`` in seconds, 0 if unknown."""

    duration: float
    has_audio: bool
    has_video: bool


class PastEnd(UserError):
    """A span goes more than half a second past the ``end`` of its file's track, in seconds."""

    def __init__(self, message: str, end: float):
        super().__init__(message)
        self.end = end


Row = tuple[str, str, str]  # utterance id, stage, reason


def read_dropped(path: str | os.PathLike) -> list[Row]:
    """The (id, stage, reason) lines of a ``dropped.tsv``; none when there is no such file.

    Raises:
        UserError: a line has another number of columns.
    """
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


def write_dropped(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Write lines ``id<TAB>stage<TAB>reason``, sorted, atomically; white space in a reason becomes one space."""
    clean = sorted((utt, stage, " ".join(reason.split())) for utt, stage, reason in rows)
    write_text(path, "".join("\t".join(row) + "\n" for row in clean))


def append_dropped(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Add rows to a ``dropped.tsv``.

    A row of the same id and stage is replaced, so that a stage that runs again does not list an utterance twice.
    """
    merged = {(utt, stage): reason for utt, stage, reason in read_dropped(path)}
    merged.update({(utt, stage): reason for utt, stage, reason in rows})
    write_dropped(path, [(utt, stage, reason) for (utt, stage), reason in merged.items()])


LABEL_RANGE = (CMU.low, CMU.high)
_SHOWN = 10  # problems listed in one error message


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data directory.

    ``utterance`` is set when the problem belongs to one utterance, ``recording`` when it belongs to a recording that
    ``segments`` cuts utterances from. ``lossless`` problems can be mended without leaving an utterance out.
    """

    file: Path
    text: str  # what is wrong and what to do, without place and id
    line: int | None = None
    utterance: str | None = None
    recording: str | None = None
    lossless: bool = False

    def __str__(self) -> str:
        place = f"{self.file}" if self.line is None else f"{self.file}:{self.line}"
        if self.utterance is not None:
            return f"{place}: utterance {self.utterance!r}: {self.text}"
        if self.recording is not None:
            return f"{place}: recording {self.recording!r}: {self.text}"
        return f"{place}: {self.text}"


@dataclass
class Table:
    """The lines of a table that can be read: id -> value (the first one, if an id is given twice)."""

    file: Path
    values: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)  # id -> line number, for tables read from disk
    of_recordings: bool = False  # the ids are recordings, not utterances

    def problem(self, key: str, text: str, line: int | None = None, lossless: bool = False) -> Problem:
        """A problem of the line of ``key``."""
        owner = {"recording" if self.of_recordings else "utterance": key}
        return Problem(self.file, text, line or self.lines.get(key), lossless=lossless, **owner)


def scan_table(
    path: str | os.PathLike, allow_empty: bool = False, of_recordings: bool = False
) -> tuple[Table, list[Problem]]:
    """Read the lines of a table as they stand, and list everything that is wrong with them.

    Args:
        path: the table.
        allow_empty: an id with nothing after it has the value ``""``; otherwise it is a problem too.
        of_recordings: the ids are recordings.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if lines[-1] == b"":
        lines.pop()
    table, problems = Table(path, of_recordings=of_recordings), []
    previous = None
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            key = raw.split(maxsplit=1)[0].decode("utf-8", "replace")
            problems.append(table.problem(key, "not UTF-8 text; convert the file with iconv", number))
            continue
        line, found = _clean_line(path, number, line)
        problems += found
        if not line:
            continue
        # Only space and tab separate columns: str.split() would also split at, say, a no-break space in an id.
        key, _, value = re.sub(r"[ \t]+", " ", line, count=1).partition(" ")
        value = value.strip()
        if not value and not allow_empty:
            problems.append(table.problem(key, "nothing after the id; give a value or remove the line", number))
        if key in table.values:
            text = f"given twice (first in line {table.lines[key]}); remove one"
            problems.append(table.problem(key, text, number, lossless=table.values[key] == value))
        elif previous is not None and key < previous:  # sorted by code points is sorted by UTF-8 bytes
            text = f"out of order after {previous!r}; sort with: LC_ALL=C sort -o {path} {path}"
            problems.append(table.problem(key, text, number, lossless=True))
        table.values.setdefault(key, value)
        table.lines.setdefault(key, number)
        previous = key
    return table, problems


def _clean_line(path: Path, number: int, line: str) -> tuple[str, list[Problem]]:
    """A line without Windows line end, byte order mark and white space in front, and a problem for each that it had.

    An empty line becomes ``""``.
    """
    texts = []
    if line.endswith("\r"):
        texts.append(f"Windows line end; remove them with: sed -i 's/\\r$//' {path}")
        line = line[:-1]
    if line.startswith("\ufeff"):
        texts.append(f"starts with a byte order mark; remove it with: sed -i '1s/^\\xef\\xbb\\xbf//' {path}")
        line = line[1:]
    if not line.strip():
        texts.append("empty line; remove it")
        line = ""
    elif line[0].isspace():
        texts.append("starts with white space; the id must come first")
        line = line.lstrip()
    return line, [Problem(path, text, number, lossless=True) for text in texts]


def fail_on(problems: Sequence[Problem], advice: str = "") -> None:
    """Raise a UserError that lists the first problems, when there are any."""
    if problems:
        shown = [str(problem) for problem in problems[:_SHOWN]]
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
    table, problems = scan_table(path, allow_empty)
    fail_on(problems)
    return table.values


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


def parse_number(value: str) -> float:
    """A float as written in a table; NaN for what is not a number (float() would read 1_0 as 10)."""
    try:
        return math.nan if "_" in value else float(value)
    except ValueError:
        return math.nan


def label_problem(value: str, label_range: tuple[float, float] = LABEL_RANGE) -> str | None:
    """What is wrong with a label as written, or None."""
    number = parse_number(value)
    if math.isnan(number) or math.isinf(number):
        return f"label {value!r} is not a finite number; correct it or leave the utterance out"
    if not label_range[0] <= number <= label_range[1]:
        return (
            f"label {value} is outside [{label_range[0]:g}, {label_range[1]:g}]; correct it or leave the utterance out"
        )
    return None


def label_problems(table: Table, label_range: tuple[float, float] = LABEL_RANGE) -> list[Problem]:
    """A problem for each label that is not a number within ``label_range``; empty values are :func:`scan_table`'s."""
    found = ((key, label_problem(value, label_range)) for key, value in table.values.items() if value)
    return [table.problem(key, text) for key, text in found if text]


def read_labels(path: str | os.PathLike, label_range: tuple[float, float] = LABEL_RANGE) -> dict[str, float]:
    """Read ``utt2label``: utt -> sentiment.

    Raises:
        UserError: as :func:`read_table`, and when a label is not a finite number within ``label_range``.
    """
    table, problems = scan_table(path)
    fail_on(problems + label_problems(table, label_range))
    return {key: float(value) for key, value in table.values.items()}


# ------------------------------------------------------------------------------------------------------ CSV and TSV


@dataclass
class Sheet:
    """The lines of a CSV file: for each its number in the file, and its values by column as the file calls it."""

    path: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, str]]] = field(default_factory=list)


def read_csv(path: Path) -> Sheet:
    """Read a CSV (comma, semicolon, bar) or TSV file with a header; every line must have as many columns as that.

    Raises:
        UserError: naming the line: another number of columns, a quotation mark that is not closed or closed too late, a
            column name given twice; or the file cannot be read or is not UTF-8 (or UTF-16 with its mark).
    """
    content = _decode(path)
    first = content.split("\n", 1)[0]
    if re.fullmatch(r"sep=.", first.strip(), re.IGNORECASE):  # a spreadsheet's note to itself
        content = content[len(first) :]
        first = content[1:].split("\n", 1)[0]
    delimiter = max("\t;,|", key=lambda c: (first.count(c), c == ","))
    if not first.strip():
        raise UserError(f"{path}:1: no header; the first line must name the columns")
    plain = _unquoted(content) if delimiter == "\t" else []
    lines = plain or list(_quoted(path, content, delimiter))
    header = [" ".join(name.split()) for name in lines[0][1]]
    lowered = [name.casefold() for name in header]
    if doubled := [name for name in header if lowered.count(name.casefold()) > 1]:
        raise UserError(f"{path}:1: two columns are called {doubled[0]!r}; rename one")
    table = Sheet(path, header)
    for number, values in lines[1:]:
        if len(values) != len(header):
            kind = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}[delimiter]
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
