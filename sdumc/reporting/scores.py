"""Tables of scores: one decoded set with a row per condition and baseline, or several experiments side by side.

Findings are computed from them; experiments are compared with the first by paired differences. Baselines need no
network: ridge regression on features averaged over time.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sdumc.conditions import MAIN_CONDITIONS, SIMULATED, condition_of, modality
from sdumc.data.dump import Dump, load_matrix
from sdumc.data.tables import read_table
from sdumc.errors import UserError
from sdumc.files import read_yaml
from sdumc.reporting.sets import Run, TestSet, read_score
from sdumc.scale import CMU, LabelScale
from sdumc.scoring.metrics import (
    UNDEFINED,
    Bootstrap,
    Interval,
    Predictions,
    clusters_of,
    format_difference,
    format_measure,
    judge,
    read_predictions,
    score,
)
from sdumc.training.settings import CONFIG


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
        """The share of the gap between no text and real text that the missing flow's text closes, in words."""
        missing = self.test_set.conditions.get("missing")
        if missing and missing.without_missing_text:
            name, simulated = self.test_set.name, missing.missing_text == SIMULATED
            reason = f"No text was simulated for {name}" if simulated else f"The missing flow reads no text of {name}"
            return f"{reason}: missing is the same as none."
        mean, (low, high) = self.recovered
        if math.isnan(mean):
            return "Share of the gap between none and full that missing recovers: undefined here."
        limits = " (without an interval: the gap is too uncertain)"
        if not math.isnan(low):
            limits = f" [{100 * low:.0f}, {100 * high:.0f}]"
        text = "Simulated text" if missing is None or missing.missing_text == SIMULATED else "ASR text"
        return f"{text} recovers {100 * mean:.0f}%{limits} of the gap in MAE between none and full."


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
    scale = test_set.scale
    bootstrap = Bootstrap(test_set.labels, speakers, rounding, scale)
    rows, notes, penalties = [], [], {}
    mae: dict[tuple[str, str], float] = {}  # by kind and condition
    resampled: dict[tuple[str, str], np.ndarray] = {}  # the same, in each resample

    def add(title: str, kind: str, condition: str, predictions: np.ndarray, scores: Sequence[Mapping]) -> None:
        values = bootstrap.resample(np.atleast_2d(predictions))
        resampled[kind, condition] = values["mae"]
        means = {m: spread([s[m] for s in scores])[0] for m in scale.measures}
        mae[kind, condition] = means["mae"]
        cells = {m: (v, UNDEFINED if math.isnan(v) else bootstrap.limits(values[m])) for m, v in means.items()}
        rows.append(Row(title, kind, condition, cells))

    def of_train(values: Any) -> Any:
        """Labels of the train set's scale, or predictions learned from them, on the scale of this set."""
        return values if train is None else scale.from_network(train.scale.to_network(values))

    about, doubt = _about_projector(train)
    for condition in test_set.conditions.values():
        title = condition.title
        if about and condition.text == "text_sim" and not condition.without_missing_text:
            title += f" ({about})"
        add(title, "model", condition.name, condition.predictions, condition.scores)
    for name, condition in test_set.shown.items() if len(runs) > 1 else ():
        mean = condition.predictions.mean(axis=0)
        add(
            f"{name}, mean of the seeds' predictions",
            "ensemble",
            name,
            mean,
            [score(mean, test_set.labels, rounding, scale)],
        )
    first_with: dict[tuple[str, ...], str] = {}
    for name, ridge in ridges.items():
        first = first_with.setdefault(ridge.features, name)
        if test_set.name not in ridge.inputs:
            notes.append(f"No ridge row for {name}: the dump of {test_set.name} lacks {' or '.join(ridge.features)}.")
            continue
        penalties[name] = ridge.model.penalty
        if first != name:  # where missing reads ASR text, asr has the same features: one row is enough
            mae["ridge", name], resampled["ridge", name] = mae["ridge", first], resampled["ridge", first]
            continue
        p = of_train(ridge.model(ridge.inputs[test_set.name]))
        add(f"ridge: {' + '.join(ridge.features)}", "ridge", name, p, [score(p, test_set.labels, rounding, scale)])
    if train is not None:
        median = float(of_train(np.median(list(train.labels.values()))))
        if train.scale.ends != scale.ends:
            notes.append(
                f"Labels of the train set are from {train.scale.ends}: ridge regression and the median are mapped "
                f"linearly to {scale.ends}."
            )
        p = np.full(len(test_set.labels), median)
        title = f"median of the train labels ({median:.2f})"
        add(title, "median", "", p, [score(p, test_set.labels, rounding, scale)])
    notes = doubt + _spread_notes(test_set, runs, bootstrap) + notes
    recovered = _recovered(test_set, bootstrap)
    findings = _findings(test_set, mae, resampled, bootstrap)
    return SetSummary(test_set, rows, bootstrap.unit, recovered, findings, notes, penalties)


def _about_projector(train: Dump | None) -> tuple[str, list[str]]:
    """On what the projector that simulated the train set's text was trained, in few words, and what follows from it."""
    meta = train.features["text_sim"].meta if train is not None and "text_sim" in train.features else {}
    saw, data = meta.get("projector_saw"), Path(str(meta.get("projector_data"))).name
    if train is None or saw is None:
        return "", []
    if parts := meta.get("projector_parts"):
        return f"projector cross-fitted over {parts} parts of the {meta.get('projector_parts_of', 'speakers')}", []
    if not saw:
        return f"projector trained on another set, {data}", []
    every = len(train.utterances)
    return (
        f"projector trained on {train.path.name} itself",
        [
            f"The projector was trained on {saw} of the {every} utterances of {train.path.name}, so the simulated text "
            "that the model learned from is better than that of other sets, and the model trusts simulated text too "
            "much. `--projector-folds` or other transcribed speech (`--projector-set`) mends that."
        ],
    )


def _spread_notes(test_set: TestSet, runs: Sequence[Run], bootstrap: Bootstrap) -> list[str]:
    """What belongs to the table: spread over seeds, what was resampled, and what the scores say themselves."""
    notes = []
    if len(runs) > 1:
        deviations = {n: spread([s["mae"] for s in c.scores])[1] for n, c in test_set.conditions.items()}
        words = ", ".join(f"{name} {value:.3f}" for name, value in deviations.items())
        notes.append(f"Sample standard deviation of the MAE over seeds: {words}.")
    if not bootstrap.by_speaker:
        notes.append(
            f"No speakers are known (utt2spk of {test_set.name}): the true intervals are wider."
            if not test_set.speakers
            else f"Each utterance of {test_set.name} has a speaker of its own in utt2spk: if that is because "
            "nobody knows the speakers, the true intervals are wider."
        )
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
    test_set: TestSet,
    mae: Mapping[tuple[str, str], float],
    resampled: Mapping[tuple[str, str], np.ndarray],
    bootstrap: Bootstrap,
) -> list[Finding]:
    """Conditions against each other and against baselines: the paired difference in MAE, and its interval."""

    def compare(claim: str, a: tuple[str, str], b: tuple[str, str]) -> Finding:
        interval = bootstrap.limits(resampled[a] - resampled[b])
        verdict = {"better": "yes", "worse": "NO", "": "not shown"}[judge("mae", interval)]
        difference = format_difference(mae[a] - mae[b], interval)
        return Finding(verdict, f"{claim}: MAE {mae[a]:.3f} against {mae[b]:.3f}, difference {difference}")

    found = []
    order = [c for c in ("full", "missing", "none") if ("model", c) in mae]
    if "none" in order and "missing" in order and test_set.conditions["missing"].without_missing_text:
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


@dataclass
class Results:
    """What the runs of one experiment predict under one condition, by seed."""

    tables: dict[int, Predictions]
    scores: dict[int, float]  # of one measure
    rounding: str
    missing_text: str = SIMULATED  # what the missing flow reads
    scale: LabelScale = CMU

    def predictions(self, seeds: Sequence[int]) -> np.ndarray:
        """Those of some runs: (R, N)."""
        return np.stack([self.tables[seed].predictions for seed in seeds])

    def mean(self, seeds: Sequence[int]) -> float:
        """The measure's mean over some runs."""
        return float(np.mean([self.scores[seed] for seed in seeds]))


def compare(
    experiments: Sequence[str], conditions: Sequence[str], measure: str, test_set: str, data_root: Path
) -> tuple[list[list[str]], list[str]]:
    """The rows of the table (experiment, a cell per condition, seeds), and notes below it.

    Raises:
        UserError: an experiment has no seed, or a run was not decoded or scored under a condition; a measure is
            undefined; two runs are not about the same utterances and labels.
    """
    found = [{c: collect(e, test_set, c, measure) for c in conditions} for e in experiments]
    first = found[0][conditions[0]]
    table = next(iter(first.tables.values()))
    check_same(table, [t for by_condition in found for r in by_condition.values() for t in r.tables.values()])
    path = data_root / test_set / "utt2spk"
    speakers = clusters_of(table.ids, read_table(path) if path.is_file() else {}, path)
    bootstrap = Bootstrap(table.labels, speakers, first.rounding, first.scale)

    rows, notes = [], [f"Intervals: bootstrap over {bootstrap.unit} and over seeds."]
    if speakers is None:
        reason = f"No speaker is twice in {path}" if path.is_file() else f"There is no {path}"
        notes.append(f"{reason}: utterances were resampled; the true intervals are wider if some are of one speaker.")
    for experiment, by_condition in zip(experiments, found, strict=True):
        name = Path(experiment).name
        seeds = list(by_condition[conditions[0]].scores)
        cells = []
        for condition, results in by_condition.items():
            reference = found[0][condition] if by_condition is not found[0] else None
            cells.append(_cell(results, reference, measure, bootstrap))
        common = [seed for seed in seeds if seed in first.scores]
        if common != seeds or (common != list(first.scores)):
            those = f"over seed {', '.join(map(str, common))} only" if common else "not given: no seed is in both"
            notes.append(f"{name}: its seeds are not those of {Path(experiments[0]).name}; the difference is {those}.")
        rows.append([name.replace("_", " "), *cells, str(len(seeds))])
    if "missing" in conditions:
        texts = {Path(e).name: by["missing"].missing_text for e, by in zip(experiments, found, strict=True)}
        words = {name: condition_of("missing", text).short for name, text in texts.items()}
        each = "; ".join(f"{text} in {name}" for name, text in words.items())
        notes.append(f"What `missing` reads: {each if len(set(words.values())) > 1 else next(iter(words.values()))}.")
    return rows, notes


def _cell(results: Results, reference: Results | None, measure: str, bootstrap: Bootstrap) -> str:
    """``0.579 [0.531, 0.634] (-0.060 [-0.081, -0.040], better)``."""
    seeds = list(results.scores)
    low, high = bootstrap.intervals(results.predictions(seeds))[measure]
    text = f"{results.mean(seeds):.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")
    common = [seed for seed in seeds if reference and seed in reference.scores]
    if reference is None or not common:
        return text
    own, other = (bootstrap.resample(r.predictions(common))[measure] for r in (results, reference))
    interval = bootstrap.limits(own - other)
    words = [format_difference(results.mean(common) - reference.mean(common), interval), judge(measure, interval)]
    return f"{text} ({', '.join(filter(None, words))})"


def collect(experiment: str, test_set: str, condition: str, measure: str) -> Results:
    """Read what all seeds of an experiment predict, and their scores.

    Raises:
        UserError: no seed is there, or one was not decoded or scored under the condition.
    """
    base = Path(experiment)
    folders = {}
    for path in base.parent.glob(f"{base.name}_seed*"):
        if match := re.fullmatch(re.escape(base.name) + r"_seed(\d+)", path.name):
            folders[int(match[1])] = path
    if not folders:
        raise UserError(f"{experiment}_seed*: no such experiment; train it with `run.sh --exp-tag {base.name}`")
    results = Results({}, {}, "")
    for seed, exp in sorted(folders.items()):
        folder = exp / f"decode_{test_set}" / condition
        if not (folder / "predictions.tsv").is_file():
            raise UserError(f"{folder}/predictions.tsv: not there; run stage 5 with --conditions {condition}")
        table = read_predictions(folder / "predictions.tsv")
        scores = read_score(folder, table)
        if measure not in scores:
            raise UserError(
                f"{folder}/score.json: there is no {measure} for labels from {scores['scale'].ends}; there are "
                f"{', '.join(scores['scale'].measures)}"
            )
        if math.isnan(scores[measure]):
            raise UserError(f"{folder}/score.json: {measure} is undefined there; compare another measure")
        if results.rounding not in ("", scores["rounding"]):
            raise UserError(f"{folder}/score.json: rounding {scores['rounding']}, other seeds have {results.rounding}")
        config = read_yaml(exp / CONFIG) if (exp / CONFIG).is_file() else {}
        results.missing_text = str(config.get("missing-text", SIMULATED))
        results.tables[seed], results.scores[seed], results.rounding = table, scores[measure], scores["rounding"]
        results.scale = scores["scale"]
    return results


def check_same(first: Predictions, tables: Sequence[Predictions]) -> None:
    """Refuse predictions for other utterances or labels than those of the first."""
    for table in tables:
        if table.ids != first.ids or not np.allclose(table.labels, first.labels, atol=1e-6):
            raise UserError(
                f"{table.path} and {first.path} are not about the same utterances and labels: a difference would "
                "be one of test sets; decode both from the same data (stage 5)"
            )


PENALTIES = tuple(float(10.0 ** (k / 2)) for k in range(-4, 15))  # 0.01 ... 10,000,000


@dataclass
class Standardiser:
    """Zero mean and unit variance over the train set; constant dimensions and absent rows become zero."""

    mean: np.ndarray  # (D,)
    scale: np.ndarray  # (D,)

    @classmethod
    def fit(cls, x: np.ndarray) -> Standardiser:
        present = x[~np.isnan(x).any(axis=1)]
        if not len(present):
            return cls(np.zeros(x.shape[1]), np.ones(x.shape[1]))
        scale = present.std(axis=0)
        return cls(present.mean(axis=0), np.where(scale > 1e-10, scale, 1.0))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.nan_to_num((x - self.mean) / self.scale, nan=0.0)


def pooled(dump: Dump, name: str) -> np.ndarray:
    """Mean over time of the feature ``name`` of every utterance: (N, D), a row of NaN where it is absent."""
    feature = dump.features[name]
    out = np.full((len(dump.utterances), feature.dim), np.nan)
    for row, utt in enumerate(dump.utterances):
        if utt in feature.entries:
            out[row] = load_matrix(feature.entries[utt]).mean(axis=0, dtype=np.float64)
            if not np.isfinite(out[row]).all():
                raise UserError(f"{dump.path}: utterance {utt}: the feature {name} has NaN or inf; extract it again")
    return out


def ridge_path(x: np.ndarray, y: np.ndarray, penalties: Sequence[float]) -> tuple[np.ndarray, float]:
    """Solve min over w of |y - b - X w|^2 + a |w|^2 for each penalty a.

    Args:
        x: (N, D), columns of zero mean.  y: (N,).

    Returns:
        Weights (len(penalties), D) and the intercept b = mean of y.
    """
    intercept = float(y.mean())
    target = y - intercept
    if x.shape[0] >= x.shape[1]:
        values, vectors = np.linalg.eigh(x.T @ x)
        projected = vectors.T @ (x.T @ target)
        weights = [vectors @ (projected / (np.maximum(values, 0) + a)) for a in penalties]
    else:  # fewer utterances than dimensions: w = X' (X X' + a)^-1 y has a smaller matrix
        values, vectors = np.linalg.eigh(x @ x.T)
        projected = vectors.T @ target
        weights = [x.T @ (vectors @ (projected / (np.maximum(values, 0) + a))) for a in penalties]
    return np.stack(weights), intercept


@dataclass
class Ridge:
    """A fitted ridge regression; ``penalty`` had the lowest MAE on the valid set."""

    penalty: float
    weights: np.ndarray  # (D,)
    intercept: float
    standardisers: list[Standardiser]

    def __call__(self, blocks: Sequence[np.ndarray]) -> np.ndarray:
        """Predict (N,) from one pooled (N, D_m) per modality."""
        x = np.concatenate([s(b) for s, b in zip(self.standardisers, blocks, strict=True)], axis=1)
        return x @ self.weights + self.intercept


def fit_ridge(
    train: Sequence[np.ndarray], y_train: np.ndarray, valid: Sequence[np.ndarray], y_valid: np.ndarray
) -> Ridge:
    """Fit on pooled features, one (N, D_m) per modality, and choose the penalty by MAE on the valid set."""
    standardisers = [Standardiser.fit(block) for block in train]
    x, v = (
        np.concatenate([s(b) for s, b in zip(standardisers, blocks, strict=True)], axis=1) for blocks in (train, valid)
    )
    weights, intercept = ridge_path(x, y_train, PENALTIES)
    errors = np.abs(v @ weights.T + intercept - y_valid[:, None]).mean(axis=0)
    # The strongest penalty among equals, so that noise in the last digit cannot change the choice.
    best = max(i for i, e in enumerate(errors) if e <= errors.min() + 1e-9)
    return Ridge(PENALTIES[best], weights[best], intercept, standardisers)


@dataclass
class FittedRidge:
    """A ridge regression, and its inputs for every set that has its features."""

    features: tuple[str, ...]
    model: Ridge
    inputs: dict[str, list[np.ndarray]]  # by set: one pooled (N, D) per feature


def fit_ridges(
    dumps: Mapping[str, Dump], train_set: str, valid_set: str, dump_root: Path, missing_text: str = SIMULATED
) -> tuple[dict[str, FittedRidge], list[str]]:
    """A regression on the features of each main condition, as far as the dumps have them, and notes on what is not.

    Raises:
        UserError: a feature has different dimensions in different sets, or values that are not finite.
    """
    if train_set not in dumps or valid_set not in dumps:
        return {}, [f"No baselines: {dump_root} lacks {train_set} or {valid_set}."]

    @cache
    def inputs(dataset: str, name: str) -> np.ndarray:
        return pooled(dumps[dataset], name)

    ridges, notes = {}, []
    for condition in MAIN_CONDITIONS:
        wanted = condition_of(condition, missing_text).features
        names = tuple(n for n in wanted if n in dumps[train_set].features)
        if not names or any(modality(n) == "text" and n not in names for n in wanted):
            continue
        if any(n not in dumps[valid_set].features for n in names):
            notes.append(f"No ridge regression on {' + '.join(names)}: {dump_root / valid_set} lacks one of them.")
            continue
        _check_dimensions(dumps, names, dump_root)
        train, valid = ([inputs(d, n) for n in names] for d in (train_set, valid_set))
        y_train, y_valid = (np.array([dumps[d].labels[u] for u in dumps[d].utterances]) for d in (train_set, valid_set))
        scales = dumps[train_set].scale, dumps[valid_set].scale
        model = fit_ridge(train, y_train, valid, scales[0].from_network(scales[1].to_network(y_valid)))
        able = [d for d in dumps if all(n in dumps[d].features for n in names)]
        ridges[condition] = FittedRidge(names, model, {d: [inputs(d, n) for n in names] for d in able})
    return ridges, notes


def _check_dimensions(dumps: Mapping[str, Dump], names: Sequence[str], dump_root: Path) -> None:
    for name in names:
        dims = {d: dump.features[name].dim for d, dump in dumps.items() if name in dump.features}
        if len(set(dims.values())) > 1:
            raise UserError(f"{dump_root}: the feature {name} has different dimensions: {dims}; extract it again")
