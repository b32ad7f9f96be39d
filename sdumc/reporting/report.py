"""The report of a recipe: RESULTS.md, a table to commit, and report.html, one page that contains all but the media.

RESULTS.md has no dates or machine names, so that a rerun writes the same file. The page links to the media. It shows
some utterances one by one: those with the largest errors, and some drawn at random.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sdumc.conditions import MAIN_CONDITIONS, MISSING_TEXTS, SIMULATED, TEXTS
from sdumc.reporting.drawing import (
    DARK,
    LIGHT,
    MAX_TOKENS,
    SHORT_QUERIES,
    Figure,
    HeatMap,
    Scale,
    attention_of,
    heat_maps,
    modality_scales,
    render,
)
from sdumc.reporting.figures import speaker_errors
from sdumc.reporting.protocols import ProtocolTable
from sdumc.reporting.scores import SetSummary
from sdumc.reporting.sets import ConditionResults, Media, Run, TestSet
from sdumc.reporting.summary import Summary
from sdumc.scale import LabelScale
from sdumc.scoring.attention import drawn_at_random


def markdown_table(
    header: Iterable[object], rows: Iterable[Iterable[object]], left: int = 1, padded: bool = False
) -> str:
    """A Markdown table; the first ``left`` columns are aligned left, the others right.

    ``padded`` gives the columns equal widths in the text itself, for a terminal.
    """
    cells = [[_cell(c) for c in row] for row in (header, *rows)]
    widths = [max(map(len, column)) if padded else 0 for column in zip(*cells, strict=True)]
    lines = [
        " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    rules = ["-" * max(w + 2, 3) if i < left else "-" * max(w + 1, 3) + ":" for i, w in enumerate(widths)]
    first, *others = (f"| {line} |" for line in lines)
    return "\n".join([first, f"|{'|'.join(rules)}|", *others])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def results_markdown(summary: Summary) -> str:
    """The whole of RESULTS.md."""
    parts = [
        f"# Results: {summary.title}",
        "Written by `python -m sdumc.bin.report`; do not edit. MAE, Corr and CCC are plain numbers, the others per "
        "cent; `docs/metrics.md` defines them all, and the 95% intervals in brackets.",
    ]
    for part in summary.sets:
        parts += _set_part(summary, part)
        parts += _protocols_part(summary.protocols.get(part.test_set.name, []), part.test_set.name)
    if summary.quality:
        parts += ["## Text quality", _table(summary.quality)]
    parts += ["## Data", _table(summary.data)]
    if summary.features:
        parts += [f"## Features of {summary.train_set}", _table(summary.features)]
    epochs = ", ".join(map(str, summary.chosen_epochs))
    parts += [
        "## Model and settings",
        f"{summary.parameters} parameters. {summary.trained} Trained on `{summary.train_set}`; the epoch (of each "
        f"seed: {epochs}) was chosen on `{summary.valid_set}`, and no test set had a part in any choice.",
    ]
    if summary.settings:
        lines = [f"{key}: {value}" for key, value in summary.settings.items()]
        lines += [f"{key}: {' | '.join(values)}   # by seed" for key, values in summary.own_settings.items()]
        parts.append("```yaml\n" + "\n".join(lines) + "\n```")
    parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in summary.versions.items()) + ".")
    if summary.notes:
        parts.append("\n".join(f"* {note}" for note in summary.notes))
    return "\n\n".join(parts) + "\n"


def made_from(summary: Summary, part: SetSummary) -> str:
    """What the numbers of the table are, and their intervals."""
    if len(summary.runs) == 1:
        return f"One run, {summary.seeds}. In brackets 95% intervals: bootstrap over {part.unit}."
    return f"Mean over {summary.seeds}. In brackets 95% intervals: bootstrap over {part.unit} and over seeds."


def made_classes(scale: LabelScale, rounding: str) -> str:
    """How the numbers of a table become classes."""
    if scale.scheme == "nearest":
        return (
            "Classes: the nearest of "
            + ", ".join(f"{v:g} ({scale.word(v)})" if scale.words else f"{v:g}" for v in scale.class_values)
            + "."
        )
    return {"cmu": f"Classes by rounding {rounding}.", "sims": "Classes by CH-SIMS's thresholds."}.get(
        scale.scheme, "No classes."
    )


def _set_part(summary: Summary, part: SetSummary) -> list[str]:
    n = len(part.test_set.utterances)
    rounding = next(iter(part.test_set.conditions.values())).scores[0]["rounding"]
    scale = part.test_set.scale
    rows = [[row.title, *(row.text(m) for m in scale.measures)] for row in part.rows]
    table = markdown_table(["", *scale.measures.values()], rows)
    out = [
        f"## Scores on {part.test_set.name}",
        f"{n} utterances, labels from {scale.ends}. {made_from(summary, part)} {made_classes(scale, rounding)} Chosen "
        f"on `{summary.valid_set}`: the epoch, and the penalty of the ridge regressions (on features averaged over "
        "time).",
        table,
    ]
    lines = [f"* {finding.verdict}: {finding.text}" for finding in part.findings]
    lines.append(f"* {part.recovered_sentence}")
    lines += [f"* {note}" for note in part.notes]
    if part.penalties:
        chosen = ", ".join(f"{name} {value:.3g}" for name, value in part.penalties.items())
        lines.append(f"* Ridge penalties, by the condition with the same modalities: {chosen}.")
    return [*out, "\n".join(lines)]


def _protocols_part(tables: list[ProtocolTable], name: str) -> list[str]:
    parts = [f"## Protocols on {name}"] if tables else []
    for t in tables:
        rows = [[row.title, *(row.text(m) for m in t.measures)] for row in t.rows]
        parts += [f"### {t.title}", markdown_table([t.first_column, *t.measures.values()], rows)]
    return parts


def _table(rows: list[dict[str, str]]) -> str:
    return markdown_table(rows[0], [row.values() for row in rows])


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


def scale(card: Card, labels: LabelScale) -> Markup:
    """A drawing (SVG) of the label and the predictions on a line from the lowest to the highest label."""

    def x(value: float) -> float:
        return 150 + 45 * max(-3.2, min(3.2, labels.to_network(value)))

    parts = ['<line class="axis" x1="15" x2="285" y1="20" y2="20"/>']
    for tick in labels.ticks():
        parts.append(f'<line class="axis" x1="{x(tick):g}" x2="{x(tick):g}" y1="17" y2="23"/>')
        parts.append(f'<text x="{x(tick):g}" y="36">{tick:g}</text>')
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


SPEAKER_ROWS = 60


@dataclass
class Picture:
    """One panel in both themes, as data URIs."""

    light: str
    dark: str
    alt: str
    width: int  # CSS pixels
    height: int


def templates(*folders: Path) -> Environment:
    """Templates of ``folders`` and of this one; with what ``parts.html`` needs for the shared look of all pages."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(themes=(LIGHT, DARK), short_queries=SHORT_QUERIES, max_tokens=MAX_TOKENS)
    return environment


def page_html(summary: Summary, training: Sequence[Figure], by_set: dict[str, list[Figure]]) -> str:
    """The page as text: inline style, figures as data URIs, no script."""
    environment = templates()
    environment.globals.update(
        classes=(*MAIN_CONDITIONS, "other"), scale=scale, made_classes=made_classes, css_class=css_class
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
    missing = test_set.conditions.get("missing")
    for kind in filter(None, ("text", MISSING_TEXTS[missing.missing_text if missing else SIMULATED])):
        stage = "stage 1" if kind == "text" else "stage 2"
        if kind not in test_set.texts:
            notes.append(f"No {kind} beside the worst utterances: data/{test_set.name}/{kind} is made by {stage}.")
    if not any(run for c in test_set.shown.values() for run in c.attention):
        notes.append("No attention over frames: decode again (stage 5); a model with fusion: concat has none.")
    if not test_set.speakers:
        notes.append(f"No errors by speaker: neither the data nor the dump folder of {test_set.name} has utt2spk.")
    elif len(set(test_set.speakers.values())) == len(test_set.speakers):
        notes.append(f"No errors by speaker: each utterance of {test_set.name} has a speaker of its own.")
    return notes
