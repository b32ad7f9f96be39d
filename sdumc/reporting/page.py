"""report.html: one page that contains everything but the media, to which it links."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sdumc.conditions import MAIN_CONDITIONS
from sdumc.reporting.attention import (
    MAX_TOKENS,
    SHORT_QUERIES,
    modality_scales,
)
from sdumc.reporting.cards import css_class, scale, utterance_lists
from sdumc.reporting.drawing import DARK, LIGHT, Figure, render
from sdumc.reporting.errors import speaker_errors
from sdumc.reporting.results import made_from
from sdumc.reporting.scores import SetSummary
from sdumc.reporting.sets import TestSet
from sdumc.reporting.summary import Summary
from sdumc.scoring.metrics import MEASURES

SPEAKER_ROWS = 60


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
        measures=MEASURES,
        themes=(LIGHT, DARK),
        classes=(*MAIN_CONDITIONS, "other"),
        scale=scale,
        css_class=css_class,
        short_queries=SHORT_QUERIES,
        max_tokens=MAX_TOKENS,
    )
    sections = []
    for part in summary.sets:
        test_set = part.test_set
        speakers = speaker_errors(test_set)
        scales = modality_scales(test_set)
        sections.append(
            {
                "part": part,
                "made_from": made_from(summary, part),
                "tiles": _tiles(part),
                "figures": [(f, pictures(f)) for f in by_set[test_set.name] if f.on_page],
                "lists": utterance_lists(test_set, summary.runs, scales),
                "scales": scales,
                "speakers": speakers[:SPEAKER_ROWS],
                "speaker_count": len(speakers),
                "notes": [*part.notes, *_left_out(test_set)],
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


def _tiles(part: SetSummary) -> list[tuple[str, str, str]]:
    """Condition, what it is, MAE with its interval."""
    cells = {row.condition: row.text("mae") for row in part.rows if row.kind == "model"}
    return [(name, condition.meaning, cells[name]) for name, condition in part.test_set.shown.items()]


def _left_out(test_set: TestSet) -> list[str]:
    """What the page cannot show of this set, and why."""
    notes = []
    if not test_set.media:
        notes.append(f"No players: data/{test_set.name} has no video.scp or wav.scp.")
    for kind, stage in (("text", "stage 1"), ("text_sim", "stage 2")):
        if kind not in test_set.texts:
            notes.append(f"No {kind} beside the worst utterances: data/{test_set.name}/{kind} is made by {stage}.")
    if not any(run for c in test_set.shown.values() for run in c.attention):
        notes.append("No attention over frames: decode again (stage 5); a model with fusion: concat has none.")
    if not test_set.speakers:
        notes.append(f"No errors by speaker: neither the data nor the dump folder of {test_set.name} has utt2spk.")
    return notes
