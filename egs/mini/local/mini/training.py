"""What the trainings of mini's small models share: seeds, the optimiser's loop, batches, saving.

Each model is trained from random weights on the corpus's set for it (pretrain), is a class of transformers, and is
written with save_pretrained; later stages load it as they load WavLM-large, Vicuna and any ViT. Lengths of training are
in steps, not seconds, so that a seed gives the same weights again on the same machine.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

log = logging.getLogger("sdumc")


def seed_everything(seed: int) -> np.random.Generator:
    """Seed torch and numpy's global state (transformers draws SpecAugment masks from it); return a generator."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    return np.random.default_rng(seed)


def save_whole(folder: Path, save: Callable[[Path], None]) -> None:
    """Call ``save`` with a temporary folder and rename that to ``folder``: a model is there whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def optimise(
    model: nn.Module, steps: int, lr: float, warmup: int, loss_at: Callable[[int], Tensor], weight_decay: float = 0.01
) -> None:
    """Train what is not frozen of ``model`` with AdamW: linear warm-up, cosine to zero, gradient norm at most 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    start, running = time.perf_counter(), 0.0
    model.train()
    for step in range(steps):
        rise, fall = min(1.0, (step + 1) / max(1, warmup)), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rise * fall
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            count = step % 100 + 1
            log.info("step %d/%d loss %.4f, %.0f s", step + 1, steps, running / count, time.perf_counter() - start)
            running = 0.0
    model.eval()


def batches(rng: np.random.Generator, lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of indices for ever: shuffled, of about equal lengths inside a batch."""
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order), 8 * size):
            pool = sorted(order[start : start + 8 * size].tolist(), key=lambda i: lengths[i])
            pieces = [pool[i : i + size] for i in range(0, len(pool), size)]
            for i in rng.permutation(len(pieces)):
                yield pieces[i]
