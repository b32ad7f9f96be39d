"""Decoding of sound and pictures: WAV and FLAC by libsndfile, everything else by FFmpeg (PyAV).

Runs in the processes of :mod:`sdumc.data.worker`, because a damaged file can crash FFmpeg. Times are in seconds from
the start of the file's earliest track, so that sound and pictures cut by the same times belong together.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np

from sdumc.data.containers import bytes_missing, is_plain_sound
from sdumc.data.sound import Mixer, Resampler
from sdumc.data.streams import AGAIN, PREROLLS, TOLERANCE, Decoder, MediaFile, check_file, opened, past_end, samples_of
from sdumc.data.tables import MediaInfo, MediaSpan
from sdumc.errors import UserError

LONGEST_SOUND = 12 * 3600  # seconds of sound in one piece: 2.8 GB at 16 kHz
LARGEST_PICTURE = 100e6  # pixels
LOUDEST = 100.0  # of full scale; what mixers write above 1 is far below that
LOWEST_RATE = 1000  # samples a second
_GAP = 0.03  # seconds; longer gaps in the sound become silence, shorter ones are rounding of the container's clock
_BLOCK = 1 << 16  # samples read from a WAV at once


# ------------------------------------------------------------------------------------------------------------ sound


def _sndfile_blocks(span: MediaSpan, notes: list[str]) -> Iterator[tuple[np.ndarray, int]]:
    import soundfile

    if missing := bytes_missing(span.path):
        raise UserError(f"{span}: cut short: {missing} bytes of sound are missing at the end; {AGAIN}")
    try:
        with soundfile.SoundFile(os.fsencode(span.path)) as f:
            total, rate = f.frames, f.samplerate
            first = min(round(span.start * rate), total)
            last = total if span.end is None else round(span.end * rate)
            if last > total + TOLERANCE * rate:
                raise past_end(span, total / rate)
            count = min(last, total) - first
            f.seek(first)
            read = 0
            while read < count:
                block = f.read(min(_BLOCK, count - read), dtype="float32", always_2d=True)
                if not len(block):
                    raise UserError(
                        f"{span}: cut short: {read} samples instead of the {count} its header states; {AGAIN}"
                    )
                read += len(block)
                yield block, rate
    except soundfile.LibsndfileError as e:
        raise UserError(f"{span}: cannot be read as sound ({e.error_string}); {AGAIN}") from None


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
        raise past_end(span, position / rate)
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
        samples = samples_of(frame)
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
            if np.abs(mono).max(initial=0.0) > LOUDEST:
                raise UserError(
                    f"{span}: holds samples of {np.abs(mono).max():.0f}, where full scale is 1: integers written as "
                    "floating point, perhaps; divide them by 32768, or write them as 16-bit integers"
                )
            if source < LOWEST_RATE:
                raise UserError(f"{span}: has {source} samples a second, too few for speech; make the file again")
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
    return _upright(frame.to_ndarray(format="rgb24"), frame)


def _upright(picture: np.ndarray, frame: Any) -> np.ndarray:
    """A picture (H, W, 3) turned, and mirrored, by its matrix: x' = a x + c y, y' = b x + d y."""
    try:
        matrices = [bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    except ValueError:  # PyAV does not know one of the picture's data; its rotation leaves mirrors out
        turns = round(getattr(frame, "rotation", 0) / 90) % 4
        return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture
    if not matrices:
        return picture
    a, b, _, c, d = np.frombuffer(matrices[0], np.int32)[:5].astype(int)
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def read_pictures(span: MediaSpan, fps: float | None, notes: list[str]) -> Iterator[tuple[float, np.ndarray]]:
    """Pictures as (time from the span's start, RGB): :func:`sdumc.data.media.read_frames`."""
    check_file(span)
    if is_plain_sound(span.path):
        raise UserError(f"{span}: has no video track; give a file with pictures")
    file = opened(span)
    for preroll in (*PREROLLS, None):
        stream, sought = file.begin("video", span, preroll)
        decoder = Decoder(span, file, stream, from_start=not sought)
        frames = decoder.frames()
        if sought:  # what comes before a key picture is not whole
            frames = itertools.dropwhile(lambda f: not f.key_frame, frames)
        first = next(frames, None)
        if not sought or (first is not None and (first.pts is None or _time(first, file) <= span.start)):
            break  # otherwise the seek went past the start
    if first is None:
        raise UserError(f"{span}: no picture can be decoded; {AGAIN}")
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
            raise past_end(span, at + nominal)
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
            raise past_end(span, place + span.start)
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
            raise UserError(f"{span}: cannot be read as sound ({e.error_string}); {AGAIN}") from None
        return MediaInfo(info.frames / info.samplerate, has_audio=True, has_video=False)
    file = opened(span)
    duration = file.container.duration / av.time_base if file.container.duration else 0.0
    tracks = file.tracks()
    if not duration and tracks:  # e.g. a browser's recording: found from the packets
        decoder = Decoder(span, file, file.from_start(span)[0], from_start=True)
        packets = 0
        for packet in decoder.packets_of_all():
            packets += packet.size > 0
        duration = max(decoder.clock.until.values())
        if not duration and tracks[0].type == "video":  # pictures without times, as cameras write them
            duration = packets / float(tracks[0].guessed_rate or 25)
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
        raise UserError(f"{span}: cut short or damaged ({getattr(e, 'strerror', None) or e}); {AGAIN}") from None
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
            raise UserError(f"{span}: nothing of its {stream.type} can be decoded; {AGAIN}")
    return info
