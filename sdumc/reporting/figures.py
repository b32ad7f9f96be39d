"""All figures of a report, in the order in which the page shows them."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.reporting.attention import attention_over_frames
from sdumc.reporting.curves import training_curves
from sdumc.reporting.drawing import Figure
from sdumc.reporting.errors import error_by_label, error_by_speaker, predicted_vs_true
from sdumc.reporting.internals import query_weights, similarity
from sdumc.reporting.runs import Run
from sdumc.reporting.sets import TestSet


def training_figures(runs: Sequence[Run], valid_set: str) -> list[Figure]:
    """Figures of the training."""
    return [training_curves(runs, valid_set)]


def set_figures(test_set: TestSet, runs: Sequence[Run]) -> list[Figure]:
    """All figures that can be drawn of one decoded set."""
    figures = [
        predicted_vs_true(test_set, runs),
        error_by_label(test_set),
        similarity(test_set, runs),
        query_weights(test_set, runs),
        error_by_speaker(test_set),
        attention_over_frames(test_set, runs),
    ]
    return [figure for figure in figures if figure is not None]
