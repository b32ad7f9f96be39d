"""A short trial of a model that was just loaded: it must give the same for a clip or picture alone and in a batch.

Padding, batch statistics and randomness make some architectures break that rule. No list of names is complete, so every
model is tried on a little seeded noise before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sdumc.errors import UserError
from sdumc.pretrained.folders import first_line

_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.2}
R = TypeVar("R")


def trial_waves() -> list[np.ndarray]:
    """Three clips (T_i,) of noise at 16 kHz, 0.6, 0.25 and 0.43 s: the same at every call."""
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, size).astype(np.float32) for size in (9600, 4000, 6900)]


def trial_pictures() -> list[np.ndarray]:
    """Three square RGB pictures of 64, 80 and 96 pixels, uint8: the same at every call."""
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(3)]
    return [np.kron(c, np.ones((n, n, 1), np.uint8)) for c, n in zip(coarse, (8, 10, 12), strict=True)]


def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """How much two results differ: the largest root mean square over D of a frame's difference.

    Each dimension is measured in its own root mean square over ``first``: some encoders have a few dimensions with
    values a hundred times those of the others.

    Args:
        first, second: tensors (T_i, D), one for each clip or picture.

    Returns:
        0 for equal results; infinite if shapes differ or a value is not finite.
    """
    if [x.shape for x in first] != [x.shape for x in second]:
        return float("inf")
    a, b = torch.cat(list(first)).double(), torch.cat(list(second)).double()
    scale = a.square().mean(0).sqrt()
    scale = scale.clamp_min(1e-3 * float(scale.square().mean().sqrt()) + 1e-12)
    worst = float(((a - b) / scale).square().mean(1).sqrt().max())
    return worst if np.isfinite(worst) else float("inf")


def same(first: Sequence[Tensor], second: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether two results, computed in ``dtype``, differ by no more than its rounding."""
    return difference(first, second) <= _TOLERANCE[dtype]


def attempt(compute: Callable[[], R], refusal: str) -> R:
    """``compute()``; any failure within the model becomes a :class:`UserError` that begins with ``refusal``."""
    try:
        return compute()
    except UserError:
        raise
    except Exception as e:  # architectures fail in their own ways on input that they are not made for
        raise UserError(f"{refusal}: {first_line(e)}") from None


def try_clips(
    compute: Callable[[Sequence[np.ndarray]], list[Tensor]],
    num_frames: Callable[[int], int] | None,
    dtype: torch.dtype,
    refusal: str,
) -> tuple[bool, list[Tensor]]:
    """Try a model on three clips alone, again, and in a batch.

    Args:
        compute: clips (T_i,) at 16 kHz -> (frames_i, D). num_frames: frames that a clip of so many samples must give.
        refusal: how the error begins, with the model's folder.

    Returns:
        Whether the model must be given one clip at a time, as its frames depend on what else is in the batch; and the
        frames of the three clips alone.

    Raises:
        UserError: it fails on a single clip, gives another number of frames or values that are not finite, or does
            not repeat itself.
    """
    waves = trial_waves()

    def alone() -> list[Tensor]:
        return [compute([w])[0] for w in waves]

    first = attempt(alone, refusal)
    for wave, frames in zip(waves, first, strict=True):
        if num_frames is not None and len(frames) != num_frames(len(wave)):
            expected, seconds = num_frames(len(wave)), len(wave) / 16000
            raise UserError(
                f"{refusal}: {len(frames)} frames for {seconds:g} s of sound, where {expected} are expected"
            )
        if not bool(torch.isfinite(frames).all()):
            raise UserError(f"{refusal}: its output is not finite in {str(dtype).removeprefix('torch.')}")
    if not same(first, attempt(alone, refusal), dtype):
        raise UserError(f"{refusal}: the same clip gives another result each time")
    try:
        together = compute(waves)
    except Exception:  # it works alone
        return True, first
    return not same(first, together, dtype), first
