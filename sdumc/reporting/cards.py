"""The utterances that the page shows one by one: those with the largest errors, and some drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sdumc.conditions import MAIN_CONDITIONS, TEXTS
from sdumc.reporting.attention import HeatMap, Scale, attention_of, heat_maps
from sdumc.reporting.runs import Run
from sdumc.reporting.sets import ConditionResults, Media, TestSet
from sdumc.scoring.attention_file import drawn_at_random

WORST = 9  # utterances shown per condition
WORST_CONDITIONS = ("missing", "full")


@dataclass
class Card:
    """One utterance that is shown with its media, texts, predictions and attention."""

    utterance: str
    speaker: str
    label: float
    predictions: list[tuple[str, float]]  # condition and mean over seeds
    condition: str  # what error and maps are of
    error: float
    texts: list[tuple[str, str, str]]  # heading, words, and the status of simulated text that is not ok
    media: Media | None
    maps: list[HeatMap]
    seed: str  # of the run whose attention it is


@dataclass
class Cards:
    """Utterances under one heading."""

    title: str
    cards: list[Card]


def utterance_lists(test_set: TestSet, runs: Sequence[Run], scales: dict[str, Scale]) -> list[Cards]:
    """The largest errors under each of two conditions, and some utterances drawn at random."""
    lists = []
    for name in WORST_CONDITIONS:
        if name in test_set.conditions:
            condition = test_set.conditions[name]
            error = np.abs(condition.predictions - test_set.labels).mean(axis=0)
            chosen = np.argsort(-error, kind="stable")[:WORST].tolist()
            cards = [make_card(test_set, condition, i, runs, scales) for i in chosen]
            lists.append(Cards(f"Largest errors under {name}", cards))
    name = next((c for c in WORST_CONDITIONS if c in test_set.conditions), next(iter(test_set.shown)))
    drawn = [test_set.utterances.index(utt) for utt in drawn_at_random(test_set.utterances)]
    cards = [make_card(test_set, test_set.conditions[name], i, runs, scales) for i in drawn]
    lists.append(Cards("Drawn at random", cards))
    return lists


def make_card(
    test_set: TestSet, condition: ConditionResults, index: int, runs: Sequence[Run], scales: dict[str, Scale]
) -> Card:
    """The card of utterance number ``index``: error (mean over seeds) and attention are those under ``condition``."""
    utt = test_set.utterances[index]
    run, _ = attention_of(condition, utt)
    status = test_set.status.get(utt, "ok").replace("ok", "")
    return Card(
        utterance=utt,
        speaker=test_set.speakers.get(utt, ""),
        label=float(test_set.labels[index]),
        predictions=[(n, float(c.predictions[:, index].mean())) for n, c in test_set.shown.items()],
        condition=condition.name,
        error=float(np.abs(condition.predictions[:, index] - test_set.labels[index]).mean()),
        texts=[(TEXTS[k], t.get(utt, ""), status if k == "text_sim" else "") for k, t in test_set.texts.items()],
        media=test_set.media.get(utt),
        maps=heat_maps(test_set, condition, utt, scales),
        seed=runs[run].seed,
    )


def scale(card: Card) -> Markup:
    """A drawing (SVG) of the label and the predictions on a line from -3 to 3."""

    def x(value: float) -> float:
        return 150 + 45 * max(-3.2, min(3.2, value))

    parts = ['<line class="axis" x1="15" x2="285" y1="20" y2="20"/>']
    for tick in range(-3, 4):
        parts.append(f'<line class="axis" x1="{x(tick):g}" x2="{x(tick):g}" y1="17" y2="23"/>')
        parts.append(f'<text x="{x(tick):g}" y="36">{tick}</text>')
    parts.append(f'<path class="truth" d="M{x(card.label):.1f} 20 l-5 -11 h10 z"/>')
    for name, value in card.predictions:
        parts.append(f'<circle class="c-{css_class(name)}" cx="{x(value):.1f}" cy="20" r="4.5"/>')
    words = f"true {card.label:.2f}; " + "; ".join(f"{n} {v:.2f}" for n, v in card.predictions)
    return Markup('<svg class="scale" viewBox="0 0 300 40" role="img" aria-label="{}">{}</svg>').format(
        words, Markup("".join(parts))
    )


def css_class(condition: str) -> str:
    """The CSS class with the colour of a condition."""
    return condition if condition in MAIN_CONDITIONS else "other"
