"""Importing the package and asking any command for help warns of nothing."""

from __future__ import annotations

import subprocess
import sys
import warnings
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


def test_what_is_deprecated_is_an_error_in_tests():
    """As `filterwarnings` in pyproject.toml and `refuse_deprecations` in tests/conftest.py have it."""
    for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning, UserWarning):
        with pytest.raises(kind):
            warnings.warn("`x` is deprecated", kind, stacklevel=1)
    from transformers.utils.logging import get_logger

    logger = get_logger("transformers.somewhere")
    for warn in (logger.warning, logger.warning_once):
        with pytest.raises(DeprecationWarning, match="use `y`"):
            warn("`x` is deprecated, use `y`")
