"""RESULTS.md: the table that a recipe commits. No dates or machine names, so that a rerun writes the same file."""

from __future__ import annotations

from collections.abc import Iterable

from sdumc.reporting.protocols import ProtocolTable
from sdumc.reporting.scores import SetSummary
from sdumc.reporting.summary import Summary
from sdumc.scale import LabelScale


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
