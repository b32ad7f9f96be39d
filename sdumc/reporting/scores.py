"""The table of scores of one decoded set: a row per condition and baseline, and findings computed from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdumc.data.dump import Dump
from sdumc.reporting.baselines import FittedRidge
from sdumc.reporting.runs import Run
from sdumc.reporting.sets import TestSet
from sdumc.scoring.metrics import MEASURES, format_measure, score


@dataclass
class Row:
    """One line of a table of scores: the mean over seeds, and the sample standard deviation where there are several."""

    title: str
    kind: str  # model, ridge or median
    condition: str
    values: dict[str, tuple[float, float | None]]

    def text(self, measure: str) -> str:
        """One cell; see :func:`sdumc.scoring.metrics.format_measure`."""
        return format_measure(measure, *self.values[measure])


@dataclass
class SetSummary:
    test_set: TestSet
    rows: list[Row]
    recovered: tuple[float, float | None]  # share of the gap between none and full; NaN where undefined
    findings: list[tuple[bool, str]]  # whether it holds, and what
    notes: list[str]
    penalties: dict[str, float]  # of the ridge regression per condition

    @property
    def recovered_sentence(self) -> str:
        """The share of the gap between no text and real text that simulated text closes, in words."""
        missing = self.test_set.conditions.get("missing")
        if missing and missing.without_simulated_text:
            return f"No text was simulated for {self.test_set.name}: missing is the same as none."
        mean, deviation = self.recovered
        if math.isnan(mean):
            return "Share of the gap between none and full that missing recovers: undefined here."
        text = f"{100 * mean:.0f}%" if deviation is None else f"{100 * mean:.0f} ± {100 * deviation:.0f}%"
        return f"Simulated text recovers {text} of the gap in MAE between none and full."


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1) of one value a seed; no deviation for a single seed."""
    v = np.asarray(values, dtype=np.float64)
    return float(v.mean()), float(v.std(ddof=1)) if v.size > 1 else None


def summarise_set(
    test_set: TestSet, runs: Sequence[Run], ridges: Mapping[str, FittedRidge], train: Dump | None
) -> SetSummary:
    """All that the report states about the scores of one set.

    Args:
        ridges: by the condition that has the same modalities.
        train: the dump of the train set, if it is there.
    """
    rounding = next(iter(test_set.conditions.values())).scores[0]["rounding"]
    rows, notes, penalties = [], [], {}
    for condition in test_set.conditions.values():
        values = {m: spread([s[m] for s in condition.scores]) for m in MEASURES}
        rows.append(Row(condition.title, "model", condition.name, values))

    def baseline(title: str, kind: str, condition: str, predictions: np.ndarray) -> Row:
        measures = score(predictions, test_set.labels, rounding)
        return Row(title, kind, condition, {m: (measures[m], None) for m in MEASURES})

    for name, ridge in ridges.items():
        if test_set.name in ridge.inputs:
            predictions = ridge.model(ridge.inputs[test_set.name])
            rows.append(baseline(f"ridge: {' + '.join(ridge.features)}", "ridge", name, predictions))
            penalties[name] = ridge.model.penalty
        else:
            notes.append(f"No ridge row for {name}: the dump of {test_set.name} lacks {' or '.join(ridge.features)}.")
    if train is not None:
        median = float(np.median(list(train.labels.values())))
        predictions = np.full(len(test_set.labels), median)
        rows.append(baseline(f"median of the train labels ({median:.2f})", "median", "", predictions))
    for condition in test_set.conditions.values():
        for run, scores in zip(runs, condition.scores, strict=True):
            notes += [f"{condition.name}, seed {run.seed}: {note}" for note in scores["notes"]]
    return SetSummary(test_set, rows, _recovered(test_set), _findings(test_set, rows), notes, penalties)


def _recovered(test_set: TestSet) -> tuple[float, float | None]:
    """(none - missing) / (none - full) of the MAE, seed by seed."""
    if not all(name in test_set.conditions for name in ("full", "missing", "none")):
        return math.nan, None
    mae = {c: np.array([s["mae"] for s in test_set.conditions[c].scores]) for c in ("full", "missing", "none")}
    gap = mae["none"] - mae["full"]
    if np.any(gap <= 0):
        return math.nan, None
    return spread((mae["none"] - mae["missing"]) / gap)


def _findings(test_set: TestSet, rows: Sequence[Row]) -> list[tuple[bool, str]]:
    """Comparisons of conditions and baselines by the mean MAE over seeds: whether each holds, and its numbers."""
    mae = {(r.kind, r.condition): r.values["mae"][0] for r in rows}
    found = []
    order = [c for c in ("full", "missing", "none") if ("model", c) in mae]
    if "none" in order and "missing" in order and test_set.conditions["missing"].without_simulated_text:
        order.remove("missing")  # the same as none
    if len(order) > 1:
        values = [mae["model", c] for c in order]
        holds = all(a < b for a, b in itertools.pairwise(values))
        found.append((holds, f"MAE {' < '.join(order)}: " + ", ".join(f"{v:.3f}" for v in values)))
    if ("median", "") in mae:
        worst = max(test_set.shown, key=lambda c: mae["model", c])
        found.append(
            (
                mae["model", worst] < mae["median", ""],
                f"every condition beats the median of the train labels: at worst {mae['model', worst]:.3f} "
                f"({worst}) against {mae['median', '']:.3f}",
            )
        )
    for c in test_set.shown:
        if ("ridge", c) in mae:
            own, ridge = mae["model", c], mae["ridge", c]
            found.append((own < ridge, f"{c} beats ridge on the same modalities: {own:.3f} against {ridge:.3f}"))
    return found
