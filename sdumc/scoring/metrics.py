"""The measures of sentiment as a number, their 95% intervals, and the file of predictions that they are computed from.

Which accuracies there are depends on the scale of the labels (:mod:`sdumc.scale`). Papers differ in what they call
accuracy and F1, so every variant has a name of its own: see ``docs/metrics.md``.
:func:`doubts` says what the choice of the epoch tells about a training run, for its log and for the report.

The 95% intervals are by bootstrap over speakers (or videos) and over seeds. Utterances of a speaker are alike, so whole
speakers are drawn, with replacement: a cluster bootstrap (Davison & Hinkley 1997, section 3.8). Several seeds are drawn
too, independently of the speakers (Owen 2007, the pigeonhole bootstrap). Their deviations from the mean are enlarged by
sqrt(R / (R - 1)), because R draws from R seeds vary too little (Rao & Wu 1988). The limits are expanded percentiles
(Hesterberg 2015): :func:`expanded_tail`.

Every measure is a function of sums over utterances, so a resample is a weighted sum of the speakers' sums, and all
resamples together one product of matrices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
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


LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
MOST_UNDEFINED = 0.05  # an interval is given if at most this share of the resamples leaves its value undefined
_AT_ONCE = 250  # resamples whose weights are held as floats

Interval = tuple[float, float]  # NaN, NaN where it is undefined
UNDEFINED: Interval = (math.nan, math.nan)


def expanded_tail(clusters: int, level: float = LEVEL) -> float:
    """The probability below the lower limit in the bootstrap distribution of a mean over C clusters.

    That distribution has the variance of C, not of C - 1, and the tails of a normal and not of a t distribution. The
    tail Phi(sqrt(C / (C - 1)) t_{(1 - level) / 2, C - 1}) makes up for both. T. Hesterberg: What teachers should know
    about the bootstrap, The American Statistician 69(4), 2015.
    """
    from scipy.stats import norm, t

    return float(norm.cdf(math.sqrt(clusters / (clusters - 1)) * t.ppf((1 - level) / 2, clusters - 1)))


class Bootstrap:
    """Resamples of one set of N utterances. All systems scored with one object see the same resamples.

    Args:
        labels: (N,).
        clusters: the cluster of each utterance, such as its speaker; None resamples utterances.
        rounding, scale: as in :func:`score`.
    """

    def __init__(
        self,
        labels: np.ndarray,
        clusters: Sequence[str] | None = None,
        rounding: str = "half-even",
        scale: LabelScale = CMU,
        resamples: int = RESAMPLES,
        seed: int = SEED,
    ):
        self.labels = np.asarray(labels, dtype=np.float64)
        self.rounding, self.scale, self.resamples, self.seed = rounding, scale, resamples, seed
        self.by_speaker = clusters is not None
        names = clusters if clusters is not None else range(len(self.labels))
        _, self.index = np.unique(np.asarray(names), return_inverse=True)  # (N,) number of the cluster
        self.clusters = int(self.index.max()) + 1
        rng = np.random.default_rng([seed, self.clusters])
        self.weights = np.zeros((resamples, self.clusters), np.uint16)  # how often each cluster was drawn
        for start in range(0, resamples, _AT_ONCE):
            rows = self.weights[start : start + _AT_ONCE]
            drawn = rng.integers(self.clusters, size=rows.shape) + np.arange(len(rows))[:, None] * self.clusters
            rows[:] = np.bincount(drawn.ravel(), minlength=rows.size).reshape(rows.shape)

    @property
    def unit(self) -> str:
        """What is drawn, in words."""
        return f"{self.clusters} {'speakers' if self.by_speaker else 'utterances'}"

    def by_run(self, predictions: np.ndarray) -> dict[str, np.ndarray]:
        """Each measure in each of the B resamples, (B, R), of the predictions (R, N) of R runs."""
        sums = _Sums(self.scale, self.labels, self.rounding)
        columns = sums.of(np.asarray(predictions, dtype=np.float64))  # (N, R, K)
        n, runs, kinds = columns.shape
        per_cluster = np.zeros((self.clusters, runs * kinds))
        np.add.at(per_cluster, self.index, columns.reshape(n, runs * kinds))
        parts = [
            sums.measures((self.weights[i : i + _AT_ONCE].astype(np.float64) @ per_cluster).reshape(-1, runs, kinds))
            for i in range(0, self.resamples, _AT_ONCE)
        ]
        return {m: np.concatenate([part[m] for part in parts]) for m in self.scale.measures}

    def over_seeds(self, values: np.ndarray) -> np.ndarray:
        """The mean over R runs (B, R) -> (B,), with the runs drawn anew in each resample if there are several.

        Equal R, equal draws: a difference of two results is that of systems paired by seed.
        """
        mean, runs = values.mean(axis=1), values.shape[1]
        if runs == 1:
            return mean
        drawn = np.random.default_rng([self.seed, 1, runs]).multinomial(runs, [1 / runs] * runs, size=len(values))
        return mean + math.sqrt(runs / (runs - 1)) * ((values * drawn).mean(axis=1) - mean)

    def resample(self, predictions: np.ndarray) -> dict[str, np.ndarray]:
        """Each measure's mean over the R runs in each resample (B,), of predictions (R, N)."""
        return {m: self.over_seeds(values) for m, values in self.by_run(predictions).items()}

    def limits(self, values: np.ndarray) -> Interval:
        """The interval of a statistic with these values in the resamples (B,).

        It is NaN for a single cluster, and if more than MOST_UNDEFINED of the values are NaN; fewer are left out.
        """
        defined = values[~np.isnan(values)]
        if self.clusters < 2 or len(defined) < (1 - MOST_UNDEFINED) * len(values):
            return UNDEFINED
        tail = expanded_tail(self.clusters)
        low, high = np.quantile(defined, [tail, 1 - tail])
        return float(low), float(high)

    def intervals(self, predictions: np.ndarray) -> dict[str, Interval]:
        """The interval of each measure's mean over the R runs, of predictions (R, N)."""
        return {m: self.limits(values) for m, values in self.resample(predictions).items()}


def judge(measure: str, interval: Interval) -> str:
    """``better`` or ``worse`` by the interval of a difference; empty if it holds 0 or is undefined."""
    low, high = interval
    if not (low > 0 or high < 0):
        return ""
    return "better" if (high < 0) == (measure in LOWER_IS_BETTER) else "worse"


def format_difference(value: float, interval: Interval) -> str:
    """``-0.060 [-0.081, -0.040]``; without limits where these are NaN."""
    low, high = interval
    return f"{value:+.3f}" if math.isnan(low) else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def clusters_of(utterances: Sequence[str], speakers: Mapping[str, str], path: object) -> list[str] | None:
    """The speaker of each utterance; None, so that utterances are resampled, if no speaker is known or each utterance
    has a speaker of its own, as it has in a table without a column of speakers.

    Raises:
        UserError: ``speakers``, read from ``path``, has some of the utterances only.
    """
    if not speakers:
        return None
    if absent := [utt for utt in utterances if utt not in speakers]:
        raise UserError(
            f"{path}: {len(absent)} of the {len(utterances)} scored utterances have no speaker, the first is "
            f"{absent[0]}; add them, or resample utterances by leaving the file out"
        )
    found = [speakers[utt] for utt in utterances]
    return found if len(set(found)) < len(found) else None


def score_with_intervals(
    predictions: np.ndarray,
    labels: np.ndarray,
    clusters: Sequence[str] | None,
    rounding: str = "half-even",
    scale: LabelScale = CMU,
) -> dict[str, Any]:
    """:func:`score`, with ``intervals`` by measure and ``interval_method``.

    An interval is [low, high], or None where it is undefined; ``interval_method["notes"]`` says why.
    """
    measures = score(predictions, labels, rounding, scale)
    bootstrap = Bootstrap(labels, clusters, rounding, scale)
    resampled = bootstrap.resample(np.asarray(predictions)[None])
    intervals: dict[str, list[float] | None] = {}
    notes = (
        []
        if clusters
        else ["no speakers were given, or none twice: utterances are resampled; true intervals are wider"]
    )
    if bootstrap.clusters < 2:
        notes.append(f"no intervals: {bootstrap.unit.rstrip('s')} only")
    for m, values in resampled.items():
        low, high = UNDEFINED if math.isnan(measures[m]) else bootstrap.limits(values)
        intervals[m] = None if math.isnan(low) else [round(low, 6), round(high, 6)]
        undefined = int(np.isnan(values).sum())
        if undefined and not math.isnan(measures[m]):
            notes.append(f"{m} is undefined in {undefined} of {len(values)} resamples")
    method = {
        "method": "bootstrap, expanded percentiles",
        "level": LEVEL,
        "resampled": "speakers" if bootstrap.by_speaker else "utterances",
        "clusters": bootstrap.clusters,
        "resamples": bootstrap.resamples,
        "seed": bootstrap.seed,
        "notes": notes,
    }
    return {**measures, "intervals": intervals, "interval_method": method}


# ------------------------------------------------------------------------- the measures as functions of sums

_MOMENTS = ("n", "abs", "error", "p", "y", "pp", "yy", "py")


class _Sums:
    """What each utterance adds to the sums that the measures are made of, and the measures of such sums.

    For a rule of classes these are how many utterances count and hit and, for F1, of each class how many hit, are of
    it, and are said to be.
    """

    def __init__(self, scale: LabelScale, labels: np.ndarray, rounding: str):
        self.scale, self.y, self.rounding = scale, labels, rounding
        self.truth = {rule.key: classes_of(rule, labels, rounding) for rule in scale.rules}
        self.used = {r.key: labels != 0 if r.without_zero else np.ones(len(labels), bool) for r in scale.rules}
        # A class that no label has counts nothing in a weighted F1.
        self.classes = {r.key: np.unique(self.truth[r.key][self.used[r.key]]) if r.f1 else () for r in scale.rules}
        self.names = [*_MOMENTS]
        for key, found in self.classes.items():
            self.names += [f"{key} used", f"{key} hits"]
            self.names += [f"{key} {what} {c}" for c in found for what in ("hits", "true", "said")]

    def of(self, p: np.ndarray) -> np.ndarray:
        """The columns (N, R, K) of predictions p (R, N)."""
        # Centred: small sums of squares.
        a, b = p - p.mean(axis=1, keepdims=True), np.broadcast_to(self.y - self.y.mean(), p.shape)
        columns = {
            **{"n": np.ones_like(p), "abs": np.abs(p - self.y), "error": p - self.y},
            **{"p": a, "y": b, "pp": a * a, "yy": b * b, "py": a * b},
        }
        for rule in self.scale.rules:
            key, truth, used = rule.key, self.truth[rule.key], self.used[rule.key]
            said = classes_of(rule, p, self.rounding)
            hit = used & (truth == said)
            columns |= {f"{key} used": np.broadcast_to(used, p.shape), f"{key} hits": hit}
            for c in self.classes[key]:
                columns[f"{key} hits {c}"] = hit & (truth == c)
                columns[f"{key} true {c}"] = np.broadcast_to(used & (truth == c), p.shape)
                columns[f"{key} said {c}"] = used & (said == c)
        return np.stack([columns[name].astype(np.float64).T for name in self.names], axis=2)

    def measures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """The measures of sums (..., K); NaN where undefined."""
        s = {name: sums[..., i] for i, name in enumerate(self.names)}
        n = s["n"]
        with np.errstate(divide="ignore", invalid="ignore"):
            vp, vy = s["pp"] - s["p"] ** 2 / n, s["yy"] - s["y"] ** 2 / n
            covariance = s["py"] - s["p"] * s["y"] / n
            # Through rounding, the variance of a constant is not exactly 0.
            varied = (vp > 1e-12 * s["pp"]) & (vy > 1e-12 * s["yy"])
            apart = vp + vy + s["error"] ** 2 / n
            found = {
                "mae": s["abs"] / n,
                "corr": np.where(varied, np.clip(covariance / np.sqrt(vp * vy), -1, 1), np.nan),
                "ccc": np.where(apart > 1e-12 * (s["pp"] + s["yy"]), 2 * covariance / apart, np.nan),
            }
            for rule in self.scale.rules:
                key = rule.key
                found[key] = s[f"{key} hits"] / s[f"{key} used"]
                if rule.f1:
                    parts = [[s[f"{key} {w} {c}"] for w in ("hits", "true", "said")] for c in self.classes[key]]
                    weighted = [true * _safe_ratio(2 * hits, true + said) for hits, true, said in parts]
                    found[rule.f1] = sum(weighted, np.zeros_like(n)) / s[f"{key} used"]
        return found


def _safe_ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
