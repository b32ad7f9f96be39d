"""docs/map.md and the ten questions of CONTRIBUTING.md name modules, functions and files that exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def table(path: Path, first_column: str) -> list[dict[str, str]]:
    """The rows of the table whose header begins with a column of this name."""
    rows: list[list[str]] = []
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and (rows or cells[0] == first_column):
            rows.append(cells)
        elif rows:
            break
    header, _, *body = rows
    return [dict(zip(header, row, strict=True)) for row in body]


MAP = table(ROOT / "docs/map.md", "stage")
QUESTIONS = table(ROOT / "CONTRIBUTING.md", "question")
# `ark/<name>.<job>.ark`, of the tables and lists of files.md; the folders are its headings and sentences.
FILES = set(codes((ROOT / "docs/files.md").read_text()))


@pytest.mark.parametrize("row", MAP, ids=lambda row: row["function"])
def test_functions_of_the_map(row):
    (module,), (function,) = codes(row["module"]), codes(row["function"])
    found = importlib.import_module(module)
    for name in function.split("."):
        found = getattr(found, name)
    assert callable(found) and found.__module__ == module, f"{function} is imported there from {found.__module__}"


def test_the_map_follows_all_stages():
    assert len(MAP) > 30
    stages = [row["stage"][0] for row in MAP]
    assert stages == sorted(stages)
    for stage in "123456":
        assert any(stage in row["stage"] and codes(row["file"]) for row in MAP)


@pytest.mark.parametrize("file", sorted({file for row in MAP for file in codes(row["file"])}))
def test_files_of_the_map(file):
    inner = re.sub(r"^(data/<set>/|dump/<set>/|exp/<tag>_seed<N>/|exp/<tag>/)", "", file)
    assert inner in FILES, f"docs/files.md does not describe {inner}"


def defined_in(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def test_ten_questions():
    assert len(QUESTIONS) == 10
    for row in QUESTIONS:
        files, functions = codes(row["file"]), codes(row["function"])
        assert files and functions and row["question"].rstrip(".").count("?") == 1
        own = {file: defined_in(ROOT / file) for file in files}
        for function in functions:
            assert any(function in names for names in own.values()), f"{function} is in none of {', '.join(files)}"
        assert all(any(f in names for f in functions) for names in own.values()), f"nothing is named of one of {files}"


def test_other_names_of_the_map():
    """Paths and dotted names in the map's sentences."""
    text = "".join(line for line in (ROOT / "docs/map.md").open() if not line.startswith("|"))
    for code in codes(text):
        if re.fullmatch(r"(sdumc|egs|utils)/[\w/.]+", code):
            assert (ROOT / code).exists(), code
        elif code.startswith("sdumc."):
            module, _, names = code.partition(".Scorer")
            assert hasattr(importlib.import_module(module).Scorer, names.lstrip("."))
