"""The scale of a corpus's labels: its ends, and what counts as a class. Quick to import: no numpy, no torch.

A corpus declares it once, in ``scale.yaml`` of its data directories (or with ``run.sh --label-scale``). It is copied to
the dump, the exp folder, the decoded predictions and a packed model. Where there is no such file, the scale is CMU's.
The network itself computes on CMU's scale whatever the corpus's is, so that the objective's factors fit every corpus
and a model can be used on a corpus of another scale.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdumc.errors import UserError, answer_shell
from sdumc.files import read_yaml, write_text

SCALE = "scale.yaml"
MAPPED = "labels-mapped-from"  # key of condition.yaml
SCHEMES = ("cmu", "sims", "nearest", "none")
_KEYS = ("low", "high", "classes", "words")
_MOST_CLASSES = 20
# Fewer different whole numbers than these look like the numbers of classes, if there are enough labels to tell.
_FEW_VALUES, _ENOUGH_LABELS = 4, 20

USAGE = """usage:
  python3 -m sdumc.scale check SCALE             exit code 2 if it is none: cmu, sims, "1 5", "1 5 nearest", ...
  python3 -m sdumc.scale write SCALE FOLDER ...  write scale.yaml into those of the folders that are there"""


@dataclass(frozen=True)
class ClassRule:
    """A way to make classes of numbers: the keys and titles of its accuracy and, where there is one, its weighted F1.

    The class of a number is how many of ``edges`` are below it, or reached by it with ``closed``. With ``limit`` it is
    the whole number, from -limit to limit, that :func:`sdumc.scoring.metrics.classes` rounds to.
    """

    key: str
    title: str
    f1: str = ""
    f1_title: str = ""
    edges: tuple[float, ...] = ()
    closed: bool = False
    limit: int = 0
    without_zero: bool = False  # utterances with the label 0 do not count


_CMU = (
    ClassRule("acc7", "Acc-7", limit=3),
    ClassRule("acc5", "Acc-5", limit=2),
    ClassRule("acc3", "Acc-3", limit=1),
    ClassRule("acc2_has0", "Acc-2 has0", "f1_has0", "F1 has0", edges=(0.0,), closed=True),
    ClassRule("acc2_non0", "Acc-2 non0", "f1_non0", "F1 non0", edges=(0.0,), without_zero=True),
)
# The edges of the common toolkit's measures for CH-SIMS and CH-SIMS v2; a number on an edge is in the lower class.
_SIMS = (
    ClassRule("acc5", "Acc-5", edges=(-0.7, -0.1, 0.1, 0.7)),
    ClassRule("acc3", "Acc-3", edges=(-0.1, 0.1)),
    ClassRule("acc2", "Acc-2", "f1", "F1", edges=(0.0,)),
)


@dataclass(frozen=True)
class LabelScale:
    """The lowest and highest label, the scheme of classes, and the words that stand for labels, if any do."""

    low: float = -3.0
    high: float = 3.0
    scheme: str = "cmu"
    words: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"labels from {self.low:g} to {self.high:g}: the lowest must be below the highest")
        if self.scheme not in SCHEMES:
            raise UserError(f"{self.scheme!r} is no scheme of classes; there are {', '.join(SCHEMES)}")
        ends = {"cmu": (-3.0, 3.0), "sims": (-1.0, 1.0)}.get(self.scheme, (self.low, self.high))
        if ends != (self.low, self.high):
            raise UserError(
                f"the classes of {self.scheme} are of labels from {ends[0]:g} to {ends[1]:g}, not {self.ends}; use "
                "nearest (the nearest of the words' labels, or of the whole numbers) or none"
            )
        if wrong := [f"{word}={value:g}" for word, value in self.words if not self.low <= value <= self.high]:
            raise UserError(f"{wrong[0]}: outside {self.interval}")
        if self.scheme == "nearest" and not 2 <= len(self.class_values) <= _MOST_CLASSES:
            raise UserError(
                f"scheme nearest: {len(self.class_values)} classes in {self.interval}; give words, or whole numbers as "
                f"ends, for 2 to {_MOST_CLASSES}"
            )

    @property
    def ends(self) -> str:
        """``-3 to 3``."""
        return f"{self.low:g} to {self.high:g}"

    @property
    def interval(self) -> str:
        """``[-3, 3]``."""
        return f"[{self.low:g}, {self.high:g}]"

    @property
    def named_ends(self) -> str:
        """``-3 (very negative) to 3 (very positive)``; with words, theirs."""
        low, high = self.word(self.low) or "very negative", self.word(self.high) or "very positive"
        return f"{self.low:g} ({low}) to {self.high:g} ({high})"

    @property
    def signed(self) -> bool:
        """Whether a sign says something: there are negative labels."""
        return self.low < 0

    def format(self, value: float, digits: int = 3) -> str:
        """A number on the scale, with its sign if there are negative ones."""
        return f"{value:+.{digits}f}" if self.signed else f"{value:.{digits}f}"

    def word(self, value: float) -> str:
        """The word of a label, or an empty string."""
        return next((word for word, v in self.words if v == value), "")

    @property
    def class_values(self) -> tuple[float, ...]:
        """What ``nearest`` chooses from: the labels of words, or the whole numbers of the scale; sorted."""
        if self.words:
            return tuple(sorted({value for _, value in self.words}))
        if self.high - self.low > 1000:
            return ()
        return tuple(float(v) for v in range(math.ceil(self.low), math.floor(self.high) + 1))

    @property
    def rules(self) -> tuple[ClassRule, ...]:
        """The class measures, in the order of tables."""
        if self.scheme == "nearest":
            v = self.class_values
            edges = tuple((a + b) / 2 for a, b in itertools.pairwise(v))
            return (ClassRule("acc_nearest", f"Acc-{len(v)}", "f1_nearest", f"F1-{len(v)}", edges),)
        return {"cmu": _CMU, "sims": _SIMS, "none": ()}[self.scheme]

    @property
    def measures(self) -> dict[str, str]:
        """Every measure of a score on this scale, and how tables call it."""
        found = {"mae": "MAE", "corr": "Corr", "ccc": "CCC"}
        for rule in self.rules:
            found[rule.key] = rule.title
            if rule.f1:
                found[rule.f1] = rule.f1_title
        return found

    def ticks(self, most: int = 9) -> list[float]:
        """Places to mark on an axis: whole numbers where there are a few of them, else equal steps."""
        step = 1.0
        while (self.high - self.low) / step > most - 1:
            step *= 2
        while (self.high - self.low) / step < 4:
            step /= 2
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    # ---- the network's scale

    def to_network(self, label: Any) -> Any:
        """A label, or an array or tensor of them, on the scale of the network, CMU's. Exact where that is this one."""
        if (self.low, self.high) == (-3.0, 3.0):
            return label
        return (label - (self.low + self.high) / 2) * (6 / (self.high - self.low))

    def from_network(self, prediction: Any) -> Any:
        """The inverse of :meth:`to_network`."""
        if (self.low, self.high) == (-3.0, 3.0):
            return prediction
        return prediction * ((self.high - self.low) / 6) + (self.low + self.high) / 2

    # ---- files

    def as_dict(self) -> dict[str, Any]:
        """The content of scale.yaml."""
        content: dict[str, Any] = {"low": _plain(self.low), "high": _plain(self.high), "classes": self.scheme}
        if self.words:
            content["words"] = {word: _plain(value) for word, value in self.words}
        return content

    def write(self, folder: str | os.PathLike) -> None:
        """Write ``scale.yaml`` into a folder, unless it says the same already."""
        path = Path(folder, SCALE)
        text = yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            write_text(path, text)


CMU = LabelScale()
SIMS = LabelScale(-1.0, 1.0, "sims")
_NAMED = {"cmu": CMU, "sims": SIMS}


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


def from_dict(content: Mapping[str, Any], where: object) -> LabelScale:
    """The scale that scale.yaml, or the ``scale`` of a score.json, describes.

    Raises:
        UserError: a key is unknown or missing, or a value cannot be; ``where`` is named.
    """
    try:
        if unknown := [key for key in content if key not in _KEYS]:
            raise UserError(f"unknown key {unknown[0]!r}; the keys are {', '.join(_KEYS)}")
        for key in ("low", "high"):
            if not isinstance(content.get(key), (int, float)) or isinstance(content[key], bool):
                raise UserError(f"{key} must be a number, not {content.get(key)!r}")
        words = content.get("words") or {}
        if not isinstance(words, Mapping) or not all(isinstance(v, (int, float)) for v in words.values()):
            raise UserError("words must be lines `word: number`")
        named = tuple((str(word), float(value)) for word, value in words.items())
        low, high = float(content["low"]), float(content["high"])
        return LabelScale(low, high, str(content.get("classes", _default_scheme(low, high, bool(named)))), named)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _default_scheme(low: float, high: float, words: bool) -> str:
    return "nearest" if words else "cmu" if (low, high) == (-3.0, 3.0) else "none"


def mapped_from(models: Iterable[str | os.PathLike], scale: LabelScale) -> str:
    """``1 to 5``: the scales of models, by folder, whose predictions are mapped to another one; empty if none is."""
    theirs = [scale_of(model) for model in models]
    return " and ".join(sorted({s.ends for s in theirs if (s.low, s.high) != (scale.low, scale.high)}))


def mapping_in_words(theirs: str, scale: LabelScale) -> str:
    """What is said of :func:`mapped_from` in logs, tables and reports."""
    return f"the model was trained on labels from {theirs}; its predictions are mapped linearly to {scale.ends}"


def declared_scale(folder: str | os.PathLike) -> LabelScale | None:
    """What ``scale.yaml`` of a folder says; None where there is no such file."""
    path = Path(folder, SCALE)
    return from_dict(read_yaml(path), path) if path.is_file() else None


def scale_of(folder: str | os.PathLike) -> LabelScale:
    """The scale of a data directory, dump, exp folder or packed model: as declared, else CMU's."""
    return declared_scale(folder) or CMU


def parse_scale(text: str, words: Mapping[str, float] | None = None) -> LabelScale:
    """``cmu``, ``sims``, or the lowest and highest label with, if wanted, a scheme: ``1 5``, ``0 1 nearest``.

    Args:
        words: labels by word, if labels are words.

    Raises:
        UserError: it is nothing of the kind.
    """
    parts = text.replace(",", " ").split()
    named = tuple((words or {}).items())
    if len(parts) == 1 and parts[0] in _NAMED:
        chosen = _NAMED[parts[0]]
        return LabelScale(chosen.low, chosen.high, "nearest" if named else chosen.scheme, named)
    try:
        low, high = float(parts[0]), float(parts[1])
        (scheme,) = parts[2:] or [_default_scheme(low, high, bool(named))]
    except (IndexError, ValueError):
        raise UserError(
            f"{text!r} is no scale of labels: give cmu, sims, or the lowest and the highest label and, if wanted, one "
            f"of {', '.join(SCHEMES)}: '1 5', '1 5 nearest'"
        ) from None
    return LabelScale(low, high, scheme, named)


def looks_like_classes(labels: Iterable[float]) -> str | None:
    """A question, if the labels are so few different whole numbers from 0 or 1 on that they may be class numbers."""
    found = list(labels)
    values = sorted(set(found))
    if len(found) < _ENOUGH_LABELS or not 2 <= len(values) <= _FEW_VALUES:
        return None
    if values[0] not in (0, 1) or values != [values[0] + i for i in range(len(values))]:
        return None
    shown = ", ".join(f"{v:g}" for v in values)
    return (
        f"the labels are only {shown}, which look like numbers of classes: if they are, give each class its sentiment "
        "(docs/new_recipe.md: classes); if they are sentiment, declare their scale: "
        f"--label-scale '{values[0]:g} {values[-1]:g} nearest'"
    )


def ask_for_scale(labels: Iterable[float]) -> str | None:
    """A question, if it is not clear that labels are on CMU's scale: nothing is learned from them in silence."""
    found = sorted(set(labels))
    if not found:
        return None
    low, high = found[0], found[-1]
    whole = all(v == int(v) for v in found)
    seen = f"labels are {'whole numbers ' if whole else ''}from {low:g} to {high:g}"
    if whole and len(found) <= _MOST_CLASSES:
        shown = ", ".join(f"{v:g}" for v in found)
        return (
            f"{seen} ({shown}): classes, or a scale? For a scale declare its ends: --label-scale '{low:g} {high:g}' or "
            f"'{low:g} {high:g} nearest' for the accuracy of the nearest one too; for classes give each its sentiment: "
            f"--label-map '{' '.join(f'{v:g}=?' for v in found)}'"
        )
    if low < CMU.low or high > CMU.high:
        return (
            f"{seen}, outside of CMU's scale {CMU.interval}: declare theirs, such as --label-scale '{low:g} {high:g}'"
        )
    if low >= SIMS.low and high <= SIMS.high and len(found) > _FEW_VALUES:
        return f"{seen} only: declare the scale: --label-scale sims ({SIMS.interval}), '0 1', or cmu ({CMU.interval})"
    return None


def answer(arguments: list[str]) -> bool:
    """Answer a shell script: :func:`sdumc.errors.answer_shell`."""
    match arguments:
        case ["check", text]:
            parse_scale(text)
        case ["write", text, *folders]:
            scale = parse_scale(text)
            for folder in folders:
                if Path(folder).is_dir():
                    scale.write(folder)
        case _:
            return False
    return True


if __name__ == "__main__":
    sys.exit(answer_shell(answer, USAGE))
