"""OpenMP's threads soon sleep while they wait, however sdumc is started, unless the user has said otherwise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdumc import WAITING, WAITING_NAMES

ROOT = Path(__file__).resolve().parents[2]
OURS = WAITING["GOMP_SPINCOUNT"]
PYTHON = [sys.executable]
STEP = ["-m", "sdumc.bin.train", "--dry-run", "--config", "conf/train.yaml"]
RECIPE = f". ./path.sh && python3 -S -E utils/ranks.py 2 python3 {' '.join(STEP)}"
# How it is started, and what each process with torch in it says.
STARTS = {
    "a command": ([*PYTHON, *STEP], [OURS]),
    "ranks in a recipe": (["bash", "-c", RECIPE], [OURS, OURS]),
    # torchrun itself has torch without sdumc; it computes nothing.
    "torchrun": ([*PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "1", *STEP], ["300000", OURS]),
    "Scorer": ([*PYTHON, "-c", "from sdumc import Scorer"], [OURS]),
    "pytest": ([*PYTHON, "-m", "pytest", "-s", "-q", "--collect-only", f"{ROOT}/tests/unit/test_losses.py"], [OURS]),
}


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in WAITING_NAMES}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix, **more}


def spins(command: list[str], env: dict[str, str]) -> list[str]:
    """How often a waiting thread looks before it sleeps, as the runtime says in every process."""
    env = {**env, "OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(command, cwd=ROOT / "egs/mini", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)


@pytest.mark.parametrize("start", STARTS)
def test_threads_soon_sleep(start):
    command, expected = STARTS[start]
    assert spins(command, environment()) == expected


@pytest.mark.parametrize("setting", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "300000"}])
def test_what_the_user_has_set_stays(setting):
    expected = setting.get("GOMP_SPINCOUNT", "30000000000")
    assert spins([*PYTHON, "-c", "from sdumc import Scorer"], environment(**setting)) == [expected]


@pytest.mark.parametrize("setting", [{}, *({name: "1"} for name in WAITING_NAMES), {"OMP_NUM_THREADS": "3"}])
def test_nothing_else_is_set(setting):
    code = "import os; before = dict(os.environ); import sdumc; after = dict(os.environ)\n"
    code += "print({k: v for k, v in after.items() if before.get(k) != v}, before.keys() <= after.keys())"
    done = subprocess.run([*PYTHON, "-c", code], env=environment(**setting), cwd=ROOT, capture_output=True, text=True)
    changed = {} if setting.keys() & set(WAITING_NAMES) else WAITING
    assert done.stdout == f"{changed} True\n"
