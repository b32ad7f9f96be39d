"""The training curves: loss, its terms, and the MAE on the valid set, by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sdumc.conditions import by_condition
from sdumc.reporting.drawing import LINES, Figure, Panel, Theme, legend_below
from sdumc.reporting.runs import Run


def training_curves(runs: Sequence[Run], valid_set: str) -> Figure:
    """Losses and valid MAE by epoch."""
    terms = dict.fromkeys(term for run in runs for epoch in run.history for term in epoch["train"] if term != "loss")
    panels = [
        Panel(partial(_draw_valid, runs=runs, valid_set=valid_set), f"MAE on {valid_set} by epoch, per condition"),
        Panel(partial(_draw_loss, runs=runs), "training loss by epoch, a line per seed"),
        Panel(partial(_draw_terms, runs=runs, terms=list(terms)), "each term of the loss by epoch"),
    ]
    many = "Thin lines are seeds, thick ones their mean. " if len(runs) > 1 else ""
    return Figure(
        "training_curves",
        "Curves",
        f"{many}The circle marks the epoch with the lowest MAE on {valid_set}. The terms are not weighted.",
        panels,
        columns=3,
    )


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
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_valid(ax: Axes, theme: Theme, runs: Sequence[Run], valid_set: str) -> None:
    names = sorted({c for run in runs for e in run.history for c in e["valid"]}, key=by_condition)
    for i, name in enumerate(names):
        colour = theme.colour(name, i)
        for run in runs:
            epochs, values = _curve(run, "valid", name, "mae")
            ax.plot(epochs, values, color=colour, linewidth=0.7, alpha=0.55, linestyle=LINES.get(name, "-"))
            best = run.best_epoch
            if best in epochs:
                at = values[list(epochs).index(best)]
                ax.plot([best], [at], "o", markersize=5, markerfacecolor="none", markeredgecolor=colour)
        epochs, values = mean_curve(runs, "valid", name, "mae")
        ax.plot(epochs, values, color=colour, linestyle=LINES.get(name, "-"), label=name)
    ax.set_title(f"MAE on {valid_set}")
    ax.set_ylabel("mean absolute error")
    _epoch_axis(ax)
    legend_below(ax)


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
    legend_below(ax, columns=2)
