"""Streams of a media file as FFmpeg (PyAV) gives them: opened, sought, decoded; cut and damaged files are found.

Runs in the processes of :mod:`sdumc.data.worker`. Times are in seconds from the start of the file's earliest track.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np

from sdumc.data.containers import bytes_missing, is_play_list, open_options
from sdumc.data.tables import MediaSpan, PastEnd
from sdumc.errors import UserError

TOLERANCE = 0.5  # seconds that a track may end before the time its header states, or a segment after the track
_JUMP = 10.0  # seconds without a packet of any track: the time stamps are wrong
_PAUSE = 600.0  # the same where the file has one track only, which may have been interrupted
_MAX_BAD = 0.05  # share of packets that may fail to decode before the file counts as broken
_QUIET = 0.1  # the first of several audio tracks is not used if its level is below this share (-20 dB) of another's
_TRACK_SECONDS = 1200  # of each of several audio tracks are listened to
# Containers whose header states durations when the file was closed, not guessed from the size or the last packet...
_STATES_DURATION = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "asf", "aiff", "caf", "w64", "wv", "tta", "ape")
# ... and those whose packets carry exact times after a seek. Of the second line, most are read once up to the place,
# without decoding, and FFmpeg remembers where each packet is.
_SEEKABLE = {
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpeg", "mpegts", "asf", "nut", "mxf", "sox", "aptx", "loas"),
    *("flv", "avi", "aiff", "caf", "mp3", "aac", "amr", "ac3", "wav", "au", "w64", "voc", "wv", "tta", "rm"),
}
_OGG_SEEKABLE = ("opus", "vorbis", "flac")
# Seconds decoded before a cut, as a codec's output depends on what came before; more where no key picture is in them.
PREROLLS = (1.0, 12.0)
AGAIN = "copy or make it again"


def check_file(span: MediaSpan) -> None:
    if not os.path.exists(span.path):
        raise UserError(f"{span}: no such media file (relative paths count from {os.getcwd()}); correct the path")
    if not os.path.isfile(span.path):
        raise UserError(f"{span}: not a file; give the path of a media file")
    if os.path.getsize(span.path) == 0:
        raise UserError(f"{span}: the media file is empty (0 bytes); copy or make it again")
    if not os.access(span.path, os.R_OK):
        raise UserError(f"{span}: no permission to read the media file")


def past_end(span: MediaSpan, duration: float) -> PastEnd:
    return PastEnd(
        f"{span}: the segment {span.start:g}-{span.end:g} s goes past the end of the file at {duration:.2f} s; correct "
        "the times, or copy the file again if it is cut short",
        duration,
    )


class MediaFile:
    """A file read by FFmpeg, kept open for the next segment.

    A second :meth:`open` starts from the file's beginning again.
    """

    def __init__(self, span: MediaSpan):
        self.path = span.path
        self._descriptor = -1
        self.container: Any = None
        self.fresh = False  # nothing was read yet
        self._audio: int | None = None  # the track that is listened to
        self.first: tuple[int, Fraction] | None = None  # place in the file of its first block; samples per byte
        self.notes: list[str] = []
        self.open(span)
        if missing := bytes_missing(span.path):
            self.close()
            raise UserError(f"{span}: cut short: {missing} bytes are missing at its end; {AGAIN}")

    def open(self, span: MediaSpan) -> None:
        self.close()
        try:
            self.path.encode()
            # "file:" keeps FFmpeg from taking a path with a colon for a network protocol.
            name = "file:" + self.path
        except UnicodeEncodeError:  # PyAV takes UTF-8 names alone
            self._descriptor = os.open(self.path, os.O_RDONLY)
            name = f"file:/dev/fd/{self._descriptor}"
        try:
            self.container = av.open(name, container_options=open_options())
        except (av.error.FFmpegError, OSError, ValueError) as e:
            self.close()
            if is_play_list(self.path):
                raise UserError(
                    f"{span}: a play list, which names other files and has no media itself; give those"
                ) from None
            raise UserError(
                f"{span}: not a readable media file ({getattr(e, 'strerror', None) or e}); it may be cut short or no "
                f"media at all: {AGAIN}"
            ) from None
        self.fresh = True

    def close(self) -> None:
        if self.container is not None:
            self.container.close()
            self.container = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def format(self) -> str:
        return self.container.format.name

    @property
    def origin(self) -> float:
        start = self.container.start_time
        return start / av.time_base if start is not None else 0.0

    def tracks(self) -> list[Any]:
        """All audio and video streams; cover pictures of music files are no video."""
        cover = av.stream.Disposition.attached_pic
        return [
            s for s in self.container.streams if s.type == "audio" or (s.type == "video" and not s.disposition & cover)
        ]

    def has(self, kind: str) -> bool:
        return any(s.type == kind for s in self.tracks())

    def track(self, kind: str, span: MediaSpan) -> Any:
        """The stream to be read.

        Raises:
            UserError: there is none, or nothing that decodes it.
        """
        streams = [s for s in self.tracks() if s.type == kind]
        if not streams:
            raise UserError(
                f"{span}: has no {kind} track; give a file with {'sound' if kind == 'audio' else 'pictures'}"
            )
        known = sorted((s for s in streams if s.codec_context is not None), key=_not_meant)
        if not known:
            raise UserError(
                f"{span}: its {kind} track is of a kind that FFmpeg cannot decode ({_tag(streams[0])}); convert it, or "
                f"{AGAIN} if it is damaged"
            )
        if kind == "audio" and len(known) > 1:
            if self._audio is None:
                self._audio = self._loudest(span, [s.index for s in known])
            return self.container.streams[self._audio]
        return known[0]

    def _loudest(self, span: MediaSpan, indices: list[int]) -> int:
        """The first audio track, or the loudest if the first one is much quieter."""
        levels = dict.fromkeys(indices, 0.0)
        counts = dict.fromkeys(indices, 1)
        streams = [self.container.streams[i] for i in indices]
        self.fresh = False
        try:
            for packet in self.container.demux(streams):
                i = packet.stream.index
                try:
                    for frame in packet.decode():
                        samples = samples_of(frame)
                        levels[i] += float(np.square(samples).mean(axis=1).sum())
                        counts[i] += len(samples)
                except av.error.FFmpegError:
                    continue
                if all(counts[k] > _TRACK_SECONDS * (self.container.streams[k].rate or 16000) for k in indices):
                    break
        except (av.error.FFmpegError, IndexError):
            pass
        self.open(span)
        power = {i: levels[i] / counts[i] for i in indices}
        best = max(indices, key=lambda i: power[i])
        if power[indices[0]] >= _QUIET**2 * power[best]:
            return indices[0]
        self.notes.append(
            f"audio track {indices.index(best) + 1} of {len(indices)} is used; the first one is much quieter"
        )
        return best

    def from_start(self, span: MediaSpan) -> list[Any]:
        """The tracks, to be read from the file's beginning."""
        if not self.fresh:
            self.open(span)
        self.fresh = False
        return self.tracks()

    def begin(self, kind: str, span: MediaSpan, preroll: float | None = PREROLLS[0]) -> tuple[Any, bool]:
        """The stream to be read, from a place ``preroll`` seconds before the span's start; and False when that is the
        file's beginning. None: from the beginning."""
        stream = self.track(kind, span)
        target = 0.0 if preroll is None else span.start - preroll
        codec = stream.codec_context.name
        if target > 0 and (self.format in _SEEKABLE or (self.format == "ogg" and codec in _OGG_SEEKABLE)):
            self.fresh = False
            try:
                if is_block_coded(self.format, codec) and self.first is None:
                    self.from_start(span)
                    stream = self.track(kind, span)
                    block = next(self.container.demux(stream))
                    self.first = (block.pos, Fraction(block.duration, block.size))
                self.container.seek(int((self.origin + target) / stream.time_base), stream=stream)
                return stream, True
            except (av.error.FFmpegError, StopIteration, TypeError, ZeroDivisionError):
                pass
        self.from_start(span)
        return self.track(kind, span), False


def _not_meant(stream: Any) -> tuple[bool, bool]:
    """Order of tracks of one kind: a comment, or what describes the pictures, comes last, and what a player plays if
    nobody chooses comes first."""
    flags = av.stream.Disposition
    aside = flags.comment | flags.visual_impaired | flags.descriptions | flags.karaoke | flags.still_image
    return bool(stream.disposition & aside), not stream.disposition & flags.default


def _tag(stream: Any) -> str:
    try:
        return f"tag {stream.codec_tag!r}"
    except (AttributeError, UnicodeDecodeError, ValueError):
        return "no codec"


def is_block_coded(container: str, codec: str) -> bool:
    """Whether FFmpeg takes the time of a place in the file from the header's bytes per second, which are rounded."""
    return container in ("wav", "w64") and (codec.startswith("adpcm_") or codec == "gsm_ms")


def _flac_place(packet: Any, info: bytes) -> int | None:
    """Samples before a frame of FLAC, by its own number; FFmpeg does not know its time behind a seek in Ogg.

    Args:
        info: the stream's header, which begins with the samples in a frame.
    """
    head = bytes(packet)[:12]
    if len(head) < 12 or head[0] != 0xFF or head[1] & 0xFE != 0xF8 or len(info) < 2:
        return None
    length = 8 - (~head[4] & 0xFF).bit_length()  # the number is coded like a character of UTF-8
    number = head[4] & (0x7F >> length)
    for byte in head[5 : 4 + max(length, 1)]:
        number = number << 6 | byte & 0x3F
    return number if head[1] & 1 else number * int.from_bytes(info[:2], "big")


_kept: dict[tuple, MediaFile] = {}


def opened(span: MediaSpan) -> MediaFile:
    """The file, as it was left by the last request if that was for the same file."""
    status = os.stat(span.path)
    key = (os.path.abspath(span.path), status.st_size, status.st_mtime_ns, status.st_ino)
    if key not in _kept:
        forget()
        _kept[key] = MediaFile(span)
    return _kept[key]


def forget() -> None:
    """Close the file that is kept open."""
    for file in _kept.values():
        file.close()
    _kept.clear()


def _stated_end(file: MediaFile, stream: Any) -> float | None:
    """Time in seconds (FFmpeg's clock) at which the header says that the stream ends; None when it does not say."""
    if file.format not in _STATES_DURATION:
        return None
    ends = []
    if stream.duration:
        ends.append(float(((stream.start_time or 0) + stream.duration) * stream.time_base))
    elif match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        ends.append(3600 * int(match[1]) + 60 * int(match[2]) + float(match[3]))
    elif len(file.tracks()) > 1:
        return None  # the file's duration may be that of the other track
    if file.container.duration:
        # An edit list can end the presentation before the media does; only this duration takes it into account.
        ends.append(file.origin + file.container.duration / av.time_base)
    return min(ends, default=None)


class _Clock:
    """Finds time stamps that jump, which would become hours of silence or of one picture.

    While one track pauses, the other one goes on; and in a file of one track a pause may last ten minutes.
    """

    def __init__(self, span: MediaSpan, streams: list[Any], from_start: bool):
        self.span = span
        self.wanted: set[int] = set()
        self.kinds = {s.index: s.type for s in streams}
        self.until: dict[int, float] = {s.index: 0.0 for s in streams} if from_start else {}  # seconds
        self.since = dict(self.until)  # the beginning of what has no long gap

    def see(self, index: int, at: float, end: float) -> None:
        """A packet from ``at`` to ``end``; :class:`UserError` if it cannot belong there."""
        before = self.until.get(index)
        if before is None:
            self.until[index], self.since[index] = end, at
            return
        longest = _JUMP if len(self.kinds) > 1 else _PAUSE
        jumps_back = at < before - _JUMP
        if index in self.wanted and (jumps_back or (at > before + longest and not self._covered(index, before, at))):
            raise UserError(
                f"{self.span}: its time stamps jump from {before:.2f} to {at:.2f} s in the {self.kinds[index]} track, "
                "and the file has nothing in between; convert it, or cut it there"
            )
        if jumps_back or at > before + _JUMP:
            self.since[index] = at
        self.until[index] = end if jumps_back else max(before, end)

    def _covered(self, index: int, start: float, end: float) -> bool:
        return any(
            self.since.get(i, math.inf) <= start + _JUMP and self.until.get(i, 0.0) >= end - _JUMP
            for i in self.kinds
            if i != index
        )


class Decoder:
    """Decodes one stream of an opened file, and knows how far it came."""

    def __init__(self, span: MediaSpan, file: MediaFile, stream: Any, from_start: bool):
        self.span, self.file, self.stream = span, file, stream
        self.end = -math.inf  # of the last packet, in seconds on FFmpeg's clock
        self.packets = self.bad = 0
        self.sought = not from_start
        self.whole = from_start  # behind a seek, the first packets may be parts
        self.clock = _Clock(span, file.tracks(), from_start)
        self.clock.wanted.add(stream.index)

    def packets_of_all(self) -> Iterator[Any]:
        """Packets of the tracks, so that pauses of one can be told from jumps of all."""
        size, read = os.path.getsize(self.span.path), 0
        packets = self.file.container.demux(self.file.tracks())
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as e:
                raise UserError(f"{self.span}: cut short or damaged ({e.strerror}); {AGAIN}") from None
            except IndexError:  # of PyAV, in its list of tracks
                raise UserError(
                    f"{self.span}: a new track begins in the middle, or it is damaged; convert it, or {AGAIN}"
                ) from None
            if packet is None:
                return
            read += max(packet.size, 1)
            if read > 2 * size + (1 << 20):
                raise UserError(f"{self.span}: damaged: it would be read again and again; {AGAIN}")
            if self.sought and packet.stream.index == self.stream.index and packet.size:
                self._correct(packet)
            if packet.pts is not None:
                at = float(packet.pts * packet.time_base)
                end = at + float((packet.duration or 0) * packet.time_base)
                self.clock.see(packet.stream.index, at - self.file.origin, end - self.file.origin)
                if packet.stream.index == self.stream.index:
                    self.end = max(self.end, end)
            yield packet

    def _correct(self, packet: Any) -> None:
        """Give a packet behind a seek its time where FFmpeg does not know it well."""
        codec = self.stream.codec_context
        if self.file.format == "ogg" and codec.name == "flac":
            samples = _flac_place(packet, codec.extradata or b"")
        elif is_block_coded(self.file.format, codec.name) and self.file.first is not None:
            start, per_byte = self.file.first
            samples = None if packet.pos is None else int((packet.pos - start) * per_byte)
        else:
            return
        packet.pts = packet.dts = None if samples is None else round(samples / codec.rate / packet.time_base)

    def frames(self) -> Iterator[Any]:
        """Yields decoded frames to the stream's end.

        Raises:
            UserError: the stream stops before its stated end, its time stamps jump, or much of it cannot be decoded.
        """
        pauses = _PAUSES.get(self.stream.codec_context.name, ())
        for packet in self.packets_of_all():
            if packet.stream.index != self.stream.index:
                continue
            self.packets += packet.size > 0
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                if pauses and packet.size and bytes(packet)[0] >> 3 & 15 in pauses:
                    continue
                self.bad += self.whole and packet.size > 0
                continue
            self.whole |= bool(decoded)
            yield from decoded
        self.check_complete()

    def check_complete(self) -> None:
        stated = _stated_end(self.file, self.stream)
        if stated is not None and self.end < stated - TOLERANCE:
            raise UserError(
                f"{self.span}: cut short: its {self.stream.type} stops at {max(self.end, 0):.2f} s of "
                f"{stated:.2f} s; {AGAIN}"
            )
        if self.bad > _MAX_BAD * self.packets:
            raise UserError(
                f"{self.span}: damaged: {self.bad} of {self.packets} {self.stream.type} packets cannot be decoded; "
                f"{AGAIN}"
            )


# Frames in which a phone sent no sound (3GPP TS 26.101 and 26.201), which FFmpeg's own decoders refuse.
_PAUSES = {"amrnb": (8, 9, 10, 11, 15), "amrwb": (9, 14, 15)}


def samples_of(frame: Any) -> np.ndarray:
    """Samples (T, C) float32 of a decoded frame."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, len(frame.layout.channels))
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128.0) / 128.0
    if values.dtype.kind == "i":
        return values.astype(np.float32) / np.float32(2 ** (8 * values.dtype.itemsize - 1))
    return values.astype(np.float32, copy=False)
