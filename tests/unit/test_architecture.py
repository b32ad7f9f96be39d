"""The shape of the package: who imports whom, how many modules there are, and how long files and functions are."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted((ROOT / "sdumc").rglob("*.py"))
}
SOURCES = ("sdumc/**/*.py", "utils/*.py", "tools/*.py", "egs/**/*.py", "tests/**/*.py")
LONGEST_FUNCTION, LONGEST_MAIN, LONGEST_FILE = 80, 40, 560
READING_ORDER = (
    *("data", "pretrained", "model", "losses", "corpora"),
    *("extraction", "scoring", "training", "reporting", "prediction"),
)
MOST_MODULES = 70  # besides commands and benchmarks: what is new extends the module of its concept


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def functions(tree: ast.AST, prefix: str = ""):
    """(qualified name, lines) of every function; a nested one is counted in the outer one too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}{node.name}"
            if not isinstance(node, ast.ClassDef):
                yield name, (node.end_lineno or 0) - node.lineno + 1
            yield from functions(node, f"{name}.")
        else:
            yield from functions(node, prefix)


def names_of(node: ast.AST) -> list[str]:
    """Modules of the package that an import statement names; ``from sdumc.a import b`` may name sdumc.a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in MODULES]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        parts = [f"{node.module}.{alias.name}" for alias in node.names]
        return [p for p in parts if p in MODULES] or ([node.module] if node.module in MODULES else [])
    return []


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@cache
def imports(module: str, inside_functions: bool) -> frozenset[str]:
    """What a module imports when it is loaded, and with ``inside_functions`` also what it imports later."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if for_types_only(child) or (
                not inside_functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            ):
                continue
            found.update(names_of(child))
            walk(child)

    walk(tree_of(module))
    # Whoever imports a module has loaded the package before it; the package itself loads `Scorer` on request only.
    return frozenset(found - {module, "sdumc"})


def cycles(inside_functions: bool) -> list[list[str]]:
    """Groups of modules that all reach each other."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for name in imports(todo.pop(), inside_functions) - seen:
                seen.add(name)
                todo.append(name)
        return seen

    reach = {module: reached(module) for module in MODULES}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in MODULES if a in reach[a]}
    return sorted(map(list, groups))


@pytest.mark.parametrize("inside_functions", [False, True], ids=["when loaded", "also inside functions"])
def test_no_import_cycle(inside_functions):
    assert cycles(inside_functions) == []


def test_functions_are_short():
    files = [path for pattern in SOURCES for path in sorted(ROOT.glob(pattern)) if not path.is_symlink()]
    assert len(files) > 100
    long = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name, lines in functions(ast.parse(path.read_text()))
        if lines > (LONGEST_MAIN if name == "main" else LONGEST_FUNCTION)
    ]
    assert long == []


def test_modules_are_few_and_fit_a_sitting():
    lines = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in MODULES.values()}
    assert {file: n for file, n in lines.items() if n > LONGEST_FILE} == {}
    apart = ("sdumc.bin", "sdumc.bench")
    parts = [m for m, p in MODULES.items() if p.name != "__init__.py" and not m.startswith(apart)]
    assert 50 < len(parts) <= MOST_MODULES


def test_parts_never_import_commands():
    guilty = {
        (module, name)
        for module in MODULES
        if not module.startswith("sdumc.bin")
        for name in imports(module, True)
        if name.startswith("sdumc.bin")
    }
    assert not guilty


def test_parts_import_only_what_comes_before_them():
    part_of = {m: m.split(".")[1] for m in MODULES if m.count(".") == 2 and m.split(".")[1] in READING_ORDER}
    assert set(part_of.values()) == set(READING_ORDER)
    guilty = [
        (module, name)
        for module, part in part_of.items()
        for name in imports(module, True)
        if name in part_of and READING_ORDER.index(part_of[name]) > READING_ORDER.index(part)
    ]
    assert guilty == []


@pytest.mark.parametrize(
    ("part", "stranger"),
    [
        ("data", "model"),
        ("data", "training"),
        ("data", "losses"),
        ("losses", "model"),
        ("model", "data"),
        ("model", "losses"),
    ],
)
def test_parts_that_know_nothing_of_each_other(part, stranger):
    guilty = [
        (module, name)
        for module in MODULES
        if module.startswith(f"sdumc.{part}.")
        for name in imports(module, True)
        if name.startswith(f"sdumc.{stranger}.") or name == f"sdumc.{stranger}"
    ]
    assert not guilty
