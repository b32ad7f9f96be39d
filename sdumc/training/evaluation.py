"""Scores on valid while training, each utterance once on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdumc.data.dump import Dump
from sdumc.model.network import SDUMC
from sdumc.scoring.decoding import decode
from sdumc.scoring.metrics import score
from sdumc.training.distributed import Ranks, gather_objects


def evaluate(model: SDUMC, dump: Dump, conditions: Sequence[str], ranks: Ranks) -> dict[str, dict[str, float]]:
    """Every measure by condition, the same on every rank."""
    scores = {}
    for condition in conditions:
        part = decode(model, dump, condition, ranks.device, (ranks.rank, ranks.size))
        mine = list(zip(part.ids, part.prediction, part.label, strict=True))
        rows = [row for rank in gather_objects(mine, ranks) for row in rank]
        rows.sort(key=lambda row: row[0])
        values = score(np.array([p for _, p, _ in rows]), np.array([y for _, _, y in rows]))
        scores[condition] = {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
    return scores
