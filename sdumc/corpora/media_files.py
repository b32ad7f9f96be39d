"""Media files of the raw distributions: whole videos that clips are cut from, or a file a clip.

MOSEI: ``Videos/Full/Combined/<video>.mp4``, ``Videos/Segmented/Combined/<video>_<clip>.mp4`` and
``Audio/Full/WAV_16000/<video>.wav``. MOSI: ``Video/{Full,Segmented}`` and ``Audio/WAV_16000/{Full,Segmented}``.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from sdumc.corpora.sets import ClipMedia
from sdumc.corpora.transcripts import Clip
from sdumc.errors import UserError

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
