"""What the choice of the epoch says about a training run, for its log and for the report."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def median_mae(train_labels: Iterable[float], valid_labels: Iterable[float]) -> float:
    """MAE on valid of predicting the median of the train labels for every utterance."""
    return float(np.abs(np.array(list(valid_labels)) - np.median(list(train_labels))).mean())


def doubts(best_epoch: int, last_epoch: int, best_mae: float, median: float | None) -> list[str]:
    """Signs that a run was too short or has learned nothing, as sentences; empty for most runs.

    Args:
        best_mae: on valid, at the best epoch (mean over conditions).
        median: :func:`median_mae`, if it is known.
    """
    found = []
    if best_epoch == last_epoch:
        found.append(f"the best epoch is the last one ({last_epoch}): still improving; train longer")
    if median is not None and not best_mae < median:
        found.append(
            f"no epoch's valid MAE (at best {best_mae:.4f}) beat predicting the median of the train labels "
            f"({median:.4f}): the model has learned nothing that helps"
        )
    return found
