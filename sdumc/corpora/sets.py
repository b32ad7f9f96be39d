"""What every importer shares: utterance ids, who was left out and why, the table of what was found per fold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdumc.conditions import FEATURES
from sdumc.data.kaldi_dir import append_dropped, check_id, label_problem, write_table
from sdumc.errors import UserError
from sdumc.files import write_text

FOLDS = ("train", "valid", "test")
DROPPED = "dropped.tsv"
SUMMARY = "folds.txt"
STAGE = "data"  # the stage column of dropped.tsv
_TABLES = ("segments", "video.scp", "text", "utt2label", "utt2spk", "spk2utt", "utt2dur", "wav.scp")


@dataclass(frozen=True)
class Known:
    """Counts that others have published for a fold, to compare with; nothing depends on them."""

    videos: int
    clips: int


# Official folds, and the segments in the common toolkit's files.
KNOWN_COUNTS = {
    "mosei": {"train": Known(2249, 16326), "valid": Known(300, 1871), "test": Known(678, 4659)},
    "mosi": {"train": Known(52, 1284), "valid": Known(10, 229), "test": Known(31, 686)},
    "none": {},
}


def utterance_id(video: str, clip: str) -> str:
    """The utterance id of a clip: ``video-clip``, of which the speaker, the video, is the beginning.

    The hyphen sorts before letters, digits and underscore, so that utterances stand in the order of their speakers.
    """
    return f"{video}-{clip}"


def split_name(name: str) -> tuple[str, str]:
    """(speaker, utterance id) of a clip that others name ``video$_$clip`` or ``video_clip``.

    Both become ``video-clip``, so that an utterance has one id wherever it came from. The video id may have
    underscores and hyphens itself. A name without a clip number is a speaker of its own.

    Raises:
        UserError: the name is empty or has white space.
    """
    for separator in ("$_$", "_"):
        video, found, clip = name.rpartition(separator)
        if found and video and (separator == "$_$" or clip.isdigit()):
            break
    else:
        video, clip = name, ""
    check_id(name, "corpus")
    return video, utterance_id(video, clip) if clip else name


@dataclass
class Fold:
    """One fold while it is being imported.

    ``text`` and ``label`` are those of the utterances that are kept; ``left_out`` is utterance -> reason for those
    that have a label and should have been there; ``unlabelled`` is the same for clips without label, which are listed
    but do not count against the share that may be left out.
    """

    name: str
    videos: set[str] = field(default_factory=set)
    speaker: dict[str, str] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    label: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unlabelled: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, utt: str, speaker: str, label: float, text: str) -> None:
        """Keep an utterance, or leave it out if its label is no number in range.

        Raises:
            UserError: the id was there before.
        """
        if utt in self.speaker or utt in self.left_out:
            raise UserError(f"{self.name}: utterance {utt!r} is there twice; ids must be unique: correct the corpus")
        if problem := label_problem(repr(float(label))):
            self.left_out[utt] = problem
            return
        self.videos.add(speaker)
        self.speaker[utt], self.label[utt], self.text[utt] = speaker, float(label), " ".join(text.split())

    def drop(self, utt: str, reason: str) -> None:
        """Take an utterance out again, and remember why."""
        for table in (self.speaker, self.label, self.text):
            table.pop(utt, None)
        self.left_out[utt] = reason

    @property
    def expected(self) -> int:
        """Labelled utterances, kept or not."""
        return len(self.label) + len(self.left_out)


def check_disjoint(folds: Iterable[Fold]) -> None:
    """Raise a UserError when a video is in two folds: scores would be of people the model has seen."""
    owner: dict[str, str] = {}
    for fold in folds:
        for video in fold.videos:
            if owner.setdefault(video, fold.name) != fold.name:
                raise UserError(f"video {video!r} is in {owner[video]} and in {fold.name}; the folds must be disjoint")


def write_set(directory: Path, tables: Mapping[str, Mapping[str, object]]) -> None:
    """Write the tables of a set, ``wav.scp`` (or ``utt2label``, without media) last; old tables that it no longer has
    are removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "wav.scp").unlink(missing_ok=True)
    for name in _TABLES:
        if name in tables:
            write_table(directory / name, tables[name])
        else:
            (directory / name).unlink(missing_ok=True)


def plain_tables(fold: Fold) -> dict[str, dict[str, object]]:
    """text, utt2label and utt2spk of a fold; transcripts may be missing altogether."""
    tables: dict[str, dict[str, object]] = {
        "utt2label": {u: format_number(y) for u, y in fold.label.items()},
        "utt2spk": dict(fold.speaker),
    }
    if any(fold.text.values()):
        tables["text"] = dict(fold.text)
    speakers: dict[str, list[str]] = {}
    for utt in sorted(fold.speaker):
        speakers.setdefault(fold.speaker[utt], []).append(utt)
    tables["spk2utt"] = {s: " ".join(utts) for s, utts in speakers.items()}
    return tables


def format_number(value: float) -> str:
    """A number with six digits after the point at most, without trailing zeros."""
    return f"{value:.6f}".rstrip("0").rstrip(".") if value else "0"


def write_dropped(path: Path, fold: Fold) -> None:
    """Replace a set's ``dropped.tsv`` by what this import left out; no file if that is nothing."""
    path.unlink(missing_ok=True)
    rows = [(utt, STAGE, reason) for utt, reason in {**fold.unlabelled, **fold.left_out}.items()]
    if rows:
        append_dropped(path, rows)


def check_share(fold: Fold, max_drop: float, dropped: Path) -> None:
    """Raise a UserError when more than ``max_drop`` of a fold's labelled utterances, or all, were left out."""
    if fold.label and len(fold.left_out) <= max_drop * fold.expected:
        return
    if not fold.expected:
        raise UserError(f"{fold.name}: no labelled utterance found; check the folds, the labels and their folders")
    first = "; ".join(f"{u}: {r}" for u, r in sorted(fold.left_out.items())[:3])
    raise UserError(
        f"{fold.name}: {len(fold.left_out)} of {fold.expected} labelled utterances "
        f"({100 * len(fold.left_out) / fold.expected:.1f}%) cannot be used, more than the {100 * max_drop:g}% allowed. "
        f"{dropped} lists them with their reasons, the first: {first}. Complete the corpus, or allow more with "
        "--max-drop"
    )


def summary_table(folds: Sequence[Fold], counts: str, data_dir: Path) -> str:
    """What was found per fold beside the known counts, and why utterances were left out."""
    known = KNOWN_COUNTS[counts]

    def beside(found: int, name: str, kind: str) -> str:
        return f"{found} ({getattr(known[name], kind)})" if name in known else str(found)

    head = ["set", "videos", "utterances", "left out", "unlabelled"]
    rows = [
        [
            f.name,
            beside(len({f.speaker[u] for u in f.label}), f.name, "videos"),
            beside(len(f.label), f.name, "clips"),
            str(len(f.left_out)),
            str(len(f.unlabelled)),
        ]
        for f in folds
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    if known:
        lines[0] += "   (in brackets: as published)"
    for f in folds:
        for reasons, what in ((f.left_out, "left out"), (f.unlabelled, "unlabelled")):
            for reason, count in Counter(map(_kind, reasons.values())).most_common():
                example = next(u for u, r in sorted(reasons.items()) if _kind(r) == reason)
                lines.append(f"{f.name}: {count} {what}: {reason} (such as {example}; {data_dir / f.name / DROPPED})")
        if f.name in known and (fewer := known[f.name].clips - f.expected) > 0:
            lines.append(f"{f.name}: {fewer} utterances fewer than published: they are in no table of this copy")
        lines += [f"{f.name}: {note}" for note in f.notes]
    return "\n".join(lines) + "\n"


def _kind(reason: str) -> str:
    """A reason without what differs from one utterance to the next."""
    return (
        re.sub(r"\S*/\S*", "FILE", re.sub(r"\(.*?\)|'[^']*'|\d+(\.\d+)?", "", reason)).replace("  ", " ").strip(" ;:")
    )


def write_summary(data_dir: Path, folds: Sequence[Fold], counts: str, notes: Iterable[str]) -> None:
    """Keep :func:`summary_table` and ``notes``, a line each, as :data:`SUMMARY`, which the recipe prints."""
    text = summary_table(folds, counts, data_dir) + "".join(f"{note}\n" for note in notes)
    write_text(data_dir / SUMMARY, text)


def forget_features(dump_dir: Path, kept: Iterable[str]) -> None:
    """Remove the indexes of the features that an import does not bring.

    They are of another import, or were made in stages 2 and 3 from other utterances; those stages find their archives
    and join them again, which takes no time, if these are still right.
    """
    for name in FEATURES:
        if name not in kept:
            for suffix in ("scp", "frames", "absent", "yaml"):
                (dump_dir / f"{name}.{suffix}").unlink(missing_ok=True)
