"""Importing the package and asking any command for help warns of nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(p.stem for p in (ROOT / "sdumc/bin").glob("[a-z]*.py"))
HELP = f"""
import importlib
for name in {COMMANDS}:
    module = importlib.import_module("sdumc.bin." + name)
    assert module.get_parser().format_help()
"""


@pytest.mark.parametrize("code", ["import sdumc; sdumc.__version__", HELP, "from sdumc import Scorer"])
def test_nothing_warns(code):
    # Of what other packages import only deprecations are an error here; they announce that something will break.
    strict = "error::DeprecationWarning" if "Scorer" in code else "error"
    done = subprocess.run([sys.executable, "-W", strict, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
