"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


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
