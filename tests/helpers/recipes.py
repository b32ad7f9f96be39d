"""Recipes copied into a repository of their own, so that what they write does not come into this one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MADE = ("corpus", "models", "data", "dump", "exp", ".done", "RESULTS*.md", ".corpus.partial")


def copy_recipes(root: Path, *names: str) -> Path:
    """Copy egs/NAME of each name to ``root``, beside links to all that recipes need; gives the folder of the last."""
    for name in names:
        shutil.copytree(ROOT / "egs" / name, root / "egs" / name, symlinks=True, ignore=shutil.ignore_patterns(*MADE))
    for name in ("sdumc", "utils", "egs/TEMPLATE"):
        (root / name).symlink_to(ROOT / name)
    (root / "tools").mkdir()
    for name in ("venv", "import_checkpoint.py"):
        if (ROOT / "tools" / name).exists():
            (root / "tools" / name).symlink_to(ROOT / "tools" / name)
    set_up = root / "tools/setup_env.sh"
    set_up.write_text("#!/bin/sh\nexit 0\n")
    set_up.chmod(0o755)
    return root / "egs" / names[-1]


def call_recipe(folder: Path, *words: object, script: str = "./run.sh", code: int = 0) -> str:
    """Call a recipe's script, which must end with ``code``; gives what it printed."""
    done = subprocess.run(
        [script, *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


# egs/mini at a size that runs in a minute or two.
SMALL = {
    "corpus": "num-pretrain: 16\nnum-pretrain-speakers: 2\nnum-train: 24\nnum-train-speakers: 3\n"
    "num-valid: 6\nnum-valid-speakers: 1\nnum-test: 6\n"
    "num-test-speakers: 2\nnoise-min: 0.01\nnoise-max: 0.02\npretrain-noise-min: 0.01\nframe-size: 64\n",
    "pretrain": "jobs: 1\nencoder-front-steps: 3\nencoder-steps: 4\nllm-steps: 4\nvision-steps: 4\n",
    "projector": "k: 5\nhidden: 32\nsteps: 3\nbatch-size: 4\nwarmup-steps: 1\nvalid-interval: 3\nmax-new-tokens: 5\n",
    "simulation": "layers: [1]\nbeam: 2\nmax-new-tokens: 6\n",
    "train": "batch-size: 8\nepochs: 2\nlr: 0.001\ndim: 32\ncontent-dim: 16\n",
}


def make_small_mini(root: Path) -> Path:
    """Copy egs/mini to ``root``/egs/mini with settings of :data:`SMALL`."""
    folder = copy_recipes(root, "mini")
    for name, text in SMALL.items():
        (folder / "conf" / f"{name}.yaml").write_text(text)
    return folder
