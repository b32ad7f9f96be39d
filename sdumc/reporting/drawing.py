"""The parts of all figures: panels, two themes, the look of each condition, and rendering to PNG.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every condition has its own marker too.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.transforms import ScaledTranslation

from sdumc.conditions import QUERIES
from sdumc.files import atomic_write

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
