"""``dropped.tsv``: the utterances that a stage left out, with its name and the reason."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sdumc.errors import UserError
from sdumc.files import write_text

Row = tuple[str, str, str]  # utterance id, stage, reason


def read_dropped(path: str | os.PathLike) -> list[Row]:
    """The (id, stage, reason) lines of a ``dropped.tsv``; none when there is no such file.

    Raises:
        UserError: a line has another number of columns.
    """
    if not Path(path).exists():
        return []
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if line:
            fields = line.split("\t")
            if len(fields) != 3:
                raise UserError(f"{path}:{number}: expected id, stage and reason separated by tabs")
            rows.append((fields[0], fields[1], fields[2]))
    return rows


def write_dropped(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Write lines ``id<TAB>stage<TAB>reason``, sorted, atomically; white space in a reason becomes one space."""
    clean = sorted((utt, stage, " ".join(reason.split())) for utt, stage, reason in rows)
    write_text(path, "".join("\t".join(row) + "\n" for row in clean))


def append_dropped(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Add rows to a ``dropped.tsv``.

    A row of the same id and stage is replaced, so that a stage that runs again does not list an utterance twice.
    """
    merged = {(utt, stage): reason for utt, stage, reason in read_dropped(path)}
    merged.update({(utt, stage): reason for utt, stage, reason in rows})
    write_dropped(path, [(utt, stage, reason) for (utt, stage), reason in merged.items()])
