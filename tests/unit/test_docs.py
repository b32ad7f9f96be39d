"""The documentation against the code: links, commands, options, recipes; and the worked example, which is run."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from sdumc.__main__ import COMMANDS, module_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "egs").iterdir() if path.is_dir() and not path.name.startswith("."))
MINI_COMMANDS = ("make_corpus", "make_data", "pretrain")  # in egs/mini/local
# Folders from which a script is called in the docs.
PLACES = [ROOT, *RECIPES]
# Options of programs that are not ours, as the docs show them.
FOREIGN = {"--index", "--export", "--gres", "--signal", "--requeue", "--kill-on-bad-exit", "--local-dir"}


def markdown() -> list[Path]:
    """Every page that belongs to the repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # a source archive has no git
        found = [str(p.relative_to(ROOT)) for d in ("docs", "egs") for p in (ROOT / d).rglob("*.md")]
        found += [p.name for p in ROOT.glob("*.md")]
    return sorted(ROOT / name for name in found if name and (ROOT / name).is_file())


PAGES = [path for path in markdown() if not path.name.startswith("RESULTS")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parts(page: Path) -> tuple[str, list[tuple[str, str]]]:
    """The prose of a page, and its fenced blocks as (language, text)."""
    blocks: list[tuple[str, str]] = []

    def take(match: re.Match) -> str:
        blocks.append((match[1].strip(), match[2]))
        return ""

    return re.sub(r"^```(.*)\n((?:.*\n)*?)```$", take, page.read_text(encoding="utf-8"), flags=re.M), blocks


# ---------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The names that the headings of a page get on the web."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", parts(page)[0], flags=re.M):
        plain = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", parts(page)[0])):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{name_of(page)}: {target}: no such file"
        assert path == ROOT or ROOT in path.parents, f"{name_of(page)}: {target} leads out of the repository"
        if anchor:
            assert anchor in anchors(path), f"{name_of(page)}: {target}: {name_of(path)} has {sorted(anchors(path))}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


# ------------------------------------------------------------------------------------------- commands and options


@lru_cache
def parser_of(command: str) -> argparse.ArgumentParser:
    module = command if command in MINI_COMMANDS else module_of(command)
    return importlib.import_module(module).get_parser()


@pytest.mark.parametrize("command", [*COMMANDS, *MINI_COMMANDS])
def test_help_is_grouped_and_complete(command):
    """Every option says what it is, and stands in a named group, save the four that all commands share."""
    shared = {"--help", "--config", "--version", "--verbose"}
    for group in parser_of(command)._action_groups:
        for action in group._group_actions:
            name = (action.option_strings or [action.dest])[-1]
            assert action.help, f"{command}: {name} has no help"
            assert group.title not in ("options", "positional arguments") or name in shared, f"{command}: {name}"


def declared(script: Path) -> set[str]:
    """Options of a shell script, from the lines that utils/parse_options.sh reads."""
    lines = re.findall(r"^([a-z][a-z0-9_]*)=.*#: ", script.read_text(), flags=re.M)
    return {f"--{name.replace('_', '-')}" for name in lines}


@lru_cache
def options_of(script: Path) -> frozenset[str]:
    """The long options that a script takes."""
    if script.suffix == ".py":
        environment = {**os.environ}
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found = set(re.findall(r"--[a-z][a-z-]*", done.stdout))
    else:
        found = declared(script)
        if script.name == "run.sh" and "egs" in script.parts:
            found |= declared(ROOT / "egs/TEMPLATE/sdumc.sh")
            if (script.parent / "cmu.sh").exists():
                found |= declared(script.parent / "cmu.sh")
    return frozenset(found | {"--help"})


@lru_cache
def all_options() -> frozenset[str]:
    """Every option of every command and script."""
    found = set(FOREIGN)
    for command in COMMANDS:
        found |= {o for action in parser_of(command)._actions for o in action.option_strings}
    scripts = [
        *ROOT.glob("utils/*.sh"),
        *ROOT.glob("tools/*.sh"),
        *ROOT.glob("egs/*/*.sh"),
        *ROOT.glob("egs/*/local/*.sh"),
    ]
    for script in [*scripts, ROOT / "tests/run.sh"]:
        found |= declared(script)
    for name in ("run.py", "slurm.py", "step.py", "fix_data_dir.py", "validate_data_dir.py"):
        found |= options_of(ROOT / "utils" / name)
    return frozenset(
        found | options_of(ROOT / "tools/import_checkpoint.py") | options_of(ROOT / "tools/check_install.py")
    )


def commands(text: str) -> list[list[str]]:
    """The commands of a block: its lines as words, those that go on after a backslash joined."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # not a command
            continue
        while words and re.fullmatch(r"[A-Za-z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            found.append(words)
    return found


def long_options(words: list[str]) -> set[str]:
    return {"--" + w[2:].partition("=")[0].replace("_", "-") for w in words if re.match(r"--[a-z]", w)}


def check_command(words: list[str], where: str, own: frozenset[str] = frozenset()) -> None:
    """Fail if a command line has no such command, script or option; ``own`` are scripts that the page itself writes."""
    if words[0] in own:
        return
    if words[0] == "sdumc" and len(words) > 1:
        words = ["python", "-m", "sdumc", *words[1:]]
    if words[:2] in (["python", "-m"], ["python3", "-m"]) and len(words) > 2:
        if words[2] == "sdumc" and re.match("[a-z]", words[-1] if len(words) == 3 else words[3]):
            words = [*words[:2], f"sdumc.bin.{words[3]}", *words[4:]]
        name = words[2].removeprefix("sdumc.bin.").replace("sdumc.bench", "bench")
        if name == words[2]:
            return
        assert name in COMMANDS, f"{where}: there is no command {words[2]}"
        known = {o for action in parser_of(name)._actions for o in action.option_strings}
        unknown = long_options(words[3:]) - known
    elif re.match(r"(\./|\.\./|local/|utils/|tools/|tests/|egs/)\S+\.(sh|py)$", words[0]):
        found = [path for place in PLACES if (path := place / words[0]).is_file()]
        assert found, f"{where}: {words[0]}: no such script from any of the folders"
        if found[0].name in ("run.py", "slurm.py"):  # what follows the log is another's command line
            words = words[: next((i for i, w in enumerate(words) if w.endswith(".log")), None)]
        if "--" in words:
            words = words[: words.index("--")]
        known = frozenset().union(*(options_of(path) for path in found))
        unknown = long_options(words[1:]) - known
    else:
        return
    assert not unknown, f"{where}: {' '.join(words[:3])} has no {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options(page):
    prose, blocks = parts(page)
    own = frozenset(re.findall(r"^\*\*`([^`\n]+)`\*\*", prose, flags=re.M))
    for language, text in blocks:
        if language in ("", "sh", "bash", "console"):
            for words in commands(text):
                check_command(words, name_of(page), own)
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"sdumc\.bin\.([a-z_]+)", text):
        assert name in COMMANDS, f"{name_of(page)}: there is no command sdumc.bin.{name}"
    for code in re.findall(r"`([^`\n]+)`", prose):
        for words in commands(code):
            check_command(words, name_of(page), own)
            if words[0].startswith("--"):
                unknown = long_options(words) - all_options()
                assert not unknown, f"{name_of(page)}: no command has {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_the_text_names(page):
    """Paths of the repository between backticks exist."""
    for code in re.findall(r"`([^`\n]+)`", parts(page)[0]):
        for path in re.findall(r"^((?:docs|egs|sdumc|tests|tools|utils)/[\w./-]+\.(?:py|sh|md|yaml|svg|bats))\b", code):
            assert any((place / path).exists() for place in PLACES), f"{name_of(page)}: {path}: no such file"


# --------------------------------------------------------------------------------------------------------- recipes


def test_the_table_of_recipes():
    table = re.findall(r"^\| \[(\w+)\]\(\.\./egs/(\w+)\)", (ROOT / "docs/recipes.md").read_text(), flags=re.M)
    assert all(name == folder for name, folder in table)
    assert sorted(name for name, _ in table) == [path.name for path in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_shares_what_is_shared(recipe):
    for name in ("sdumc.sh", "path.sh", "cmd.sh", "conf/slurm.conf"):
        assert (recipe / name).read_bytes() == (ROOT / "egs/TEMPLATE" / name).read_bytes(), f"{recipe.name}/{name}"
    assert (recipe / "utils").resolve() == ROOT / "utils"
    assert os.access(recipe / "run.sh", os.X_OK)
    assert recipe.name == "TEMPLATE" or (recipe / "README.md").is_file(), f"{recipe.name} has no README.md"


SETTINGS = {
    "train": "train",
    "projector": "train_projector",
    "asr": "recognize",
    "simulation": "simulate_text",
    "audio": "extract_audio",
    "text": "extract_text",
    "video": "extract_video",
    "corpus": "make_corpus",
    "pretrain": "pretrain",
}
FILES = sorted((ROOT / "egs").glob("*/conf/**/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_settings_are_sound(path, capsys):
    """Every key is an option of its command, every value is allowed; training also builds the model and does a step."""
    command = "train" if path.parent.name == "ablation" else SETTINGS[path.stem.split("_")[0]]
    if command == "train":
        from sdumc.bin import train

        assert train.main(["--config", str(path), "--dry-run"]) == 0
        assert "settings are sound" in capsys.readouterr().out
        return
    parser = parser_of(command)
    needed = [word for action in parser._actions if action.required for word in (action.option_strings[0], "x")]
    parser.parse_args(["--config", str(path), *needed])


# --------------------------------------------------------------------------------------------- the worked example


def test_the_example_of_a_new_recipe(tmp_path):
    """docs/new_recipe.md, followed to the letter as far as stage 1."""
    from helpers.tiny_recipe import clip

    (tmp_path / "egs").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "utils").mkdir()
    for path in (ROOT / "utils").iterdir():
        if path.name != "new_recipe.sh":
            (tmp_path / "utils" / path.name).symlink_to(path)
    shutil.copy(ROOT / "utils/new_recipe.sh", tmp_path / "utils")
    (tmp_path / "sdumc").symlink_to(ROOT / "sdumc")
    (tmp_path / "egs/TEMPLATE").symlink_to(ROOT / "egs/TEMPLATE")
    if (ROOT / "tools/venv").exists():
        (tmp_path / "tools/venv").symlink_to(ROOT / "tools/venv")
    blocks = parts(ROOT / "docs/new_recipe.md")[1]
    table, data_py, data_sh = (next(t for kind, t in blocks if kind == k) for k in ("text", "python", "bash"))

    def call(words: str, folder: Path) -> str:
        done = subprocess.run(
            shlex.split(words, comments=True),
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    first = next(t for kind, t in blocks if kind == "" and "new_recipe" in t)
    assert "egs/reviews is made" in call(first, tmp_path)
    recipe = tmp_path / "egs/reviews"
    (recipe / "corpus/clips").mkdir(parents=True)
    (recipe / "corpus/reviews.csv").write_text(table)
    for number in range(1, 5):
        clip(recipe / f"corpus/clips/{number:04d}.mp4", 0.5, number)
    (recipe / "local/make_data.py").write_text(data_py)
    (recipe / "local/data.sh").write_text(data_sh)
    stage_1 = next(line for kind, t in blocks if kind == "" for line in t.splitlines() if "--stop-stage 1" in line)
    output = call(stage_1.partition("#")[0] + " --ngpu 0 --label-scale '1 5 nearest'", recipe)
    assert "stage 1 (data)" in output
    labels = dict(line.split() for s in ("train", "valid", "test") for line in (recipe / f"data/{s}/utt2label").open())
    assert labels == {"anna-0001": "5", "anna-0002": "2", "boris-0003": "4", "clara-0004": "1"}


def test_the_example_of_features_from_elsewhere(tmp_path, monkeypatch):
    """The arrays that docs/new_recipe.md writes are read back as a dump folder."""
    from sdumc.data.dump import load_dump

    example = [text for kind, text in parts(ROOT / "docs/new_recipe.md")[1] if kind == "python"][1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dump/train").mkdir(parents=True)
    exec(compile(example, "docs/new_recipe.md", "exec"), {})
    (tmp_path / "dump/train/utt2label").write_text("anna-0001 1\n")
    dump = load_dump("dump/train")
    assert dump.features["audio"].dim == 74 and dump.features["audio"].frames == {"anna-0001": 120}
