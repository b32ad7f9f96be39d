"""Rank-N-Contrast, forward and backward, against its definition."""

from __future__ import annotations

import torch

from sdumc.bench.measure import goal, interleaved, median, ratio, spread, table
from sdumc.bench.plain import plain_rank_n_contrast
from sdumc.losses.objective import rank_n_contrast

BATCHES = (32, 64, 96, 128, 256, 512, 1024)
# The definition at batch 1024 would need a minute and 17 GB a call.
_LARGEST_PLAIN = 512


def main(repeats: int) -> bool:
    """Print a row for each batch size (the contrast set is twice as large: two flows); whether the goal is reached."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, gain = [], 0.0
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(2 * batch, 64, generator=generator).to(device).requires_grad_()
        y = (torch.randint(-9, 10, (batch,), generator=generator) / 3).repeat(2).to(device)

        def ours(x=x, y=y):
            rank_n_contrast(x, y).backward()

        def plain(x=x, y=y):
            plain_rank_n_contrast(x, y).backward()

        if batch > _LARGEST_PLAIN:
            times = interleaved({"ours": ours}, repeats)
            rows.append([str(batch), "-", f"{1e3 * median(times['ours']):.1f}", spread(times["ours"]), "-"])
            continue
        times = interleaved({"plain": plain, "ours": ours}, repeats if batch < 256 else min(repeats, 3))
        gain = ratio(times["plain"], times["ours"])
        rows.append(
            [
                str(batch),
                f"{1e3 * median(times['plain']):.1f}",
                f"{1e3 * median(times['ours']):.1f}",
                spread(times["ours"]),
                f"{gain:.1f}",
            ]
        )
    print(table(["batch", "definition (ms)", "ours (ms)", "ours, range (s)", "times as fast"], rows))
    print()
    return goal(f"times as fast at batch {_LARGEST_PLAIN}", gain, least=30)
