"""Figures of errors: predicted against true, error by label, error by speaker."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from sdumc.reporting.drawing import LINES, MARKERS, Figure, Panel, Theme, legend_below, offsets
from sdumc.reporting.scores import spread
from sdumc.reporting.sets import Run, TestSet
from sdumc.scoring.metrics import format_measure

MAX_SPEAKERS = 30


def predicted_vs_true(test_set: TestSet, runs: Sequence[Run]) -> Figure:
    """A scatter plot for each condition."""
    count = f"{len(test_set.utterances)} utterances" + (f" x {len(runs)} seeds" if len(runs) > 1 else "")
    return Figure(
        f"{test_set.name}_predicted_vs_true",
        "Predicted against true",
        f"{count}. The line is a perfect prediction; a flatter cloud means predictions too close to the middle.",
        [
            Panel(
                partial(_draw_scatter, test_set=test_set, name=c),
                f"predicted against true sentiment, {c}",
                width=3.6,
                height=3.7,
            )
            for c in test_set.shown
        ],
    )


def _draw_scatter(ax: Axes, theme: Theme, test_set: TestSet, name: str) -> None:
    condition = test_set.shown[name]
    x = np.tile(test_set.labels, len(condition.predictions))
    y = condition.predictions.ravel()
    colour = theme.colour(name, list(test_set.shown).index(name))
    # The same scale for all conditions, so that they can be compared.
    everything = np.stack([c.predictions for c in test_set.shown.values()])
    scale = test_set.scale
    margin = (scale.high - scale.low) / 30
    left, right = scale.low - margin, scale.high + margin
    low, high = min(left, everything.min() - margin), max(right, everything.max() + margin)
    ax.plot([scale.low, scale.high], [scale.low, scale.high], color=theme.ink, linewidth=0.8, alpha=0.8)
    size = 12 if len(x) < 2000 else 4
    ax.scatter(x, y, s=size, color=colour, alpha=min(0.6, max(0.06, 150 / len(x) ** 0.9)), linewidths=0)
    mae = spread([s["mae"] for s in condition.scores])
    corr = spread([s["corr"] for s in condition.scores])
    ax.text(
        0.04,
        0.96,
        f"MAE {format_measure('mae', *mae)}\nCorr {format_measure('corr', *corr)}",
        transform=ax.transAxes,
        va="top",
        fontsize=8,
        linespacing=1.4,
        bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1.5},
    )
    ticks = scale.ticks()
    step = ticks[1] - ticks[0]
    beside = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    ax.set(xlim=(left, right), ylim=(low, high), xticks=ticks, yticks=beside)
    ax.set_title(condition.title)
    ax.set_xlabel(f"true sentiment ({scale.ends})")
    ax.set_ylabel("predicted sentiment")


def error_by_label(test_set: TestSet) -> Figure:
    """Absolute and signed error for labels rounded to the marks of the axis."""
    return Figure(
        f"{test_set.name}_error_by_label",
        "Error by label",
        "Labels rounded to the values shown, with the number of utterances below. Whiskers: standard deviation over "
        "seeds. Left: how far off. Right: in which direction; above zero means predicted too positive.",
        [
            Panel(partial(_draw_bins, test_set=test_set, signed=False), "mean absolute error by true label"),
            Panel(partial(_draw_bins, test_set=test_set, signed=True), "mean signed error by true label"),
        ],
    )


def _draw_bins(ax: Axes, theme: Theme, test_set: TestSet, signed: bool) -> None:
    places = np.array(test_set.scale.ticks())  # a bin is what is nearest to a mark of the axis
    bins = places[np.abs(test_set.labels[:, None] - places).argmin(axis=1)]
    gap = places[1] - places[0]
    present = np.unique(bins)
    shifts = offsets(len(test_set.shown), 0.12)
    for i, (name, condition) in enumerate(test_set.shown.items()):
        error = condition.predictions - test_set.labels
        error = error if signed else np.abs(error)
        per_bin = np.stack([error[:, bins == b].mean(axis=1) for b in present])  # (bins, seeds)
        deviation = per_bin.std(axis=1, ddof=1) if per_bin.shape[1] > 1 else None
        ax.errorbar(
            present + gap * shifts[i],
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
    ax.set_xticks(present, [f"{b:g}\nn={np.sum(bins == b)}" for b in present])
    ax.set_title("Mean signed error" if signed else "Mean absolute error")
    ax.set_xlabel("true sentiment, rounded")
    ax.set_ylabel("predicted - true" if signed else "|predicted - true|")
    legend_below(ax, gap=0.58)


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


def error_by_speaker(test_set: TestSet) -> Figure | None:
    """The speakers with the largest errors; None where speakers are not known."""
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
                partial(_draw_speakers, test_set=test_set, rows=shown),
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
    legend_below(ax)


def _clip(text: str, length: int = 20) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
