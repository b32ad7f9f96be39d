"""Writing clips with sound and pictures, as the synthetic corpus and the tests need them."""

from __future__ import annotations

import os
import tempfile
import wave
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from sdumc.errors import UserError


def write_sound(path: Path, audio: np.ndarray, rate: int) -> None:
    """Write float32 (T,) in [-1, 1] as a WAV file of 16 bits."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())


def write_clip(
    path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float, audio: np.ndarray, rate: int, crf: int = 20
) -> None:
    """Write an MP4 that browsers play (H.264 yuv420p, AAC), atomically and with the same bytes every time.

    Args:
        path: the file to write.
        frames: RGB uint8 (H, W, 3) pictures, H and W even.
        fps: pictures a second.
        audio: float32 (T,) in [-1, 1].
        rate: samples a second; one that AAC knows, such as 16000.
        crf: H.264 quality; lower is better and larger.

    Raises:
        UserError: there are no frames or no samples, or the sizes or rates cannot be encoded.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = np.clip(np.asarray(audio, dtype=np.float32), -1.0, 1.0)
    if audio.ndim != 1 or not len(audio):
        raise UserError(f"{path}: the sound to write must be one channel with at least one sample")
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(fd)
    try:
        _encode(temporary, path, frames, fps, audio, rate, crf)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except av.error.FFmpegError as e:
        raise UserError(f"{path}: cannot be encoded ({e.strerror}); check picture size and sample rate") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def _encode(temporary, path, frames, fps, audio, rate, crf) -> None:
    # One thread and no version strings or dates: the bytes depend on pictures and sound only.
    with av.open(temporary, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video_stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        video_stream.pix_fmt = "yuv420p"
        # No look-ahead: x264's vector code for it gave different bytes for about one clip in thirty.
        lookahead = "bframes=0:mbtree=0:rc-lookahead=0"
        video_stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": lookahead, "flags": "+bitexact"}
        video_stream.codec_context.thread_count = 1
        audio_stream = container.add_stream("aac", rate=rate, layout="mono")
        audio_stream.bit_rate = 64000
        audio_stream.options = {"flags": "+bitexact"}
        sent = count = 0

        def send_audio(until: int) -> None:
            nonlocal sent
            while sent < until:
                piece = np.ascontiguousarray(audio[None, sent : min(sent + 1024, len(audio))])
                frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = rate, sent, Fraction(1, rate)
                container.mux(audio_stream.encode(frame))
                sent += piece.shape[1]

        for picture in frames:
            if (
                picture.dtype != np.uint8
                or picture.ndim != 3
                or picture.shape[2] != 3
                or any(n % 2 for n in picture.shape[:2])
            ):
                raise UserError(f"{path}: pictures must be uint8 (H, W, 3) with even H and W, not {picture.shape}")
            if not count:
                video_stream.height, video_stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = count
            frame.time_base = 1 / video_stream.codec_context.framerate
            container.mux(video_stream.encode(frame))
            count += 1
            send_audio(min(round(count / fps * rate), len(audio)))
        if not count:
            raise UserError(f"{path}: no pictures to write")
        send_audio(len(audio))
        container.mux(video_stream.encode(None))
        container.mux(audio_stream.encode(None))
