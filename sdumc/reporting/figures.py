"""The figures: each is a few panels, put together as one PNG for people and one by one for the page.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every condition has its own marker too.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from sdumc.files import atomic_write
from sdumc.reporting.collect import MODALITY_NAMES, QUERY_NAMES, Run, TestSet, condition_order
from sdumc.reporting.summary import best_epoch, spread

MAX_MATRIX = 500  # rows of a similarity matrix; more are thinned out evenly
MAX_SPEAKERS = 30
MARKERS = {"full": "o", "missing": "s", "asr": "^", "none": "D"}
LINES = {"full": "-", "missing": "--", "asr": "-.", "none": ":"}


@dataclass(frozen=True)
class Theme:
    """Colours of one rendering: on paper, or for a reader in dark mode."""

    name: str
    ink: str
    faint: str
    background: str
    conditions: dict[str, str]
    others: tuple[str, ...]

    def colour(self, condition: str, index: int = 0) -> str:
        return self.conditions.get(condition, self.others[index % len(self.others)])


LIGHT = Theme(
    "light",
    ink="#222222",
    faint="#d5d8dc",
    background="#ffffff",
    conditions={"full": "#0072B2", "missing": "#D55E00", "asr": "#009E73", "none": "#7A7A7A"},
    others=("#CC79A7", "#B08900", "#3A9BD6", "#5B3A8C", "#8A4B08", "#222222"),
)
DARK = Theme(
    "dark",
    ink="#e4e6ea",
    faint="#3b4148",
    background="#1b1f24",
    conditions={"full": "#56B4E9", "missing": "#F0883E", "asr": "#2FC79A", "none": "#A9AFB7"},
    others=("#E3A0C8", "#E6C84B", "#8CCBF0", "#B79AE0", "#D8A06A", "#ffffff"),
)


@dataclass
class Panel:
    """One plot. ``draw`` gets the axes and the theme; ``alt`` says in words what is to be seen."""

    draw: Callable[[Axes, Theme], None]
    alt: str
    width: float = 4.2  # inches
    height: float = 3.5


@dataclass
class Figure:
    name: str  # file name without its ending
    title: str
    caption: str
    panels: list[Panel]
    columns: int = field(default=2)
    on_page: bool = True  # False: the page shows the same in another way


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    with plt.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.labelsize": 9,
            "axes.edgecolor": theme.ink,
            "axes.labelcolor": theme.ink,
            "axes.facecolor": theme.background,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": theme.faint,
            "grid.linewidth": 0.6,
            "figure.facecolor": theme.background,
            "savefig.facecolor": theme.background,
            "text.color": theme.ink,
            "xtick.color": theme.ink,
            "ytick.color": theme.ink,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "lines.linewidth": 1.6,
        }
    ):
        yield


def render(panels: Sequence[Panel], columns: int, theme: Theme = LIGHT, dpi: int = 130) -> bytes:
    """Draw the panels in rows of ``columns`` and return the PNG; the same data give the same bytes."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = max(p.width for p in panels)
    height = max(p.height for p in panels)
    with themed(theme):
        figure, grid = plt.subplots(
            rows, columns, figsize=(columns * width, rows * height), squeeze=False, layout="constrained"
        )
        try:
            axes = grid.ravel()
            for ax, panel in zip(axes, panels, strict=False):
                panel.draw(ax, theme)
            for ax in axes[len(panels) :]:
                ax.set_axis_off()
            out = io.BytesIO()
            figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
        finally:
            plt.close(figure)
    return out.getvalue()


def write_figures(figures: Sequence[Figure], directory: Path) -> list[Path]:
    """Write ``<directory>/<name>.png`` of each figure."""
    paths = []
    for figure in figures:
        path = directory / f"{figure.name}.png"
        with atomic_write(path, "wb") as f:
            f.write(render(figure.panels, figure.columns))
        paths.append(path)
    return paths


def training_figures(runs: Sequence[Run], valid_set: str) -> list[Figure]:
    """Losses and valid MAE by epoch."""
    panels = [Panel(lambda ax, t: _draw_valid(ax, t, runs, valid_set), f"MAE on {valid_set} by epoch, per condition")]
    terms = _loss_terms(runs)
    if "loss" in terms:
        panels.append(Panel(lambda ax, t: _draw_loss(ax, t, runs), "training loss by epoch, a line per seed"))
    rest = [t for t in terms if t != "loss"]
    if rest:
        panels.append(Panel(lambda ax, t: _draw_terms(ax, t, runs, rest), "each term of the loss by epoch"))
    many = "Thin lines are seeds, thick ones their mean. " if len(runs) > 1 else ""
    return [
        Figure(
            "training_curves",
            "Curves",
            f"{many}The circle marks the epoch with the lowest MAE on {valid_set}. The terms are not weighted.",
            panels,
            columns=3,
        )
    ]


def set_figures(test_set: TestSet, runs: Sequence[Run]) -> list[Figure]:
    """All figures of one decoded set."""
    prefix = test_set.name
    count = f"{len(test_set.utterances)} utterances" + (f" x {len(runs)} seeds" if len(runs) > 1 else "")
    figures = [
        Figure(
            f"{prefix}_predicted_vs_true",
            "Predicted against true",
            f"{count}. The line is a perfect prediction; a flatter cloud means predictions drawn to the middle.",
            [
                Panel(
                    partial(_draw_scatter, test_set=test_set, name=c),
                    f"predicted against true sentiment, {c}",
                    width=3.6,
                    height=3.7,
                )
                for c in test_set.shown
            ],
        ),
        Figure(
            f"{prefix}_error_by_label",
            "Error by label",
            "Labels rounded to whole numbers, with the number of utterances below. Whiskers: standard deviation over "
            "seeds. Left: how far off. Right: in which direction; above zero means predicted too positive.",
            [
                Panel(lambda ax, t: _draw_bins(ax, t, test_set, signed=False), "mean absolute error by true label"),
                Panel(lambda ax, t: _draw_bins(ax, t, test_set, signed=True), "mean signed error by true label"),
            ],
        ),
    ]
    figures += [f for f in (_similarity(test_set, runs), _attention(test_set, runs), _speakers(test_set)) if f]
    return figures


def _loss_terms(runs: Sequence[Run]) -> list[str]:
    names: dict[str, None] = {}
    for run in runs:
        for epoch in run.history:
            names.update(dict.fromkeys(k for k, v in epoch.get("train", {}).items() if isinstance(v, (int, float))))
    return list(names)


def _curve(run: Run, *keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of one entry of metrics.jsonl, e.g. ``valid, full, mae``."""
    epochs: list[int] = []
    values: list[float] = []
    for entry in run.history:
        value: Any = entry
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)):
            epochs.append(entry["epoch"])
            values.append(value)
    return np.array(epochs), np.array(values, dtype=float)


def mean_curve(runs: Sequence[Run], *keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the runs at the epochs that all of them reached."""
    curves = [dict(zip(*(a.tolist() for a in _curve(run, *keys)), strict=True)) for run in runs]
    epochs = sorted(set.intersection(*(set(c) for c in curves)))
    return np.array(epochs), np.array([np.mean([c[e] for c in curves]) for e in epochs])


def _epoch_axis(ax: Axes) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def _draw_valid(ax: Axes, theme: Theme, runs: Sequence[Run], valid_set: str) -> None:
    names = sorted({c for run in runs for e in run.history for c in e.get("valid", {})}, key=condition_order)
    for i, name in enumerate(names):
        colour = theme.colour(name, i)
        for run in runs:
            epochs, values = _curve(run, "valid", name, "mae")
            ax.plot(epochs, values, color=colour, linewidth=0.7, alpha=0.55, linestyle=LINES.get(name, "-"))
            best = best_epoch(run.history)
            if best in epochs:
                at = values[list(epochs).index(best)]
                ax.plot([best], [at], "o", markersize=5, markerfacecolor="none", markeredgecolor=colour)
        epochs, values = mean_curve(runs, "valid", name, "mae")
        ax.plot(epochs, values, color=colour, linestyle=LINES.get(name, "-"), label=name)
    ax.set_title(f"MAE on {valid_set}")
    ax.set_ylabel("mean absolute error")
    _epoch_axis(ax)
    if names:
        _legend(ax)


def _draw_loss(ax: Axes, theme: Theme, runs: Sequence[Run]) -> None:
    for run in runs:
        ax.plot(*_curve(run, "train", "loss"), color=theme.ink, linewidth=0.7, alpha=0.55)
    ax.plot(*mean_curve(runs, "train", "loss"), color=theme.ink)
    ax.set_title("Training loss")
    ax.set_ylabel("weighted sum of the terms")
    _epoch_axis(ax)


def _draw_terms(ax: Axes, theme: Theme, runs: Sequence[Run], terms: Sequence[str]) -> None:
    styles = ("-", "--", "-.", ":")
    colours = [*theme.conditions.values(), *theme.others]
    for i, term in enumerate(terms):
        epochs, values = mean_curve(runs, "train", term)
        if len(values) and np.any(values > 0):
            ax.plot(
                epochs, values, label=term.replace("_", " "), color=colours[i % len(colours)], linestyle=styles[i % 4]
            )
    ax.set_yscale("log")
    ax.set_title("Terms of the loss")
    ax.set_ylabel("value (log scale)")
    _epoch_axis(ax)
    _legend(ax, columns=2)


def _draw_scatter(ax: Axes, theme: Theme, test_set: TestSet, name: str) -> None:
    condition = test_set.shown[name]
    x = np.tile(test_set.labels, len(condition.predictions))
    y = condition.predictions.ravel()
    colour = theme.colour(name, list(test_set.shown).index(name))
    # One scale for all conditions, so that they can be compared by eye.
    everything = np.stack([c.predictions for c in test_set.shown.values()])
    low, high = min(-3.2, everything.min() - 0.2), max(3.2, everything.max() + 0.2)
    ax.plot([-3, 3], [-3, 3], color=theme.ink, linewidth=0.8, alpha=0.8)
    size = 12 if len(x) < 2000 else 4
    ax.scatter(x, y, s=size, color=colour, alpha=min(0.6, max(0.06, 150 / len(x) ** 0.9)), linewidths=0)
    mae = spread([s["mae"] for s in condition.scores])
    corr = spread([s["corr"] for s in condition.scores])
    ax.text(
        0.04,
        0.96,
        f"MAE {_pm(*mae)}\nCorr {_pm(*corr)}",
        transform=ax.transAxes,
        va="top",
        fontsize=8,
        linespacing=1.4,
        bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1.5},
    )
    ax.set(xlim=(-3.2, 3.2), ylim=(low, high), xticks=range(-3, 4), yticks=range(int(np.ceil(low)), int(high) + 1))
    ax.set_title(condition.title)
    ax.set_xlabel("true sentiment (-3 to 3)")
    ax.set_ylabel("predicted sentiment")


def _pm(mean: float, deviation: float | None) -> str:
    if np.isnan(mean):
        return "–"
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def _draw_bins(ax: Axes, theme: Theme, test_set: TestSet, signed: bool) -> None:
    bins = np.round(test_set.labels).astype(int)
    present = np.unique(bins)
    offsets = _offsets(len(test_set.shown), 0.12)
    for i, (name, condition) in enumerate(test_set.shown.items()):
        error = condition.predictions - test_set.labels
        error = error if signed else np.abs(error)
        per_bin = np.stack([error[:, bins == b].mean(axis=1) for b in present])  # (bins, seeds)
        deviation = per_bin.std(axis=1, ddof=1) if per_bin.shape[1] > 1 else None
        ax.errorbar(
            present + offsets[i],
            per_bin.mean(axis=1),
            yerr=deviation,
            color=theme.colour(name, i),
            marker=MARKERS.get(name, "v"),
            markersize=4,
            linestyle=LINES.get(name, "-"),
            linewidth=1.2,
            elinewidth=0.8,
            label=name,
        )
    if signed:
        ax.axhline(0, color=theme.ink, linewidth=0.8)
    else:
        ax.set_ylim(bottom=0)
    ax.set_xticks(present, [f"{b}\nn={np.sum(bins == b)}" for b in present])
    ax.set_title("Mean signed error" if signed else "Mean absolute error")
    ax.set_xlabel("true sentiment, rounded")
    ax.set_ylabel("predicted - true" if signed else "|predicted - true|")
    _legend(ax, gap=0.58)


def _legend(ax: Axes, columns: int = 4, gap: float = 0.42) -> None:
    """A legend below the plot, where it hides nothing; ``gap`` in inches leaves room for the axis's own words."""
    handles, labels = ax.get_legend_handles_labels()
    below = ax.transAxes + ScaledTranslation(0, -gap, ax.figure.dpi_scale_trans)
    ax.legend(
        handles,
        labels,
        ncols=min(columns, max(1, len(labels))),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=below,
        handletextpad=0.5,
        columnspacing=1.2,
    )


def _offsets(count: int, step: float) -> np.ndarray:
    return (np.arange(count) - (count - 1) / 2) * step


def _similarity(test_set: TestSet, runs: Sequence[Run]) -> Figure | None:
    """Cosine similarity of every pair of utterances, ordered by label; the first run's features."""
    panels = []
    order = np.argsort(test_set.labels, kind="stable")
    if len(order) > MAX_MATRIX:
        order = order[np.linspace(0, len(order) - 1, MAX_MATRIX).round().astype(int)]
    labels = test_set.labels[order]
    for key, what in (("text_feature", "Text feature"), ("utterance_feature", "Utterance feature")):
        matrices = {}
        for name in ("full", "missing"):
            if name in test_set.shown and key in test_set.shown[name].internals[0]:
                matrices[name] = cosine_matrix(test_set.shown[name].internals[0][key][order])
        if not matrices:
            continue
        # One scale for both, from the bulk of the values: they are what the eye compares.
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


def _attention(test_set: TestSet, runs: Sequence[Run]) -> Figure | None:
    """Weights over the seven queries, a panel per seed as their scale and sign are each run's own."""
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
                        names=QUERY_NAMES,
                        title=f"Query weights, seed {run.seed}",
                    ),
                    f"mean and spread of the weights over the seven queries, seed {run.seed}",
                )
            )
    if all("modality_weights" in c.internals[0] for c in test_set.shown.values()):
        panels.append(
            Panel(
                lambda ax, t: _draw_weights(
                    ax, t, test_set, 0, "modality_weights", MODALITY_NAMES, f"Modality weights, seed {runs[0].seed}"
                ),
                f"mean and spread of the weights of the three modalities, seed {runs[0].seed}",
            )
        )
    if not panels:
        return None
    more = f" The first 3 of {len(runs)} seeds are shown." if len(runs) > 3 else ""
    return Figure(
        f"{test_set.name}_query_attention",
        "Attention over the seven queries",
        "Mean over utterances; whiskers are one standard deviation over utterances. The weights are raw, not a "
        f"softmax: they may be negative, and their scale and sign are each run's own.{more}",
        panels,
    )


def _draw_weights(
    ax: Axes, theme: Theme, test_set: TestSet, run: int, key: str, names: Sequence[str], title: str
) -> None:
    offsets = _offsets(len(test_set.shown), 0.17)
    for i, (name, condition) in enumerate(test_set.shown.items()):
        weights = condition.internals[run][key]
        ax.errorbar(
            weights.mean(axis=0),
            np.arange(weights.shape[1]) + offsets[i],
            xerr=weights.std(axis=0),
            fmt=MARKERS.get(name, "v"),
            color=theme.colour(name, i),
            markersize=4,
            elinewidth=1,
            label=name,
        )
    count = test_set.shown[next(iter(test_set.shown))].internals[run][key].shape[1]
    ax.axvline(0, color=theme.ink, linewidth=0.8)
    ax.set_yticks(range(count), [names[i] if i < len(names) else str(i) for i in range(count)])
    ax.set_ylim(count - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_title(title)
    ax.set_xlabel("weight (no unit)")
    _legend(ax)


def speaker_errors(test_set: TestSet) -> list[tuple[str, int, dict[str, float]]]:
    """Speaker, number of utterances, MAE by condition over all seeds; the worst without text first."""
    members: dict[str, list[int]] = {}
    for i, utt in enumerate(test_set.utterances):
        if utt in test_set.speakers:
            members.setdefault(test_set.speakers[utt], []).append(i)
    rows = []
    for speaker, index in members.items():
        mae = {
            name: float(np.abs(c.predictions[:, index] - test_set.labels[index]).mean())
            for name, c in test_set.shown.items()
        }
        rows.append((speaker, len(index), mae))
    key = "missing" if "missing" in test_set.shown else next(iter(test_set.shown))
    return sorted(rows, key=lambda row: (-row[2][key], row[0]))


def _speakers(test_set: TestSet) -> Figure | None:
    rows = speaker_errors(test_set)
    if not rows:
        return None
    shown = rows[:MAX_SPEAKERS]
    which = f"The {len(shown)} worst of {len(rows)} speakers" if len(rows) > len(shown) else "All speakers"
    key = "missing" if "missing" in test_set.shown else next(iter(test_set.shown))
    return Figure(
        f"{test_set.name}_error_by_speaker",
        "Error by speaker",
        f"{which}, the largest error under {key} on top; the number of utterances in brackets, mean over seeds.",
        [
            Panel(
                lambda ax, t: _draw_speakers(ax, t, test_set, shown),
                "mean absolute error by speaker",
                width=5.2,
                height=1.6 + 0.24 * len(shown),
            )
        ],
        columns=1,
    )


def _draw_speakers(ax: Axes, theme: Theme, test_set: TestSet, rows: list) -> None:
    for y, (_, _, mae) in enumerate(rows):
        ax.plot([min(mae.values()), max(mae.values())], [y, y], color=theme.faint, linewidth=2, zorder=1)
    for i, name in enumerate(test_set.shown):
        ax.scatter(
            [mae[name] for _, _, mae in rows],
            range(len(rows)),
            color=theme.colour(name, i),
            marker=MARKERS.get(name, "v"),
            s=22,
            label=name,
            zorder=2,
        )
    ax.set_yticks(range(len(rows)), [f"{_clip(speaker)} ({n})" for speaker, n, _ in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.grid(axis="y", visible=False)
    ax.set_title("Mean absolute error by speaker")
    ax.set_xlabel("|predicted - true|")
    _legend(ax)


def _clip(text: str, length: int = 20) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
