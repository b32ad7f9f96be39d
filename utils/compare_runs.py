#!/usr/bin/env python3
"""Usage: utils/compare_runs.py FOLDER OTHER_FOLDER

Compares the files of two runs of a recipe, byte by byte: corpus, models, data, dump, exp and RESULTS.md of both recipe
folders. Logs, TensorBoard's files and locks are left out, and where a folder's own path stands in a file, it counts as
the same. One line is printed for each file that differs or that only one run has; then the exit code is 1.

Two runs of the same code on one machine, with the same seed and ranks, write the same files: so this shows whether a
change of the code altered any result.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdumc.errors import EXIT_USAGE, EXIT_USER_ERROR

PARTS = ("corpus", "models", "data", "dump", "exp", "RESULTS.md")
MOST = 60  # characters of a line that are shown


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a run that are compared, by their path within the recipe's folder."""
    found = (path for part in PARTS for path in (folder / part, *(folder / part).rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in sorted(found) if not left_out(path)}


def left_out(path: Path) -> bool:
    """Whether a file tells of the run itself (times, machine), not of its results."""
    return path.suffix in (".log", ".lock") or path.name == ".lock" or path.name.startswith("events.out.tfevents")


def content(path: Path, folder: Path) -> bytes:
    """A file without the path of the folder that it is in."""
    return path.read_bytes().replace(str(folder.resolve()).encode(), b"FOLDER")


def difference(a: bytes, b: bytes) -> str:
    """Where two files differ: the first line of texts, or the sizes of others."""
    if b"\0" in a or b"\0" in b:
        return f"{len(a)} and {len(b)} bytes" if len(a) != len(b) else f"other content, {len(a)} bytes"
    first, second = (text.decode(errors="replace").split("\n") for text in (a, b))
    number = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    if number is None:
        return f"{len(first)} and {len(second)} lines"
    return f"line {number + 1}: {first[number][:MOST]!r} and {second[number][:MOST]!r}"


def compare(first: Path, second: Path) -> tuple[int, list[str]]:
    """The number of files that are the same, and a line for each that is not."""
    a, b = files_of(first), files_of(second)
    same, lines = 0, []
    for name in sorted({*a, *b}):
        if name not in a or name not in b:
            lines.append(f"{name}: only in {first if name in a else second}")
        elif (x := content(a[name], first)) != (y := content(b[name], second)):
            lines.append(f"{name}: {difference(x, y)}")
        else:
            same += 1
    return same, lines


def main(argv: list[str]) -> int:
    if argv[:1] in (["--help"], ["-h"]) or len(argv) != 2:
        print((__doc__ or "").strip(), file=sys.stdout if argv[:1] else sys.stderr)
        return 0 if argv[:1] in (["--help"], ["-h"]) else EXIT_USAGE
    first, second = map(Path, argv)
    for folder in (first, second):
        if not files_of(folder):
            print(f"error: {folder}: no run of a recipe is here; it has none of {', '.join(PARTS)}", file=sys.stderr)
            return EXIT_USER_ERROR
    same, lines = compare(first, second)
    for line in lines:
        print(line)
    print(f"{same} files are the same, {len(lines)} differ or are in one run only")
    return EXIT_USER_ERROR if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
