"""The player of a clip's page: a file as a browser can play it, embedded, linked, or encoded again."""

from __future__ import annotations

import base64
import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import av
import numpy as np

from sdumc.data.media import describe, read_frames, read_sound
from sdumc.errors import UserError
from sdumc.files import atomic_write

EMBEDDED = 20e6  # bytes; larger media are linked
_HEIGHT, _FPS, _RATE = 360, 25, 24000  # of what is encoded again
# What all common browsers play, telephones too: container, codecs of pictures, codecs of sound.
_MP4, _WEBM = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
_PLAYABLE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    _MP4: (("h264",), ("aac", "mp3")),
    _WEBM: (("vp8", "vp9"), ("opus", "vorbis")),
    "mp3": ((), ("mp3", "mp3float")),
    "wav": ((), ("pcm_s16le", "pcm_u8", "pcm_s24le")),
    "flac": ((), ("flac",)),
}
_TYPES = {_MP4: "mp4", _WEBM: "webm", "mp3": "mpeg"}


@dataclass(frozen=True)
class Player:
    """``kind`` is video or audio; ``source`` a data URI or a relative link; ``note`` says what was changed, if anything
    was, or why there is no player (``kind`` and ``source`` are empty then)."""

    kind: str
    source: str
    note: str = ""


def make_player(file: Path, page: Path | None, left: float = EMBEDDED) -> Player:
    """What plays ``file`` on the page that is to be written as ``page``.

    A file of at most ``left`` bytes is part of the page; a larger one is linked relative to it. What browsers do not
    play is encoded again as MP4 (H.264 of at most 360 lines and 25 pictures a second, AAC of one channel) and, where
    that is larger, written beside the page as ``<name>.sdumc.mp4``. Without ``page`` everything is embedded.
    """
    media_type = _playable(file)
    if media_type and file.stat().st_size <= left:
        return Player(media_type.partition("/")[0], _data_uri(media_type, file.read_bytes()))
    if media_type and page is not None:
        return Player(media_type.partition("/")[0], _link(file, page))
    try:
        kind, content = encode(file)
    except (UserError, av.error.FFmpegError, ValueError) as e:
        return Player("", "", f"no player: it could not be encoded for browsers ({e})")
    note = "a copy is played: one channel of sound" + (", small pictures" if kind == "video" else "")
    if len(content) <= left or page is None:
        return Player(kind, _data_uri(f"{kind}/mp4", content), note)
    beside = page.parent / f"{file.stem}.sdumc.mp4"
    with atomic_write(beside, "wb") as f:
        f.write(content)
    return Player(kind, _link(beside, page), f"{note}; it is the file {beside.name} beside this page")


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _link(file: Path, page: Path) -> str:
    return quote(os.fsencode(os.path.relpath(file.absolute(), page.absolute().parent)))


def _playable(file: Path) -> str:
    """The media type with which browsers play a file as it is; empty if they do not."""
    try:
        found = describe(file)
    except UserError:
        return ""
    form, tracks = found.format, {"video": found.video, "audio": found.audio}
    if form not in _PLAYABLE or (form == _WEBM and file.suffix.lower() != ".webm"):
        return ""
    for kind, known in zip(("video", "audio"), _PLAYABLE[form], strict=True):
        # Of several tracks a browser may take another one than was scored; cover pictures are rare enough.
        names = {name for name, _ in tracks[kind]}
        if len(tracks[kind]) > 1 or not names <= {*known, *(f"lib{name}" for name in known)}:
            return ""
    if any(pixels not in ("yuv420p", "yuvj420p") for _, pixels in found.video):
        return ""
    return f"{'video' if found.video else 'audio'}/{_TYPES.get(form, form)}"


def encode(file: Path) -> tuple[str, bytes]:
    """``video`` or ``audio``, and the file as an MP4 for browsers.

    Raises:
        UserError: neither sound nor pictures can be read.
    """
    wave, problem = None, None
    try:
        wave, _ = read_sound(file, _RATE)
    except UserError as e:
        problem = e
    pictures: Iterator[tuple[float, np.ndarray]] = iter(())
    first = None
    with contextlib.suppress(UserError):
        pictures = read_frames(file, _FPS)
        first = next(pictures, None)
    if wave is None and first is None:
        raise problem or UserError(f"{file}: nothing in it can be read")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        tracks = _Tracks(container, None if first is None else first[1], wave)
        with contextlib.suppress(UserError):  # what could be read before is played
            for _, picture in chain([first] if first else [], pictures):
                tracks.show(picture)
        tracks.close()
    return ("audio" if first is None else "video"), out.getvalue()


class _Tracks:
    """Pictures and sound of a new MP4, interleaved."""

    def __init__(self, container: av.container.OutputContainer, first: np.ndarray | None, wave: np.ndarray | None):
        self.container, self.wave, self.count, self.sent = container, wave, 0, 0
        self.pictures = self.sound = None
        if first is not None:
            height, width = first.shape[:2]
            scale = min(1.0, _HEIGHT / height)
            self.pictures = container.add_stream("libx264", rate=_FPS)
            self.pictures.width, self.pictures.height = (max(round(n * scale / 2) * 2, 2) for n in (width, height))
            self.pictures.pix_fmt = "yuv420p"
            self.pictures.options = {"crf": "26", "preset": "veryfast"}
        if wave is not None:
            self.sound = container.add_stream("aac", rate=_RATE, layout="mono")
            self.sound.bit_rate = 64000

    def show(self, picture: np.ndarray) -> None:
        assert self.pictures is not None
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(self.pictures.width, self.pictures.height, "yuv420p")
        frame.pts, frame.time_base = self.count, Fraction(1, _FPS)
        self.container.mux(self.pictures.encode(frame))
        self.count += 1
        self._play(round(self.count / _FPS * _RATE))

    def _play(self, until: int) -> None:
        if self.sound is None or self.wave is None:
            return
        while self.sent < min(until, len(self.wave)):
            piece = np.clip(self.wave[None, self.sent : self.sent + 1024], -1, 1).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = _RATE, self.sent, Fraction(1, _RATE)
            self.container.mux(self.sound.encode(frame))
            self.sent += piece.shape[1]

    def close(self) -> None:
        if self.wave is not None:
            self._play(len(self.wave))
        if self.pictures is not None:
            self.container.mux(self.pictures.encode(None))
        if self.sound is not None:
            self.container.mux(self.sound.encode(None))
