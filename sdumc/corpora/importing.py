"""What a source of an importer yields, and the driver of all importers of stage 1.

A source is a function that reads a corpus in one form and returns a :class:`Corpus`: folds of utterances, and what was
left out with its reason. Everything else is the same for all and done by :func:`import_corpus`: validate, list what is
left out, refuse or write, print what was found. A new form is such a function and a command in ``sdumc/bin`` that calls
the driver. ``folds.txt`` says what was found per fold, beside published counts.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdumc.cli import Parser
from sdumc.conditions import FEATURES
from sdumc.data.dump import load_dump
from sdumc.data.kaldi_dir import (
    MEDIA_TABLES,
    TEXT_ABSENT,
    check_tables,
    first_problems,
    media_problems,
    utterances_by_speaker,
)
from sdumc.data.tables import Table, check_id, label_problem, write_dropped, write_table
from sdumc.errors import UserError
from sdumc.files import write_text
from sdumc.scale import CMU, LabelScale

FOLDS = ("train", "valid", "test")


@dataclass(frozen=True)
class ClipMedia:
    """The media files of one clip: its sound, and its pictures if there are any.

    ``start`` and ``end`` are the clip's place in ``recording`` in seconds, None when the files hold this clip alone.
    """

    recording: str
    sound: Path
    pictures: Path | None = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Utterance:
    """One labelled utterance; ``text`` may be empty, ``media`` is None in a source of features alone."""

    speaker: str
    label: float
    text: str = ""
    media: ClipMedia | None = None


@dataclass
class Fold:
    """One fold of a corpus.

    ``left_out`` is utterance -> reason for those that have a label and should have been there; ``unlabelled`` is the
    same for clips without label, which are listed but do not count against the share that may be left out. ``speakers``
    are those of all utterances ever added. A label outside ``scale`` leaves its utterance out. ``extra`` are
    further tables of the data directory, by name; nothing of ours reads them.
    """

    name: str
    utterances: dict[str, Utterance] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unlabelled: dict[str, str] = field(default_factory=dict)
    speakers: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    scale: LabelScale = CMU
    extra: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, utt: str, speaker: str, label: float, text: str = "", media: ClipMedia | None = None) -> None:
        """Add an utterance, or leave it out if its label is not a number in range.

        Raises:
            UserError: the id was there before, or cannot be the first column of a table.
        """
        check_id(utt, self.name)
        if utt in self.utterances or utt in self.left_out:
            raise UserError(f"{self.name}: utterance {utt!r} is there twice; ids must be unique: correct the corpus")
        if problem := label_problem(repr(float(label)), (self.scale.low, self.scale.high)):
            self.left_out[utt] = problem
            return
        self.speakers.add(speaker)
        self.utterances[utt] = Utterance(speaker, float(label), " ".join(text.split()), media)

    def leave_out(self, utt: str, reason: str) -> None:
        """Move an utterance to ``left_out``."""
        self.utterances.pop(utt, None)
        self.left_out[utt] = reason

    @property
    def expected(self) -> int:
        """Labelled utterances, kept or not."""
        return len(self.utterances) + len(self.left_out)

    def tables(self) -> dict[str, dict[str, str]]:
        """The tables of a data directory, by file name; the media tables only where there are media.

        ``segments`` and ``utt2dur`` are there when clips are cut from longer recordings, ``text`` when at least one
        utterance has one.
        """
        found = self.utterances
        speakers = {utt: u.speaker for utt, u in found.items()}
        tables = {
            "utt2label": {utt: format_number(u.label) for utt, u in found.items()},
            "utt2spk": speakers,
            "spk2utt": utterances_by_speaker(speakers),
        }
        if any(u.text for u in found.values()):
            tables["text"] = {utt: u.text for utt, u in found.items() if u.text}
            if without := {utt: "no transcript" for utt, u in found.items() if not u.text}:
                tables["text.absent"] = without
        for name, values in self.extra.items():
            tables[name] = {utt: value for utt, value in values.items() if utt in found}
        return tables | _media_tables({utt: u.media for utt, u in found.items() if u.media})


def _media_tables(media: Mapping[str, ClipMedia]) -> dict[str, dict[str, str]]:
    if not media:
        return {}
    times = {utt: (m.start, m.end) for utt, m in media.items() if m.start is not None and m.end is not None}
    keys = {utt: m.recording if times else utt for utt, m in media.items()}
    tables = {"wav.scp": {keys[utt]: os.path.abspath(m.sound) for utt, m in media.items()}}
    if pictures := {keys[utt]: os.path.abspath(m.pictures) for utt, m in media.items() if m.pictures}:
        tables["video.scp"] = pictures
    if times:
        tables["segments"] = {
            utt: f"{keys[utt]} {format_number(start)} {format_number(end)}" for utt, (start, end) in times.items()
        }
        tables["utt2dur"] = {utt: f"{end - start:.3f}" for utt, (start, end) in times.items()}
    return tables


# Writes one feature of a fold into a dump folder and returns notes about it, one string each.
FeatureWriter = Callable[[Fold, Path], list[str]]


@dataclass
class Corpus:
    """What a source yields, before anything is written.

    ``unused`` are names of videos and files that belong to no utterance of a fold, with what they are. ``features``
    are written to dump folders, by name; a source of media has none.
    """

    folds: list[Fold]
    notes: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    features: dict[str, FeatureWriter] = field(default_factory=dict)


def utterance_id(video: str, clip: str) -> str:
    """The utterance id of a clip: ``video-clip``, of which the speaker, the video, is the beginning.

    The hyphen sorts before letters, digits and underscore, so that utterances are in the order of their speakers.
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


def check_disjoint(folds: Iterable[Fold], allowed: bool = False) -> list[str]:
    """Raise a UserError when a video is in two folds: scores would be of people the model has seen.

    Args:
        allowed: return a note about it instead.
    """
    shared: dict[str, str] = {}
    owner: dict[str, str] = {}
    for fold in folds:
        for video in fold.speakers:
            if owner.setdefault(video, fold.name) != fold.name:
                shared[video] = f"{owner[video]} and in {fold.name}"
    if not shared:
        return []
    first, places = next(iter(shared.items()))
    if not allowed:
        raise UserError(
            f"video {first!r} is in {places} ({len(shared)} such); the folds must be disjoint: no speaker (or source "
            "video) of train may be tested. If a published split is like that, see --shared-speakers"
        )
    return [
        f"NOTE: {len(shared)} of {len(owner)} speakers or videos are in several sets, such as {first!r} in {places}: "
        "scores are of voices and faces that the model has seen"
    ]


def format_number(value: float) -> str:
    """A number with at most six decimals, without trailing zeros."""
    return f"{value:.6f}".rstrip("0").rstrip(".") if value else "0"


DROPPED = "dropped.tsv"
UNKNOWN = "-"


@dataclass(frozen=True)
class Counts:
    """What others have published about a fold, for comparison; nothing depends on it."""

    videos: int  # 0: not known
    clips: int


# Official folds, and the segments in the common toolkit's files.
PUBLISHED_COUNTS = {
    "mosei": {"train": Counts(2249, 16326), "valid": Counts(300, 1871), "test": Counts(678, 4659)},
    "mosi": {"train": Counts(52, 1284), "valid": Counts(10, 229), "test": Counts(31, 686)},
    "sims": {"train": Counts(0, 1368), "valid": Counts(0, 456), "test": Counts(0, 457)},
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
            cells = [f"{found[0]} ({others.videos or UNKNOWN})", f"{found[1]} ({others.clips})"]
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


SUMMARY = "folds.txt"
STAGE = "data"  # the stage column of dropped.tsv
# In the order of writing: the last one is there only when the set is whole.
_TABLES = ("segments", "video.scp", "text", TEXT_ABSENT, "utt2label", "utt2spk", "spk2utt", "utt2dur", "wav.scp")


def add_media_options(group: Any, required: bool = False) -> None:
    """``--corpus-dir`` and ``--media``: where the videos of a raw distribution are, and how clips are cut."""
    note = "" if required else ", if there are media of the same clips"
    group.add_argument(
        "--corpus-dir", required=required, metavar="DIR", help=f"the folder that holds Raw/, or Raw itself{note}"
    )
    group.add_argument(
        "--media",
        choices=("auto", "full", "segmented"),
        default="auto",
        help="cut clips from whole videos, or take the files of single clips; auto: the first where there are any",
    )


def add_output_options(parser: Parser, dump: bool = True, counts: str = "mosei", label_scale: bool = False) -> Any:
    """Where the sets go, how many of their utterances may be left out, and which counts stand beside those found.

    Args:
        dump: there are features to write too.
        counts: default of the option.
        label_scale: labels may be on another scale than CMU's.

    Returns:
        the group, for more options.
    """
    group = parser.add_argument_group("output")
    what = "texts and labels" if dump else "the sets"
    group.add_argument("--data-dir", default="data", metavar="DIR", help=f"where {what} are written")
    if dump:
        group.add_argument("--dump-dir", default="dump", metavar="DIR", help="where the features are written")
    group.add_argument(
        "--max-drop", type=float, default=0.01, metavar="X", help="largest share of a fold that is left out (0-1)"
    )
    group.add_argument(
        "--counts",
        choices=tuple(PUBLISHED_COUNTS),
        default=counts,
        help="published counts to show beside those found",
    )
    group.add_argument(
        "--shared-speakers",
        choices=("refuse", "allow"),
        default="refuse",
        help="a speaker (or source video) in two sets; allow: it is noted in folds.txt",
    )
    if label_scale:
        group.add_argument(
            "--label-scale",
            metavar="SCALE",
            help="scale of the labels: cmu, sims, or lowest and highest label and, if wanted, classes: '1 5 nearest'",
        )
    return group


def import_corpus(read: Callable[[], Corpus], args: Any) -> None:
    """Read a corpus and write its data directories and, if it has features, its dump folders.

    Args:
        read: the source; called once.
        args: the values of :func:`add_output_options`.

    Raises:
        UserError: the source cannot be read, a video is in two folds, or more of a fold than ``--max-drop`` cannot be
            used. No set is written then, but ``dropped.tsv`` and ``folds.txt`` are.
    """
    data_dir = Path(args.data_dir)
    (data_dir / SUMMARY).unlink(missing_ok=True)  # an older one says nothing about this run
    corpus = read()
    corpus.notes += check_disjoint(corpus.folds, args.shared_speakers == "allow")
    for fold in corpus.folds:
        leave_out_broken(fold, data_dir / fold.name)
        _list_left_out(data_dir / fold.name / DROPPED, fold.unlabelled | fold.left_out)
    _list_left_out(data_dir / DROPPED, corpus.unused)
    write_text(data_dir / SUMMARY, summary(corpus, args.counts, data_dir))
    try:
        for fold in corpus.folds:
            check_share(fold, args.max_drop, data_dir / fold.name / DROPPED)
        for fold in corpus.folds:
            _write_set(data_dir / fold.name, fold.tables())
            fold.scale.write(data_dir / fold.name)
            if corpus.features:
                _write_features(corpus, fold, Path(args.dump_dir, fold.name))
        write_text(data_dir / SUMMARY, summary(corpus, args.counts, data_dir))  # with notes about the features
    finally:
        print((data_dir / SUMMARY).read_text(encoding="utf-8"), end="")


def leave_out_broken(fold: Fold, folder: Path) -> None:
    """Validate a fold as a data directory, media included, and leave out the utterances that have a problem.

    A media file has to be whole, to have the tracks wanted, and to be as long as its segments; each is read once.
    """
    values = fold.tables()
    by_recording = MEDIA_TABLES if "segments" in values else ()
    tables = {name: Table(folder / name, table, of_recordings=name in by_recording) for name, table in values.items()}
    data, problems = check_tables(folder, tables, (fold.scale.low, fold.scale.high))
    for found in (problems, media_problems(data) if data.wav else []):
        for utt, problem in first_problems(found, data.segments).items():
            if utt in fold.utterances:
                fold.leave_out(utt, problem.text)


def _list_left_out(path: Path, reasons: Mapping[str, str]) -> None:
    """Replace a ``dropped.tsv`` by what this import left out; no file if that is nothing."""
    path.unlink(missing_ok=True)
    if reasons:
        write_dropped(path, [(name, STAGE, reason) for name, reason in reasons.items()])


def check_share(fold: Fold, max_drop: float, dropped: Path) -> None:
    """Raise a UserError when more than ``max_drop`` of a fold's labelled utterances, or all, were left out."""
    if fold.utterances and len(fold.left_out) <= max_drop * fold.expected:
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


def _write_set(directory: Path, tables: Mapping[str, Mapping[str, str]]) -> None:
    """Write the tables of a set, ``wav.scp`` (without media, ``utt2dur`` or ``spk2utt``) last; remove old tables that
    it no longer has.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "wav.scp").unlink(missing_ok=True)
    for name in dict.fromkeys([*(t for t in tables if t not in _TABLES), *_TABLES]):
        if name in tables:
            write_table(directory / name, tables[name])
        else:
            (directory / name).unlink(missing_ok=True)


def _write_features(corpus: Corpus, fold: Fold, folder: Path) -> None:
    """Write the features of a fold and what training needs beside them, and read the dump folder back."""
    _remove_other_features(folder, corpus.features)
    tables = fold.tables()
    for name in ("utt2spk", "utt2label"):
        write_table(folder / name, tables[name])
    fold.scale.write(folder)
    for write in corpus.features.values():
        fold.notes += write(fold, folder)
    load_dump(folder, list(corpus.features), require=("utt2label",))


def _remove_other_features(folder: Path, kept: Iterable[str]) -> None:
    """Remove the indexes of the features that an import does not bring.

    They are of another import, or were made in stages 2 and 3 from other utterances; those stages find their archives
    and join them again, which takes no time, if these are still right.
    """
    for name in FEATURES:
        if name not in kept:
            for suffix in ("scp", "frames", "absent", "yaml"):
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
