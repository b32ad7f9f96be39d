"""What an importer yields: a corpus of folds of utterances, and what was left out with its reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdumc.data.kaldi_dir import utterances_by_speaker
from sdumc.data.tables import check_id, label_problem
from sdumc.errors import UserError
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
