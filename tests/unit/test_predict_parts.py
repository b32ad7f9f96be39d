"""Predicting, without a model: voice activity, subtitles, inputs, the record of extractors, archives."""

from __future__ import annotations

import importlib.util
import io
import itertools
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers.shared import MEDIA

from sdumc.data.media import read_audio
from sdumc.errors import UserError
from sdumc.extraction import activity
from sdumc.prediction import extractors, inputs, package
from sdumc.prediction.inputs import Cue
from sdumc.prediction.scorer import ScoredFile, ScoredUtterance, overall_score, table


def voiced(*spans: tuple[float, float], length: float) -> np.ndarray:
    """Frames that are speech in ``spans`` of seconds."""
    frames = np.zeros(round(length / activity.FRAME), bool)
    for a, b in spans:
        frames[round(a / activity.FRAME) : round(b / activity.FRAME)] = True
    return frames


def cut(*spans, length=60.0, max_seconds=20.0, levels=None):
    frames = voiced(*spans, length=length)
    return activity.utterances(frames, np.ones(len(frames)) if levels is None else levels, max_seconds)


def near(found, expected, tolerance=0.07):
    assert len(found) == len(expected), found
    for (a, b), (c, d) in zip(found, expected, strict=True):
        assert abs(a - c) < tolerance and abs(b - d) < tolerance, (found, expected)


def test_pauses_end_utterances_and_margins_stay():
    near(cut((1, 4), (4.3, 6), (8, 12)), [(0.85, 6.15), (7.85, 12.15)])


def test_margins_do_not_overlap_or_leave_the_file():
    found = cut((0, 3), (3.51, 6), length=6.08, max_seconds=5)
    assert found[0][0] == 0.0 and found[-1][1] <= 6.08
    assert found[0][1] <= found[1][0]


def test_long_utterances_are_divided_at_their_longest_pause():
    near(cut((0, 9), (9.2, 15), (15.4, 25)), [(0, 15.15), (15.25, 25.15)], 0.1)


def test_speech_without_a_pause_is_divided_where_it_is_quietest():
    levels = np.ones(round(60 / activity.FRAME))
    levels[round(17 / activity.FRAME)] = 0.1
    near(cut((0, 30), levels=levels), [(0, 17), (17, 30.15)])
    assert all(b - a <= 20 for a, b in cut((0, 59)))
    assert all(b - a <= 3 for a, b in cut((0, 59), max_seconds=3))


def test_short_utterances_join_their_neighbour_and_noises_are_left_out():
    near(cut((1, 4), (4.8, 5.3), (20, 20.15)), [(0.85, 5.45)])
    near(cut((1, 4), (9, 9.6)), [(0.85, 4.15), (8.85, 9.75)])
    assert cut(length=10) == []


def test_even_pieces():
    assert activity.even_pieces(45, 20) == [(0, 15), (15, 30), (30, 45)]
    assert activity.even_pieces(20, 20) == [(0, 20)]


def tones(seconds, seed):
    """Notes with harmonics and vibrato, chords below them, a drum on every half second: (T,) at 16 kHz."""
    rng = np.random.default_rng(seed)
    wave = np.zeros(int(seconds * 16000), np.float32)

    def add(at, sound):
        part = wave[int(at * 16000) :][: len(sound)]
        part += sound[: len(part)].astype(np.float32)

    def note(frequency, length, vibrato):
        t = np.arange(int(length * 16000)) / 16000
        phase = 2 * np.pi * frequency * t + vibrato * np.sin(2 * np.pi * 5.5 * t)
        rise_and_fall = np.minimum(1, t / 0.02) * np.exp(-1.5 * t)
        return rise_and_fall * sum(np.sin(k * phase) / k**1.2 for k in range(1, 9))

    for beat in range(int(2 * seconds)):
        if beat % 2 == 0:
            root = 110 * 2 ** (rng.integers(12) / 12)
            for step in (0, 4, 7):
                add(beat / 2, 0.06 * note(root * 2 ** (step / 12), 1, 0))
        for half in (0, 0.25):
            add(beat / 2 + half, 0.1 * note(220 * 2 ** (rng.choice([0, 2, 4, 5, 7, 9, 11]) / 12), 0.4, 0.3))
        t = np.arange(3200) / 16000
        add(beat / 2, 0.3 * np.sin(2 * np.pi * (60 * t + 8 * np.exp(-20 * t))) * np.exp(-15 * t))
        add(beat / 2 + 0.25, 0.1 * rng.standard_normal(3200) * np.exp(-30 * t))
    return wave


def coloured_noise(seconds, power, seed):
    """Noise whose amplitude falls with frequency ** power: white 0, pink 0.5, brown 1."""
    count = int(seconds * 16000)
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(count))
    noise = np.fft.irfft(spectrum / np.maximum(np.fft.rfftfreq(count, 1 / 16000), 20) ** power, count)
    return (0.1 * noise / noise.std()).astype(np.float32)


@pytest.mark.parametrize("gain", [1.0, 0.02])
@pytest.mark.parametrize("kind", ["music", "white", "pink", "brown", "hum"])
def test_music_and_noise_are_no_speech(kind, gain):
    if kind == "music":
        wave = tones(60, 0)
    elif kind == "hum":
        t = np.arange(60 * 16000) / 16000
        wave = sum(0.1 * np.sin(2 * np.pi * 50 * k * t) / k for k in (1, 2, 3, 5, 7)) + coloured_noise(60, 0, 1) / 50
    else:
        wave = coloured_noise(60, {"white": 0, "pink": 0.5, "brown": 1}[kind], 2)
    assert activity.cut_speech((gain * wave).astype(np.float32), 20) == []


def test_the_detector_works_in_blocks_of_a_long_recording(monkeypatch):
    rng = np.random.default_rng(0)
    wave = (rng.standard_normal(16000 * 4) * np.abs(np.sin(np.arange(64000) / 4000))).astype(np.float32) * 0.1
    detector = activity.SpeechDetector()
    whole = detector(wave)
    assert whole.shape == (len(wave) // 512,) and (whole >= 0).all() and (whole <= 1).all()
    np.testing.assert_array_equal(whole, detector(wave))
    monkeypatch.setattr(activity, "_BLOCK", 7)
    np.testing.assert_allclose(detector(wave), whole, atol=1e-5)
    np.testing.assert_allclose(detector(wave * 0.1, gain=10.0), whole, atol=1e-3)


def test_threads_and_random_numbers_stay_as_they_are():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    activity.SpeechDetector()(np.zeros(16000, np.float32))
    assert torch.get_num_threads() == before and torch.equal(torch.get_rng_state(), state)


def test_without_the_weights_of_the_detector(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'silero-vad"):
        activity.SpeechDetector()
    other = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: other)
    with pytest.raises(UserError, match="not the weights"):
        activity.SpeechDetector()


def test_speech_goes_on_below_the_probability_at_which_it_begins():
    found = activity._hysteresis(np.array([0.1, 0.3, 0.5, 0.3, 0.26, 0.2, 0.3, 0.9]))
    assert found.tolist() == [False, False, True, True, True, False, False, True]


def test_who_is_not_speaking_in_noise_and_music():
    """By the detector; by level alone they pass for speech."""
    rng, t = np.random.default_rng(0), np.arange(48000) / 16000
    notes = rng.choice([220.0, 262.0, 330.0, 392.0, 440.0], (12, 3))
    music = np.zeros_like(t)
    for i, chord in enumerate(notes):
        fading = np.exp(-5 * (t - i / 4)) * (t >= i / 4)
        music += fading * sum(np.sin(2 * np.pi * f * h * t) / h for f in chord for h in range(1, 5))
    sounds = [s * rng.normal(size=48000) for s in (0.003, 0.03, 0.3)] + [0.3 * music / np.abs(music).max()]
    for sound in sounds:
        assert activity.lacks_speech(sound.astype(np.float32)) and not activity.lacks_speech(sound, "level")
    assert activity.lacks_speech(np.zeros(300, np.float32)) and activity.lacks_speech(np.zeros(48000), "level")


@pytest.mark.skipif(not MEDIA.is_dir(), reason=f"no real recordings: no folder {MEDIA}")
def test_people_who_speak_are_heard_short_and_quiet():
    for path in sorted(MEDIA.glob("*.mpg")):
        wave = read_audio(path)
        assert not activity.lacks_speech(wave) and not activity.lacks_speech(wave * 0.02)
        (start, end), *_ = activity.cut_speech(wave, 20)
        middle = round(16000 * (start + end) / 2)
        assert not activity.lacks_speech(wave[middle - 3200 : middle + 3200])  # a word of 0.4 s


def test_silence_and_steady_noise_are_no_speech():
    rng = np.random.default_rng(0)
    hiss = (0.05 * rng.standard_normal(16000 * 5)).astype(np.float32)
    assert activity.is_silent(np.zeros(16000, np.float32)) and activity.is_silent(hiss * 0.01)
    assert not activity.is_silent(hiss)
    assert not activity.is_silent(np.ones(10, np.float32))
    assert activity.cut_speech(hiss, 20) == []
    assert activity.cut_speech(np.zeros(100, np.float32), 20) == []


@pytest.mark.parametrize("gain, noise", [(1.0, 0.0), (1.0, 0.02), (0.02, 0.0005), (1.0, 0.05)])
def test_spoken_sentences_are_found(gain, noise):
    pytest.importorskip("espeakng_loader")
    from mini.speech import Synthesiser, Voice

    speaker = Synthesiser()
    pieces, truth, at = [], [], 0
    for text in ("The film was very good and I liked it so much.", "I did not like the ending at all.", "It was fine."):
        said = speaker.say(text, Voice("en-us", 160, 50, 50), 1)
        truth.append(((at + 24000) / 16000, (at + 24000 + len(said)) / 16000))
        pieces += [np.zeros(24000, np.float32), said]
        at += 24000 + len(said)
    wave = np.concatenate([*pieces, np.zeros(16000, np.float32)])
    wave = (gain * wave + noise * np.random.default_rng(0).standard_normal(len(wave))).astype(np.float32)
    near(activity.cut_speech(wave, 20), truth, 0.45)  # a pause of 1.5 s lies between two sentences


# ---- subtitles

SRT = """1
00:00:01,000 --> 00:00:03,500
I really <i>liked</i>

2
00:00:03,600 --> 00:00:05,000
the film.
And more

3
0:10.5 --> 0:12.0
<b></b>
"""


def test_subtitles_are_read_and_joined_to_sentences(tmp_path):
    path = tmp_path / "a.srt"
    path.write_text(SRT, encoding="utf-8-sig")
    cues = inputs.read_subtitles(path)
    assert cues == [Cue(1, 3.5, "I really liked"), Cue(3.6, 5, "the film. And more")]
    assert inputs.sentences(cues, 20) == [Cue(1, 5, "I really liked the film. And more")]
    assert inputs.sentences(cues, 3) == cues
    assert len(inputs.sentences([Cue(0, 1, "Yes."), Cue(1, 2, "no")], 20)) == 2
    assert len(inputs.sentences([Cue(0, 1, "yes"), Cue(2, 3, "no")], 20)) == 2


def test_subtitles_written_can_be_read_again(tmp_path):
    cues = [Cue(0.5, 3661.25, "a < b & c --> d"), Cue(3662, 3663.001, "two\nlines")]
    for kind in ("srt", "vtt"):
        path = tmp_path / f"x.{kind}"
        path.write_text(inputs.format_subtitles(cues, kind))
        assert (kind == "vtt") == path.read_text().startswith("WEBVTT\n\n")
        back = inputs.read_subtitles(path)
        assert [(c.start, c.end) for c in back] == [(c.start, c.end) for c in cues]
        assert back[1].text == "two lines"
    assert back[0].text == "a < b & c -> d"
    assert "01:01:01.250" in path.read_text()


@pytest.mark.parametrize(
    "content, message",
    [
        ("nothing here", "no subtitles"),
        ("00:00:02,000 --> 00:00:01,000\nx\n", ":1: the end"),
        ("a --> b\n", ":1: 'a'"),
        ("00:00:01,000 --> 00:00:02,000\nx\n\n00:00:02,000 --> 00:00:0x,000\ny\n", ":4: '00:00:0x,000'"),
        ("00:00:01,000 --> 00:00:01,000\nx\n", "each subtitle ends when it starts"),
    ],
)
def test_bad_subtitles_are_refused(tmp_path, content, message):
    path = tmp_path / "a.srt"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        inputs.read_subtitles(path)


def read(tmp_path, name, content, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return inputs.read_subtitles(path)


def clock(seconds):
    return f"00:00:{seconds:06.3f}"


def rolling(lines, step=1.2):
    """Automatic captions as YouTube has them: the line before, the new line with the time of each word, and between
    two lines a cue of 10 ms that shows the finished one."""
    blocks = ["WEBVTT\nKind: captions\nLanguage: en\n"]
    for i, words in enumerate(lines):
        a, b = i * step, (i + 1) * step
        first, *rest = words.split()
        timed = first + "".join(f"<{clock(a + 0.1 * (k + 1))}><c> {w}</c>" for k, w in enumerate(rest))
        before = lines[i - 1] if i else " "
        blocks.append(f"{clock(a + 0.01)} --> {clock(b)} align:start position:0%\n{before}\n{timed}\n")
        blocks.append(f"{clock(b)} --> {clock(b + 0.01)} align:start position:0%\n{words}\n \n")
    return "\n".join(blocks)


SPOKEN = ["i went to see it", "it was a good film", "a good film you know", "no", "no", "really good"]


def test_captions_that_roll_have_each_word_once(tmp_path):
    cues = read(tmp_path, "a.vtt", rolling(SPOKEN))
    assert " ".join(c.text for c in cues).startswith("i went to see it it was a good film a good film you know no")
    assert [c.text for c in cues][:3] == SPOKEN[:3]
    assert [round(c.start, 2) for c in cues[:3]] == [0.01, 1.21, 2.41]
    assert len(cues.notes) == 1 and "once" in cues.notes[0]


def test_captions_that_roll_as_subrip_and_as_growing_lines(tmp_path):
    shown = [(0, 1, "one two"), (1, 1.01, "one two"), (1.01, 2, "one two\nthree four"), (2, 3, "three four\nfive")]
    text = "".join(f"{i}\n{clock(a)} --> {clock(b)}\n{t}\n\n" for i, (a, b, t) in enumerate(shown, 1))
    assert [c.text for c in read(tmp_path, "a.srt", text)] == ["one two", "three four", "five"]
    grown = [(0, 1, "one"), (1, 2, "one two"), (2, 3, "one two three"), (3, 4, "two three four")]
    text = "".join(f"{i}\n{clock(a)} --> {clock(b)}\n{t}\n\n" for i, (a, b, t) in enumerate(grown, 1))
    assert [c.text for c in read(tmp_path, "b.srt", text)] == ["one", "two", "three", "four"]


def test_what_is_said_twice_stays(tmp_path):
    said = [(0, 1, "No."), (1, 2, "No."), (2, 3, "No, I said."), (3, 4, "it was good"), (4, 5, "very good")]
    text = "".join(f"{i}\n{clock(a)} --> {clock(b)}\n{t}\n\n" for i, (a, b, t) in enumerate(said, 1))
    cues = read(tmp_path, "a.srt", text)
    assert [c.text for c in cues] == [t for _, _, t in said] and cues.notes == []


def test_cues_that_last_no_time_and_cues_that_overlap(tmp_path):
    text = "".join(
        f"{clock(a)} --> {clock(b)}\n{t}\n\n"
        for a, b, t in [
            (0, 0, "a"),
            (1, 2, "b"),
            (2, 2, "c"),
            (6, 6, "d"),
            (6, 6, "e"),
            (7, 9, "f"),
            (8, 10, "g"),
            (8.5, 9, "h"),
        ]
    )
    cues = read(tmp_path, "a.srt", text)
    assert cues == [Cue(1, 2, "a b c"), Cue(7, 8, "d e f"), Cue(8, 10, "g h")]
    assert sum("lasts no time" in n for n in cues.notes) == 4
    assert any("overlap" in n for n in cues.notes) and any("within" in n for n in cues.notes)


ASS = """[Script Info]
Title: x
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname
Style: Default,Arial

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Comment: 0,0:00:00.00,0:00:01.00,Default,,0,0,0,,not shown
Dialogue: 0,0:00:02.00,0:00:03.50,Default,,0,0,0,,{\\an8\\i1}Yes, the film{\\i0}\\Nwas good
Dialogue: 1,0:00:02.00,0:00:03.50,Default,,0,0,0,,{\\an8\\i1}Yes, the film{\\i0}\\Nwas good
Dialogue: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,,{\\p1}m 0 0 l 100 0{\\p0}
"""


def test_other_formats(tmp_path):
    for name, text in (
        ("a.ass", ASS),
        ("b.ssa", ASS.replace("v4.00+", "v4.00").replace("V4+", "V4").replace("e: 0,", "e: Marked=0,")),
        ("c.sub", "{1}{1}25\n{50}{87}Yes, the film|was good\n"),
        ("d.smi", "<SAMI><BODY><SYNC Start=2000><P>Yes, the film<br>was good<SYNC Start=3500><P>&nbsp;</BODY></SAMI>"),
        ("e.sub", "[20][35]Yes, the film|was good\n"),
        ("f.srt", "\r1\r00:00:02 --> 00:00:03.5\rYes, the film\rwas good\r"),
    ):
        (cue,) = read(tmp_path, name, text)
        assert (cue.start, cue.end) == pytest.approx((2.0, 3.5), abs=0.03), name
        assert cue.text == "Yes, the film was good", name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings(tmp_path, encoding):
    (cue,) = read(tmp_path, "a.srt", "1\r\n00:00:01,000 --> 00:00:02,000\r\nSchön 好\r\n", encoding)
    assert cue == Cue(1, 2, "Schön 好")


def test_words_that_look_like_something_else(tmp_path):
    text = (
        "1\n00:00:01,000 --> 00:00:02,000\nfrom 00:00:01,000 to 00:00:02,000 in\n1984\n\n"
        "2\n00:00:03,000 --> 00:00:04,000\n\n3\n00:00:05,000 --> 00:00:06,000\n1985\n"
        "4\n00:00:07,000 --> 00:00:08,000\n1986"
    )
    cues = read(tmp_path, "a.srt", text)
    assert [c.text for c in cues] == ["from 00:00:01,000 to 00:00:02,000 in 1984", "1985", "1986"]
    text = (
        "WEBVTT\n\nNOTE a\nremark\n\nSTYLE\n::cue {}\n\n7\n00:01.000 --> 00:02.000\n<v Bob>you &amp; me\n\n"
        "name\n00:03.000 --> 00:04.000\nx\n"
    )
    assert [c.text for c in read(tmp_path, "a.vtt", text)] == ["you & me", "x"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.ass", ASS + "Dialogue: 0,0:00:04.00,soon,Default,,0,0,0,,x\n", ":15: 'soon'"),
        ("a.ass", ASS + "Dialogue: 0,0:00:04.00\n", ":15: 2 fields"),
        ("a.sub", "{50}{87}x\n", "how many there are in a second"),
        ("a.sub", "{1}{1}25\n{50}{87}x\ny\n", ":3: does not begin"),
        ("a.srt", b"1\n00:00:01,000 --> 00:00:02,000\nSch\xf6n\n", ":3: not UTF-8"),
        ("a.sub", b"\x00\x00\x01\xba\x44\x00\x04" * 9, "save the file|not a text|pictures"),
        ("a.ttml", "<tt xmlns='http://www.w3.org/ns/ttml'><body>", "line 1"),
    ],
)
def test_other_bad_subtitles_are_refused(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as e:
        read(tmp_path, name, content)
    assert name in str(e.value)


def test_damaged_subtitles_are_read_or_refused(tmp_path):
    """Whatever is wrong in them: cues in time order that do not overlap, or an error that names the file."""
    rng = random.Random(0)
    whole = {"a.srt": SRT, "a.ass": ASS, "a.vtt": rolling(SPOKEN), "a.sub": "{1}{1}25\n{50}{87}Yes|was good\n"}
    read_or_refused = Counter()
    for _ in range(400):
        name = rng.choice(sorted(whole))
        content = bytearray(whole[name].encode())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content))
            kind = rng.randrange(3)
            if kind == 0:
                content[at] = rng.choice(b"0123456789:->,.{}[]<&\n \xff")
            elif kind == 1:
                del content[at : at + rng.randint(1, 9)]
            else:
                content[at:at] = content[max(0, at - rng.randint(1, 40)) : at]
        try:
            cues = read(tmp_path, name, bytes(content))
        except UserError as e:
            assert str(tmp_path / name) in str(e)
            read_or_refused["refused"] += 1
        else:
            assert all(c.start < c.end and c.text for c in cues)
            assert all(a.end <= b.start for a, b in itertools.pairwise(cues))
            read_or_refused["read"] += 1
    assert min(read_or_refused["read"], read_or_refused["refused"]) > 50


def test_the_trials(media_dir):
    """Files on which an earlier state failed; where they lie beside the recordings."""
    folder = media_dir.parent / "trials/media"
    if not folder.is_dir():
        pytest.skip("no real recordings: no folder")
    texts = {n: [c.text for c in inputs.read_subtitles(folder / n)] for n in ("youtube.vtt", "zerolen.srt", "a.ass")}
    assert texts["youtube.vtt"] == ["the movie was", "really very good", "yesterday"]
    assert texts["zerolen.srt"] == ["a b", "c"] and texts["a.ass"] == ["the movie was good"]
    clip = Path("lbax4n.mpg")
    assert inputs.transcripts(str(folder / "table.txt"), [clip]) == {clip: "the movie was good"}


# ---- what is named on the command line


OTHER_FORMS = {
    "x.lrc": "[ti:Song]\n[00:00.00]Hello\n[00:01.50]film\n",
    "x.json": '{"text": "Hello", "segments": [{"start": 0}]}',
    "x.json3": '{"wireMagic":"pb3","events":[]}',
    "x.srv3": '<?xml version="1.0"?><timedtext format="3"><body><p t="0" d="1500">Hello</p></body></timedtext>',
    "x.rtf": "{\\rtf1\\ansi Hello}",
    "whisper.txt": "[00:00:00.000 --> 00:00:01.500]   Hello\n[00:00:01.500 --> 00:00:03.000]   film\n",
    "x.idx": "# VobSub index file, v7\n",
    "vplayer.txt": "00:00:00:Hello\n00:00:02:film\n",
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_what_is_no_transcript_is_not_scored_as_one(tmp_path, name):
    (tmp_path / name).write_text(OTHER_FORMS[name])
    with pytest.raises(UserError, match="no words to be read"):
        inputs.transcripts(str(tmp_path / name), [Path("clip.mp4")])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.sbv", "0:00:00.000,0:00:01.500\nHello &amp; you\n\n0:00:01.500,0:00:03.000\nfilm\n"),
        ("whisper.tsv", "start\tend\ttext\n0\t1500\tHello & you\n1500\t3000\tfilm\n"),
        (
            "x.dfxp",
            '<?xml version="1.0"?><tt xmlns="http://www.w3.org/ns/ttml"><body><div><p begin="00:00:00.000" '
            'end="00:00:01.500">Hello &amp; you</p><p begin="1.5s" end="3s">film</p></div></body></tt>',
        ),
        (
            "x.srt",
            "\ufeff00:00:00,000 --> 00:00:01,500\r\n<b>Hello</b> &amp; \x1b you\r\n\r\n00:01,5 --> 00:03,0\r\nfilm\r\n",
        ),
        (
            "x.vtt",
            "WEBVTT - t\nKind: captions\n\nSTYLE\n::cue { color: red }\n\nREGION\nid:a\n\nNOTE no words\n\nintro\n"
            "00:00.000 --> 00:01.500 region:a\n<v Ann>Hello <c.x>&amp;</c> you\n\n"
            "00:01.500 --> 00:03.000\n<00:01.6><c>fi</c><00:02.0><c>lm</c>\n",
        ),
    ],
)
def test_subtitles_of_other_programs(tmp_path, name, content):
    (tmp_path / name).write_text(content, newline="")
    cues = inputs.transcripts(str(tmp_path / name), [Path("clip.mp4")])[Path("clip.mp4")]
    assert [(c.start, c.end, c.text) for c in cues] == [(0, 1.5, "Hello & you"), (1.5, 3, "film")]


def test_files_folders_and_lists(tmp_path):
    for name in ("f/b.MP4", "f/a.wav", "f/sub/c.webm", "f/notes.txt", "f/a.sdumc.mp4", "f/.hidden.wav", "x.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").write_text(f"{tmp_path}/x.dat\n\n{tmp_path}/f/a.wav\n")
    files, failures = inputs.media_files([f"{tmp_path}/f", f"{tmp_path}/empty"], f"{tmp_path}/list")
    assert [str(f.relative_to(tmp_path)) for f in files] == ["f/a.wav", "f/b.MP4", "f/sub/c.webm", "x.dat"]
    assert [f[0] for f in failures] == [f"{tmp_path}/empty"]
    with pytest.raises(UserError, match="at least one"):
        inputs.media_files([], None)
    with pytest.raises(UserError, match="cannot be read"):
        inputs.media_files([], f"{tmp_path}/nolist")


def test_transcripts(tmp_path):
    one, two = Path("v/one.mp4"), Path("two.wav")
    words = tmp_path / "words.txt"
    words.write_text("so\nmany words\n")
    lines = tmp_path / "table"
    lines.write_text("one it was good\ntwo it was bad\n")
    (tmp_path / "s.srt").write_text(SRT)
    assert inputs.transcripts(None, [one]) == {}
    assert inputs.transcripts("it was good", [one]) == {one: "it was good"}
    assert inputs.transcripts(str(words), [one]) == {one: "so many words"}
    assert len(inputs.transcripts(str(tmp_path / "s.srt"), [one])[one]) == 2
    assert inputs.transcripts(str(lines), [one, two]) == {one: "it was good", two: "it was bad"}
    assert inputs.transcripts(str(lines), [one]) == {one: "it was good"}
    (tmp_path / "as.txt").write_text(SRT, encoding="utf-16")
    assert (
        inputs.transcripts(str(tmp_path / "as.txt"), [one])[one]
        == inputs.transcripts(str(tmp_path / "s.srt"), [one])[one]
    )
    (tmp_path / "tabs").write_text("a b\tit was good\nc\tit was bad\n")
    assert inputs.transcripts(str(tmp_path / "tabs"), [Path("a b.mp4")]) == {Path("a b.mp4"): "it was good"}
    (tmp_path / "codes").write_text("id_1 it was good\nid_2 it was bad\n")
    (tmp_path / "years").write_text("1984 was good\n1985 was bad\n")
    assert inputs.transcripts(str(tmp_path / "years"), [one]) == {one: "1984 was good 1985 was bad"}
    for text, files, message in (
        (str(tmp_path / "tabs"), [one], "no line for 'one'"),
        (str(tmp_path / "codes"), [one], "no line for 'one'"),
        (str(tmp_path / "s.srt"), [one, two], "one file"),
        ("it was good", [one, two], "table"),
        (str(lines), [one, Path("three.wav")], "three"),
        (str(lines), [one, Path("w/one.wav")], "several files"),
        ("nofile.srt", [one], "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            inputs.transcripts(text, files)


# ---- where models are


def settings(**more):
    known = {"layers": [1], "normalise": True, "dtype": "fp32", "model": "models/encoder"}
    return {"audio": {**known, **more}}


def write_record(folder: Path, content: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "extractors.yaml").write_text(yaml.safe_dump(content))
    return folder


def fake_model(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "wavlm"}')
    (folder / "model.safetensors").write_bytes(content)
    return folder


def test_models_are_found_where_they_were_or_where_they_are_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = fake_model(tmp_path / "models/encoder")
    known = extractors.fingerprint(model, "audio")
    exp = write_record(tmp_path / "exp/one", settings(model_hash=known))
    (use,) = extractors.load_record(exp).models()
    assert extractors.find_model(use, exp) == model
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "exp").symlink_to(tmp_path / "exp")
    assert extractors.find_model(use, tmp_path / "recipe/exp/one") == model  # an exp folder that is a link
    other = fake_model(tmp_path / "exp/models/encoder", b"others")
    assert extractors.find_model(use, exp) == model  # not the nearer one with other weights
    moved = (tmp_path / "elsewhere").resolve()
    moved.mkdir()
    model.rename(moved / "encoder")
    assert extractors.find_model(use, exp, moved) == moved / "encoder"
    with pytest.raises(UserError, match="not the audio model that the features were made with"):
        extractors.find_model(use, exp)
    (other / "config.json").unlink()
    (other / "model.safetensors").unlink()
    other.rmdir()
    with pytest.raises(UserError, match="--model-dir"):
        extractors.find_model(use, exp)


def test_features_from_elsewhere_are_no_recipe(tmp_path):
    for content in ({}, {"audio": {"imported": True, "model": "x"}}, {"audio": {"extractor": "noise"}}):
        with pytest.raises(UserError, match="came from elsewhere"):
            extractors.load_record(write_record(tmp_path / "exp", content))
    found = extractors.load_record(
        write_record(tmp_path / "exp", {**settings(), "video": {"model": "x", "dtype": "fp32"}})
    )
    assert set(found.features) == {"audio"}
    assert "pooling" in found.left_out["video"]
    with pytest.raises(UserError, match="no such file"):
        extractors.load_record(tmp_path)


def test_faces_found_by_the_former_detector_are_refused(tmp_path):
    from sdumc.prediction.extractors import Extractors

    def with_detector(name):
        return Extractors(SimpleNamespace(models=list, features={"video": {"detector": name}}, folder=tmp_path))

    with_detector("yunet").check()
    with pytest.raises(UserError, match="detector: yunet"):
        with_detector("opencv").check()


# ---- archives


@pytest.mark.parametrize("name", ["../out", "/abs", "link"])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, name):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            archive.addfile(member)
        else:
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="no plain file inside"):
        package.open_experiment(path)
    assert not (tmp_path / "out").exists()


def test_what_is_no_archive_of_ours(tmp_path):
    with pytest.raises(UserError, match="no such experiment"):
        package.open_experiment(tmp_path / "nothing")
    (tmp_path / "a.tar").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be unpacked"):
        package.open_experiment(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w"):
        pass
    with pytest.raises(UserError, match=r"no extractors\.yaml"):
        package.open_experiment(tmp_path / "b.tar")


# ---- results


def test_overall_is_weighted_by_duration_and_the_table_is_aligned():
    found = [
        ScoredUtterance(0, 1, 3.0, "so good", ("audio", "text"), "simulated", "ok"),
        ScoredUtterance(10, 13, -1.0, "", ("video",), None),
    ]
    assert overall_score(found) == 0.0
    assert overall_score([ScoredUtterance(0, 0, 2.0, "", ("video",), None)]) == 2.0
    lines = table(ScoredFile("a.mp4", 13.0, 0.0, found, ["hm"])).splitlines()
    assert lines[0] == "a.mp4 (13.0 s), scores from -3 to 3"
    ends = {line.index(s) + len(s) for line, s in zip(lines[1:5], ("score", "+3.000", "-1.000", "+0.000"), strict=True)}
    assert len(ends) == 1
    assert lines[-1] == "  note: hm"


def test_importing_the_package_stays_light():
    code = "import sys, sdumc; sdumc.__version__; print('torch' in sys.modules, hasattr(sdumc, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ---- what a model says of itself


def test_the_card_says_what_is_read_and_what_was_learned_from():
    def card(*features, sets=()):
        return package.model_card(
            "m", "e", "averaged", {}, {name: {} for name in features}, [], {}, True, train_sets=sets
        )

    assert "from its sound, its words and its pictures. Without a transcript" in card(
        "audio", "text", "text_sim", "video"
    )
    assert "from its sound and its pictures. Absent" in card("audio", "video") and "It learned" not in card("audio")
    assert "from its words. It needs a transcript." in card("text")
    sets = [{"folder": f, "weight": 1.0, "utterances": 80, "share": 1.0, "labels": "-3 to 3"} for f in ("one", "two")]
    assert "It learned from two with weight 1: 80 utterances, 50% of what is drawn." in card("audio", sets=sets)


def test_a_model_of_texts_alone_asks_for_a_transcript():
    from sdumc.prediction.scorer import Scorer

    scorer = Scorer.__new__(Scorer)
    scorer.features, scorer.missing_text = ["text"], "simulated"
    with pytest.raises(UserError, match="nothing but a transcript; give it with --text"):
        scorer._check_request(None, "auto", 20)
    scorer._check_request("words", "auto", 20)
