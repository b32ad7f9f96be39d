"""All figures of a report: training curves, what the network computes inside; and the same for TensorBoard."""

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
from sdumc.reporting.attention import attention_over_frames
from sdumc.reporting.drawing import LINES, MARKERS, QUERY_TITLES, Figure, Panel, Theme, legend_below, offsets
from sdumc.reporting.errors import error_by_label, error_by_speaker, predicted_vs_true
from sdumc.reporting.sets import Run, TestSet


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
