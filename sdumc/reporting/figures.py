"""All figures of a report: errors, training curves, what the network computes inside; and the same for TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image

from sdumc.conditions import MODALITIES, by_condition
from sdumc.files import atomic_write
from sdumc.reporting.drawing import (
    LINES,
    MARKERS,
    QUERY_TITLES,
    Figure,
    Panel,
    Theme,
    attention_over_frames,
    legend_below,
    offsets,
)
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
    """Speaker, number of utterances, MAE by condition over all seeds; the worst without text first. Nothing where no
    speaker has two utterances."""
    members: dict[str, list[int]] = {}
    for i, utt in enumerate(test_set.utterances):
        if utt in test_set.speakers:
            members.setdefault(test_set.speakers[utt], []).append(i)
    rows: list[tuple[str, int, dict[str, float]]] = []
    if len(members) == sum(map(len, members.values())):
        return rows
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


MAX_MATRIX = 500  # rows of a similarity matrix; more are thinned out evenly


def similarity(test_set: TestSet, runs: Sequence[Run]) -> Figure | None:
    """Cosine similarity of every pair of utterances, ordered by label; the first run's features."""
    panels = []
    order = np.argsort(test_set.labels, kind="stable")
    if len(order) > MAX_MATRIX:
        order = order[np.linspace(0, len(order) - 1, MAX_MATRIX).round().astype(int)]
    labels, marks = test_set.labels[order], test_set.scale.ticks()
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
                    partial(_draw_matrix, matrix=matrix, labels=labels, low=low, title=title, marks=marks),
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


def _draw_matrix(
    ax: Axes,
    theme: Theme,
    matrix: np.ndarray,
    labels: np.ndarray,
    low: float,
    title: str,
    marks: Sequence[float],
) -> None:
    image = ax.imshow(matrix, vmin=low, vmax=1, cmap="cividis", interpolation="nearest")
    ax.grid(False)
    n = len(labels)
    # A tick where each of `marks` begins among the labels; those too close to the last one are left out.
    ticks: list[tuple[int, str]] = []
    for value in marks:
        at = int(np.searchsorted(labels, value - 1e-6))
        if at < n and (not ticks or at - ticks[-1][0] >= n / 14):
            ticks.append((at, f"{value:g}"))
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


def training_figures(runs: Sequence[Run], valid_set: str) -> list[Figure]:
    """Figures of the training."""
    return [training_curves(runs, valid_set)]


def set_figures(test_set: TestSet, runs: Sequence[Run]) -> list[Figure]:
    """All figures that can be drawn of one decoded set."""
    figures = [
        predicted_vs_true(test_set, runs),
        error_by_label(test_set),
        similarity(test_set, runs),
        query_weights(test_set, runs),
        error_by_speaker(test_set),
        attention_over_frames(test_set, runs),
    ]
    return [figure for figure in figures if figure is not None]


SUFFIX = ".report"


def write_board(runs: Sequence[Run], images: Sequence[Path], directory: Path) -> Path:
    """Write one event file with ``images`` (PNG) and the mean curves, in place of the one of an earlier report.

    Its time is that of the last epoch, not the current time, so that the same runs give the same file.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    time = max((run.path / "metrics.jsonl").stat().st_mtime for run in runs)
    last = max(run.history[-1]["epoch"] for run in runs)
    path = directory / f"events.out.tfevents.{int(time):010d}{SUFFIX}"
    with atomic_write(path, "wb") as f:
        records = RecordWriter(f)
        records.write(Event(wall_time=time, file_version="brain.Event:2").SerializeToString())
        # A run's own folder has its curves from training.
        own = any(directory.resolve() == (run.path / "tensorboard").resolve() for run in runs)
        for keys in [] if own else _curves(runs):
            for epoch, value in zip(*(a.tolist() for a in mean_curve(runs, *keys)), strict=True):
                entry = Summary.Value(tag="/".join(keys), simple_value=value)
                event = Event(wall_time=time, step=epoch, summary=Summary(value=[entry]))
                records.write(event.SerializeToString())
        for image in images:
            png = image.read_bytes()
            width, height = Image.open(io.BytesIO(png)).size
            picture = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
            entry = Summary.Value(tag=f"figures/{image.stem}", image=picture)
            event = Event(wall_time=time, step=last, summary=Summary(value=[entry]))
            records.write(event.SerializeToString())
        records.flush()
    for old in directory.glob(f"events.out.tfevents.*{SUFFIX}"):
        if old != path:
            old.unlink()
    return path


def _curves(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The entries of metrics.jsonl that are numbers, by where they are in it."""
    found: dict[tuple[str, ...], None] = {}
    for run in runs:
        for entry in run.history:
            found.update(dict.fromkeys(path for path in _numbers(entry) if path not in (("epoch",), ("step",))))
    return list(found)


def _numbers(entry: dict, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*above, key))
        elif isinstance(value, (int, float)):
            yield (*above, key)
