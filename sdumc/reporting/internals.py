"""Figures of what the network computes inside: similarity of features, weights of queries and modalities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from sdumc.conditions import MODALITIES
from sdumc.reporting.drawing import MARKERS, QUERY_TITLES, Figure, Panel, Theme, legend_below, offsets
from sdumc.reporting.runs import Run
from sdumc.reporting.sets import TestSet

MAX_MATRIX = 500  # rows of a similarity matrix; more are thinned out evenly


def similarity(test_set: TestSet, runs: Sequence[Run]) -> Figure | None:
    """Cosine similarity of every pair of utterances, ordered by label; the first run's features."""
    panels = []
    order = np.argsort(test_set.labels, kind="stable")
    if len(order) > MAX_MATRIX:
        order = order[np.linspace(0, len(order) - 1, MAX_MATRIX).round().astype(int)]
    labels = test_set.labels[order]
    for key, what in (("text_feature", "Text feature"), ("utterance_feature", "Utterance feature")):
        matrices = {}
        for name in ("full", "missing"):
            if name in test_set.shown:
                matrices[name] = cosine_matrix(test_set.shown[name].internals[0][key][order])
        if not matrices:
            continue
        # One colour scale for both conditions, so that they can be compared; without the lowest 2% of the values.
        low = min(float(np.percentile(m, 2)) for m in matrices.values())
        for name, matrix in matrices.items():
            title = f"{what}, {test_set.shown[name].meaning}"
            panels.append(
                Panel(
                    partial(_draw_matrix, matrix=matrix, labels=labels, low=low, title=title),
                    f"cosine similarity matrix ordered by label: {title}",
                    width=4.3,
                    height=3.8,
                )
            )
    if not panels:
        return None
    return Figure(
        f"{test_set.name}_similarity",
        "Similarity of features, ordered by label",
        f"Cosine similarity of every pair of {len(order)} utterances from the most negative (top left) to the most "
        f"positive (bottom right), seed {runs[0].seed}. Blocks along the diagonal mean that utterances of like "
        "sentiment have like features. r: correlation of similarity with closeness of labels over all pairs.",
        panels,
    )


def cosine_matrix(x: np.ndarray) -> np.ndarray:
    """Cosine similarity (N, N) of the rows of x (N, D)."""
    x = x.astype(np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x @ x.T


def _draw_matrix(ax: Axes, theme: Theme, matrix: np.ndarray, labels: np.ndarray, low: float, title: str) -> None:
    image = ax.imshow(matrix, vmin=low, vmax=1, cmap="cividis", interpolation="nearest")
    ax.grid(False)
    n = len(labels)
    # A tick where each whole label begins; those too close to the last one are left out.
    ticks: list[tuple[int, str]] = []
    for value in range(-3, 4):
        at = int(np.searchsorted(labels, value - 1e-6))
        if at < n and (not ticks or at - ticks[-1][0] >= n / 14):
            ticks.append((at, str(value)))
    ax.set_xticks([a for a, _ in ticks], [t for _, t in ticks])
    ax.set_yticks([a for a, _ in ticks], [t for _, t in ticks])
    ax.set_xlabel("utterances by true sentiment")
    ax.set_ylabel("utterances by true sentiment")
    pairs = np.triu_indices(n, 1)
    closeness = -np.abs(labels[pairs[0]] - labels[pairs[1]])
    values = matrix[pairs]
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(values, closeness)[0, 1] if n > 2 else np.nan
    ax.set_title(f"{title}  (r = {r:.2f})" if np.isfinite(r) else title, fontsize=9)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.85)
    bar.set_label("cosine similarity")
    bar.outline.set_visible(False)


def query_weights(test_set: TestSet, runs: Sequence[Run]) -> Figure:
    """Weights over the seven queries. One panel per seed, because runs differ in the scale and sign of the weights."""
    panels = []
    for i, run in enumerate(runs[:3]):
        if all("query_weights" in c.internals[i] for c in test_set.shown.values()):
            panels.append(
                Panel(
                    partial(
                        _draw_weights,
                        test_set=test_set,
                        run=i,
                        key="query_weights",
                        names=QUERY_TITLES,
                        title=f"Query weights, seed {run.seed}",
                    ),
                    f"mean and spread of the weights over the seven queries, seed {run.seed}",
                )
            )
    panels.append(
        Panel(
            partial(
                _draw_weights,
                test_set=test_set,
                run=0,
                key="modality_weights",
                names=MODALITIES,
                title=f"Modality weights, seed {runs[0].seed}",
            ),
            f"mean and spread of the weights of the three modalities, seed {runs[0].seed}",
        )
    )
    more = f" The first 3 of {len(runs)} seeds are shown." if len(runs) > 3 else ""
    return Figure(
        f"{test_set.name}_query_attention",
        "Attention over the seven queries",
        "Mean over utterances; whiskers are one standard deviation over utterances. The weights are raw, not a "
        f"softmax: they may be negative, and runs differ in their scale and sign.{more}",
        panels,
    )


def _draw_weights(
    ax: Axes, theme: Theme, test_set: TestSet, run: int, key: str, names: Sequence[str], title: str
) -> None:
    shifts = offsets(len(test_set.shown), 0.17)
    for i, (name, condition) in enumerate(test_set.shown.items()):
        weights = condition.internals[run][key]
        ax.errorbar(
            weights.mean(axis=0),
            np.arange(weights.shape[1]) + shifts[i],
            xerr=weights.std(axis=0),
            fmt=MARKERS.get(name, "v"),
            color=theme.colour(name, i),
            markersize=4,
            elinewidth=1,
            label=name,
        )
    ax.axvline(0, color=theme.ink, linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_title(title)
    ax.set_xlabel("weight (no unit)")
    legend_below(ax)
