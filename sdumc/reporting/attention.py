"""Attention of the seven queries over the frames of single utterances, as heat maps for the page and as a figure."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from sdumc.reporting.collect import MODALITY_NAMES, QUERY_NAMES, Condition, Run, TestSet
from sdumc.reporting.figures import Figure, Panel, Theme
from sdumc.scoring.attention_file import drawn_at_random

SHORT_QUERIES = ("fused", "a + t", "t + v", "a + v", "audio", "text", "video")
TEXT_FEATURES = {"missing": "text_sim", "asr": "text_asr"}  # of the other conditions: text
TEXT_TITLES = {"text": "real text", "text_sim": "simulated text", "text_asr": "ASR text"}
MAX_TOKENS = 26  # labels that still fit below a map as wide as a card
FIGURE_UTTERANCES = 3
_COLOURS = matplotlib.colormaps["cividis"]


@dataclass
class HeatMap:
    """One modality of one utterance: a picture of 7 x T cells, and what stands beside and below it."""

    title: str
    unit: str  # what a column is, with their number
    image: str  # data URI of a PNG, a pixel a cell
    alt: str
    ticks: list[tuple[float, str]]  # where along the map, in per cent, and what
    tokens: list[str]  # one a column, or empty


@dataclass
class Scale:
    """What the ends of the colours mean, in multiples of even attention (1/T)."""

    low: float
    high: float

    def __call__(self, relative: np.ndarray) -> np.ndarray:
        return np.clip((relative - self.low) / max(self.high - self.low, 1e-9), 0, 1)


def modality_scales(test_set: TestSet) -> dict[str, Scale]:
    """One scale a modality for all utterances and conditions that are shown, so that maps can be compared."""
    values: dict[str, list[np.ndarray]] = {}
    for condition in test_set.shown.values():
        # Of the run that is shown only: another's attention can be much sharper.
        for utt in set().union(*condition.attention):
            for modality, a in attention_of(condition, utt)[1].items():
                values.setdefault(modality, []).append((a * a.shape[1]).ravel())
    scales = {}
    for modality in MODALITY_NAMES:
        if modality in values:
            low, high = np.percentile(np.concatenate(values[modality]), [1, 99])
            scales[modality] = Scale(float(min(low, 1)), float(max(high, 1)))
    return scales


def attention_of(condition: Condition, utterance: str) -> tuple[int, dict[str, np.ndarray]]:
    """The first run that kept the utterance, and its attention by modality; empty where none did."""
    for i, run in enumerate(condition.attention):
        if run.get(utterance):
            return i, dict(run[utterance])
    return 0, {}


def heat_maps(test_set: TestSet, condition: Condition, utterance: str, scales: dict[str, Scale]) -> list[HeatMap]:
    """A map per modality that the utterance has under ``condition``."""
    maps = []
    _, found = attention_of(condition, utterance)
    for modality in MODALITY_NAMES:
        if modality not in found:
            continue
        a = found[modality]
        title, unit, ticks, tokens = _axis(test_set, condition.name, utterance, modality, a.shape[1])
        cells = _COLOURS(scales[modality](a * a.shape[1]), bytes=True)
        out = io.BytesIO()
        Image.fromarray(cells).save(out, "png")
        peak = int(a[0].argmax())
        where = f"at {tokens[peak]!r}" if tokens else f"{100 * (peak + 0.5) / a.shape[1]:.0f}% of the way through"
        maps.append(
            HeatMap(
                title,
                unit,
                "data:image/png;base64," + base64.b64encode(out.getvalue()).decode(),
                f"attention of seven queries over {title} of {utterance}; the fused query looks most {where}",
                ticks,
                tokens if len(tokens) <= MAX_TOKENS else [],
            )
        )
    return maps


def _axis(
    test_set: TestSet, condition: str, utterance: str, modality: str, frames: int
) -> tuple[str, str, list[tuple[float, str]], list[str]]:
    """Title, unit, ticks and tokens of a map with ``frames`` columns."""
    if modality == "text":
        feature = TEXT_FEATURES.get(condition, "text")
        words = test_set.texts.get(feature, {}).get(utterance, "")
        tokens = test_set.tokenisers[feature](words, frames) if feature in test_set.tokenisers else words.split()
        tokens = tokens if len(tokens) == frames else []
        unit = "1 token" if frames == 1 else f"{frames} tokens"
        every = max(1, -(-frames // 6))
        return (
            TEXT_TITLES[feature],
            unit,
            [(100 * (i + 0.5) / frames, str(i + 1)) for i in range(0, frames, every)],
            tokens,
        )
    rate = test_set.frame_rates.get(modality)
    if not rate:
        step = _round_step(frames / 4)
        return (
            modality,
            f"{frames} frames",
            [(100 * i / frames, f"{i:g}") for i in np.arange(0, frames + 1e-9, step)],
            [],
        )
    seconds = frames / rate
    step = _round_step(seconds / 4)
    ticks = [(100 * t / seconds, f"{t:g} s") for t in np.arange(0, seconds + 1e-9, step).round(3)]
    return modality, f"{frames} frames, {seconds:.1f} s", ticks, []


def _round_step(least: float) -> float:
    """The next larger of 1, 2, 5, 10, 20 ... and their tenths."""
    power = 10.0 ** np.floor(np.log10(max(least, 1e-6)))
    return float(next(power * m for m in (1, 2, 5, 10) if power * m >= least * (1 - 1e-9)))


def attention_figure(test_set: TestSet, runs: list[Run]) -> Figure | None:
    """The worst utterance and some drawn at random, a row each, for images/ and TensorBoard; the page has more."""
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
                axis = _axis(test_set, name, utt, modality, found[modality].shape[1])
                panels.append(
                    Panel(
                        partial(_draw_map, a=found[modality], scale=scales[modality], axis=axis, utterance=utt),
                        f"attention over {axis[0]} of {utt}, seed {runs[run].seed}",
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
        f"Under {name}; 1 is even attention.",
        panels,
        columns=len(scales),
        on_page=False,
    )


def _draw_map(ax: Axes, theme: Theme, a: np.ndarray, scale: Scale, axis: tuple, utterance: str) -> None:
    title, unit, ticks, tokens = axis
    frames = a.shape[1]
    image = ax.imshow(
        a * frames,
        aspect="auto",
        cmap=_COLOURS,
        vmin=scale.low,
        vmax=max(scale.high, scale.low + 1e-9),
        interpolation="nearest",
        extent=(0, frames, len(QUERY_NAMES), 0),
    )
    ax.grid(False)
    ax.set_yticks(np.arange(len(QUERY_NAMES)) + 0.5, QUERY_NAMES, fontsize=7)
    if tokens and len(tokens) <= MAX_TOKENS:
        ax.set_xticks(np.arange(frames) + 0.5, tokens, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    else:
        ax.set_xticks([frames * p / 100 for p, _ in ticks], [t for _, t in ticks], fontsize=7)
    ax.tick_params(length=2)
    ax.set_title(f"{utterance}: {title} ({unit})", fontsize=8)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.9)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _draw_nothing(ax: Axes, theme: Theme, words: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=8, transform=ax.transAxes)
