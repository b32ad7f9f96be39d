"""egs/mini at a size that runs in a minute or two, in a repository of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "corpus": "num-pretrain: 16\nnum-pretrain-speakers: 2\nnum-train: 24\nnum-train-speakers: 3\n"
    "num-valid: 6\nnum-valid-speakers: 1\nnum-test: 6\n"
    "num-test-speakers: 2\nnoise-min: 0.01\nnoise-max: 0.02\npretrain-noise-min: 0.01\nframe-size: 64\n",
    "pretrain": "encoder-front-steps: 3\nencoder-steps: 4\nllm-steps: 4\nvision-steps: 4\n",
    "projector": "k: 5\nhidden: 32\nsteps: 3\nbatch-size: 4\nwarmup-steps: 1\nvalid-interval: 3\nmax-new-tokens: 5\n",
    "simulation": "layers: [1]\nbeam: 2\nmax-new-tokens: 6\n",
    "train": "batch-size: 8\nepochs: 2\nlr: 0.001\ndim: 32\ncontent-dim: 16\n",
}


def make_small_mini(root: Path) -> Path:
    """Copy egs/mini to ``root``/egs/mini with settings of :data:`SMALL`, beside links to all that it needs."""
    folder = root / "egs" / "mini"
    made = ("corpus", "models", "data", "dump", "exp", ".done", "RESULTS.md", ".corpus.partial")
    shutil.copytree(ROOT / "egs" / "mini", folder, symlinks=True, ignore=shutil.ignore_patterns(*made))
    for name in ("sdumc", "utils"):
        (root / name).symlink_to(ROOT / name)
    (root / "egs" / "TEMPLATE").symlink_to(ROOT / "egs" / "TEMPLATE")
    (root / "tools").mkdir()
    if (ROOT / "tools" / "venv").exists():
        (root / "tools" / "venv").symlink_to(ROOT / "tools" / "venv")
    (root / "tools" / "setup_env.sh").write_text("#!/bin/sh\nexit 0\n")
    (root / "tools" / "setup_env.sh").chmod(0o755)
    for name, text in SMALL.items():
        (folder / "conf" / f"{name}.yaml").write_text(text)
    return folder
