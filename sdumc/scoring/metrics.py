"""The measures of sentiment as a number, and the file of predictions that they are computed from.

Which accuracies there are depends on the scale of the labels (:mod:`sdumc.scale`). Papers differ in what they call
accuracy and F1, so every variant has a name of its own: see ``docs/metrics.md``.
:func:`doubts` says what the choice of the epoch tells about a training run, for its log and for the report.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdumc.errors import UserError
from sdumc.scale import CMU, SIMS, ClassRule, LabelScale

HEADER = ("utt_id", "prediction", "label")
ROUNDINGS = ("half-even", "away")
# Every measure of any scale; those of a score, with their titles, are LabelScale.measures.
EVERY_MEASURE = tuple(dict.fromkeys(m for s in (CMU, SIMS, LabelScale(0, 1, "nearest")) for m in s.measures))
PLAIN = ("mae", "corr", "ccc")  # not fractions of utterances
LOWER_IS_BETTER = ("mae",)


@dataclass
class Predictions:
    """The lines of a ``predictions.tsv``: sorted ids, predictions (N,) and labels (N,)."""

    ids: list[str]
    predictions: np.ndarray
    labels: np.ndarray
    path: str


def read_predictions(path: str | os.PathLike) -> Predictions:
    """Read a table with the header ``utt_id<TAB>prediction<TAB>label``.

    Raises:
        UserError: naming file and line: another header or number of columns, an id given twice or out of order,
            a prediction or label that is not a finite number, no label; or no utterance at all.
    """
    try:
        with open(path, encoding="utf-8", newline="") as f:
            lines = f.read().split("\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); run sdumc.bin.decode first") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text: {e.reason} at byte {e.start}") from None
    if lines[-1] == "":
        lines.pop()
    if not lines or tuple(lines[0].rstrip("\r").split("\t")) != HEADER:
        raise UserError(f"{path}:1: the header must be {'<TAB>'.join(HEADER)}")

    ids: list[str] = []
    values: list[tuple[float, float]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path}:{number}"
        columns = line.rstrip("\r").split("\t")
        if len(columns) != len(HEADER):
            raise UserError(
                f"{where}: expected {len(HEADER)} columns separated by tabs, found {len(columns)}: {line!r}"
            )
        utt, prediction, label = columns
        if not utt or utt != utt.strip():
            raise UserError(f"{where}: the utterance id is empty or has blanks around it: {utt!r}")
        if utt in seen:
            raise UserError(f"{where}: utterance {utt} was given in line {seen[utt]} already")
        if ids and utt < ids[-1]:
            raise UserError(f"{where}: utterance {utt} comes after {ids[-1]}: sort the lines by id (LC_ALL=C)")
        if label.strip().lower() in ("", "nan"):
            raise UserError(
                f"{where}: utterance {utt} has no label, and there is nothing to compare its prediction with; "
                "decode a set that has utt2label to score it"
            )
        seen[utt] = number
        ids.append(utt)
        y = _number(label, f"{where}: utterance {utt}: the label")
        values.append((_number(prediction, f"{where}: utterance {utt}: the prediction"), y))
    if not ids:
        raise UserError(f"{path}: no utterance below the header; nothing to score")
    table = np.array(values, dtype=np.float64)
    return Predictions(ids, table[:, 0], table[:, 1], str(path))


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{what} is not a number: {text!r}") from None
    if not math.isfinite(value):
        raise UserError(f"{what} is not finite: {text!r}")
    return value


def score(
    predictions: Sequence[float] | np.ndarray,
    labels: Sequence[float] | np.ndarray,
    rounding: str = "half-even",
    scale: LabelScale = CMU,
) -> dict[str, Any]:
    """All measures of one set of predictions p (N,) against the labels y (N,), both on ``scale``.

    p is never clipped except for the classes. Accuracies and F1 are fractions of 1. What the data leave undefined
    is NaN, with a sentence in ``notes``.

    Returns:
        ``mae, corr``, the scale's accuracies and F1 (CMU's: ``acc7, acc5, acc3, acc2_has0, f1_has0, acc2_non0,
        f1_non0``), ``n``, and then ``ccc, n_non0, rounding, notes, scale``.

    Raises:
        ValueError: no utterance, shapes that differ, values that are not finite, or an unknown rounding.
    """
    p = np.asarray(predictions, dtype=np.float64)
    y = np.asarray(labels, dtype=np.float64)
    if p.shape != y.shape or p.ndim != 1 or p.size == 0:
        raise ValueError(f"predictions {p.shape} and labels {y.shape} must be equally long and not empty")
    if not (np.isfinite(p).all() and np.isfinite(y).all()):
        raise ValueError("predictions and labels must be finite")

    notes: list[str] = []
    corr, why = pearson(p, y)
    if why:
        notes.append(f"corr is undefined: {why}")
    ccc, why = concordance(p, y)
    if why:
        notes.append(f"ccc is undefined: {why}")
    by_class: dict[str, float] = {}
    for rule in scale.rules:
        used = y != 0 if rule.without_zero else np.ones(y.size, bool)
        truth, said = (classes_of(rule, v[used], rounding) for v in (y, p))
        by_class[rule.key] = float(np.mean(truth == said)) if used.any() else math.nan
        if rule.f1:
            by_class[rule.f1] = weighted_f1(truth, said) if used.any() else math.nan
        if not used.any():
            notes.append(f"{rule.key} and {rule.f1} are undefined: every label is zero")
    return {
        "mae": float(np.mean(np.abs(p - y))),
        "corr": corr,
        **by_class,
        "n": int(y.size),
        "ccc": ccc,
        "n_non0": int((y != 0).sum()),
        "rounding": rounding,
        "notes": notes,
        "scale": scale.as_dict(),
    }


def format_measure(
    measure: str, mean: float, deviation: float | None = None, interval: tuple[float, float] | None = None
) -> str:
    """``0.512 ± 0.008`` or ``0.512 [0.50, 0.52]`` for MAE, Corr and CCC; per cent for the others; – if undefined.

    Args:
        deviation: the standard deviation over seeds, if it is to be shown.
        interval: its limits, if they are to be shown; not shown where they are NaN.
    """
    if math.isnan(mean):
        return "–"
    factor, digits = (1, 3) if measure in PLAIN else (100, 1)
    text = f"{factor * mean:.{digits}f}"
    if deviation is not None:
        text += f" ± {factor * deviation:.{digits}f}"
    if interval is not None and not math.isnan(interval[0]):
        low, high = (f"{factor * limit:.{digits - 1}f}" for limit in interval)
        text += f" [{low}, {high}]"
    return text


def pearson(p: np.ndarray, y: np.ndarray) -> tuple[float, str]:
    """Pearson's correlation of p (N,) and y (N,), or NaN and the reason why it is undefined."""
    if p.size < 2:
        return math.nan, "there is only one utterance"
    # Compared as numbers: a mean in floating point can leave a constant with a spread just above zero.
    if np.all(p == p[0]):
        return math.nan, "all predictions are the same"
    if np.all(y == y[0]):
        return math.nan, "all labels are the same"
    a, b = p - p.mean(), y - y.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()  # keeps the squares of very small spreads above zero
    r = float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))
    return max(-1.0, min(1.0, r)), ""


def concordance(p: np.ndarray, y: np.ndarray) -> tuple[float, str]:
    """Lin's concordance correlation coefficient of p (N,) and y (N,), or NaN and the reason why it is undefined.

    2 cov(p, y) / (var(p) + var(y) + (mean(p) - mean(y))^2), moments with 1 / N. L. I-K. Lin: A concordance correlation
    coefficient to evaluate reproducibility, Biometrics 45(1), 1989.
    """
    if p.size < 2:
        return math.nan, "there is only one utterance"
    if np.all(p == y[0]) and np.all(y == y[0]):
        return math.nan, "all predictions and labels are the same number"
    a, b = p - p.mean(), y - y.mean()
    apart = float(np.mean(a * a) + np.mean(b * b) + np.mean(p - y) ** 2)
    return float(2 * np.mean(a * b)) / apart, ""


def classes_of(rule: ClassRule, values: np.ndarray, rounding: str = "half-even") -> np.ndarray:
    """The class of each value by a rule of a scale: whole numbers, of any value."""
    if rule.limit:
        return classes(values, rule.limit, rounding).astype(np.int64)
    return np.searchsorted(np.array(rule.edges), values, side="right" if rule.closed else "left")


def classes(values: np.ndarray, limit: int, rounding: str = "half-even") -> np.ndarray:
    """The class of each value: it is clipped to [-limit, limit] and then made an integer.

    ``half-even`` rounds to the nearest integer and .5 to the even neighbour, as numpy does. ``away`` is the rule of the
    CMU SDK: any fraction goes to the next integer away from zero, so that only exactly 0 is class 0.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}")
    clipped = np.clip(values, -limit, limit)
    return np.round(clipped) if rounding == "half-even" else np.sign(clipped) * np.ceil(np.abs(clipped))


def weighted_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """F1 of each class of two arrays of classes (N,), weighted by how often it is *true*.

    The order of the arguments matters: two well-known toolkits once had them swapped. A class that is never
    predicted has F1 = 0.
    """
    total = 0.0
    for cls in np.unique(truth):
        support = int(np.sum(truth == cls))
        hits = int(np.sum((truth == cls) & (predicted == cls)))
        chosen = int(np.sum(predicted == cls))
        total += support * 2.0 * hits / (support + chosen)
    return total / truth.size


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
