"""Media as people really have them: other codecs and tracks, cut and damaged files, decoders that crash or hang."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from helpers.stopping import wait_until

from sdumc.data import decoding, streams, worker
from sdumc.data.containers import bytes_missing
from sdumc.data.media import check_media_file, probe, read_audio, read_frames, read_sound
from sdumc.data.sound import resample
from sdumc.data.tables import MediaSpan, PastEnd
from sdumc.errors import UserError
from sdumc.files import shown

RATE = 16000
RATES = {"libopus": 48000, "ac3": 48000, "libopencore_amrnb": 8000, "g726": 8000}  # of codecs that do not know 16 kHz


def voice(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Sound of which no two parts are the same: (T,) float32."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, len(t))
    return (0.3 * np.sin(2 * np.pi * (200 * t + 40 * np.sin(3 * t))) + noise).astype(np.float32)


def write(
    path: Path,
    container: str,
    sounds: list[tuple[str, np.ndarray, str, float]] = (),
    pictures: int = 0,
    options: dict[str, str] | None = None,
    **settings: str,
) -> Path:
    """A media file: ``sounds`` as (codec, samples (C, T), layout, start in seconds), 10 pictures a second."""
    with av.open(str(path), "w", format=container, options=settings) as c:
        streams = []
        if pictures:
            video = c.add_stream({"flv": "flv", "mov": "mjpeg"}.get(container, "mpeg4"), rate=10)
            video.width, video.height, video.pix_fmt = 64, 48, "yuvj420p" if container == "mov" else "yuv420p"
        for codec, samples, layout, start in sounds:
            rate = RATES.get(codec, RATE)
            stream = c.add_stream(codec, rate=rate, layout=layout, options=dict(options or {}))
            if codec in ("wmav2", "g726"):
                stream.bit_rate = 32000
            streams.append((stream, samples, start))
        packets = []
        for i in range(pictures):
            picture = np.full((48, 64, 3), 20 + 2 * (i % 100), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            packets += video.encode(frame)
        if pictures:
            packets += video.encode(None)
        for stream, samples, start in streams:
            packets += encoded(stream, samples, start)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            c.mux(packet)
    return path


def encoded(stream: av.AudioStream, samples: np.ndarray, start: float) -> list[av.Packet]:
    context, packets = stream.codec_context, []
    feeder = av.AudioResampler(context.format, context.layout, context.rate, context.frame_size or 1024)
    for first in range(0, samples.shape[1], RATE):
        part = np.ascontiguousarray(samples[:, first : first + RATE])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=stream.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = RATE, first + round(start * RATE), Fraction(1, RATE)
        for ready in feeder.resample(frame):
            packets += stream.encode(ready)
    for ready in feeder.resample(None):
        packets += stream.encode(ready)
    return packets + stream.encode(None)


def mono(codec: str, seconds: float, start: float = 0.0, seed: int = 0) -> tuple[str, np.ndarray, str, float]:
    return codec, voice(seconds, seed=seed)[None], "mono", start


# -------------------------------------------------------------------------------------------------- sound of any kind


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two recordings at the best of some shifts."""
    n = min(len(a), len(b)) - 4000
    return max(float(np.corrcoef(a[2000 + k : 2000 + k + n - 2000], b[2000:n])[0, 1]) for k in range(0, 1900, 1))


def test_channels_that_cancel_each_other(tmp_path):
    x = voice(1.0)
    soundfile.write(tmp_path / "x.flac", np.stack([x, -x], axis=1), RATE)
    write(tmp_path / "x.m4a", "ipod", [("aac", np.stack([x, -x]), "stereo", 0.0)])
    for name in ("x.flac", "x.m4a"):
        samples, notes = read_sound(tmp_path / name)
        assert samples.std() > 0.8 * x.std()
        assert "cancel each other" in notes[0]
    np.testing.assert_allclose(read_audio(tmp_path / "x.flac"), x, atol=1e-4)


def test_a_voice_in_one_channel_of_six(tmp_path):
    x = voice(1.0)
    six = np.zeros((RATE, 6), np.float32)
    six[:, 2] = x  # the centre
    soundfile.write(tmp_path / "x.wav", six, RATE, subtype="FLOAT")
    write(tmp_path / "x.mka", "matroska", [("ac3", six.T, "5.1(side)", 0.0)])
    samples, notes = read_sound(tmp_path / "x.wav")
    np.testing.assert_allclose(samples, x, atol=1e-6)
    assert notes == ["of its 6 channels, channel 3 has the sound"]
    assert read_audio(tmp_path / "x.mka").std() > 0.7 * x.std()


def test_channels_that_all_have_sound_are_averaged(tmp_path):
    x, y = voice(1.0), voice(1.0, seed=1)[::-1]
    soundfile.write(tmp_path / "x.wav", np.stack([x, y], axis=1), RATE, subtype="FLOAT")
    samples, notes = read_sound(tmp_path / "x.wav")
    np.testing.assert_allclose(samples, (x + y) / 2, atol=1e-6)
    assert notes == []


@pytest.mark.parametrize(("first", "second", "used"), [(0.001, 1.0, 2), (0.5, 1.0, 1), (1.0, 0.0, 1)])
def test_the_first_of_several_audio_tracks_unless_it_is_much_quieter(tmp_path, first, second, used):
    a, b = voice(2.0), voice(2.0, seed=1)[::-1].copy()
    tracks = [("pcm_s16le", first * a[None], "mono", 0.0), ("pcm_s16le", second * b[None], "mono", 0.0)]
    path = write(tmp_path / "x.mkv", "matroska", tracks, pictures=20)
    for span in (MediaSpan(str(path)), MediaSpan(str(path), 1.5, 1.9)):
        samples, notes = read_sound(span)
        whole = (first * a, second * b)[used - 1]
        expected = whole if span.end is None else whole[24000:30400]
        np.testing.assert_allclose(samples, expected, atol=1e-3)
        assert bool(notes) == (used == 2)


@pytest.mark.parametrize("codec", ["libmp3lame", "ac3", "adpcm_ms", "pcm_mulaw", "pcm_s24le", "pcm_f64le", "g726"])
def test_any_codec_in_wav(tmp_path, codec):
    write(tmp_path / "x.wav", "wav", [mono(codec, 2.0)])
    samples = read_audio(tmp_path / "x.wav")
    assert len(samples) / RATE == pytest.approx(2.0, abs=0.15)
    assert likeness(samples, voice(2.0)) > 0.9
    assert check_media_file(tmp_path / "x.wav").has_audio


@pytest.mark.parametrize(("codec", "option"), [("libopencore_amrnb", "dtx")])
def test_a_phone_that_sends_nothing_in_pauses(tmp_path, codec, option):
    x = voice(6.0)
    x[1 * RATE : 5 * RATE] = 0
    write(tmp_path / "x.3gp", "3gp", [(codec, x[None], "mono", 0.0)], options={option: "1"})
    write(tmp_path / "x.amr", "amr", [(codec, x[None], "mono", 0.0)], options={option: "1"})
    for name in ("x.3gp", "x.amr"):
        samples = read_audio(tmp_path / name)
        assert len(samples) / RATE == pytest.approx(6.0, abs=0.15)
        assert samples[RATE * 3 // 2 : 4 * RATE].std() < 0.01 < 0.1 < samples[: RATE // 2].std()
        assert samples[round(5.2 * RATE) : round(5.8 * RATE)].std() > 0.1


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        (b"caf\xe9.wav", "caf\\xe9.wav"),
        (b"two\nlines\x1b[31m.wav", "two\\nlines\\x1b[31m.wav"),
        ("gnp.\u202evaw".encode(), "gnp.\\u202evaw"),
        ("Müller 日本 👩\u200d🚀.wav".encode(), "Müller 日本 👩\u200d🚀.wav"),
    ],
)
def test_names_are_shown_on_one_line_and_without_tricks(name, seen):
    assert shown(os.fsdecode(name)) == seen


def test_names_that_are_not_utf8(tmp_path):
    soundfile.write(tmp_path / "x.wav", voice(1.0), RATE)
    write(tmp_path / "x.mp4", "mp4", [mono("aac", 1.0)], pictures=10)
    for source in ("x.wav", "x.mp4"):
        name = os.fsdecode(b"caf\xe9." + source.encode())
        path = tmp_path / name
        (tmp_path / source).rename(path)
        assert abs(len(read_audio(path)) - RATE) < 2100
        assert check_media_file(path).has_audio
        with pytest.raises(UserError, match=r"caf\\xe9\.") as error:
            read_audio(MediaSpan(str(path), 0.5, 9.0))
        assert str(error.value).encode()  # can be printed anywhere
    assert len(list(read_frames(path, 5))) == 5


@pytest.mark.parametrize("rates", [(48000, 16000), (44100, 16000), (8000, 16000), (12345, 16000), (16000, 44100)])
@pytest.mark.parametrize("seconds", [0.0001, 0.5, 33.3])
def test_the_sample_rate_is_changed_as_by_scipy(rates, seconds):
    from scipy.signal import resample_poly

    source, target = rates
    x = np.random.default_rng(0).normal(0, 0.1, max(round(seconds * source), 1)).astype(np.float32)
    common = np.gcd(source, target)
    expected = resample_poly(x, target // common, source // common)
    assert resample(x, source, target).shape == expected.shape
    np.testing.assert_allclose(resample(x, source, target), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- time stamps


def test_sound_that_starts_hours_after_the_pictures(tmp_path):
    path = write(tmp_path / "x.mkv", "matroska", [mono("aac", 2.0, start=3600.0)], pictures=20)
    for read in (read_audio, check_media_file):
        with pytest.raises(UserError, match=r"time stamps jump from \S+ to 3(599|600)\.\d\d s in the audio track"):
            read(path)
    assert len(list(read_frames(path, 5))) == 10


def test_pictures_that_start_hours_after_the_sound(tmp_path):
    path = write(tmp_path / "x.mkv", "matroska", [mono("aac", 2.0)], pictures=20)
    raw = path.read_bytes()
    assert len(raw)
    with av.open(str(path)) as i, av.open(str(tmp_path / "y.mkv"), "w") as o:
        streams = {s.index: o.add_stream_from_template(s) for s in i.streams}
        for packet in i.demux():
            if packet.dts is not None:
                if packet.stream.type == "video":
                    packet.pts += round(3600 / packet.time_base)
                    packet.dts += round(3600 / packet.time_base)
                packet.stream = streams[packet.stream.index]
                o.mux(packet)
    with pytest.raises(UserError, match="time stamps jump"):
        list(read_frames(tmp_path / "y.mkv", 5))
    assert len(read_audio(tmp_path / "y.mkv")) / RATE == pytest.approx(2.0, abs=0.2)


def test_a_jump_of_all_tracks(tmp_path):
    a = write(tmp_path / "a.ts", "mpegts", [mono("aac", 3.0)], pictures=30)
    b = write(tmp_path / "b.ts", "mpegts", [mono("aac", 3.0)], pictures=30, output_ts_offset="7200", mpegts_copyts="1")
    (tmp_path / "x.ts").write_bytes(a.read_bytes() + b.read_bytes())
    for read in (read_audio, check_media_file, lambda p: list(read_frames(p, 5))):
        with pytest.raises(UserError, match="time stamps jump"):
            read(tmp_path / "x.ts")
    assert len(read_audio(MediaSpan(str(tmp_path / "x.ts"), 0.5, 1.5))) == RATE  # before the jump


def test_a_long_pause_of_the_microphone_is_silence(tmp_path):
    """Pictures go on meanwhile: a call in which one was mute for 40 s."""
    sounds = [mono("pcm_s16le", 2.0), mono("pcm_s16le", 2.0)]
    path = write(tmp_path / "x.mkv", "matroska", [sounds[0]], pictures=450)
    with av.open(str(path)) as i, av.open(str(tmp_path / "y.mkv"), "w") as o:
        streams = {s.index: o.add_stream_from_template(s) for s in i.streams}
        for packet in sorted(
            (p for p in i.demux() if p.dts is not None),
            key=lambda p: float(p.dts * p.time_base) + 40 * (p.stream.type == "audio" and p.dts * p.time_base > 1),
        ):
            if packet.stream.type == "audio" and packet.dts * packet.time_base > 1:
                packet.pts += round(40 / packet.time_base)
                packet.dts = packet.pts
            packet.stream = streams[packet.stream.index]
            o.mux(packet)
    samples = read_audio(tmp_path / "y.mkv")
    assert len(samples) / RATE == pytest.approx(42.0, abs=0.1)
    assert samples[5 * RATE : 40 * RATE].std() == 0 < samples[RATE // 2 : RATE].std()


# ---------------------------------------------------------------------------------- segments of one file, any container

CONTAINERS = {
    "wav": ("wav", "adpcm_ms", 0),
    "ima.wav": ("wav", "adpcm_ima_wav", 0),
    "mp3.wav": ("wav", "libmp3lame", 0),
    "nut": ("nut", "aac", 1),
    "mp4": ("mp4", "aac", 1),
    "mkv": ("matroska", "aac", 1),
    "ts": ("mpegts", "aac", 1),
    "mpg": ("mpeg", "mp2", 1),
    "flv": ("flv", "aac", 1),
    "avi": ("avi", "libmp3lame", 1),
    "wmv": ("asf", "wmav2", 1),
    "mp3": ("mp3", "libmp3lame", 0),
    "aac": ("adts", "aac", 0),
    "opus": ("ogg", "libopus", 0),
    "amr": ("amr", "libopencore_amrnb", 0),
    "ac3": ("ac3", "ac3", 0),
    "aiff": ("aiff", "pcm_s16be", 0),
    "caf": ("caf", "pcm_s16le", 0),
    "au": ("au", "pcm_s16be", 0),
    "w64": ("w64", "pcm_s16le", 0),
    "wv": ("wv", "wavpack", 0),
    "tta": ("tta", "tta", 0),
    "oga": ("ogg", "flac", 0),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of twelve seconds in each container."""
    folder = tmp_path_factory.mktemp("containers")
    return {
        name: write(folder / f"x.{name}", container, [mono(codec, 12.0)], pictures=120 * pictures)
        for name, (container, codec, pictures) in CONTAINERS.items()
    }


@pytest.mark.parametrize("name", CONTAINERS)
def test_segments_in_any_order_equal_the_whole_cut(files, name):
    path = files[name]
    whole = read_audio(path, 8000 if name == "amr" else RATE)
    rate = 8000 if name == "amr" else RATE
    assert len(whole) / rate == pytest.approx(12.0, abs=0.2)
    for start, end in [(7.3, 8.1), (0.2, 0.9), (3.33, 5.0), (10.5, 11.25), (1.2, 1.7), (9.0, 9.05)]:
        part = read_audio(MediaSpan(str(path), start, end), rate)
        own = name not in ("opus", "ac3")  # the others are resampled from 48 kHz after the cut
        if own:
            assert len(part) == round(end * rate) - round(start * rate)
        expected = whole[round(start * rate) : round(end * rate)]
        inner = slice(None) if own else slice(200, -200)
        np.testing.assert_allclose(
            part[inner],
            expected[: len(part)][inner],
            atol=0.02 if name in ("ac3", "wmv") else 2e-3,
            err_msg=f"{start}-{end}",
        )


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_segment_is_not_read_from_the_start_of_its_file(files, name, monkeypatch):
    """Nor after the place was found, in which case the file would be begun a second time."""
    begun, begin = [], streams.MediaFile.begin
    monkeypatch.setattr(
        streams.MediaFile, "begin", lambda *args: begun.append(found := begin(*args)) or found, raising=True
    )
    parts: list[np.ndarray] = []
    decoding.read_sound(MediaSpan(str(files[name]), 9.0, 9.5), 8000, parts.append, parts.clear)
    streams.forget()
    # FFmpeg before version 8 finds no packet behind a seek in ADPCM in WAV; it is then read from the beginning.
    lost = name in ("wav", "ima.wav") and av.library_versions["libavformat"] < (62, 0, 0)
    assert [sought for _, sought in begun] == [True, False][: 1 + lost]
    assert sum(map(len, parts)) == 4000


@pytest.mark.parametrize("name", [n for n, c in CONTAINERS.items() if c[2] and n != "mpg"])  # no MPEG-4 there
def test_pictures_of_segments_equal_the_whole_cut(files, name):
    pictures_of_segments(files[name], 120, [(7.3, 8.1), (0.2, 0.9), (10.5, 11.3)])


def test_pictures_of_segments_of_a_recording(media_dir):
    pictures_of_segments(media_dir / "bbaf2n.mpg", 75, [(1.6, 2.0), (0.2, 0.9), (2.5, 2.9)])


def pictures_of_segments(path: Path, count: int, spans: list[tuple[float, float]]) -> None:
    whole = list(read_frames(path))
    assert len(whole) == count
    for start, end in spans:
        part = [p for _, p in read_frames(MediaSpan(str(path), start, end))]
        expected = [p for t, p in whole if start - 1e-4 <= t < end - 1e-4]
        assert len(part) == len(expected)
        np.testing.assert_allclose(np.stack(part), np.stack(expected), atol=2)


# ------------------------------------------------------------------------------------------------- cut, damaged


@pytest.mark.parametrize("share", [0.45, 0.8, 0.9])
@pytest.mark.parametrize(
    "name", [n for n in CONTAINERS if n not in ("aac", "amr", "ac3", "nut")]
)  # these state no length
def test_cut_files_of_every_container_that_states_its_length(files, tmp_path, name, share):
    assert bytes_missing(str(files[name])) == 0
    path = tmp_path / files[name].name
    raw = files[name].read_bytes()
    path.write_bytes(raw[: int(len(raw) * share) | 1])
    for read in (read_audio, check_media_file):
        with pytest.raises(UserError, match=r"cut short|not a readable media file|damaged"):
            read(path)


@pytest.mark.parametrize("subtype", ["RF64", "W64", "AIFF", "CAF", "AU", "WAV"])
def test_cut_files_of_libsndfile(tmp_path, subtype):
    soundfile.write(tmp_path / "x", voice(3.0), RATE, format=subtype, subtype="PCM_16")
    assert len(read_audio(tmp_path / "x")) == 3 * RATE
    raw = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(raw[: len(raw) * 2 // 3])
    with pytest.raises(UserError, match="cut short"):
        read_audio(tmp_path / "x")


def test_tracks_without_a_decoder(tmp_path):
    path = write(tmp_path / "x.mov", "mov", [mono("pcm_s16le", 1.0)], pictures=10)
    raw = path.read_bytes()
    (tmp_path / "sound.mov").write_bytes(raw.replace(b"sowt", b"zzzz"))
    (tmp_path / "picture.mov").write_bytes(raw.replace(b"jpeg", b"zzzz"))
    with pytest.raises(UserError, match="audio track is of a kind that FFmpeg cannot decode"):
        read_audio(tmp_path / "sound.mov")
    assert len(list(read_frames(tmp_path / "sound.mov", 5))) == 5
    with pytest.raises(UserError, match="video track is of a kind that FFmpeg cannot decode"):
        list(read_frames(tmp_path / "picture.mov", 5))
    assert len(read_audio(tmp_path / "picture.mov")) == RATE


def test_sound_that_goes_on_after_the_pictures(tmp_path):
    path = write(tmp_path / "x.mp4", "mp4", [mono("aac", 6.0)], pictures=20)
    with pytest.raises(PastEnd) as error:
        list(read_frames(MediaSpan(str(path), 1.0, 5.0), 5))
    assert error.value.end == pytest.approx(2.0, abs=0.1)
    assert len(read_audio(path)) / RATE == pytest.approx(6.0, abs=0.1)


def test_the_trials(media_dir):
    """Files on which an earlier state failed; where they lie beside the recordings."""
    folder = media_dir.parent / "trials/media"
    if not folder.is_dir():
        pytest.skip("no real recordings: no folder")
    for name in ("antiphase.flac", "antiphase.m4a", "mp3_in.wav", "ac3_in.wav", "g726.wav"):
        samples = read_audio(folder / name)
        assert len(samples) / RATE == pytest.approx(3.0, abs=0.1) and samples.std() > 0.1
    for name, message in {
        "jump_2h.ts": "time stamps jump",
        "jump_25h.ts": "time stamps jump",
        "trunc_tail.avi": "cut short",
        "trunc_rf64.wav": "cut short",
        "segfault_damaged_aac.mp4": "decoder crashed|damaged",
        "no_decoder_audio.3gp": "cannot decode",
    }.items():
        with pytest.raises(UserError, match=message):
            read_audio(folder / name)
    with pytest.raises(UserError, match="cannot decode"):
        list(read_frames(folder / "no_decoder_video.mp4"))
    try:  # earlier versions of PyAV read it
        read_audio(folder / "new_track_in_the_middle.flv")
    except UserError as e:
        assert "a new track begins in the middle" in str(e)


def test_damaged_files_of_twelve_containers(tmp_path):
    """For an hour by hand: ``python tests/fuzz_media.py --minutes 60``."""
    import fuzz_media

    fuzz = fuzz_media.Fuzz(seed=1, folder=tmp_path)
    used = 0
    for number in range(130):
        fuzz.case()
        if number == 40:
            used = fuzz_media.memory()
    assert fuzz.wrong == []
    assert fuzz.counts["read"] > 100 and fuzz.counts["refused"] > 100
    assert fuzz_media.memory() < used + (200 << 20)


# ------------------------------------------------------------------------------------------ processes that decode


@pytest.fixture
def slow(tmp_path, known_processes) -> Path:
    """A file whose sound takes a while."""
    path = tmp_path / "slow.wav"
    soundfile.write(path, np.tile(voice(10.0, 48000), 120), 48000)
    return path


def busy() -> list[worker._Process]:
    return [p for p in processes if p.process.poll() is None and p not in worker._idle]


processes: list[worker._Process] = []


@pytest.fixture
def known_processes(monkeypatch):
    """Every process that a test starts is in ``processes``."""
    begin = worker._Process.__init__
    worker.end_all()
    processes.clear()

    def init(self):
        begin(self)
        processes.append(self)

    monkeypatch.setattr(worker._Process, "__init__", init)
    yield
    worker.end_all()


def reading(path: Path) -> tuple[threading.Thread, list]:
    found: list = []

    def read():
        try:
            found.append(read_audio(path, 8000))
        except UserError as e:
            found.append(e)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, found


def kill_when_busy(number: int, past: set[int]) -> int:
    wait_until(lambda: any(p.process.pid not in past for p in busy()))
    (process,) = [p.process for p in busy() if p.process.pid not in past]
    os.kill(process.pid, number)
    return process.pid


def test_a_crash_is_tried_once_more_and_costs_one_file(slow, tmp_path):
    thread, found = reading(slow)
    kill_when_busy(signal.SIGSEGV, set())
    thread.join()
    assert len(found[0]) == 8000 * 1200 and len(processes) == 2  # whatever it died of, the second one read it
    thread, found = reading(slow)
    wait_until(lambda: bool(busy()))
    first = kill_when_busy(signal.SIGSEGV, set())
    kill_when_busy(signal.SIGBUS, {first})
    thread.join()
    assert isinstance(found[0], UserError) and "its decoder crashed (SIGBUS)" in str(found[0])
    soundfile.write(tmp_path / "good.wav", voice(1.0), RATE)
    assert len(read_audio(tmp_path / "good.wav")) == RATE


def test_a_decoder_that_died_while_it_waited_is_not_the_file_s_fault(tmp_path, known_processes):
    soundfile.write(tmp_path / "x.wav", voice(1.0), RATE)
    read_audio(tmp_path / "x.wav")
    (process,) = processes
    process.process.kill()
    process.process.wait()
    assert len(read_audio(tmp_path / "x.wav")) == RATE and len(processes) == 2


def test_a_decoder_that_gets_no_thread_is_tried_once_more(tmp_path, monkeypatch):
    class Busy:
        def read_sound(self, *_):
            raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    request = {"do": "sound", "rate": RATE, "cwd": str(tmp_path), "span": ["x.wav", 0.0, None, None]}
    with pytest.raises(SystemExit, match=str(os.EX_TEMPFAIL)):
        worker._answer(Busy(), None, request)


def test_a_decoder_that_hangs(slow, monkeypatch):
    monkeypatch.setattr(worker, "MOST_WAITING", 3.0)
    soundfile.write(slow.with_name("x.wav"), voice(1.0), RATE)
    read_audio(slow.with_name("x.wav"))
    os.kill(processes[0].process.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="did not answer for"):
        read_audio(slow)
    assert processes[0].process.poll() is not None


def test_a_decoder_that_computes_for_ever(slow):
    """The limit is the kernel's, on processor time."""
    thread, found = reading(slow)
    kill_when_busy(signal.SIGXCPU, set())
    thread.join()
    assert "took more than 120 s of processor time" in str(found[0])
    with open(f"/proc/{os.getpid()}/limits") as f:  # the limits are the processes' own
        assert "Max address space         unlimited" in f.read()


def test_memory_of_a_decoder_is_limited(tmp_path, known_processes):
    soundfile.write(tmp_path / "x.wav", voice(1.0), RATE)
    read_audio(tmp_path / "x.wav")
    limits = Path(f"/proc/{processes[0].process.pid}/limits").read_text()
    assert any(line.split()[3] == str(worker.MOST_MEMORY) for line in limits.split("\n") if "address space" in line)


def test_one_process_serves_many_reads_and_two_at_once_have_two(tmp_path, known_processes):
    path = write(tmp_path / "x.mp4", "mp4", [mono("aac", 2.0)], pictures=20)
    for _ in range(3):
        read_audio(path)
        assert len(list(read_frames(path, 5))) == 10
        next(read_frames(path))  # given up in the middle
        assert probe(path).has_video
    assert len(processes) == 1
    pictures = read_frames(path)
    next(pictures)
    read_audio(path)
    assert len(processes) == 2 and len(list(pictures)) == 19
    assert len(worker._idle) == 2


def test_pictures_come_once_when_the_decoder_crashes_between_them(tmp_path, monkeypatch, known_processes):
    monkeypatch.setattr(worker, "_BATCH", 1)
    path = write(tmp_path / "x.mkv", "matroska", pictures=2000)
    pictures = read_frames(path)
    times = [next(pictures)[0] for _ in range(5)]
    os.kill(processes[0].process.pid, signal.SIGSEGV)
    times += [t for t, _ in pictures]
    np.testing.assert_allclose(times, np.arange(2000) / 10, atol=1e-3)
    assert len(processes) == 2


def test_processes_end_with_the_command(tmp_path):
    import subprocess
    import sys

    soundfile.write(tmp_path / "x.wav", voice(1.0), RATE)
    code = (
        "import os, sys; from sdumc.data import media, worker; media.read_audio(sys.argv[1]);"
        "print(worker._idle[0].process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.wav")], capture_output=True, text=True)
    pid = int(done.stdout)

    def ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
        except OSError:
            return True

    wait_until(ended)


def test_a_header_that_promises_a_giant_picture(tmp_path):
    header = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 30000, 30000, 1, 24, *[0] * 6)
    (tmp_path / "x.bmp").write_bytes(header + bytes(100000))
    begin = time.monotonic()
    with pytest.raises(UserError):
        list(read_frames(tmp_path / "x.bmp"))
    assert time.monotonic() - begin < 300
