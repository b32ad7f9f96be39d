"""Decoding of sound and pictures: WAV and FLAC by libsndfile, everything else by FFmpeg (PyAV).

Runs in the processes of :mod:`sdumc.data.worker`, because a damaged file can crash FFmpeg. Times are in seconds from
the start of the file's earliest track, so that sound and pictures cut by the same times belong together.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np

from sdumc.data.containers import bytes_missing, is_plain_sound, open_options
from sdumc.data.sound import Mixer, Resampler
from sdumc.data.tables import MediaInfo, MediaSpan, PastEnd
from sdumc.errors import UserError

TOLERANCE = 0.5  # seconds that a track may end before the time its header states, or a segment after the track
LONGEST_SOUND = 12 * 3600  # seconds of sound in one piece: 2.8 GB at 16 kHz
LARGEST_PICTURE = 100e6  # pixels
_GAP = 0.03  # seconds; longer gaps in the sound become silence, shorter ones are rounding of the container's clock
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
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpeg", "mpegts"),
    *("flv", "avi", "aiff", "caf", "mp3", "aac", "amr", "ac3"),
}
_OGG_SEEKABLE = ("opus", "vorbis")
# Seconds decoded before a cut, as a codec's output depends on what came before; more where no key picture is in them.
_PREROLLS = (1.0, 12.0)
_BLOCK = 1 << 16  # samples read from a WAV at once
_AGAIN = "copy or make it again"


def check_file(span: MediaSpan) -> None:
    if not os.path.exists(span.path):
        raise UserError(f"{span}: no such media file (relative paths count from {os.getcwd()}); correct the path")
    if not os.path.isfile(span.path):
        raise UserError(f"{span}: not a file; give the path of a media file")
    if os.path.getsize(span.path) == 0:
        raise UserError(f"{span}: the media file is empty (0 bytes); copy or make it again")
    if not os.access(span.path, os.R_OK):
        raise UserError(f"{span}: no permission to read the media file")


def _past_end(span: MediaSpan, duration: float) -> PastEnd:
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
        self.notes: list[str] = []
        self.open(span)
        if missing := bytes_missing(span.path):
            self.close()
            raise UserError(f"{span}: cut short: {missing} bytes are missing at its end; {_AGAIN}")

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
            raise UserError(
                f"{span}: not a readable media file ({getattr(e, 'strerror', None) or e}); it may be cut short or no "
                f"media at all: {_AGAIN}"
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
        known = [s for s in streams if s.codec_context is not None]
        if not known:
            raise UserError(
                f"{span}: its {kind} track is of a kind that FFmpeg cannot decode ({_tag(streams[0])}); convert it, or "
                f"{_AGAIN} if it is damaged"
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
                        samples = _samples(frame)
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

    def begin(self, kind: str, span: MediaSpan, preroll: float | None = _PREROLLS[0]) -> tuple[Any, bool]:
        """The stream to be read, from a place ``preroll`` seconds before the span's start; and False when that is the
        file's beginning. None: from the beginning."""
        stream = self.track(kind, span)
        target = 0.0 if preroll is None else span.start - preroll
        codec = stream.codec_context.name
        if target > 0 and (self.format in _SEEKABLE or (self.format == "ogg" and codec in _OGG_SEEKABLE)):
            self.fresh = False
            try:
                self.container.seek(int((self.origin + target) / stream.time_base), stream=stream)
                return stream, True
            except av.error.FFmpegError:
                pass
        self.from_start(span)
        return self.track(kind, span), False


def _tag(stream: Any) -> str:
    try:
        return f"tag {stream.codec_tag!r}"
    except (AttributeError, UnicodeDecodeError, ValueError):
        return "no codec"


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
                raise UserError(f"{self.span}: cut short or damaged ({e.strerror}); {_AGAIN}") from None
            except IndexError:  # of PyAV, in its list of tracks
                raise UserError(
                    f"{self.span}: a new track begins in the middle, or it is damaged; convert it, or {_AGAIN}"
                ) from None
            if packet is None:
                return
            read += max(packet.size, 1)
            if read > 2 * size + (1 << 20):
                raise UserError(f"{self.span}: damaged: it would be read again and again; {_AGAIN}")
            if packet.pts is not None:
                at = float(packet.pts * packet.time_base)
                end = at + float((packet.duration or 0) * packet.time_base)
                self.clock.see(packet.stream.index, at - self.file.origin, end - self.file.origin)
                if packet.stream.index == self.stream.index:
                    self.end = max(self.end, end)
            yield packet

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
                f"{stated:.2f} s; {_AGAIN}"
            )
        if self.bad > _MAX_BAD * self.packets:
            raise UserError(
                f"{self.span}: damaged: {self.bad} of {self.packets} {self.stream.type} packets cannot be decoded; "
                f"{_AGAIN}"
            )


# Frames in which a phone sent no sound (3GPP TS 26.101 and 26.201), which FFmpeg's own decoders refuse.
_PAUSES = {"amrnb": (8, 9, 10, 11, 15), "amrwb": (9, 14, 15)}


# ------------------------------------------------------------------------------------------------------------ sound


def _samples(frame: Any) -> np.ndarray:
    """Samples (T, C) float32 of a decoded frame."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, len(frame.layout.channels))
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128.0) / 128.0
    if values.dtype.kind == "i":
        return values.astype(np.float32) / np.float32(2 ** (8 * values.dtype.itemsize - 1))
    return values.astype(np.float32, copy=False)


def _sndfile_blocks(span: MediaSpan, notes: list[str]) -> Iterator[tuple[np.ndarray, int]]:
    import soundfile

    if missing := bytes_missing(span.path):
        raise UserError(f"{span}: cut short: {missing} bytes of sound are missing at the end; {_AGAIN}")
    try:
        with soundfile.SoundFile(os.fsencode(span.path)) as f:
            total, rate = f.frames, f.samplerate
            first = min(round(span.start * rate), total)
            last = total if span.end is None else round(span.end * rate)
            if last > total + TOLERANCE * rate:
                raise _past_end(span, total / rate)
            count = min(last, total) - first
            f.seek(first)
            read = 0
            while read < count:
                block = f.read(min(_BLOCK, count - read), dtype="float32", always_2d=True)
                if not len(block):
                    raise UserError(
                        f"{span}: cut short: {read} samples instead of the {count} its header states; {_AGAIN}"
                    )
                read += len(block)
                yield block, rate
    except soundfile.LibsndfileError as e:
        raise UserError(f"{span}: cannot be read as sound ({e.error_string}); {_AGAIN}") from None


def _av_blocks(span: MediaSpan, notes: list[str]) -> Iterator[tuple[np.ndarray, int]]:
    """Samples (T, C) of exactly the span, with the sample rate."""
    file = opened(span)
    stream, sought = file.begin("audio", span)
    notes += file.notes
    while True:
        decoder = Decoder(span, file, stream, from_start=not sought)
        pieces = _placed(span, file, decoder, sought)
        first = next(pieces)
        if first is not None:
            break
        stream, sought = file.begin("audio", span, None)  # the seek went past the start
    rate = first[1]
    start, end = round(span.start * rate), math.inf if span.end is None else round(span.end * rate)
    position, begun = 0, False
    for piece in _chain(first, pieces):
        samples, _, position = piece
        if not begun and position > start:  # the sound begins after the pictures
            yield from _silence(min(position, end) - start, samples.shape[1], rate)
        begun = True
        at, position = position, position + len(samples)
        part = samples[max(start - at, 0) : max(min(end, position) - at, 0) if end < math.inf else None]
        if len(part):
            yield part, rate
        if position >= end:
            break
        if position - start > LONGEST_SOUND * rate:
            raise UserError(f"{span}: has more than {LONGEST_SOUND // 3600} hours of sound; cut it into parts")
    if end < math.inf and end > position + TOLERANCE * rate:
        raise _past_end(span, position / rate)
    if decoder.bad:
        notes.append(f"{decoder.bad} of {decoder.packets} audio packets are damaged")


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _silence(count: float, channels: int, rate: int) -> Iterator[tuple[np.ndarray, int]]:
    while count > 0:
        part = min(int(count), _BLOCK)
        yield np.zeros((part, channels), np.float32), rate
        count -= part


def _placed(span: MediaSpan, file: MediaFile, decoder: Decoder, sought: bool) -> Iterator[Any]:
    """(samples (T, C), rate, index of the first of them) of each frame and of the silence between frames; None at
    first if a seek went past the span's start."""
    rate = position = 0
    for frame in decoder.frames():
        samples = _samples(frame)
        at = None if frame.pts is None else float(frame.pts * frame.time_base) - file.origin
        if not rate:
            rate = frame.sample_rate
            if sought and (at is None or at > span.start):
                yield None
                return
            position = round((at or 0.0) * rate)
        elif frame.sample_rate != rate:
            raise UserError(
                f"{span}: the sample rate changes from {rate} to {frame.sample_rate} Hz; convert the file to WAV"
            )
        elif at is not None and at * rate - position > _GAP * rate:
            for silence, _ in _silence(round(at * rate) - position, samples.shape[1], rate):
                yield silence, rate, position
                position += len(silence)
        yield samples, rate, position
        position += len(samples)
    if not rate:
        if sought:
            yield None
        else:
            raise UserError(f"{span}: its audio track has no samples; replace the file or leave the utterance out")


def read_sound(span: MediaSpan, rate: int, put: Callable[[np.ndarray], None], again: Callable[[], None]) -> list[str]:
    """Sound of a span as one channel at ``rate`` Hz, in blocks (T,) float32 to ``put``.

    ``again`` is called when the sound comes once more from its beginning, with other weights of its channels.

    Returns:
        Notes of what was unusual.
    """
    check_file(span)
    blocks = _sndfile_blocks if is_plain_sound(span.path) else _av_blocks
    weights: np.ndarray | None = None
    notes: list[str] = []
    while True:
        mixer = Mixer(weights)
        found: list[str] = []
        converter, count = None, 0
        for block, source in blocks(span, found):
            mono = mixer(block)
            if not np.isfinite(mono).all():
                raise UserError(f"{span}: holds NaN or infinite samples; make the file again")
            converter = converter or Resampler(source, rate)
            count += len(mono)
            for part in converter.push(mono):
                put(part)
        if converter is None or not count:
            raise UserError(f"{span}: has no samples; replace the file or leave the utterance out")
        better = mixer.better() if weights is None else None
        if better is None:
            for part in converter.finish():
                put(part)
            return found + notes
        weights, note = better
        notes = [note]
        again()


# --------------------------------------------------------------------------------------------------------- pictures


def _picture(span: MediaSpan, frame: Any) -> np.ndarray:
    """RGB uint8 (H, W, 3), turned upright as the file asks for (phones store pictures sideways)."""
    if frame.width * frame.height > LARGEST_PICTURE:
        raise UserError(f"{span}: a picture of {frame.width} x {frame.height} pixels is too large; convert the file")
    picture = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def read_pictures(span: MediaSpan, fps: float | None, notes: list[str]) -> Iterator[tuple[float, np.ndarray]]:
    """Pictures as (time from the span's start, RGB): :func:`sdumc.data.media.read_frames`."""
    check_file(span)
    if is_plain_sound(span.path):
        raise UserError(f"{span}: has no video track; give a file with pictures")
    file = opened(span)
    for preroll in (*_PREROLLS, None):
        stream, sought = file.begin("video", span, preroll)
        decoder = Decoder(span, file, stream, from_start=not sought)
        frames = decoder.frames()
        if sought:  # what comes before a key picture is not whole
            frames = itertools.dropwhile(lambda f: not f.key_frame, frames)
        first = next(frames, None)
        if not sought or (first is not None and (first.pts is None or _time(first, file) <= span.start)):
            break  # otherwise the seek went past the start
    if first is None:
        raise UserError(f"{span}: no picture can be decoded; {_AGAIN}")
    nominal = float(1 / (stream.average_rate or stream.guessed_rate or 25))
    timed = _timed(_chain(first, frames), file, nominal)
    yield from _shown(span, timed, nominal) if fps is None else _sampled(span, timed, nominal, fps)
    if decoder.bad:
        notes.append(f"{decoder.bad} of {decoder.packets} video packets are damaged")


def _time(frame: Any, file: MediaFile) -> float:
    return float(frame.pts * frame.time_base) - file.origin


def _timed(frames: Iterator[Any], file: MediaFile, nominal: float) -> Iterator[tuple[float, Any]]:
    for number, frame in enumerate(frames):
        yield number * nominal if frame.pts is None else _time(frame, file), frame


_SLACK = 1e-4  # seconds; container clocks are coarser than fractions of a second in floating point


def _no_picture(span: MediaSpan) -> UserError:
    return UserError(f"{span}: no picture lies within the span {span.start:g}-{span.end} s; correct the times")


def _shown(span: MediaSpan, frames: Iterator[tuple[float, Any]], nominal: float) -> Iterator[tuple[float, np.ndarray]]:
    """Every picture of the span."""
    wanted = math.inf if span.end is None else span.end
    at, count = 0.0, 0
    for at, frame in frames:
        if at >= wanted - _SLACK:
            break
        if at >= span.start - _SLACK:
            yield max(at - span.start, 0.0), _picture(span, frame)
            count += 1
    else:
        if span.end is not None and at + nominal < wanted - TOLERANCE:
            raise _past_end(span, at + nominal)
    if not count:
        raise _no_picture(span)


def _sampled(
    span: MediaSpan, frames: Iterator[tuple[float, Any]], nominal: float, fps: float
) -> Iterator[tuple[float, np.ndarray]]:
    """The picture that is shown at each of the times; before the first one, that one."""
    wanted = math.inf if span.end is None else span.end - span.start
    shown: Any = None
    shown_from, count = 0.0, 0
    for at, frame in _and_the_end(frames):
        place = shown_from + nominal if at is None else at - span.start
        if at is None and span.end is not None and place < wanted - TOLERANCE:
            raise _past_end(span, place + span.start)
        picture = None
        while count / fps < min(place, wanted) - _SLACK:
            if picture is None:
                picture = _picture(span, shown if shown is not None else frame)
            yield count / fps, picture
            count += 1
        if place >= wanted - _SLACK:
            break
        shown, shown_from = frame, place
    if not count:
        raise _no_picture(span)


def _and_the_end(frames: Iterator[tuple[float, Any]]) -> Iterator[tuple[float | None, Any]]:
    yield from frames
    yield None, None


# ---------------------------------------------------------------------------------------------------------- checks


def probe(span: MediaSpan) -> MediaInfo:
    """What a media file states about itself: :func:`sdumc.data.media.probe`."""
    check_file(span)
    if is_plain_sound(span.path):
        import soundfile

        try:
            info = soundfile.info(os.fsencode(span.path))
        except soundfile.LibsndfileError as e:
            raise UserError(f"{span}: cannot be read as sound ({e.error_string}); {_AGAIN}") from None
        return MediaInfo(info.frames / info.samplerate, has_audio=True, has_video=False)
    file = opened(span)
    duration = file.container.duration / av.time_base if file.container.duration else 0.0
    tracks = file.tracks()
    if not duration and tracks:  # e.g. a browser's recording: found from the packets
        decoder = Decoder(span, file, file.from_start(span)[0], from_start=True)
        for _ in decoder.packets_of_all():
            pass
        duration = max(decoder.clock.until.values())
    return MediaInfo(duration, has_audio=file.has("audio"), has_video=file.has("video"))


def describe(span: MediaSpan, most_seconds: float) -> dict[str, Any]:
    """What a file is made of: the values of :class:`sdumc.data.media.Contents`."""
    check_file(span)
    file = MediaFile(span)
    try:
        coded = [(s.type, s.codec_context) for s in file.tracks()]
        codecs: dict[str, list] = {"audio": [], "video": []}
        for kind, context in coded:
            codecs[kind].append(
                ["", ""] if context is None else [context.name, getattr(context, "pix_fmt", None) or ""]
            )
        first, last = math.inf, -math.inf
        for packet in file.container.demux() if most_seconds else ():
            if packet.pts is not None and packet.time_base is not None:
                at = float(packet.pts * packet.time_base)
                first, last = min(first, at), max(last, at + float((packet.duration or 0) * packet.time_base))
            if last - first > most_seconds:
                break
        return {"format": file.format, **codecs, "seconds": max(last - first, 0.0)}
    except (av.error.FFmpegError, IndexError) as e:
        raise UserError(f"{span}: cut short or damaged ({getattr(e, 'strerror', None) or e}); {_AGAIN}") from None
    finally:
        file.close()


def check(span: MediaSpan, audio: bool, video: bool) -> MediaInfo:
    """Check a whole file: :func:`sdumc.data.media.check_media_file`."""
    info = probe(span)
    if audio and not info.has_audio:
        raise UserError(f"{span}: has no audio track; give a file with sound")
    if video and not info.has_video:
        raise UserError(f"{span}: has no video track; give a file with pictures")
    if is_plain_sound(span.path):
        if not sum(len(block) for block, _ in _sndfile_blocks(span, [])):
            raise UserError(f"{span}: has no samples; replace the file or leave the utterance out")
        return info
    file = opened(span)
    chosen = [file.track(kind, span).index for kind, on in (("audio", audio), ("video", video)) if on]
    wanted = [s for s in file.from_start(span) if s.index in chosen]
    if not wanted:
        return info
    decoders = {stream.index: Decoder(span, file, stream, True) for stream in wanted}
    decoded: set[int] = set()
    first = decoders[wanted[0].index]
    first.clock.wanted = set(decoders)
    for packet in first.packets_of_all():
        decoder = decoders.get(packet.stream.index)
        if decoder is None:
            continue
        if packet.pts is not None:
            decoder.end = max(decoder.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index not in decoded:
            try:
                if packet.decode():
                    decoded.add(packet.stream.index)
            except av.error.FFmpegError:
                pass
    for stream in wanted:
        decoders[stream.index].check_complete()
        if stream.index not in decoded:
            raise UserError(f"{span}: nothing of its {stream.type} can be decoded; {_AGAIN}")
    return info
