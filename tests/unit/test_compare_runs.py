"""utils/compare_runs.py: which files of two runs of a recipe differ."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "utils/compare_runs.py"


def compare(*folders: object) -> tuple[int, list[str], str]:
    found = subprocess.run([sys.executable, SCRIPT, *map(str, folders)], capture_output=True, text=True, check=False)
    return found.returncode, found.stdout.splitlines(), found.stderr


@pytest.fixture()
def runs(tmp_path):
    """Two runs that differ in logs and in their own paths only."""
    for name in ("a", "b"):
        run = tmp_path / name
        for folder in ("dump/train/ark", "exp/train_seed1/tensorboard"):
            (run / folder).mkdir(parents=True)
        (run / "RESULTS.md").write_text("| full | 0.8 |\n")
        (run / "dump/train/ark/audio.1.ark").write_bytes(b"u1 \0BFM \4abcd")
        (run / "dump/train/audio.scp").write_text(f"u1 {run}/dump/train/ark/audio.1.ark:3\n")
        (run / "exp/train_seed1/train.log").write_text(f"12:00 {name}\n")
        (run / "exp/train_seed1/.lock").write_text(name)
        (run / f"exp/train_seed1/tensorboard/events.out.tfevents.{name}").write_text(name)
        (run / "elsewhere").write_text(name)
    return tmp_path / "a", tmp_path / "b"


def test_logs_and_the_folders_own_paths_do_not_count(runs):
    assert compare(*runs) == (0, ["3 files are the same, 0 differ or are in one run only"], "")


def test_each_file_that_differs_is_named(runs):
    a, b = runs
    (b / "RESULTS.md").write_text("| full | 0.8 |\n| none | 1.2 |\n")
    (b / "dump/train/ark/audio.1.ark").write_bytes(b"u1 \0BFM \4abce")
    (b / "dump/train/audio.scp").write_text("u1 other:3\n")
    (a / "exp/train_seed1/config.yaml").write_text("lr: 1\n")
    code, lines, _ = compare(a, b)
    assert code == 1 and lines == [
        "RESULTS.md: line 2: '' and '| none | 1.2 |'",
        "dump/train/ark/audio.1.ark: other content, 13 bytes",
        "dump/train/audio.scp: line 1: 'u1 FOLDER/dump/train/ark/audio.1.ark:3' and 'u1 other:3'",
        f"exp/train_seed1/config.yaml: only in {a}",
        "0 files are the same, 4 differ or are in one run only",
    ]


def test_a_folder_without_a_run_is_refused(runs, tmp_path):
    code, _, errors = compare(runs[0], tmp_path / "nothing")
    assert code == 1 and errors.startswith(f"error: {tmp_path / 'nothing'}: no run of a recipe is here")
    assert compare(runs[0])[0] == 2 and compare("--help")[0] == 0
