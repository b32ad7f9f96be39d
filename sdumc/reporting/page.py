"""report.html: one page with everything in it but the media, which it links to where they are."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sdumc.reporting.collect import CONDITION_NAMES, Media, TestSet
from sdumc.reporting.figures import DARK, LIGHT, Figure, render, speaker_errors
from sdumc.reporting.results import recovered_sentence
from sdumc.reporting.summary import MEASURE_NAMES, Summary, format_value, spread

WORST = 9  # utterances shown per condition
WORST_CONDITIONS = ("missing", "full")
SPEAKER_ROWS = 60


@dataclass
class Worst:
    """One utterance of the list of the largest errors."""

    utterance: str
    speaker: str
    label: float
    predictions: list[tuple[str, float]]  # condition and mean over seeds
    error: float
    texts: list[tuple[str, str]]  # heading and words
    status: str
    media: Media | None


@dataclass
class Picture:
    """One panel in both themes, as data URIs."""

    light: str
    dark: str
    alt: str
    width: int  # CSS pixels
    height: int


def page_html(summary: Summary, training: Sequence[Figure], by_set: dict[str, list[Figure]]) -> str:
    """The page as text: inline style, figures as data URIs, no script."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        measure_names=MEASURE_NAMES,
        format_value=format_value,
        recovered=recovered_sentence,
        scale=scale,
    )
    sections = []
    for part in summary.sets:
        test_set = part.test_set
        speakers = speaker_errors(test_set)
        sections.append(
            {
                "part": part,
                "tiles": _tiles(test_set),
                "figures": [(f, pictures(f)) for f in by_set[test_set.name]],
                "worst": {c: worst_utterances(test_set, c) for c in WORST_CONDITIONS if c in test_set.conditions},
                "speakers": speakers[:SPEAKER_ROWS],
                "speaker_count": len(speakers),
                "notes": [*part.notes, *_missing_pieces(test_set)],
            }
        )
    return environment.get_template("page.html").render(
        summary=summary,
        sections=sections,
        training=[(f, pictures(f)) for f in training],
    )


def pictures(figure: Figure) -> list[Picture]:
    """Every panel by itself, so that a narrow screen can stack them."""
    out = []
    for panel in figure.panels:
        light, dark = (
            "data:image/png;base64," + base64.b64encode(render([panel], 1, theme, dpi=160)).decode()
            for theme in (LIGHT, DARK)
        )
        out.append(Picture(light, dark, panel.alt, round(panel.width * 100), round(panel.height * 100)))
    return out


def worst_utterances(test_set: TestSet, condition: str, count: int = WORST) -> list[Worst]:
    """The utterances with the largest absolute error under ``condition``, averaged over seeds."""
    error = np.abs(test_set.conditions[condition].predictions - test_set.labels).mean(axis=0)
    headings = {"text": "True text", "text_sim": "Simulated text", "text_asr": "ASR text"}
    out = []
    for i in np.argsort(-error, kind="stable")[:count]:
        utt = test_set.utterances[i]
        out.append(
            Worst(
                utterance=utt,
                speaker=test_set.speakers.get(utt, ""),
                label=float(test_set.labels[i]),
                predictions=[(n, float(c.predictions[:, i].mean())) for n, c in test_set.shown.items()],
                error=float(error[i]),
                texts=[(headings[k], t.get(utt, "")) for k, t in test_set.texts.items()],
                status=test_set.status.get(utt, ""),
                media=test_set.media.get(utt),
            )
        )
    return out


def scale(worst: Worst) -> Markup:
    """A small drawing of the true label and the predictions on the line from -3 to 3."""

    def x(value: float) -> float:
        return 150 + 45 * max(-3.2, min(3.2, value))

    parts = ['<line class="axis" x1="15" x2="285" y1="20" y2="20"/>']
    for tick in range(-3, 4):
        parts.append(f'<line class="axis" x1="{x(tick):g}" x2="{x(tick):g}" y1="17" y2="23"/>')
        parts.append(f'<text x="{x(tick):g}" y="36">{tick}</text>')
    parts.append(f'<path class="truth" d="M{x(worst.label):.1f} 20 l-5 -11 h10 z"/>')
    for name, value in worst.predictions:
        css = name if name in CONDITION_NAMES else "other"
        parts.append(f'<circle class="c-{css}" cx="{x(value):.1f}" cy="20" r="4.5"/>')
    words = f"true {worst.label:.2f}; " + "; ".join(f"{n} {v:.2f}" for n, v in worst.predictions)
    return Markup('<svg class="scale" viewBox="0 0 300 40" role="img" aria-label="{}">{}</svg>').format(
        words, Markup("".join(parts))
    )


def _tiles(test_set: TestSet) -> list[tuple[str, str, str]]:
    """Condition, what it is, MAE with its spread."""
    tiles = []
    for name, condition in test_set.shown.items():
        mae = spread([s["mae"] for s in condition.scores])
        tiles.append((name, condition.meaning, format_value("mae", *mae)))
    return tiles


def _missing_pieces(test_set: TestSet) -> list[str]:
    """What the page would show if it were there."""
    notes = []
    if not test_set.media:
        notes.append(f"No players: data/{test_set.name} has no video.scp or wav.scp.")
    for kind, stage in (("text", "stage 1"), ("text_sim", "stage 2")):
        if kind not in test_set.texts:
            notes.append(f"No {kind} beside the worst utterances: data/{test_set.name}/{kind} is made by {stage}.")
    if not test_set.speakers:
        notes.append(f"No errors by speaker: neither the data nor the dump folder of {test_set.name} has utt2spk.")
    return notes
