"""Sound and pictures: exact cuts, damaged files, clips with the same bytes every time."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from mini.clips import write_clip
from sdumc.data.media import check_media_file, probe, read_audio, read_frames
from sdumc.data.sound import resample
from sdumc.data.tables import MediaSpan
from sdumc.errors import UserError

RATE = 16000


def sound(seconds: float, rate: int = RATE) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 440 * t) * (np.sin(2 * np.pi * 2 * t) > 0)).astype(np.float32)


def pictures(count: int, height: int = 32, width: int = 48):
    for k in range(count):
        picture = np.full((height, width, 3), 30, np.uint8)
        picture[..., 0] = 3 * k
        yield picture


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "a:b c.mp4"  # a colon must not be taken for a protocol
    write_clip(path, pictures(75), 25, sound(3), RATE)
    return path


def remux(source: Path, target: Path, container_format: str, **options: str) -> Path:
    with av.open("file:" + str(source)) as i, av.open(str(target), "w", format=container_format, options=options) as o:
        streams = {s.index: o.add_stream_from_template(s) for s in i.streams}
        for packet in i.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                o.mux(packet)
    return target


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


# ----------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_wav_and_flac(tmp_path, suffix):
    x = sound(1.0)
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, x, RATE, subtype="PCM_16")
    y = read_audio(path)
    assert y.dtype == np.float32 and y.shape == x.shape and y.flags.writeable
    np.testing.assert_allclose(y, x, atol=1e-4)
    np.testing.assert_array_equal(read_audio(MediaSpan(str(path), 0.25, 0.75)), y[4000:12000])
    np.testing.assert_array_equal(read_audio(MediaSpan(str(path), 0.25)), y[4000:])


def test_two_channels_are_averaged(tmp_path):
    x = sound(0.5)
    soundfile.write(tmp_path / "x.wav", np.stack([x, np.zeros_like(x)], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "x.wav"), x / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    t = np.arange(rate) / rate
    soundfile.write(tmp_path / "x.wav", 0.5 * np.sin(2 * np.pi * 440 * t), rate)
    y = read_audio(tmp_path / "x.wav")
    assert abs(len(y) - RATE) <= 1 and y.dtype == np.float32
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(y[500:-500], expected[500 : len(y) - 500], atol=5e-3)


def test_resample_removes_what_would_alias():
    t = np.arange(48000) / 48000
    assert abs(resample(np.sin(2 * np.pi * 12000 * t).astype(np.float32), 48000, 16000)[200:-200]).max() < 0.01


def test_audio_of_a_clip_is_in_time(clip):
    y, x = read_audio(clip), sound(3)
    assert 0 <= len(y) - len(x) < 2048  # AAC works in blocks of 1024
    lags = range(-50, 51)
    scores = [float(np.dot(y[4000 + lag : 40000 + lag], x[4000:40000])) for lag in lags]
    assert lags[int(np.argmax(scores))] == 0


@pytest.mark.parametrize("container_format", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.3, 0.7), (1.55, 2.2), (2.9, 3.0)])
def test_spans_equal_the_whole_cut(clip, tmp_path, container_format, start, end):
    path = remux(clip, tmp_path / "x", container_format)
    whole = read_audio(path)
    part = read_audio(MediaSpan(str(path), start, end))
    assert len(part) == round(end * RATE) - round(start * RATE)
    np.testing.assert_allclose(part, whole[round(start * RATE) : round(end * RATE)], atol=1e-4)


def test_integer_and_packed_sample_formats(tmp_path):
    """Formats that FFmpeg decodes to packed integers, two channels."""
    x = np.stack([sound(0.5), -0.5 * sound(0.5)], axis=1)
    for subtype, tolerance in (("PCM_16", 1e-4), ("PCM_32", 1e-6), ("PCM_U8", 1e-2)):
        soundfile.write(tmp_path / "x.wav", x, RATE, subtype=subtype)
        path = remux(tmp_path / "x.wav", tmp_path / "x.mkv", "matroska")
        np.testing.assert_allclose(read_audio(path), x.mean(axis=1), atol=tolerance)


# -------------------------------------------------------------------------------------------------------- pictures


def level(picture: np.ndarray) -> int:
    return round(picture[..., 0].mean() / 3)


def test_every_frame_with_its_time(clip):
    frames = list(read_frames(clip))
    assert len(frames) == 75
    np.testing.assert_allclose([t for t, _ in frames], np.arange(75) / 25, atol=1e-6)
    assert frames[0][1].shape == (32, 48, 3) and frames[0][1].dtype == np.uint8
    assert max(abs(level(p) - k) for k, (_, p) in enumerate(frames)) <= 1


@pytest.mark.parametrize("fps", [5, 10, 12.5, 25, 30])
def test_frames_by_time_stamp(clip, fps):
    frames = list(read_frames(clip, fps))
    assert len(frames) == 3 * fps if fps != 12.5 else 38
    for k, (t, picture) in enumerate(frames):
        assert t == pytest.approx(k / fps)
        assert abs(level(picture) - int(t * 25 + 1e-6)) <= 1


@pytest.mark.parametrize("start", [0.4, 1.0, 2.2])
def test_frames_of_a_span(clip, start):
    frames = list(read_frames(MediaSpan(str(clip), start, start + 0.6), 5))
    assert [round(t, 6) for t, _ in frames] == [0.0, 0.2, 0.4]
    assert all(abs(level(p) - 25 * (start + t)) <= 1.5 for t, p in frames)
    native = list(read_frames(MediaSpan(str(clip), start, start + 0.6)))
    assert len(native) == 15 and native[0][0] == pytest.approx(0, abs=1e-6)


def test_rotated_phone_video_is_turned_upright(tmp_path):
    def halves(count):
        for _ in range(count):
            picture = np.zeros((32, 48, 3), np.uint8)
            picture[:16] = 255  # bright above
            yield picture

    write_clip(tmp_path / "x.mp4", halves(10), 25, sound(0.4), RATE)
    raw = bytearray((tmp_path / "x.mp4").read_bytes())
    # The display matrix is the 9 int32 at byte 48 of the first track header (ISO 14496-12); this one turns clockwise.
    at = raw.index(b"tkhd") - 4 + 48
    one = 0x10000
    raw[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 0x40000000)
    (tmp_path / "x.mp4").write_bytes(raw)
    _, picture = next(read_frames(tmp_path / "x.mp4"))
    assert picture.shape == (48, 32, 3)
    assert picture[:, 20:].mean() > 200 > 50 > picture[:, :12].mean()  # what was above is now on the right


# -------------------------------------------------------------------------------------------------------- bad files


def readers(path: Path):
    return [
        lambda: read_audio(path),
        lambda: list(read_frames(path)),
        lambda: list(read_frames(path, 5)),
        lambda: check_media_file(path, audio=True, video=True),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, clip: None, "no such media file"),
        (lambda p, clip: p.mkdir(), "not a file"),
        (lambda p, clip: p.write_bytes(b""), "0 bytes"),
        (lambda p, clip: p.write_bytes(bytes(range(256)) * 20), "not a readable media file"),
        (lambda p, clip: p.write_text("hello world\n" * 50), "not a readable media file|no (audio|video) track"),
        (lambda p, clip: cut(remux(clip, p, "mp4"), 0.6), "not a readable media file"),
        (lambda p, clip: cut(remux(clip, p, "mp4", movflags="faststart"), 0.6), "cut short"),
        (lambda p, clip: cut(remux(clip, p, "matroska"), 0.6), "cut short"),
        (lambda p, clip: cut(remux(clip, p, "mpegts"), 0.601), "cut short"),
    ],
)
def test_damaged_files(tmp_path, clip, make, message):
    path = tmp_path / "x.mp4"
    make(path, clip)
    for read in readers(path):
        with pytest.raises(UserError, match=message) as error:
            read()
        assert str(path) in str(error.value)


def test_errors_name_the_utterance(tmp_path):
    with pytest.raises(UserError, match=r"none.wav: utterance 'u_1': no such media file"):
        read_audio(MediaSpan(str(tmp_path / "none.wav"), utterance="u_1"))


@pytest.mark.parametrize(("suffix", "share"), [("wav", 0.5), ("flac", 0.5), ("wav", 0.999)])
def test_truncated_wav_and_flac(tmp_path, suffix, share):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    cut(path, share)
    for read in (read_audio, check_media_file):
        with pytest.raises(UserError, match=r"cut short|cannot be read as sound"):
            read(path)


def test_wav_without_samples(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(0), RATE)
    for read in (read_audio, check_media_file):
        with pytest.raises(UserError, match="no samples"):
            read(tmp_path / "x.wav")


def test_wav_header_alone(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"RIFF\x24\0\0\0WAVE")
    with pytest.raises(UserError, match=r"x\.wav: cannot be read as sound"):
        read_audio(tmp_path / "x.wav")


def test_wav_from_a_pipe_states_no_length(tmp_path):
    soundfile.write(tmp_path / "x.wav", sound(0.5), RATE)
    raw = bytearray((tmp_path / "x.wav").read_bytes())
    at = raw.index(b"data") + 4
    raw[at : at + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "x.wav").write_bytes(raw)
    assert len(read_audio(tmp_path / "x.wav")) == RATE // 2


def test_wav_with_nan(tmp_path):
    x = sound(0.5)
    x[100] = np.nan
    soundfile.write(tmp_path / "x.wav", x, RATE, subtype="FLOAT")
    with pytest.raises(UserError, match="NaN"):
        read_audio(tmp_path / "x.wav")


def test_missing_tracks(tmp_path, clip):
    soundfile.write(tmp_path / "x.wav", sound(0.5), RATE)
    with pytest.raises(UserError, match="no video track"):
        list(read_frames(tmp_path / "x.wav"))
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert not probe(tmp_path / "mute.mp4").has_audio
    for read in (read_audio, check_media_file):
        with pytest.raises(UserError, match="no audio track"):
            read(tmp_path / "mute.mp4")
    assert len(list(read_frames(tmp_path / "mute.mp4"))) == 10


def test_spans_past_the_end(tmp_path, clip):
    soundfile.write(tmp_path / "x.wav", sound(1), RATE)
    for path in (tmp_path / "x.wav", clip):
        with pytest.raises(UserError, match="past the end of the file"):
            read_audio(MediaSpan(str(path), 0.5, 9.0))
    with pytest.raises(UserError, match="past the end of the file"):
        list(read_frames(MediaSpan(str(clip), 0.5, 9.0), 5))
    # A label that ends a little late is no error.
    assert len(read_audio(MediaSpan(str(tmp_path / "x.wav"), 0.5, 1.2))) == RATE // 2


# ---------------------------------------------------------------------------------------------------------- writing


def test_clips_have_the_same_bytes_every_time(tmp_path):
    rng = np.random.default_rng(1)
    noise = [rng.integers(0, 255, (48, 48, 3)).astype(np.uint8) for _ in range(30)]
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, iter(noise), 25, sound(1.2), RATE)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]


def test_probe(clip):
    info = probe(clip)
    assert info.has_audio and info.has_video and info.duration == pytest.approx(3, abs=0.1)
    with av.open("file:" + str(clip)) as container:
        assert {s.codec_context.name for s in container.streams} == {"h264", "aac"}
        assert container.streams.video[0].pix_fmt == "yuv420p"


@pytest.mark.parametrize(
    ("frames", "audio", "message"),
    [
        ([], sound(1), "no pictures"),
        ([np.zeros((31, 32, 3), np.uint8)], sound(1), "even H and W"),
        ([np.zeros((32, 32), np.uint8)], sound(1), "even H and W"),
        ([np.zeros((32, 32, 3), np.uint8)], np.zeros(0), "at least one sample"),
    ],
)
def test_write_clip_refuses(tmp_path, frames, audio, message):
    with pytest.raises(UserError, match=message):
        write_clip(tmp_path / "x.mp4", frames, 25, audio, RATE)
    assert os.listdir(tmp_path) == []


def test_a_real_recording(media_dir, tmp_path):
    recording = media_dir / "bbaf2n.mpg"  # of the GRID corpus
    info = check_media_file(recording, audio=True, video=True)
    assert info.has_audio and info.has_video
    audio = read_audio(recording, 44100)
    assert len(audio) / 44100 == pytest.approx(2.978, abs=0.01) and audio.std() > 0.005
    part = read_audio(MediaSpan(str(recording), 1.5, 2.2), 44100)
    np.testing.assert_allclose(part, audio[round(1.5 * 44100) : round(2.2 * 44100)], atol=1e-3)
    assert len(list(read_frames(recording, 10))) == 30
    (tmp_path / "x.mpg").write_bytes(recording.read_bytes()[:200001])
    for read in readers(tmp_path / "x.mpg"):
        with pytest.raises(UserError, match="cut short"):
            read()
