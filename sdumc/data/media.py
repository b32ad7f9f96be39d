"""Sound and pictures from media files: WAV and FLAC by libsndfile, everything else by FFmpeg (PyAV).

Times are in seconds from the start of the file's earliest track, so that sound and pictures cut by the same times
belong together.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from sdumc.data.tables import MediaSpan
from sdumc.errors import UserError

log = logging.getLogger(__name__)

TOLERANCE = 0.5  # seconds that a track may end before the time its header states, or a segment after the track
_GAP = 0.03  # seconds; longer gaps in the sound become silence, shorter ones are rounding of the container's clock
_MAX_BAD = 0.05  # share of packets that may fail to decode before the file counts as broken
# Containers whose header states durations when the file was closed, not guessed from the size or the last packet...
_STATES_DURATION = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "asf")
# ... and those whose packets carry exact times after a seek.
_SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpeg", "mpegts")
_PREROLL = 1.0  # seconds decoded before a cut, as a codec's output depends on what came before


@dataclass(frozen=True)
class MediaInfo:
    """What a media file states about itself; ``duration`` in seconds, 0 if unknown."""

    duration: float
    has_audio: bool
    has_video: bool


def _as_span(span: MediaSpan | str | os.PathLike) -> MediaSpan:
    return span if isinstance(span, MediaSpan) else MediaSpan(os.fspath(span))


def _check_file(span: MediaSpan) -> None:
    if not os.path.exists(span.path):
        raise UserError(f"{span}: no such media file (relative paths count from {os.getcwd()}); correct the path")
    if not os.path.isfile(span.path):
        raise UserError(f"{span}: not a file; give the path of a media file")
    if os.path.getsize(span.path) == 0:
        raise UserError(f"{span}: the media file is empty (0 bytes); copy or make it again")
    if not os.access(span.path, os.R_OK):
        raise UserError(f"{span}: no permission to read the media file")


# ---------------------------------------------------------------------------------------------------- wav and flac


def _is_sndfile(path: str) -> bool:
    with open(path, "rb") as f:
        head = f.read(12)
    return head[:4] == b"fLaC" or (head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE")


def _wav_bytes_missing(path: str) -> int:
    """How many bytes of sound the header of a WAV file promises beyond the file's end (libsndfile hides this)."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        if f.read(4) != b"RIFF":
            return 0  # FLAC is checked by decoding it; RF64 has its sizes in another place
        f.seek(12)
        while len(header := f.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            if name == b"data":
                # Programs that write to a pipe do not know the length and write about the largest number.
                return 0 if length >= 0x7FFFF000 else max(0, f.tell() + length - size)
            f.seek(length + (length & 1), os.SEEK_CUR)
    return 0


def _read_sndfile(span: MediaSpan) -> tuple[np.ndarray, int]:
    """Samples (T, C) float32 of the span and their rate in Hz."""
    import soundfile

    if missing := _wav_bytes_missing(span.path):
        raise UserError(f"{span}: cut short: {missing} bytes of sound are missing at the end; copy or make it again")
    try:
        with soundfile.SoundFile(span.path) as f:
            total, rate = f.frames, f.samplerate
            first = min(round(span.start * rate), total)
            last = total if span.end is None else round(span.end * rate)
            if last > total + TOLERANCE * rate:
                raise UserError(_past_end(span, total / rate))
            count = min(last, total) - first
            f.seek(first)
            samples = f.read(count, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as e:
        raise UserError(f"{span}: cannot be read as sound ({e.error_string}); copy or make it again") from None
    if len(samples) < count:
        raise UserError(
            f"{span}: cut short: {len(samples)} samples instead of the {count} its header states; copy or make it again"
        )
    return samples, rate


def _past_end(span: MediaSpan, duration: float) -> str:
    return (
        f"{span}: the segment {span.start:g}-{span.end:g} s goes past the end of the file at {duration:.2f} s; correct "
        "the times, or copy the file again if it is cut short"
    )


# ------------------------------------------------------------------------------------------------- all other files


def _cut_in_unit(path: str, container_format: str) -> bool:
    """Whether the file ends within a box (MP4) or packet (MPEG), of which FFmpeg says nothing.

    Files that deviate from their format count as whole.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if container_format.startswith("mov,mp4"):
            at = 0
            while at + 8 <= size:
                length, kind = struct.unpack_from(">I4s", data, at)
                if length == 1 and at + 16 <= size:
                    length = struct.unpack_from(">Q", data, at + 8)[0]
                if length < 8:  # 0: to the end of the file, whatever that is
                    return False
                if at + length > size:
                    return kind in (b"mdat", b"moof", b"moov")
                at += length
        elif container_format == "mpegts":
            return data[0] == 0x47 and size > 188 and data[188] == 0x47 and size % 188 != 0
        elif container_format == "mpeg":
            at = 0
            while at + 14 <= size and data[at : at + 3] == b"\0\0\1":
                kind = data[at + 3]
                if kind == 0xBA:  # pack header, of MPEG-2 or MPEG-1
                    at += 14 + (data[at + 13] & 7) if data[at + 4] >> 6 == 1 else 12
                elif kind >= 0xBB:
                    at += 6 + struct.unpack_from(">H", data, at + 4)[0]
                else:
                    return False
            return at > size
    return False


def _open(span: MediaSpan) -> av.container.InputContainer:
    try:
        # "file:" keeps FFmpeg from taking a path with a colon for a network protocol.
        container = av.open("file:" + span.path)
    except (av.error.FFmpegError, OSError, ValueError) as e:
        raise UserError(
            f"{span}: not a readable media file ({getattr(e, 'strerror', None) or e}); it may be cut short or no media "
            "at all: copy or make it again"
        ) from None
    if _cut_in_unit(span.path, container.format.name):
        container.close()
        raise UserError(f"{span}: cut short: the file ends in the middle of a packet; copy or make it again")
    return container


def _track(container: av.container.InputContainer, kind: str):
    """The first audio or video stream, or None; cover pictures of music files are no video."""
    for stream in container.streams:
        if stream.type == kind and not (kind == "video" and stream.disposition & av.stream.Disposition.attached_pic):
            return stream
    return None


def _origin(container: av.container.InputContainer) -> float:
    return container.start_time / av.time_base if container.start_time is not None else 0.0


def _stated_end(container: av.container.InputContainer, stream) -> float | None:
    """Time in seconds (FFmpeg's clock) at which the header says that the stream ends; None when it does not say."""
    if container.format.name not in _STATES_DURATION:
        return None
    ends = []
    if stream.duration:
        ends.append(float(((stream.start_time or 0) + stream.duration) * stream.time_base))
    elif match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        ends.append(3600 * int(match[1]) + 60 * int(match[2]) + float(match[3]))
    elif sum(s.type in ("audio", "video") for s in container.streams) > 1:
        return None  # the file's duration may be that of the other track
    if container.duration:
        # An edit list can end the presentation before the media does; only this duration takes it into account.
        ends.append(_origin(container) + container.duration / av.time_base)
    return min(ends, default=None)


class _Decoder:
    """Decodes one stream of an opened file, and knows how far it came."""

    def __init__(self, span: MediaSpan, container: av.container.InputContainer, stream):
        self.span, self.container, self.stream = span, container, stream
        self.end = -math.inf  # of the last packet, in seconds on FFmpeg's clock
        self.packets = self.bad = 0

    def frames(self) -> Iterator:
        """Yields decoded frames to the stream's end.

        Raises:
            UserError: the stream stops before its stated end, or much of it cannot be decoded.
        """
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as e:
                raise UserError(f"{self.span}: cut short or damaged ({e.strerror}); copy or make it again") from None
            if packet is None:
                break
            if packet.pts is not None:
                self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * self.stream.time_base))
            self.packets += packet.size > 0
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                self.bad += 1
                continue
            yield from decoded
        self._check_complete()

    def _check_complete(self) -> None:
        stated = _stated_end(self.container, self.stream)
        if stated is not None and self.end < stated - TOLERANCE:
            raise UserError(
                f"{self.span}: cut short: its {self.stream.type} stops at {max(self.end, 0):.2f} s of "
                f"{stated:.2f} s; copy or make it again"
            )
        if self.bad > _MAX_BAD * self.packets:
            raise UserError(
                f"{self.span}: damaged: {self.bad} of {self.packets} {self.stream.type} packets cannot be decoded; "
                "copy or make it again"
            )
        if self.bad:
            log.warning("%s: %d of %d %s packets are damaged", self.span, self.bad, self.packets, self.stream.type)


def _seek(container: av.container.InputContainer, stream, seconds: float) -> bool:
    """Go to a place at least :data:`_PREROLL` before ``seconds``; False when the file must be read from its start."""
    target = seconds - _PREROLL
    if target <= 0 or container.format.name not in _SEEKABLE:
        return False
    try:
        container.seek(int((_origin(container) + target) / stream.time_base), stream=stream)
    except av.error.FFmpegError:
        return False
    return True


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """Samples (T,) float32 of a decoded frame, mixed down to one channel."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, len(frame.layout.channels)).T
    if values.dtype == np.uint8:
        values = (values.astype(np.float32) - 128.0) / 128.0
    elif values.dtype.kind == "i":
        values = values.astype(np.float32) / float(2 ** (8 * values.dtype.itemsize - 1))
    return values.astype(np.float32, copy=False).mean(axis=0)


def _read_av_audio(span: MediaSpan, seek: bool = True) -> tuple[np.ndarray, int]:
    """Samples (T,) float32 of the span and their rate in Hz."""
    with _open(span) as container:
        stream = _track(container, "audio")
        if stream is None:
            raise UserError(f"{span}: has no audio track; give a file with sound")
        sought = seek and _seek(container, stream, span.start)
        origin = _origin(container)
        decoder = _Decoder(span, container, stream)
        pieces: list[np.ndarray] = []
        rate = first = position = 0  # first: index of the first sample kept; position: that of the next one
        for frame in decoder.frames():
            piece = _samples(frame)
            at = None if frame.pts is None else float(frame.pts * frame.time_base) - origin
            if not pieces:
                rate = frame.sample_rate
                if sought and (at is None or at > span.start):
                    return _read_av_audio(span, seek=False)  # the seek went past the start
                first = position = round((at or 0.0) * rate)
            elif frame.sample_rate != rate:
                raise UserError(
                    f"{span}: the sample rate changes from {rate} to {frame.sample_rate} Hz; convert the file to WAV"
                )
            elif at is not None and at * rate - position > _GAP * rate:
                silence = round(at * rate) - position
                pieces.append(np.zeros(silence, np.float32))
                position += silence
            pieces.append(piece)
            position += len(piece)
            if span.end is not None and position >= round(span.end * rate):
                break
    if not pieces:
        raise UserError(f"{span}: its audio track has no samples; replace the file or leave the utterance out")
    start = round(span.start * rate)
    end = position if span.end is None else round(span.end * rate)
    if end > position + TOLERANCE * rate:
        raise UserError(_past_end(span, position / rate))
    samples = np.concatenate(pieces)
    if first > start:  # the sound begins after the pictures
        samples = np.concatenate([np.zeros(first - start, np.float32), samples])
        first = start
    return samples[start - first : max(end, start) - first], rate


def resample(audio: np.ndarray, source: int, target: int) -> np.ndarray:
    """Change the sample rate of audio (T,) from ``source`` to ``target`` Hz with a polyphase low-pass filter."""
    if source == target or not len(audio):
        return audio
    from scipy.signal import resample_poly

    common = math.gcd(source, target)
    return resample_poly(audio, target // common, source // common).astype(np.float32, copy=False)


def read_audio(span: MediaSpan | str | os.PathLike, rate: int = 16000) -> np.ndarray:
    """Read sound as one channel at ``rate`` Hz.

    Channels are averaged. A span is cut at the file's own rate, to the nearest sample, and resampled afterwards.

    Returns:
        float32 (T,), nominally within [-1, 1], writable.

    Raises:
        UserError: naming the file, when it is absent, empty, not media, has no audio track or no samples, is cut
            short, holds NaN, or the span goes more than half a second past its end.
    """
    span = _as_span(span)
    _check_file(span)
    if _is_sndfile(span.path):
        samples, source = _read_sndfile(span)
        samples = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    else:
        samples, source = _read_av_audio(span)
    if not len(samples):
        raise UserError(f"{span}: has no samples; replace the file or leave the utterance out")
    if not np.isfinite(samples).all():
        raise UserError(f"{span}: holds NaN or infinite samples; make the file again")
    return np.ascontiguousarray(resample(samples, source, rate))


def probe(path: str | os.PathLike) -> MediaInfo:
    """What a media file states about itself, without decoding it.

    Raises:
        UserError: the file is absent, empty or not media.
    """
    span = _as_span(path)
    _check_file(span)
    if _is_sndfile(span.path):
        import soundfile

        try:
            info = soundfile.info(span.path)
        except soundfile.LibsndfileError as e:
            raise UserError(f"{span}: cannot be read as sound ({e.error_string}); copy or make it again") from None
        return MediaInfo(info.frames / info.samplerate, has_audio=True, has_video=False)
    with _open(span) as container:
        audio, video = _track(container, "audio"), _track(container, "video")
        duration = container.duration / av.time_base if container.duration else 0.0
        if not duration:  # e.g. a browser's recording: found from the packets
            for packet in container.demux([s for s in (audio, video) if s is not None]):
                if packet.pts is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.stream.time_base)
                    duration = max(duration, end - _origin(container))
        return MediaInfo(duration, has_audio=audio is not None, has_video=video is not None)


def check_media_file(path: str | os.PathLike, *, audio: bool = True, video: bool = False) -> MediaInfo:
    """Check that a file is whole and has the wanted tracks, reading it once but decoding only the start of each.

    Raises:
        UserError: as :func:`read_audio` and :func:`read_frames`, but for damage in the middle.
    """
    span = _as_span(path)
    info = probe(span.path)
    if audio and not info.has_audio:
        raise UserError(f"{span}: has no audio track; give a file with sound")
    if video and not info.has_video:
        raise UserError(f"{span}: has no video track; give a file with pictures")
    if _is_sndfile(span.path):
        if not len(_read_sndfile(span)[0]):
            raise UserError(f"{span}: has no samples; replace the file or leave the utterance out")
        return info
    with _open(span) as container:
        wanted = [_track(container, kind) for kind, on in (("audio", audio), ("video", video)) if on]
        decoders = {stream.index: _Decoder(span, container, stream) for stream in wanted}
        decoded: set[int] = set()
        packets = container.demux(wanted)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as e:
                raise UserError(f"{span}: cut short or damaged ({e.strerror}); copy or make it again") from None
            if packet is None:
                break
            decoder = decoders[packet.stream.index]
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.stream.time_base)
                decoder.end = max(decoder.end, end)
            if packet.stream.index not in decoded:
                try:
                    if packet.decode():
                        decoded.add(packet.stream.index)
                except av.error.FFmpegError:
                    pass
        for stream in wanted:
            decoders[stream.index]._check_complete()
            if stream.index not in decoded:
                raise UserError(f"{span}: nothing of its {stream.type} can be decoded; copy or make it again")
    return info


# --------------------------------------------------------------------------------------------------------- pictures


def _picture(frame: av.VideoFrame) -> np.ndarray:
    """RGB uint8 (H, W, 3), turned upright as the file asks for (phones store pictures sideways)."""
    picture = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def read_frames(span: MediaSpan | str | os.PathLike, fps: float | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """Read pictures as (time, RGB uint8 (H, W, 3)), the time in seconds from the span's start.

    With ``fps``, the picture shown at each of the times 0, 1/fps, 2/fps, ... is given (some twice when the file has
    fewer pictures a second); without, every picture with its own time.

    Raises:
        UserError: while iterating, naming the file, when it is absent, empty, not media, has no video track, nothing
            of it can be decoded, it stops before the duration that its header states, or the span goes more than half
            a second past its end.
    """
    span = _as_span(span)
    _check_file(span)
    if fps is not None and not fps > 0:
        raise UserError(f"{span}: frames per second must be above 0, not {fps}")
    if _is_sndfile(span.path):
        raise UserError(f"{span}: has no video track; give a file with pictures")
    return _frames(span, fps)


def _frames(span: MediaSpan, fps: float | None, seek: bool = True) -> Iterator[tuple[float, np.ndarray]]:
    with _open(span) as container:
        stream = _track(container, "video")
        if stream is None:
            raise UserError(f"{span}: has no video track; give a file with pictures")
        sought = seek and _seek(container, stream, span.start)
        origin = _origin(container)
        nominal = float(1 / (stream.average_rate or stream.guessed_rate or 25))
        shown: Any = None
        shown_from, count, decoded = 0.0, 0, 0
        wanted = math.inf if span.end is None else span.end - span.start
        slack = 1e-4  # seconds; container clocks are coarser than fractions of a second in floating point
        complete = True
        for frame in _Decoder(span, container, stream).frames():
            decoded += 1
            at = (decoded - 1) * nominal if frame.pts is None else float(frame.pts * frame.time_base) - origin
            at -= span.start
            if sought and decoded == 1 and at > 0:
                yield from _frames(span, fps, seek=False)  # the seek went past the start
                return
            if fps is None:
                if at >= wanted - slack:
                    complete = False
                    break
                if at >= -slack:
                    yield max(at, 0.0), _picture(frame)
                    count += 1
            else:
                # `shown` is displayed until this frame's time; before the first frame, that first frame is.
                picture = None
                while count / fps < min(at, wanted) - slack:
                    if picture is None:
                        picture = _picture(shown if shown is not None else frame)
                    yield count / fps, picture
                    count += 1
                if at >= wanted - slack:
                    complete = False
                    break
            shown, shown_from = frame, at
        if not decoded:
            raise UserError(f"{span}: no picture can be decoded; copy or make it again")
        if complete:  # came to the end of the file
            last = shown_from + nominal
            if span.end is not None and last < wanted - TOLERANCE:
                raise UserError(_past_end(span, last + span.start))
            if fps is not None:
                picture = None
                while count / fps < min(last, wanted) - slack:
                    picture = _picture(shown) if picture is None else picture
                    yield count / fps, picture
                    count += 1
        if not count:
            raise UserError(f"{span}: no picture lies within the span {span.start:g}-{span.end} s; correct the times")
