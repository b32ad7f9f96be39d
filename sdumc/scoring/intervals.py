"""95% intervals of the measures, by bootstrap over speakers (or videos) and over seeds.

Utterances of a speaker are alike, so whole speakers are drawn, with replacement: a cluster bootstrap (Davison & Hinkley
1997, section 3.8). Several seeds are drawn too, independently of the speakers (Owen 2007, the pigeonhole bootstrap).
Their deviations from the mean are enlarged by sqrt(R / (R - 1)), because R draws from R seeds vary too little (Rao & Wu
1988). The limits are expanded percentiles (Hesterberg 2015): :func:`expanded_tail`. See ``docs/metrics.md``.

Every measure is a function of sums over utterances, so a resample is a weighted sum of the speakers' sums, and all
resamples together one product of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdumc.errors import UserError
from sdumc.scale import CMU, LabelScale
from sdumc.scoring.metrics import LOWER_IS_BETTER, classes_of, score

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
        rounding, scale: as in :func:`sdumc.scoring.metrics.score`.
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
    """The speaker of each utterance; None, so that utterances are resampled, if no speaker is known.

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
    return [speakers[utt] for utt in utterances]


def score_with_intervals(
    predictions: np.ndarray,
    labels: np.ndarray,
    clusters: Sequence[str] | None,
    rounding: str = "half-even",
    scale: LabelScale = CMU,
) -> dict[str, Any]:
    """:func:`sdumc.scoring.metrics.score`, with ``intervals`` by measure and ``interval_method``.

    An interval is [low, high], or None where it is undefined; ``interval_method["notes"]`` says why.
    """
    measures = score(predictions, labels, rounding, scale)
    bootstrap = Bootstrap(labels, clusters, rounding, scale)
    resampled = bootstrap.resample(np.asarray(predictions)[None])
    intervals: dict[str, list[float] | None] = {}
    notes = [] if clusters else ["no speakers were given: utterances are resampled; true intervals are wider"]
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
