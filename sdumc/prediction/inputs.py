"""The files to score and their transcripts, as the command line of ``sdumc predict`` names them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sdumc.errors import UserError
from sdumc.prediction.subtitles import SUFFIXES, Cue, is_subtitles, read_subtitles, read_text, refuse_other_forms

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
