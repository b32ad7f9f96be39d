"""Sound and pictures from media files of any kind.

Decoding itself is in :mod:`sdumc.data.decoding`. It runs in a process of its own (:mod:`sdumc.data.worker`), so that a
damaged file costs at most itself.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sdumc.data import worker
from sdumc.data.tables import MediaInfo, MediaSpan
from sdumc.errors import UserError

log = logging.getLogger(__name__)


def _as_span(span: MediaSpan | str | os.PathLike) -> MediaSpan:
    return span if isinstance(span, MediaSpan) else MediaSpan(os.fspath(span))


def read_sound(span: MediaSpan | str | os.PathLike, rate: int = 16000) -> tuple[np.ndarray, list[str]]:
    """Read sound as one channel at ``rate`` Hz.

    Channels are averaged; where they cancel each other the loudest one is taken, and of more than two channels only
    those that have sound. Of several audio tracks the first is taken, unless another is 20 dB louder. A span is cut at
    the file's own rate, to the nearest sample, and resampled afterwards.

    Returns:
        float32 (T,), nominally within [-1, 1], writable; and notes of what was unusual.

    Raises:
        UserError: naming the file, when it is absent, empty, not media, has no audio track or no samples, is cut
            short or damaged, has time stamps that jump, holds NaN, is longer than 12 hours, or its decoder ended.
        PastEnd: the span goes more than half a second past its end.
    """
    span = _as_span(span)
    samples, size = np.empty(1 << 20, np.float32), 0
    notes: list[str] = []
    for head, body in worker.ask(span, "sound", rate=rate):
        if head.get("again"):
            size = 0
        elif "notes" in head:
            notes = head["notes"]
        elif body:
            part = np.frombuffer(body, np.float32)
            if size + len(part) > len(samples):  # grown in place: an hour would need twice its memory otherwise
                samples.resize(max(2 * len(samples), size + len(part)), refcheck=False)
            samples[size : size + len(part)] = part
            size += len(part)
    samples.resize(size, refcheck=False)
    return samples, notes


def read_audio(span: MediaSpan | str | os.PathLike, rate: int = 16000) -> np.ndarray:
    """The sound alone of :func:`read_sound`; what was unusual is logged."""
    span = _as_span(span)
    samples, notes = read_sound(span, rate)
    for note in notes:
        log.warning("%s: %s", span, note)
    return samples


def _info(span: MediaSpan, what: str, **details: bool) -> MediaInfo:
    *_, (head, _) = worker.ask(span, what, **details)
    duration, has_audio, has_video = head["info"]
    return MediaInfo(duration, has_audio, has_video)


def probe(path: str | os.PathLike) -> MediaInfo:
    """What a media file states about itself, without decoding it.

    Raises:
        UserError: the file is absent, empty or not media.
    """
    return _info(_as_span(path), "probe")


@dataclass(frozen=True)
class Contents:
    """What a file is made of: FFmpeg's name of its container, and (codec, pixel format) of each track of sound and of
    pictures, empty names where nothing decodes it. ``seconds`` is its length by the times of its packets, if that was
    asked for: of a file that is longer than was asked, what was looked at."""

    format: str
    audio: list[tuple[str, str]]
    video: list[tuple[str, str]]
    seconds: float


def describe(path: str | os.PathLike, most_seconds: float = 0.0) -> Contents:
    """What a media file is made of, and up to ``most_seconds`` how long it is.

    Raises:
        UserError: the file is absent, empty, cut short or not media.
    """
    *_, (head, _) = worker.ask(_as_span(path), "describe", most_seconds=most_seconds)
    found = head["contents"]
    tracks = {kind: [(name, pixels) for name, pixels in found[kind]] for kind in ("audio", "video")}
    return Contents(found["format"], tracks["audio"], tracks["video"], found["seconds"])


def check_media_file(path: str | os.PathLike, *, audio: bool = True, video: bool = False) -> MediaInfo:
    """Check that a file is whole and has the wanted tracks, reading it once but decoding only the start of each.

    Raises:
        UserError: as :func:`read_audio` and :func:`read_frames`, but for damage in the middle.
    """
    return _info(_as_span(path), "check", audio=audio, video=video)


def read_frames(span: MediaSpan | str | os.PathLike, fps: float | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """Read pictures as (time, RGB uint8 (H, W, 3)), the time in seconds from the span's start.

    With ``fps``, the picture shown at each of the times 0, 1/fps, 2/fps, ... is given (some twice when the file has
    fewer pictures a second); without, every picture with its own time.

    Raises:
        UserError: while iterating, naming the file, when it is absent, empty, not media, has no video track, nothing
            of it can be decoded, it stops before the duration that its header states, or as :func:`read_sound`.
        PastEnd: the span goes more than half a second past its end.
    """
    span = _as_span(span)
    if fps is not None and not (fps > 0 and math.isfinite(fps)):
        raise UserError(f"{span}: frames per second must be above 0, not {fps}")
    return _frames(span, fps)


def _frames(span: MediaSpan, fps: float | None) -> Iterator[tuple[float, np.ndarray]]:
    given = number = 0
    for head, body in worker.ask(span, "pictures", fps=fps):
        if head.get("again"):
            number = 0  # those that were given already are left out
        for note in head.get("notes", ()):
            log.warning("%s: %s", span, note)
        if times := head.get("times"):
            pictures = np.frombuffer(body, np.uint8).reshape(len(times), *head["shape"])
            for at, picture in zip(times, pictures, strict=True):
                number += 1
                if number > given:
                    given += 1
                    yield at, picture
