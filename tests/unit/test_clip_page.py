"""The page of a scored clip: what it says, what it plays, and how it behaves in a browser."""

from __future__ import annotations

import base64
import os
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote

import av
import numpy as np
import pytest
import soundfile
from helpers import shared
from helpers.browser import Tab, find_browser

from mini.clips import write_clip
from sdumc.data.media import probe, read_audio, read_frames
from sdumc.errors import UserError
from sdumc.prediction import clip_page
from sdumc.prediction.clip_page import PageWriter, clock, make_clip, make_player, page_html, place_words
from sdumc.prediction.scorer import ScoredFile, ScoredUtterance

SAID = ["i really liked the second half", "it was <b>bad</b> & slow", "", "I would see it again"]
SCORES = [1.9, -2.4, 0.1, 4.2]
SECONDS = 12.0


def attention(frames: int, seed: int) -> np.ndarray:
    x = np.exp(np.random.default_rng(seed).normal(size=(7, frames)))
    return (x / x.sum(axis=1, keepdims=True)).astype(np.float32)


def scored(file: Path, notes: list[str] | None = None) -> ScoredFile:
    """Four utterances of three seconds; the second has no pictures, the third no words."""
    utterances = []
    for i, (words, score) in enumerate(zip(SAID, SCORES, strict=True)):
        places = [m.span() for m in re.finditer(r"\S+", words)] or [(0, 0)]
        present = ("audio", "text") if i == 1 else ("audio", "text", "video")
        frames = {"audio": 150, "text": len(places), "video": 30}
        kept = {m: attention(frames[m], i) for m in present}
        status = "ok" if words else "empty"
        utterances.append(
            ScoredUtterance(3.0 * i, 3.0 * i + 2.8, score, words, present, "simulated", status, kept, places)
        )
    return ScoredFile(str(file), SECONDS, 0.95, utterances, notes or ["its sound is quiet"])


def film(path: Path, size: tuple[int, int] = (48, 64)) -> Path:
    frames = (np.full((*size, 3), 10 * i % 250, np.uint8) for i in range(round(SECONDS * 10)))
    wave = np.sin(np.arange(round(SECONDS * 16000)) / 9).astype(np.float32) / 4
    write_clip(path, frames, 10, wave, 16000)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return film(tmp_path_factory.mktemp("clips") / "my clip.mp4")


@pytest.fixture(scope="module")
def page(clip):
    path = clip.with_suffix(".html")
    path.write_text(page_html([make_clip(scored(clip), path)]))
    return path


def test_the_page_says_everything(page):
    text = page.read_text()
    for words in ("my clip.mp4", "+0.95", "−2.40", "its sound is quiet", "no pictures", "no words", "empty"):
        assert words in text, words
    assert "&lt;b&gt;bad&lt;/b&gt;" in text and "<b>bad" not in text
    assert not re.search(r"https?:|@import|url\(", re.sub(r"base64,[^\"]*", "", text))  # nothing from elsewhere
    assert text.count('class="bar') == 4 and text.count("<li data-utterance") == 4
    assert text.count('class="absent"') == 1


def test_words_share_the_time_by_their_letters():
    u = ScoredUtterance(10, 20, 1, "aa bbb\nccccc", ("audio",), "simulated")
    assert [(w.text, w.time, w.weight) for w in place_words(u)] == [
        ("aa", 10, None),
        ("bbb", 12, None),
        ("ccccc", 15, None),
    ]
    assert place_words(ScoredUtterance(0, 1, 1, " ", ("audio",), None)) == []


def test_weights_of_words_are_the_sums_of_their_tokens():
    """In multiples of a word's mean; a token before the words, and one between them, belong to none."""
    a = np.tile(np.array([[0.3, 0.1, 0.2, 0.0, 0.1, 0.3]], np.float32), (7, 1))
    tokens = [(0, 0), (0, 2), (2, 4), (4, 5), (4, 7), (7, 9)]  # those of "abcd efgh"
    u = ScoredUtterance(0, 1, 1, "abcd efgh", ("text",), "real", None, {"text": a}, tokens)
    assert [w.weight for w in place_words(u)] == pytest.approx([0.3 / 0.35, 0.4 / 0.35])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00.0"), (59.96, "1:00.0"), (75.25, "1:15.2"), (3661, "1:01:01.0"), (-1e-9, "0:00.0")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_what_browsers_play_is_embedded_or_linked(clip, tmp_path):
    player = make_player(clip, tmp_path / "a/page.html")
    assert player.kind == "video" and player.source.startswith("data:video/mp4;base64,") and not player.note
    assert base64.b64decode(player.source.partition(",")[2]) == clip.read_bytes()
    name = os.fsdecode(b"caf\xe9 #1?.mp4")
    shutil.copy(clip, tmp_path / name)
    player = make_player(tmp_path / name, tmp_path / "a/page.html", left=0)
    assert player.source == "../caf%E9%20%231%3F.mp4"


@pytest.mark.parametrize(("name", "kind"), [("a.wav", "wav"), ("a.flac", "flac"), ("a.mp3", "mpeg")])
def test_sound_is_embedded(tmp_path, name, kind):
    soundfile.write(tmp_path / name, np.zeros(16000), 16000)
    player = make_player(tmp_path / name, tmp_path / "page.html")
    assert player.kind == "audio" and player.source.startswith(f"data:audio/{kind};base64,")


def other_film(path: Path, picture: str, sound: str) -> Path:
    """Pictures and sound in codecs and a container that few browsers know."""
    with av.open(str(path), "w") as container:
        v, a = container.add_stream(picture, rate=25), container.add_stream(sound, rate=44100)
        v.width, v.height, v.pix_fmt = 1280, 720, "yuv420p"
        for i in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((720, 1280, 3), 4 * i, np.uint8), format="rgb24")
            container.mux(v.encode(frame))
        resampler = av.AudioResampler(a.format, a.layout, a.rate, a.codec_context.frame_size or 1152)
        wave = (np.sin(np.arange(2 * 44100) / 20)[None] * 9000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        frame.sample_rate = 44100
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(a.encode(piece))
        container.mux(v.encode(None))
        container.mux(a.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "picture", "sound"),
    [("a.mpg", "mpeg1video", "mp2"), ("a.avi", "mpeg4", "mp2"), ("a.mkv", "libx264", "aac")],
)
def test_other_formats_are_encoded_again(tmp_path, name, picture, sound):
    file = other_film(tmp_path / name, picture, sound)
    player = make_player(file, tmp_path / "page.html")
    assert player.kind == "video" and "a copy is played" in player.note
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(base64.b64decode(player.source.partition(",")[2]))
    assert probe(copy).duration == pytest.approx(2, abs=0.15)
    assert len(read_audio(copy)) / 16000 == pytest.approx(2, abs=0.15)
    assert next(iter(read_frames(copy)))[1].shape == (360, 640, 3)
    linked = make_player(file, tmp_path / "pages/page.html", left=100)
    assert linked.source == "a.sdumc.mp4" and (tmp_path / "pages/a.sdumc.mp4").read_bytes() == copy.read_bytes()
    assert "beside this page" in linked.note


def test_a_file_that_cannot_be_played_has_a_page_all_the_same(tmp_path):
    (tmp_path / "x.mp4").write_text("not a film")
    clip = make_clip(scored(tmp_path / "x.mp4"), tmp_path / "x.html")
    text = page_html([clip])
    assert "no player: it could not be encoded" in text and "<video" not in text and "+0.95" in text


@pytest.mark.parametrize("target", ["pages", "one.html"])
def test_files_of_one_name_in_two_folders_have_copies_of_their_own(clip, tmp_path, monkeypatch, target):
    monkeypatch.setattr(clip_page, "_playable", lambda file: "")
    monkeypatch.setattr(clip_page, "encode", lambda file: ("video", bytes(21_000_000)))
    writer = PageWriter(tmp_path / "out" / target)
    (tmp_path / "out").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        writer.add(scored(shutil.copy(clip, tmp_path / folder / "1.mp4")))
    writer.close()
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.mp4")) == ["1.sdumc.mp4", "1_2.sdumc.mp4"]


def test_one_page_for_all_or_one_for_each(clip, tmp_path):
    again = tmp_path / "other" / clip.name
    again.parent.mkdir()
    shutil.copy(clip, again)
    pages = PageWriter(tmp_path / "pages")
    pages.add(scored(clip))
    pages.add(scored(again))
    shutil.copy(clip, tmp_path / "Index.mp4")
    pages.add(scored(tmp_path / "Index.mp4"))
    long = "a" + 125 * "é"
    pages.add(scored(shutil.copy(clip, tmp_path / f"{long}.mp4")))
    pages.fail("z <b>.mp4", "z <b>.mp4: no such media file")
    pages.close()
    short = f"a{109 * 'é'}.html"
    names = ["Index_2.html", short, "index.html", "my clip.html", "my clip_2.html", "z <b>.html"]
    assert sorted(p.name for p in (tmp_path / "pages").iterdir()) == names
    index = (tmp_path / "pages" / "index.html").read_text()
    links = re.findall(r'href="([^"]+html)"', index)
    assert links == ["my%20clip.html", "my%20clip_2.html", "Index_2.html", quote(short), quote("z <b>.html")]
    assert all((tmp_path / "pages" / unquote(link)).is_file() for link in links)
    assert "z &lt;b&gt;.mp4</a><br>" in index and ">no such media file<" in index and "4 scored, from −3" in index
    assert index.count(f">{pages._entries[0].score}<") == 4
    assert f">{clip}</a>" in index and f">{again}</a>" in index and ">Index.mp4</a>" in index  # where names are doubled
    failed = (tmp_path / "pages" / "z <b>.html").read_text()
    assert "<h1>z &lt;b&gt;.mp4</h1>" in failed and ">no such media file<" in failed and 'href="index.html"' in failed
    one = PageWriter(tmp_path / "one.html")
    one.add(scored(clip))
    one.add(scored(again))
    one.fail("z.mp4", "z.mp4: no such media file")
    one.close()
    text = (tmp_path / "one.html").read_text()
    assert text.count("<video") == 2 and "z.mp4 could not be scored" in text
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        PageWriter(tmp_path / "folder.html")
    with pytest.raises(UserError, match="is a file"):
        PageWriter(clip)


def test_attention_is_not_in_the_json(clip):
    (first, *_) = scored(clip).as_dict()["utterances"]
    known = {"start", "end", "score", "transcript", "modalities", "text", "status", "log_probability", "unlikely"}
    known |= {"strange_sound"}
    assert set(first) == known


# ------------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def tab(tmp_path):
    program = find_browser()
    if program is None:
        pytest.skip("no chromium; `tests/run.sh --with-browser` gets it")
    opened: list[Tab] = []

    def start(path: Path, width: int = 1280, dark: bool = False) -> Tab:
        opened.append(Tab(program, Path(tempfile.mkdtemp(dir=tmp_path)), width, dark=dark))
        opened[-1].open(path.as_uri())
        opened[-1].wait("[...document.querySelectorAll('video, audio')].every(v => v.readyState >= 2)")
        return opened[-1]

    yield start
    for one in opened:
        one.__exit__()


TIME = "document.querySelector('video').currentTime"


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(tab, page, width, dark):
    shown = tab(page, width, dark)
    assert shown.js("document.querySelector('video').duration") == pytest.approx(SECONDS, abs=0.2)
    assert shown.js("document.documentElement.scrollWidth") <= width
    assert shown.js("getComputedStyle(document.body).backgroundColor") == (
        "rgb(27, 31, 36)" if dark else "rgb(255, 255, 255)"
    )
    maps = "[...document.querySelectorAll('.strip img')]"
    assert shown.js(f"{maps}.filter(i => i.naturalWidth > 0 && i.clientWidth > 1).length") == 11
    assert {r.partition(":")[0] for r in shown.requests} <= {"file", "data", "blob"}
    assert not shown.problems
    # A click on a word plays from about where it is said; its utterance, its bar and itself are marked.
    place = shown.js("document.querySelectorAll('[data-utterance=\"2\"] .word')[2].dataset.time")
    shown.click("li[data-utterance='2'] .word:nth-child(3)")
    assert float(place) - 0.01 <= shown.wait(f"{TIME} > 3 && {TIME}") < SECONDS
    assert shown.wait("!document.querySelector('video').paused")
    shown.js("document.querySelector('video').pause()")
    shown.js(f"{TIME} = {float(place) + 0.01}")
    shown.wait("document.querySelectorAll('.current').length == 3")
    assert shown.js("document.querySelector('li.current').dataset.utterance") == "2"
    assert shown.js("document.querySelector('.word.current').dataset.time") == place
    assert shown.js("parseFloat(document.querySelector('.now').style.left)") == pytest.approx(
        100 * (float(place) + 0.01) / SECONDS, abs=0.1
    )
    # A click on a point of the course plays from there.
    shown.click(".bar[data-utterance='4']")
    assert shown.wait(f"{TIME} > 10 && {TIME}") <= SECONDS


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_by_keyboard(tab, page):
    shown = tab(page)
    shown.key("ArrowDown")
    assert 3 <= shown.wait(f"{TIME} >= 3 && {TIME}") < SECONDS
    shown.key(" ", " ")
    shown.wait("document.querySelector('video').paused")
    shown.js(f"{TIME} = 7")
    shown.js("document.querySelector('.course').focus()")
    shown.key("ArrowRight")
    shown.key("ArrowRight")
    assert shown.js(TIME) == pytest.approx(9, abs=0.1)
    assert shown.js("document.querySelector('.course').getAttribute('aria-valuetext')") == "0:09.0, score +4.20"
    shown.key("ArrowLeft")
    assert shown.js(TIME) == pytest.approx(8, abs=0.1)
    shown.js("document.querySelector('li[data-utterance=\"1\"] .at').focus()")
    for _ in range(3):
        shown.key("w", "w")
    assert shown.js("document.activeElement.textContent") == "liked"
    shown.key("Enter", "\r")
    shown.js("document.querySelector('video').pause()")
    assert shown.js(TIME) < 3
    # The next stop is a button of an utterance, and its outline can be seen.
    shown.js("document.querySelector('.course').focus()")
    shown.key("Tab")
    assert shown.js("document.activeElement.matches('li[data-utterance=\"1\"] .at')")
    assert shown.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    shown.key("Enter", "\r")
    shown.wait(f"{TIME} < 3")
    assert not shown.problems


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_in_print(tab, page):
    """White, without the player, complete, on a page or two, from dark mode too."""
    pdf = tab(page, dark=True).pdf()
    pages = max(int(n) for n in re.findall(rb"/Count (\d+)", pdf))
    assert 1 <= pages <= 2
    assert pdf.count(b"/Subtype /Image") >= 8


@pytest.mark.slow
@pytest.mark.browser
def test_what_was_encoded_again_plays(tab, tmp_path):
    file = other_film(tmp_path / "a.mpg", "mpeg1video", "mp2")
    writer = PageWriter(tmp_path / "a.html")
    writer.add(scored(file))
    writer.close()
    shown = tab(tmp_path / "a.html")
    assert shown.js("document.querySelector('video').duration") == pytest.approx(2, abs=0.2)
    assert shown.js("document.querySelector('video').videoHeight") == 360


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not shared.MEDIA.is_dir(), reason=f"no real recordings: no folder {shared.MEDIA}")
def test_a_real_recording_plays(tab, tmp_path):
    file = shared.MEDIA / "bbaf2n.mpg"
    writer = PageWriter(tmp_path / "a.html")
    writer.add(scored(file))
    writer.close()
    assert tab(tmp_path / "a.html").js("document.querySelector('video').duration") == pytest.approx(3, abs=0.1)
