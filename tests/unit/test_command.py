"""The command `sdumc`: its list of commands, calls, completion, and what it imports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdumc.__main__ import COMMANDS, module_of, overview

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ}


def call(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sdumc", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment})


def test_every_command_is_listed_once():
    modules = [path.stem for path in (ROOT / "sdumc/bin").glob("[a-z]*.py")]
    assert sorted(COMMANDS) == sorted([*modules, "bench"])
    listed = [line.split()[0] for line in overview().splitlines() if re.match(r"  \w", line)]
    assert listed == list(COMMANDS)
    assert max(map(len, overview().splitlines())) <= 100


def test_a_command_is_the_module(tmp_path):
    predictions = tmp_path / "predictions.tsv"
    predictions.write_text(
        "utt_id\tprediction\tlabel\n" + "".join(f"u{i:02d}\t{i / 10}\t{i / 9 - 1}\n" for i in range(20))
    )
    done = call("score", "--predictions", str(predictions), "--output", str(tmp_path / "score.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "score.json").read_text())["n"] == 20
    refused = call("score", "--predictions", str(tmp_path / "none.tsv"), "--output", str(tmp_path / "x.json"))
    assert (
        refused.returncode == 1 and "none.tsv: cannot be read" in refused.stderr and "Traceback" not in refused.stderr
    )


def test_help_of_a_command_names_it():
    done = call("train-projector", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: sdumc train_projector ")


def test_unknown_settings_point_to_the_help(tmp_path):
    (tmp_path / "c.yaml").write_text("layers: 3\n")
    done = call("extract_audio", "--config", str(tmp_path / "c.yaml"))
    assert done.returncode == 2 and "unknown key 'layers'; `sdumc extract_audio --help`" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "usage: sdumc COMMAND"),
        (["--help"], 0, "usage: sdumc COMMAND"),
        (["--version"], 0, "sdumc "),
        (["trian"], 2, "did you mean train?"),
        (["xyz"], 2, "no command 'xyz'; `sdumc --help`"),
    ],
)
def test_calls_without_a_command(words, code, said):
    done = call(*words)
    assert done.returncode == code and said in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("sdumc tr", {"train", "train_projector"}),
        ("sdumc score --ro", {"--rounding"}),
        ("sdumc score --rounding ", {"half-even", "away"}),
    ],
)
def test_completion(tmp_path, typed, offered):
    answer = tmp_path / "answer"
    answer.touch()
    call(
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_STDOUT_FILENAME=str(answer),
        _ARGCOMPLETE_IFS="\n",
        COMP_LINE=typed,
        COMP_POINT=str(len(typed)),
    )
    found = {word.strip() for word in answer.read_text().splitlines()}
    assert found == offered


def test_help_needs_no_torch(record_property):
    """All parsers are built in a fresh Python in which torch and transformers cannot be imported."""
    script = """
import importlib, json, sys, time
from sdumc.__main__ import COMMANDS, module_of
sys.modules.update(torch=None, transformers=None)
failed, seconds = {}, {}
for name in COMMANDS:
    start = time.perf_counter()
    try:
        importlib.import_module(module_of(name)).get_parser().format_help()
    except ImportError as e:
        failed[name] = str(e)
    seconds[name] = round(time.perf_counter() - start, 3)
print(json.dumps([failed, seconds]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    failed, seconds = json.loads(done.stdout)
    record_property("seconds", seconds)
    print("seconds to build each parser, in this order:", seconds)
    assert not failed


def test_modules_have_the_two_functions():
    """What both `sdumc X` and `python -m sdumc.bin.X` rely on."""
    for name in COMMANDS:
        source = (ROOT / (module_of(name).replace(".", "/") + ".py")).read_text()
        assert "\ndef get_parser() -> Parser:" in source or "import get_parser" in source, name
        assert "\ndef main(argv: Sequence[str] | None = None)" in source and "\n    run(main)\n" in source, name
