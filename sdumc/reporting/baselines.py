"""Baselines without a network: ridge regression on features averaged over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from sdumc.conditions import MAIN_CONDITIONS, SIMULATED, condition_of, modality
from sdumc.data.ark import load_matrix
from sdumc.data.dump import Dump
from sdumc.errors import UserError

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
        train, valid = ([inputs(d, n) for n in names] for d in (train_set, valid_set))
        y_train, y_valid = (np.array([dumps[d].labels[u] for u in dumps[d].utterances]) for d in (train_set, valid_set))
        model = fit_ridge(train, y_train, valid, y_valid)
        able = [d for d in dumps if all(n in dumps[d].features for n in names)]
        ridges[condition] = FittedRidge(names, model, {d: [inputs(d, n) for n in names] for d in able})
    return ridges, notes


def _check_dimensions(dumps: Mapping[str, Dump], names: Sequence[str], dump_root: Path) -> None:
    for name in names:
        dims = {d: dump.features[name].dim for d, dump in dumps.items() if name in dump.features}
        if len(set(dims.values())) > 1:
            raise UserError(f"{dump_root}: the feature {name} has different dimensions: {dims}; extract it again")
