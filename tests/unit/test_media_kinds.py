"""Kinds of sound and pictures that people have, and what only looks like them."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from sdumc.data.media import probe, read_frames, read_sound
from sdumc.data.tables import MediaSpan
from sdumc.errors import UserError

RATE = 16000


def tone(seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def fmt(kind: int = 1, bits: int = 16, rate: int = RATE, size: int = 0, more: bytes = b"") -> tuple[bytes, bytes]:
    size = size or bits // 8
    return b"fmt ", struct.pack("<HHIIHH", kind, 1, rate, rate * size, size, bits) + more


def wav(*chunks: tuple[bytes, bytes], head: bytes = b"RIFF") -> bytes:
    body = b"WAVE" + b"".join(n + struct.pack("<I", len(d)) + d + b"\0" * (len(d) & 1) for n, d in chunks)
    return head + struct.pack("<I", len(body)) + body


def samples(dtype: str, scale: float, shift: int = 0) -> bytes:
    return (np.round(tone() * scale) if scale > 1 else tone()).astype(dtype).__add__(shift).astype(dtype).tobytes()


PCM = samples("<i2", 32767)
GUID = struct.pack("<HHIH", 22, 24, 4, 1) + b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
SIZES = struct.pack("<IQQQI", 28, len(PCM) + 72, len(PCM), len(PCM) // 2, 0)
WAVS = {
    "chunks in another order": wav(
        (b"LIST", b"INFO"), (b"junk", b"x" * 7), fmt(), (b"cue ", b"\0" * 4), (b"data", PCM)
    ),
    "format behind the data": wav((b"data", PCM), fmt()),
    "24 of 32 bits": wav(
        fmt(0xFFFE, 32, more=GUID), (b"data", (np.round(tone() * 8388607).astype("<i4") * 256).tobytes())
    ),
    "float64": wav(fmt(3, 64), (b"data", samples("<f8", 1))),
    "8 bits": wav(fmt(1, 8), (b"data", samples("i2", 127, 128)[::2])),
    "12 bits": wav(fmt(1, 12, size=2), (b"data", (np.round(tone() * 2047).astype("<i2") * 16).tobytes())),
    "RF64": b"RF64" + b"\xff" * 4 + b"WAVEds64" + SIZES + wav(fmt())[12:] + b"data" + b"\xff" * 4 + PCM,
    "broadcast": wav((b"bext", b"A" * 602), (b"iXML", b"<BWFXML/>"), fmt(), (b"data", PCM)),
    "big-endian": b"RIFX"
    + struct.pack(
        ">I4s4sIHHIIHH4sI", 36 + len(PCM), b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", len(PCM)
    )
    + samples(">i2", 32767),
}


@pytest.mark.parametrize("kind", WAVS)
def test_wav(tmp_path, kind):
    (tmp_path / "x.wav").write_bytes(WAVS[kind])
    sound, notes = read_sound(tmp_path / "x.wav")
    np.testing.assert_allclose(sound, tone(), atol=0.01)
    assert notes == [] and probe(tmp_path / "x.wav").duration == 0.5


def test_flac_from_a_pipe_and_with_a_wrong_checksum(tmp_path):
    soundfile.write(tmp_path / "x.flac", tone(), RATE)
    whole = (tmp_path / "x.flac").read_bytes()
    for name, at, new in (("pipe", 21, bytes([whole[21] & 0xF0, 0, 0, 0, 0])), ("sum", 26, b"\x11" * 16)):
        file = tmp_path / f"{name}.flac"
        file.write_bytes(whole[:at] + new + whole[at + len(new) :])
        np.testing.assert_allclose(read_sound(file)[0], tone(), atol=1e-3)
        assert probe(file).duration == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wav(fmt(rate=8), (b"data", PCM)), "has 8 samples a second"),
        (wav(fmt(3, 32), (b"data", (tone() * 30000).astype("<f4").tobytes())), "holds samples of 15000"),
    ],
)
def test_wav_that_says_something_else_than_it_means(tmp_path, content, message):
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_sound(tmp_path / "x.wav")


PLAY_LISTS = {
    "x.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nsecret.wav\n#EXT-X-ENDLIST\n",
    "x.mp4": "ffconcat version 1.0\nfile secret.wav\n",
    "x.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "x.wav": '<?xml version="1.0"?><MPD type="static"><Period><BaseURL>secret.wav</BaseURL></Period></MPD>',
    "x.xspf": '<?xml version="1.0"?><playlist version="1"><track><location>secret.wav</location></track></playlist>',
}


@pytest.mark.parametrize("name", PLAY_LISTS)
def test_play_lists_open_nothing(tmp_path, name):
    (tmp_path / "secret.wav").write_bytes(WAVS["broadcast"])
    (tmp_path / name).write_text(PLAY_LISTS[name])
    with pytest.raises(UserError, match="a play list"):
        probe(tmp_path / name)


@pytest.mark.parametrize("name", ["notes.txt", "notes.nfo", "raw.sw", "raw.al", "raw.g729"])
def test_what_ffmpeg_would_take_by_its_name_alone(tmp_path, name):
    (tmp_path / name).write_text("I loved this film.\n" * 500)
    with pytest.raises(UserError, match="no media"):
        probe(tmp_path / name)


@pytest.mark.parametrize("name", ["x%d.png", "x*.png"])
def test_a_name_stands_for_no_other_file(tmp_path, name):
    for file in (name, "x1.png", "x2.png"):
        film(tmp_path / file, "apng", "apng", 1, "rgb24")
    (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(UserError):
        probe(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["concat:a.wav", "http:x.wav", "file:a.wav", "pipe:0", "-x.wav", "a\nb.wav", "data:,x", "%d"]
)
def test_names_that_look_like_addresses(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    film(Path(name), "mpeg", "mpeg1video", 25, sound=True)
    assert probe(name).has_audio and len(read_sound(name)[0]) > 0


# -------------------------------------------------------------------------------------------------------- pictures


def film(path: Path, container: str, codec: str, count: int, pixels: str = "yuv420p", sound: bool = False) -> Path:
    with av.open(path.open("w+b"), "w", format=container) as c:
        video = c.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, pixels
        heard = c.add_stream("mp2", rate=RATE, layout="mono") if sound else None
        for i in range(count):
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[:24, :32] = 250  # bright above and left
            picture[24:, :32] = 3 * i % 100
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = i, Fraction(1, 25)
            c.mux(video.encode(frame))
        c.mux(video.encode(None))
        for i in range(count * RATE // 25 // 1152 if heard else 0):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16) + 99, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 1152 * i, Fraction(1, RATE)
            c.mux(heard.encode(frame))
    return path


# (a, b, c, d) of x' = a x + c y, y' = b x + d y, and where the bright quarter is then.
MATRICES = [
    ((1, 0, 0, 1), "above left"),
    ((0, 1, -1, 0), "above right"),
    ((-1, 0, 0, -1), "below right"),
    ((0, -1, 1, 0), "below left"),
    ((-1, 0, 0, 1), "above right"),
    ((1, 0, 0, -1), "below left"),
    ((0, 1, 1, 0), "above left"),
    ((0, -1, -1, 0), "below right"),
    ((0, 0, 0, 0), "above left"),
]


@pytest.mark.parametrize(("matrix", "place"), MATRICES)
def test_pictures_are_turned_and_mirrored_as_the_file_says(tmp_path, matrix, place):
    raw = bytearray(film(tmp_path / "x.mp4", "mp4", "libx264", 3).read_bytes())
    at = raw.index(b"tkhd") + 44
    a, b, c, d = (n * 0x10000 for n in matrix)
    raw[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    (tmp_path / "x.mp4").write_bytes(raw)
    _, picture = next(read_frames(tmp_path / "x.mp4"))
    assert picture.shape[:2] == ((64, 48) if matrix[1] else (48, 64))
    halves = {"above": picture[:20], "below": picture[-20:]}[place.split()[0]]
    assert {"left": halves[:, :20], "right": halves[:, -20:]}[place.split()[1]].mean() > 200


def test_pictures_without_times(tmp_path):
    found = probe(film(tmp_path / "camera.h264", "h264", "libx264", 50))
    assert found.duration == pytest.approx(2, abs=0.1) and found.has_video


@pytest.mark.parametrize("flag", ["comment", "visual_impaired", "dub"])
def test_the_track_that_a_player_plays(tmp_path, flag):
    flags = av.stream.Disposition
    with av.open(str(tmp_path / "x.mkv"), "w") as c:
        tracks = [c.add_stream("pcm_s16le", rate=RATE, layout="mono") for _ in range(2)]
        # PyAV 14 takes integers only.
        tracks[0].disposition, tracks[1].disposition = flags[flag].value, flags.default.value
        for track, level in zip(tracks, (1.0, 0.5), strict=True):
            frame = av.AudioFrame.from_ndarray(
                (tone() * level * 32767).astype(np.int16)[None], format="s16", layout="mono"
            )
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
            c.mux(track.encode(frame))
    assert np.abs(read_sound(tmp_path / "x.mkv")[0]).max() == pytest.approx(0.25, abs=0.01)


def test_segments_of_mxf(tmp_path):
    file = film(tmp_path / "x.mxf", "mxf", "mpeg2video", 300)
    whole = list(read_frames(file, 5))
    for start in (2.0, 7.4, 4.2):
        parts = list(read_frames(MediaSpan(str(file), start, start + 1), 5))
        first = round(start * 5)
        for (_, a), (_, b) in zip(parts, whole[first : first + 5], strict=True):
            np.testing.assert_array_equal(a, b)
