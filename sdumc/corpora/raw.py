"""The raw distributions of CMU-MOSEI and CMU-MOSI: videos, transcripts, labels and official folds.

Media are whole videos that clips are cut from, or a file a clip. MOSEI: ``Videos/Full/Combined/<video>.mp4``,
``Videos/Segmented/Combined/<video>_<clip>.mp4`` and ``Audio/Full/WAV_16000/<video>.wav``. MOSI:
``Video/{Full,Segmented}`` and ``Audio/WAV_16000/{Full,Segmented}``. A fold file says which videos are for training,
validation and test.
"""

from __future__ import annotations

import ast
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sdumc.corpora.annotations import (
    Clip,
    Labels,
    Transcripts,
    find_labels,
    give_times,
    match_times,
    read_labels,
    read_transcripts,
)
from sdumc.corpora.importing import FOLDS, ClipMedia, Corpus, Fold, utterance_id
from sdumc.errors import UserError

_SDK_NAMES = {"standard_train_fold": "train", "standard_valid_fold": "valid", "standard_test_fold": "test"}


def read_folds(path: str | Path) -> dict[str, list[str]]:
    """Video ids by fold.

    Args:
        path: a folder with ``train.txt``, ``valid.txt``, ``test.txt`` of one video id a line; or the CMU SDK's
            ``cmu_mosei_std_folds.py`` (or ``cmu_mosi_...``), whose three lists are read as literals: nothing is run.

    Raises:
        UserError: a file is missing, a list is no list of strings, an id is there twice or in two folds.
    """
    path = Path(path)
    if path.is_dir():
        scripts = sorted(path.glob("*std_folds.py"))
        if not (path / "train.txt").exists() and len(scripts) == 1:
            return read_folds(scripts[0])
        folds = {name: _read_list(path / f"{name}.txt") for name in FOLDS}
    elif path.suffix == ".py":
        folds = _read_sdk(path)
    else:
        raise UserError(f"{path}: give a folder with train.txt, valid.txt and test.txt, or the SDK's std_folds.py")
    owner: dict[str, str] = {}
    for name in FOLDS:
        if not folds[name]:
            raise UserError(f"{path}: fold {name} is empty")
        for video in folds[name]:
            if video in owner:
                raise UserError(
                    f"{path}: video {video!r} is in {owner[video]} and in {name}"
                    + (" (twice)" if owner[video] == name else "; the folds must be disjoint")
                )
            owner[video] = name
    return folds


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def _read_list(path: Path) -> list[str]:
    videos = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        fields = line.split()
        if len(fields) > 1:
            raise UserError(f"{path}:{number}: expected one video id, found {line.strip()!r}")
        videos += fields
    return videos


def _read_sdk(path: Path) -> dict[str, list[str]]:
    try:
        tree = ast.parse(_read(path), str(path))
    except (SyntaxError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not a Python file that can be parsed ({e})") from None
    found: dict[str, list[str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id in _SDK_NAMES:
                try:
                    value = ast.literal_eval(node.value)
                except (ValueError, TypeError, SyntaxError):
                    value = None
                if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                    raise UserError(f"{path}:{node.lineno}: {target.id} is not a plain list of strings")
                found[_SDK_NAMES[target.id]] = list(value)
    if missing := [k for k, v in _SDK_NAMES.items() if v not in found]:
        raise UserError(f"{path}: has no {', '.join(missing)}; expected the CMU SDK's file of standard folds")
    return found


_VIDEO_KINDS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".flv", ".mpg", ".mpeg", ".m4v")
_SOUND_KINDS = (".wav", ".flac", ".mp3", ".m4a", ".ogg")


def raw_root(corpus_dir: str | Path) -> Path:
    """The folder that holds Videos, Transcript and so on: ``corpus_dir`` or its subfolder ``Raw``.

    Raises:
        UserError: there is no such folder.
    """
    path = Path(corpus_dir)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of the raw distribution (--corpus-dir)")
    return path / "Raw" if (path / "Raw").is_dir() else path


@dataclass
class MediaFiles:
    """Media files by name without extension; ``segmented`` files are one a clip, named ``video_clip``.

    ``used`` are the names that :meth:`find` has returned.
    """

    segmented: bool
    video: dict[str, Path] = field(default_factory=dict)
    audio: dict[str, Path] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @property
    def how(self) -> str:
        """How clips are taken from the files, for the summary."""
        return "a file a clip" if self.segmented else "clips are cut from whole videos"

    @property
    def unused(self) -> list[str]:
        """Names of the files that no utterance has asked for, sorted."""
        return sorted((self.video.keys() | self.audio.keys()) - self.used)

    def find(self, video: str, clip: str) -> tuple[str, Path | None, Path | None]:
        """(file's name, its sound, its pictures) of a clip."""
        for stem in (f"{video}_{clip}", f"{video}-{clip}", f"{video}$_${clip}") if self.segmented else (video,):
            pictures = self.video.get(stem)
            sound = self.audio.get(stem) or pictures
            if sound:
                self.used.add(stem)
                return stem, sound, pictures
        return (f"{video}_{clip}" if self.segmented else video), None, None


def find_media(root: Path, kind: str = "auto") -> MediaFiles:
    """Index the media files below ``root``.

    Args:
        root: see :func:`raw_root`.
        kind: ``full`` (clips are cut from whole videos by their times), ``segmented`` (a file a clip), or ``auto``:
            full where there are any, since the cutting is then exact.

    Raises:
        UserError: there are none.
    """
    for name in ("full", "segmented") if kind == "auto" else (kind,):
        part = name.capitalize()
        folders = [f"Videos/{part}/Combined", f"Videos/{part}", f"Video/{part}"]
        video = _first_files([root / folder for folder in folders], _VIDEO_KINDS)
        folders = [f"Audio/{part}/WAV_16000", f"Audio/WAV_16000/{part}", f"Audio/{part}/Combined", f"Audio/{part}"]
        audio = _first_files([root / folder for folder in folders], _SOUND_KINDS)
        if video or audio:
            return MediaFiles(name == "segmented", video, audio)
    raise UserError(
        f"{root}: no media files in Videos/Full/Combined, Videos/Segmented/Combined or Audio/Full/WAV_16000; complete "
        "the corpus or correct --corpus-dir"
    )


def _first_files(folders: list[Path], kinds: tuple[str, ...]) -> dict[str, Path]:
    """The files of the first folder that has any of these kinds, by name without extension."""
    for folder in folders:
        if folder.is_dir():
            names = sorted(e.name for e in os.scandir(folder) if not e.name.startswith("."))
            if found := {Path(n).stem: folder / n for n in names if Path(n).suffix.lower() in kinds}:
                return found
    return {}


def locate(clip: Clip | None, video: str, name: str, media: MediaFiles) -> ClipMedia | str:
    """The media of a clip, or the reason why there are none. A start before the beginning becomes the beginning.

    Args:
        clip: the clip's line in the transcripts, if there is one; its times are needed to cut it.
        video: the clip's video.
        name: the clip's id.
        media: the files.
    """
    stem, sound, pictures = media.find(video, name)
    if sound is None:
        return f"no media file ({stem})"
    if media.video and pictures is None:
        return f"sound, but no video file ({stem})"
    if media.segmented:
        return ClipMedia(stem, sound, pictures)
    if clip is None:
        return "no transcript line with its start and end"
    if math.isnan(clip.end):
        return f"neither transcript nor labels say when it starts and ends ({clip.where})"
    start = max(clip.start, 0.0)
    if not clip.end > start:
        return f"ends before it starts ({clip.where})"
    return ClipMedia(stem, sound, pictures, start, clip.end)


log = logging.getLogger("sdumc")


def read_raw(corpus_dir: str, folds: str, labels: str | None = None, media: str = "auto") -> Corpus:
    """Read a raw distribution.

    Args:
        corpus_dir: the folder that holds Raw/, or Raw itself.
        folds: see :func:`sdumc.corpora.raw.read_folds`.
        labels: file or folder of the labels; by default what :func:`find_labels` finds.
        media: ``auto``, ``full`` or ``segmented``, see :func:`find_media`.

    Raises:
        UserError: a part of the corpus is missing or not of the expected form.
    """
    root = raw_root(corpus_dir)
    videos_of = read_folds(folds)
    all_labels = read_labels(labels or find_labels(root))
    transcripts = read_transcripts(root)
    give_times(transcripts, all_labels.times)
    files = find_media(root, media)
    log.info("%s: %d transcripts, %d videos", root, len(transcripts.clips), len(files.video))
    result = Corpus([collect_fold(name, videos, transcripts, all_labels, files) for name, videos in videos_of.items()])
    result.notes = [all_labels.note, f"media: {files.how}"]
    if not files.video:
        result.notes.append("media: only sound; there is no folder of videos")
    assigned = {video for videos in videos_of.values() for video in videos}
    result.unused = outside_of_folds(assigned, transcripts, all_labels, files)
    return result


def collect_fold(name: str, videos: Iterable[str], transcripts: Transcripts, labels: Labels, media: MediaFiles) -> Fold:
    """Bring together what belongs to the videos of one fold.

    Every labelled clip ends up among the fold's utterances, or in ``left_out`` with its reason; clips with a transcript
    but no label in ``unlabelled``, and videos of the fold of which there is nothing at all in ``left_out``.
    """
    fold = Fold(name)
    for video in videos:
        _collect_video(fold, video, transcripts, labels, media)
    if labels.by_time and not fold.utterances and any(labels.by_time.get(video) for video in videos):
        log.warning("%s: not one label row has the times of a transcript clip", name)
    return fold


def _collect_video(fold: Fold, video: str, transcripts: Transcripts, labels: Labels, media: MediaFiles) -> None:
    clips = transcripts.clips.get(video, {})
    refused = {**transcripts.refused.get(video, {}), **labels.refused.get(video, {})}
    values = labels.by_clip.get(video, {})
    if labels.by_time:
        values, unmatched = match_times(clips, labels.by_time.get(video, []))
        refused.update(unmatched)
    if not clips and not values and not refused:
        fold.left_out[video] = "a video of the fold without transcript and labels"
        return
    for clip, reason in refused.items():
        fold.left_out[utterance_id(video, clip)] = reason
    for clip, value in values.items():
        utt = utterance_id(video, clip)
        if utt in fold.left_out:
            continue
        line = clips.get(clip)
        source = locate(line, video, clip, media)
        if line is None:
            fold.left_out[utt] = "label without a transcript"
        elif not line.text:
            fold.left_out[utt] = f"empty transcript ({line.where})"
        elif isinstance(source, str):
            fold.left_out[utt] = source
        else:
            fold.add(utt, video, value, line.text, source)
    for clip in clips:
        if clip not in values and clip not in refused:
            fold.unlabelled[utterance_id(video, clip)] = "transcript without a label"


def outside_of_folds(assigned: set[str], transcripts: Transcripts, labels: Labels, media: MediaFiles) -> dict[str, str]:
    """Videos and media files that belong to no utterance of a fold: name -> what they are.

    Args:
        assigned: the videos of all folds.
    """
    found = dict.fromkeys(transcripts.clips, "a transcript of a video in no fold")
    found.update(dict.fromkeys(media.unused, "a media file not used"))
    found.update(dict.fromkeys(labels.videos, "labels of a video in no fold"))
    return {name: reason for name, reason in found.items() if name not in assigned}
