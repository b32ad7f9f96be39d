"""What all Python tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works also without an installed sdumc
import sdumc  # noqa: E402, F401 (before torch: it says how threads wait)

# Before torch or transformers are imported: nothing is ever downloaded, and small tests do not fight over the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def media_dir() -> Path:
    """A folder of real recordings (MPEG video with sound), where the tester has one."""
    path = Path(os.environ.get("SDUMC_TEST_MEDIA", ROOT.parent / "shared" / "media"))
    if not path.is_dir():
        pytest.skip("no folder of real recordings; SDUMC_TEST_MEDIA can name one")
    return path
