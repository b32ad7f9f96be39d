"""What all figures are made of, and attention over the frames of single utterances as heat maps.

Panels, two themes, the look of each condition, and rendering to PNG. Colours are those of Okabe and Ito, which
colour-blind readers can tell apart; every condition has its own marker too. A heat map shows the seven queries over an
utterance's frames, on a page or in a figure.
"""

from __future__ import annotations

import base64
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.transforms import ScaledTranslation

from sdumc.conditions import FUSED_QUERIES, MODALITIES, QUERIES, TEXTS
from sdumc.files import atomic_write
from sdumc.reporting.sets import ConditionResults, Run, TestSet
from sdumc.scoring.attention import drawn_at_random

log = logging.getLogger("sdumc")

FONT = "DejaVu Sans"  # comes with matplotlib, so figures are the same everywhere; it has no Chinese, Japanese, Korean
FONTS_WITH_CHINESE = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Droid Sans Fallback", "PingFang SC", "Microsoft YaHei", "SimHei"),
)
MARKERS = {"full": "o", "missing": "s", "asr": "^", "none": "D"}
QUERY_TITLES = [query.replace("+", " + ") for query in QUERIES]
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
    """One plot. ``draw`` gets the axes and the theme; ``alt`` describes the plot in words."""

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
    columns: int = 2
    on_page: bool = True  # False: the page shows the same as heat maps


@cache
def fonts() -> list[str]:
    """The font of all figures, and one for the characters that it lacks, if one is installed here."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [FONT, *[name for name in FONTS_WITH_CHINESE if name in installed][:1]]


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    with plt.rc_context(
        {
            "font.family": fonts(),
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
            return _png(figure, dpi)
        finally:
            plt.close(figure)


def _png(figure: MatplotlibFigure, dpi: int) -> bytes:
    """The figure as PNG. Characters that no font here has are drawn as boxes; the log says so."""
    out = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    absent = set()
    for warning in caught:
        if glyph := re.match(r"Glyph (\d+) .*missing from", str(warning.message)):
            absent.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if absent:
        _log_absent("".join(sorted(absent)))
    return out.getvalue()


@cache  # so that it is logged once, however many figures there are
def _log_absent(characters: str) -> None:
    log.warning("figures: no font here has %s; boxes are drawn. Install one, such as fonts-noto-cjk", characters)


def write_figures(figures: Sequence[Figure], directory: Path) -> list[Path]:
    """Write ``<directory>/<name>.png`` of each figure."""
    paths = []
    for figure in figures:
        path = directory / f"{figure.name}.png"
        with atomic_write(path, "wb") as f:
            f.write(render(figure.panels, figure.columns))
        paths.append(path)
    return paths


def legend_below(ax: Axes, columns: int = 4, gap: float = 0.42) -> None:
    """A legend below the plot, where it hides nothing; ``gap`` in inches leaves room for the axis labels."""
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


def offsets(count: int, step: float) -> np.ndarray:
    return (np.arange(count) - (count - 1) / 2) * step


# The queries beside a heat map: ``a + t`` for audio + text.
SHORT_QUERIES = [
    *("fused" if len(summed) == 3 else " + ".join(m[0] for m in summed) for summed in FUSED_QUERIES.values()),
    *MODALITIES,
]
MAX_TOKENS = 26  # more labels do not fit below a map of a card's width
FIGURE_UTTERANCES = 3
_COLOURS = matplotlib.colormaps["cividis"]


@dataclass
class Axis:
    """What the columns of one utterance's map are: frames of a modality, or tokens of a text."""

    title: str
    unit: str  # what a column is, with their number
    ticks: list[tuple[float, str]]  # position along the map in per cent, label
    tokens: list[str]  # one a column, or empty


@dataclass
class HeatMap:
    """One modality of one utterance: a picture of 7 x T cells, and the axis below it."""

    axis: Axis
    image: str  # data URI of a PNG, a pixel a cell
    alt: str


@dataclass
class Scale:
    """The values at the two ends of the colour scale, in multiples of even attention (1/T)."""

    low: float
    high: float

    def __call__(self, relative: np.ndarray) -> np.ndarray:
        return np.clip((relative - self.low) / max(self.high - self.low, 1e-9), 0, 1)


def modality_scales(test_set: TestSet) -> dict[str, Scale]:
    """One scale per modality for all utterances and conditions that are shown, so that maps can be compared."""
    values: dict[str, list[np.ndarray]] = {}
    for condition in test_set.shown.values():
        # Only of the run that is shown: the attention of another run can be much sharper.
        for utt in set().union(*condition.attention):
            for modality, a in attention_of(condition, utt)[1].items():
                values.setdefault(modality, []).append(a)
    return {m: scale_of(values[m]) for m in MODALITIES if m in values}


def scale_of(maps: Sequence[np.ndarray]) -> Scale:
    """One scale for several maps (7, T), but for a hundredth of their cells at each end; even attention is in it."""
    low, high = np.percentile(np.concatenate([(a * a.shape[1]).ravel() for a in maps]), [1, 99])
    return Scale(float(min(low, 1)), float(max(high, 1)))


def attention_of(condition: ConditionResults, utterance: str) -> tuple[int, dict[str, np.ndarray]]:
    """The first run that kept the utterance, and its attention by modality; empty where none did."""
    for i, run in enumerate(condition.attention):
        if run.get(utterance):
            return i, dict(run[utterance])
    return 0, {}


def heat_maps(
    test_set: TestSet, condition: ConditionResults, utterance: str, scales: dict[str, Scale]
) -> list[HeatMap]:
    """A map per modality that the utterance has under ``condition``."""
    maps = []
    _, found = attention_of(condition, utterance)
    for modality in MODALITIES:
        if modality not in found:
            continue
        a = found[modality]
        axis = make_axis(test_set, condition.text if modality == "text" else modality, utterance, a.shape[1])
        maps.append(heat_map(a, scales[modality], axis, utterance))
    return maps


def heat_map(a: np.ndarray, scale: Scale, axis: Axis, utterance: str) -> HeatMap:
    """The map of attention (7, T)."""
    peak = int(a[0].argmax())
    place = f"{100 * (peak + 0.5) / a.shape[1]:.0f}% of the way through"
    where = f"at {axis.tokens[peak]!r}" if axis.tokens else place
    alt = f"attention of seven queries over {axis.title} of {utterance}; the fused query looks most {where}"
    return HeatMap(axis, picture_of(a, scale), alt)


def picture_of(a: np.ndarray, scale: Scale) -> str:
    """Attention (Q, T) as the data URI of a PNG, a pixel a cell."""
    out = io.BytesIO()
    Image.fromarray(_COLOURS(scale(a * a.shape[1]), bytes=True)).save(out, "png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def make_axis(test_set: TestSet, feature: str, utterance: str, frames: int) -> Axis:
    """The axis of a map over the ``frames`` columns of one feature: tokens of a text, else time, else frames."""
    if feature in TEXTS:
        words = test_set.texts.get(feature, {}).get(utterance, "")
        tokens = test_set.tokenisers[feature](words, frames) if feature in test_set.tokenisers else words.split()
        return words_axis(TEXTS[feature], tokens, frames)
    return time_axis(feature, frames, test_set.frame_rates.get(feature))


def words_axis(title: str, tokens: list[str], frames: int) -> Axis:
    """An axis of ``frames`` tokens; positions where the ``tokens`` are not as many."""
    ticks = [(100 * (i + 0.5) / frames, str(i + 1)) for i in range(0, frames, max(1, -(-frames // 6)))]
    unit = "1 token" if frames == 1 else f"{frames} tokens"
    return Axis(title, unit, ticks, tokens if len(tokens) == frames else [])


def time_axis(feature: str, frames: int, rate: float | None) -> Axis:
    """An axis in seconds, or in frames where there is no rate (Hz)."""
    if rate:
        seconds = frames / rate
        ticks = [(100 * t / seconds, f"{t:g} s") for t in _steps(seconds).round(3)]
        return Axis(feature, f"{frames} frames, {seconds:.1f} s", ticks, [])
    return Axis(feature, f"{frames} frames", [(100 * i / frames, f"{i:g}") for i in _steps(frames)], [])


def _steps(end: float) -> np.ndarray:
    """Round numbers from 0 to ``end``, four or fewer steps."""
    return np.arange(0, end + 1e-9, _round_step(end / 4))


def _round_step(least: float) -> float:
    """The next larger of 1, 2, 5, 10, 20 ... and their tenths."""
    power = 10.0 ** np.floor(np.log10(max(least, 1e-6)))
    return float(next(power * m for m in (1, 2, 5, 10) if power * m >= least * (1 - 1e-9)))


def attention_over_frames(test_set: TestSet, runs: Sequence[Run]) -> Figure | None:
    """One row each for the utterance with the largest error and some drawn at random.

    For images/ and TensorBoard; the page shows maps of more utterances. None if decoding kept no attention.
    """
    name = next((c for c in ("missing", "full", *test_set.shown) if c in test_set.shown), "")
    condition = test_set.shown[name]
    scales = modality_scales(test_set)
    error = np.abs(condition.predictions - test_set.labels).mean(axis=0)
    order = [test_set.utterances[i] for i in np.argsort(-error, kind="stable")]
    chosen = [u for u in order[:1] + drawn_at_random(test_set.utterances) if attention_of(condition, u)[1]]
    panels = []
    for utt in list(dict.fromkeys(chosen))[:FIGURE_UTTERANCES]:
        run, found = attention_of(condition, utt)
        for modality in scales:
            if modality in found:
                feature = condition.text if modality == "text" else modality
                axis = make_axis(test_set, feature, utt, found[modality].shape[1])
                panels.append(
                    Panel(
                        partial(_draw_map, a=found[modality], scale=scales[modality], axis=axis, utterance=utt),
                        f"attention over {axis.title} of {utt}, seed {runs[run].seed}",
                        width=4.2,
                        height=2.6,
                    )
                )
            else:
                panels.append(Panel(partial(_draw_nothing, words=f"{utt}: no {modality}"), "", width=4.2, height=2.6))
    if not panels:
        return None
    return Figure(
        f"{test_set.name}_attention_over_frames",
        "Attention over frames",
        f"Condition {name}; 1 is even attention.",
        panels,
        columns=len(scales),
        on_page=False,
    )


def _draw_map(ax: Axes, theme: Theme, a: np.ndarray, scale: Scale, axis: Axis, utterance: str) -> None:
    frames = a.shape[1]
    image = ax.imshow(
        a * frames,
        aspect="auto",
        cmap=_COLOURS,
        vmin=scale.low,
        vmax=max(scale.high, scale.low + 1e-9),
        interpolation="nearest",
        extent=(0, frames, len(QUERY_TITLES), 0),
    )
    ax.grid(False)
    ax.set_yticks(np.arange(len(QUERY_TITLES)) + 0.5, QUERY_TITLES, fontsize=7)
    if 0 < len(axis.tokens) <= MAX_TOKENS:
        ax.set_xticks(np.arange(frames) + 0.5, axis.tokens, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    else:
        ax.set_xticks([frames * p / 100 for p, _ in axis.ticks], [t for _, t in axis.ticks], fontsize=7)
    ax.tick_params(length=2)
    ax.set_title(f"{utterance}: {axis.title} ({axis.unit})", fontsize=8)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.9)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _draw_nothing(ax: Axes, theme: Theme, words: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=8, transform=ax.transAxes)
