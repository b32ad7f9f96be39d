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
from sdumc.scoring.intervals import UNDEFINED, Bootstrap, Interval, clusters_of, format_difference, judge
from sdumc.scoring.metrics import MEASURES, format_measure, score


@dataclass
class Row:
    """One line of a table of scores: each measure's mean over seeds, and its interval."""

    title: str
    kind: str  # model, ensemble, ridge or median
    condition: str
    values: dict[str, tuple[float, Interval]]

    def text(self, measure: str) -> str:
        """One cell; see :func:`sdumc.scoring.metrics.format_measure`."""
        mean, interval = self.values[measure]
        return format_measure(measure, mean, interval=interval)


@dataclass
class Finding:
    """A claim, with its numbers, and whether the data bear it out."""

    verdict: str  # "yes"; "NO": the opposite is shown; "not shown": the interval of the difference holds 0
    text: str


@dataclass
class SetSummary:
    test_set: TestSet
    rows: list[Row]
    unit: str  # what the intervals resample: "12 speakers"
    recovered: tuple[float, Interval]  # share of the gap between none and full; NaN where undefined
    findings: list[Finding]
    notes: list[str]
    penalties: dict[str, float]  # of the ridge regression per condition

    @property
    def recovered_sentence(self) -> str:
        """The share of the gap between no text and real text that simulated text closes, in words."""
        missing = self.test_set.conditions.get("missing")
        if missing and missing.without_simulated_text:
            return f"No text was simulated for {self.test_set.name}: missing is the same as none."
        mean, (low, high) = self.recovered
        if math.isnan(mean):
            return "Share of the gap between none and full that missing recovers: undefined here."
        limits = " (without an interval: the gap is too uncertain)"
        if not math.isnan(low):
            limits = f" [{100 * low:.0f}, {100 * high:.0f}]"
        return f"Simulated text recovers {100 * mean:.0f}%{limits} of the gap in MAE between none and full."


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

    Raises:
        UserError: utt2spk has some of the set's utterances only.
    """
    rounding = next(iter(test_set.conditions.values())).scores[0]["rounding"]
    speakers = clusters_of(test_set.utterances, test_set.speakers, f"utt2spk of {test_set.name}")
    bootstrap = Bootstrap(test_set.labels, speakers, rounding)
    rows, notes, penalties = [], [], {}
    resampled: dict[tuple[str, str], np.ndarray] = {}  # MAE in each resample, by kind and condition

    def add(title: str, kind: str, condition: str, predictions: np.ndarray, scores: Sequence[Mapping]) -> None:
        values = bootstrap.resample(np.atleast_2d(predictions))
        resampled[kind, condition] = values["mae"]
        means = {m: spread([s[m] for s in scores])[0] for m in MEASURES}
        cells = {m: (v, UNDEFINED if math.isnan(v) else bootstrap.limits(values[m])) for m, v in means.items()}
        rows.append(Row(title, kind, condition, cells))

    for condition in test_set.conditions.values():
        add(condition.title, "model", condition.name, condition.predictions, condition.scores)
    for name, condition in test_set.shown.items() if len(runs) > 1 else ():
        mean = condition.predictions.mean(axis=0)
        add(f"{name}, mean of the seeds' predictions", "ensemble", name, mean, [score(mean, test_set.labels, rounding)])
    for name, ridge in ridges.items():
        if test_set.name in ridge.inputs:
            p = ridge.model(ridge.inputs[test_set.name])
            add(f"ridge: {' + '.join(ridge.features)}", "ridge", name, p, [score(p, test_set.labels, rounding)])
            penalties[name] = ridge.model.penalty
        else:
            notes.append(f"No ridge row for {name}: the dump of {test_set.name} lacks {' or '.join(ridge.features)}.")
    if train is not None:
        median = float(np.median(list(train.labels.values())))
        p = np.full(len(test_set.labels), median)
        title = f"median of the train labels ({median:.2f})"
        add(title, "median", "", p, [score(p, test_set.labels, rounding)])
    notes = _spread_notes(test_set, runs, bootstrap) + notes
    recovered = _recovered(test_set, bootstrap)
    findings = _findings(test_set, rows, resampled, bootstrap)
    return SetSummary(test_set, rows, bootstrap.unit, recovered, findings, notes, penalties)


def _spread_notes(test_set: TestSet, runs: Sequence[Run], bootstrap: Bootstrap) -> list[str]:
    """What belongs to the table: spread over seeds, what was resampled, and what the scores say themselves."""
    notes = []
    if len(runs) > 1:
        deviations = {n: spread([s["mae"] for s in c.scores])[1] for n, c in test_set.conditions.items()}
        words = ", ".join(f"{name} {value:.3f}" for name, value in deviations.items())
        notes.append(f"Sample standard deviation of the MAE over seeds: {words}.")
    if not bootstrap.by_speaker:
        notes.append(f"No speakers are known (utt2spk of {test_set.name}): the true intervals are wider.")
    if bootstrap.clusters < 2:
        notes.append(
            f"No intervals: all of {test_set.name} is one {'speaker' if bootstrap.by_speaker else 'utterance'}."
        )
    for condition in test_set.conditions.values():
        for run, scores in zip(runs, condition.scores, strict=True):
            notes += [f"{condition.name}, seed {run.seed}: {note}" for note in scores["notes"]]
    return notes


def _recovered(test_set: TestSet, bootstrap: Bootstrap) -> tuple[float, Interval]:
    """(none - missing) / (none - full) of the MAE, seed by seed: its mean over seeds, and the interval of that."""
    if not all(name in test_set.conditions for name in ("full", "missing", "none")):
        return math.nan, UNDEFINED
    conditions = {c: test_set.conditions[c] for c in ("full", "missing", "none")}
    share = _share({c: np.array([[s["mae"] for s in v.scores]]) for c, v in conditions.items()})
    if np.isnan(share).any():
        return math.nan, UNDEFINED
    shares = _share({c: bootstrap.by_run(v.predictions)["mae"] for c, v in conditions.items()})
    return float(share.mean()), bootstrap.limits(bootstrap.over_seeds(shares))


def _share(mae: Mapping[str, np.ndarray]) -> np.ndarray:
    """The recovered share for MAEs of any shape; NaN where full is not better than none."""
    gap = mae["none"] - mae["full"]
    return np.divide(mae["none"] - mae["missing"], gap, out=np.full_like(gap, np.nan), where=gap > 0)


def _findings(
    test_set: TestSet, rows: Sequence[Row], resampled: Mapping[tuple[str, str], np.ndarray], bootstrap: Bootstrap
) -> list[Finding]:
    """Conditions against each other and against baselines: the paired difference in MAE, and its interval."""
    mae = {(r.kind, r.condition): r.values["mae"][0] for r in rows}

    def compare(claim: str, a: tuple[str, str], b: tuple[str, str]) -> Finding:
        interval = bootstrap.limits(resampled[a] - resampled[b])
        verdict = {"better": "yes", "worse": "NO", "": "not shown"}[judge("mae", interval)]
        difference = format_difference(mae[a] - mae[b], interval)
        return Finding(verdict, f"{claim}: MAE {mae[a]:.3f} against {mae[b]:.3f}, difference {difference}")

    found = []
    order = [c for c in ("full", "missing", "none") if ("model", c) in mae]
    if "none" in order and "missing" in order and test_set.conditions["missing"].without_simulated_text:
        order.remove("missing")  # the same as none
    for a, b in itertools.pairwise(order):
        found.append(compare(f"{a} beats {b}", ("model", a), ("model", b)))
    if ("median", "") in mae:
        worst = max(test_set.shown, key=lambda c: mae["model", c])
        claim = f"every condition beats the median of the train labels; at worst ({worst})"
        found.append(compare(claim, ("model", worst), ("median", "")))
    for c in test_set.shown:
        if ("ridge", c) in mae:
            found.append(compare(f"{c} beats ridge on the same modalities", ("model", c), ("ridge", c)))
    return found
