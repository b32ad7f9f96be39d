"""``folds.txt``: what an importer found per fold, beside published counts, and why utterances were left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdumc.corpora.sets import Corpus, Fold

DROPPED = "dropped.tsv"


@dataclass(frozen=True)
class Counts:
    """What others have published about a fold, for comparison; nothing depends on it."""

    videos: int
    clips: int


# Official folds, and the segments in the common toolkit's files.
PUBLISHED_COUNTS = {
    "mosei": {"train": Counts(2249, 16326), "valid": Counts(300, 1871), "test": Counts(678, 4659)},
    "mosi": {"train": Counts(52, 1284), "valid": Counts(10, 229), "test": Counts(31, 686)},
    "none": {},
}


def summary(corpus: Corpus, counts: str, data_dir: Path) -> str:
    """The text of ``folds.txt``.

    Args:
        corpus: what was found.
        counts: whose published counts are shown, a key of :data:`PUBLISHED_COUNTS`.
        data_dir: where the sets and their ``dropped.tsv`` are.
    """
    published = PUBLISHED_COUNTS[counts]
    lines = _table(corpus.folds, published)
    for fold in corpus.folds:
        dropped = data_dir / fold.name / DROPPED
        lines += _by_reason(f"{fold.name}: {{}} left out", fold.left_out, dropped)
        lines += _by_reason(f"{fold.name}: {{}} unlabelled", fold.unlabelled, dropped)
        if fold.name in published and (fewer := published[fold.name].clips - fold.expected) > 0:
            lines.append(f"{fold.name}: {fewer} utterances fewer than published: they are in no table of this copy")
        lines += [f"{fold.name}: {note}" for note in fold.notes]
    lines += corpus.notes
    lines += _by_reason("{} outside of the folds", corpus.unused, data_dir / DROPPED)
    return "".join(f"{line}\n" for line in lines)


def _table(folds: Iterable[Fold], published: Mapping[str, Counts]) -> list[str]:
    rows = [["set", "videos", "utterances", "left out", "unlabelled"]]
    for fold in folds:
        found = [len({u.speaker for u in fold.utterances.values()}), len(fold.utterances)]
        cells = [str(count) for count in found]
        if others := published.get(fold.name):
            cells = [f"{found[0]} ({others.videos})", f"{found[1]} ({others.clips})"]
        rows.append([fold.name, *cells, str(len(fold.left_out)), str(len(fold.unlabelled))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if published:
        lines[0] += "   (in brackets: as published)"
    return lines


def _by_reason(head: str, reasons: Mapping[str, str], listed_in: Path) -> list[str]:
    """A line for each kind of reason, with its count in ``head`` and an example."""
    kinds = {name: _kind(reason) for name, reason in reasons.items()}
    examples = {kind: name for name, kind in sorted(kinds.items(), reverse=True)}
    return [
        f"{head.format(count)}: {kind} (such as {examples[kind]}; {listed_in})"
        for kind, count in Counter(kinds.values()).most_common()
    ]


def _kind(reason: str) -> str:
    """A reason without what differs from one utterance to the next: names, numbers, files."""
    kind = re.sub(r"\S*/\S*", "FILE", re.sub(r"\(.*?\)|'[^']*'|\d+(\.\d+)?", "", reason))
    return kind.replace("  ", " ").strip(" ;:")
