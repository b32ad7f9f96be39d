"""RESULTS.md: the table that a recipe commits. No dates or machine names, so that a rerun writes the same file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sdumc.reporting.summary import MEASURE_NAMES, SetSummary, Summary

SPREAD = "Mean ± sample standard deviation over {seeds}."


def results_markdown(summary: Summary) -> str:
    """The whole of RESULTS.md."""
    parts = [
        f"# Results: {summary.title}",
        "Written by `python -m sdumc.bin.report`; do not edit. MAE and Corr are plain numbers, the others per cent; "
        "`docs/metrics.md` defines them all.",
    ]
    for part in summary.sets:
        parts += _set_part(summary, part)
    if summary.quality:
        parts += ["## Text quality", markdown_table(summary.quality[0], [r.values() for r in summary.quality])]
    parts += ["## Data", markdown_table(summary.data[0], [r.values() for r in summary.data])]
    if summary.features:
        parts += [
            f"## Features of {summary.train_set}",
            markdown_table(summary.features[0], [r.values() for r in summary.features]),
        ]
    epochs = ", ".join(map(str, summary.chosen_epochs))
    parts += [
        "## Model and settings",
        f"{summary.parameters} parameters. Trained on `{summary.train_set}`; the epoch (of each seed: {epochs}) was "
        f"chosen on `{summary.valid_set}`, and no test set had a part in any choice.",
    ]
    if summary.settings:
        lines = [f"{key}: {value}" for key, value in summary.settings.items()]
        lines += [f"{key}: {' | '.join(values)}   # by seed" for key, values in summary.own_settings.items()]
        parts.append("```yaml\n" + "\n".join(lines) + "\n```")
    parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in summary.versions.items()) + ".")
    if summary.notes:
        parts.append("\n".join(f"* {note}" for note in summary.notes))
    return "\n\n".join(parts) + "\n"


def _set_part(summary: Summary, part: SetSummary) -> list[str]:
    n = len(part.test_set.utterances)
    rounding = next(iter(part.test_set.conditions.values())).scores[0]["rounding"]
    spread = SPREAD.format(seeds=summary.seeds) if len(summary.runs) > 1 else f"One run, {summary.seeds}: no spread."
    rows = [[row.title, *(row.text(m) for m in MEASURE_NAMES)] for row in part.rows]
    table = markdown_table(["", *MEASURE_NAMES.values()], rows)
    out = [
        f"## Scores on {part.test_set.name}",
        f"{n} utterances. {spread} Classes by rounding {rounding}. Chosen on `{summary.valid_set}`: the epoch, and "
        "the penalty of the ridge regressions (on features averaged over time).",
        table,
    ]
    lines = [f"* {'yes' if holds else 'NO'}: {text}" for holds, text in part.findings]
    lines.append(f"* {recovered_sentence(part)}")
    lines += [f"* {note}" for note in part.notes]
    if part.penalties:
        chosen = ", ".join(f"{name} {value:.3g}" for name, value in part.penalties.items())
        lines.append(f"* Ridge penalties, by the condition with the same modalities: {chosen}.")
    return [*out, "\n".join(lines)]


def recovered_sentence(part: SetSummary) -> str:
    """How much of what text is worth the simulated text is worth, in words."""
    missing = part.test_set.conditions.get("missing")
    if missing and not missing.simulated:
        return f"No text was simulated for {part.test_set.name}: missing is the same as none."
    mean, deviation = part.recovered
    if math.isnan(mean):
        return "Share of the gap between none and full that missing recovers: undefined here."
    text = f"{100 * mean:.0f}%" if deviation is None else f"{100 * mean:.0f} ± {100 * deviation:.0f}%"
    return f"Simulated text recovers {text} of the gap in MAE between none and full."


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    names = [_cell(h) for h in header]
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    lines += [f"| {' | '.join(_cell(c) for c in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(text: str | Sequence[str]) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
