"""The page of scored clips, ``sdumc predict --html``: players, the course of sentiment, transcripts, attention.

A page is one file with inline style, pictures as data URIs and a script of its own; a policy in it forbids the browser
every connection. Its look is that of the report. A player has the file as a browser can play it: embedded, linked, or
encoded again.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import av
import numpy as np

from sdumc.conditions import MODALITIES
from sdumc.data.media import describe, read_frames, read_sound
from sdumc.errors import UserError
from sdumc.files import atomic_write, write_text
from sdumc.prediction.scorer import ScoredFile, ScoredUtterance
from sdumc.reporting.drawing import HeatMap, Scale, heat_map, picture_of, scale_of, time_axis, words_axis
from sdumc.reporting.report import templates
from sdumc.scale import CMU, LabelScale

if TYPE_CHECKING:
    from jinja2 import Environment


EMBEDDED = 20e6  # bytes; larger media are linked
_MOST_BYTES = 220  # of a page's name: a file's has at most 255, those of ".html" and of temporary endings among them
ROWS = {"audio": "sound", "text": "words", "video": "pictures"}


@dataclass
class Word:
    """A word, about when it is said (seconds), and how much the fused query looks at it (1: as at others); None: not
    known."""

    text: str
    time: float
    weight: float | None


@dataclass
class Row:
    """An utterance's part of the strip of one modality below the course."""

    modality: str
    image: str  # attention of the fused query, as a data URI; empty: not there
    words: str


@dataclass
class Utterance:
    """An utterance on the page."""

    number: int
    scored: ScoredUtterance
    words: list[Word]
    rows: list[Row]
    maps: list[HeatMap]


@dataclass
class Clip:
    """A file on the page."""

    name: str
    scored: ScoredFile
    player: Player
    utterances: list[Utterance]
    scales: dict[str, Scale]
    ticks: list[float] = field(default_factory=list)  # seconds

    @property
    def labels(self) -> LabelScale:
        """The scale of the scores."""
        return LabelScale(*self.scored.scale, scheme="none")

    @property
    def duration(self) -> float:
        return max([self.scored.duration, *(u.scored.end for u in self.utterances)], default=0.0) or 1.0


@dataclass
class Entry:
    """A file in the list of a folder's pages; ``error`` is the reason when it could not be scored."""

    name: str
    path: str
    error: str = ""
    link: str = ""
    duration: float = 0.0
    score: str = ""
    level: float = 0.0  # the score on the network's scale
    notes: int = 0


class PageWriter:
    """Writes the pages of scored files to where ``--html`` says: a file for all, or a folder with one for each and
    ``index.html``, which lists all files, also those that could not be scored.

    Raises:
        UserError: a folder has the name of the file, or the other way round.
    """

    def __init__(self, target: str | Path):
        self.target = Path(target)
        self.single = self.target.suffix.lower() in (".html", ".htm")
        if self.single and self.target.is_dir():
            raise UserError(f"--html {target}: is a folder; give the name of a file, or of a folder without .html")
        if not self.single and self.target.exists() and not self.target.is_dir():
            raise UserError(f"--html {target}: is a file whose name does not end in .html; give a folder")
        self._clips: list[Clip] = []
        self._names = {"index"}
        self._entries: list[Entry] = []
        self._failed: list[tuple[str, str]] = []
        self._ends: tuple[str, ...] = ()
        self._left = EMBEDDED

    def add(self, scored: ScoredFile) -> None:
        """Take a scored file, which is written now if it has a page of its own."""
        page = self._page(scored.file)
        if self.single:
            clip = make_clip(scored, self.target, self._left, copy=page.stem)
            self._left -= len(clip.player.source) * 3 // 4
            self._clips.append(clip)
            return
        clip = make_clip(scored, page, copy=page.stem)
        write_text(page, page_html([clip]))
        self._entries.append(_entry(clip, page.name))
        self._ends = tuple(_number(clip.labels, end, 0) for end in scored.scale)

    def fail(self, file: str, reason: str) -> None:
        """Take a file that could not be scored; in a folder it has a page that says why."""
        self._failed.append((file, reason))
        if self.single:
            return
        page = self._page(file)
        error = _printable(reason.removeprefix(f"{file}: "))
        entry = Entry(_printable(Path(file).name or file), _printable(file), error, quote(os.fsencode(page.name)))
        write_text(page, _templates().get_template("clip_failed.html").render(entry=entry))
        self._entries.append(entry)

    def _page(self, file: str) -> Path:
        """The name of a file's page, which no other has."""
        stem = name = Path(file).stem or "page"
        if len(raw := os.fsencode(stem)) > _MOST_BYTES:
            stem = name = raw[:_MOST_BYTES].decode("utf-8", "ignore")
        number = 1
        while name.lower() in self._names:  # some file systems do not tell A from a
            number += 1
            name = f"{stem}_{number}"
        self._names.add(name.lower())
        return self.target / f"{name}.html"

    def close(self) -> None:
        """Write the page for all, or the list."""
        if self.single:
            write_text(self.target, page_html(self._clips, self._failed))
            return
        names = Counter(e.name for e in self._entries)
        for entry in self._entries:
            if names[entry.name] > 1:  # 1.mp4 of several folders
                entry.name = entry.path
        values = {"entries": self._entries, "scored": len(self._entries) - len(self._failed), "ends": self._ends}
        write_text(self.target / "index.html", _templates().get_template("clip_index.html").render(values))


def _entry(clip: Clip, page: str) -> Entry:
    scored, level = clip.scored, clip.labels.to_network(clip.scored.overall)
    score = _number(clip.labels, scored.overall, 2)
    link = quote(os.fsencode(page))
    return Entry(clip.name, _printable(scored.file), "", link, scored.duration, score, level, len(scored.notes))


def _number(labels: LabelScale, score: float, digits: int) -> str:
    return labels.format(score, digits).replace("-", "−")


def make_clip(
    scored: ScoredFile, page: Path | None, left: float = EMBEDDED, name: str = "", copy: str | None = None
) -> Clip:
    """What a page shows of a file; ``page``, ``left`` and ``copy`` as :func:`make_player` has them."""
    scales = {}
    for m in MODALITIES:
        if maps := [u.attention[m] for u in scored.utterances if m in u.attention]:
            scales[m] = scale_of(maps)
    utterances = [_utterance(i, u, scales) for i, u in enumerate(scored.utterances, start=1)]
    player = make_player(Path(scored.file), page, left, copy)
    clip = Clip(_printable(name or Path(scored.file).name), scored, player, utterances, scales)
    clip.ticks = _ticks(clip.duration)
    return clip


def page_html(clips: Sequence[Clip], failed: Sequence[tuple[str, str]] = ()) -> str:
    """The page as text."""
    return _templates().get_template("clip.html").render(clips=clips, failed=failed)


def _templates() -> Environment:
    environment = templates(Path(__file__).parent)
    environment.globals.update(clock=clock, height=height, strength=strength, row_names=ROWS)
    environment.filters["printable"] = _printable
    return environment


def _utterance(number: int, u: ScoredUtterance, scales: dict[str, Scale]) -> Utterance:
    rows, maps = [], []
    for m in MODALITIES:
        a = u.attention.get(m)
        if m not in u.modalities:
            rows.append(Row(m, "", f"no {ROWS[m]}"))
            continue
        rows.append(Row(m, "" if a is None else picture_of(a[:1], scales[m]), f"attention over {ROWS[m]}"))
        if a is None:
            continue
        if m == "text":
            tokens = [u.transcript[i:j].strip() or "·" for i, j in u.tokens]
            axis = words_axis(f"{u.text} text", tokens, a.shape[1])
        else:
            seconds = u.end - u.start
            axis = time_axis(m, a.shape[1], a.shape[1] / seconds if seconds > 0 else None)
        maps.append(heat_map(a, scales[m], axis, f"utterance {number}"))
    return Utterance(number, u, place_words(u), rows, maps)


def place_words(u: ScoredUtterance) -> list[Word]:
    """The words of a transcript, with about the time of each: nobody knows it, so that a word's share of the utterance
    is that of its letters."""
    spans = [m.span() for m in re.finditer(r"\S+", u.transcript)]
    letters = sum(b - a for a, b in spans)
    weights = _word_weights(u, spans)
    words, before = [], 0
    for (a, b), weight in zip(spans, weights, strict=True):
        words.append(Word(u.transcript[a:b], u.start + (u.end - u.start) * before / letters, weight))
        before += b - a
    return words


def _word_weights(u: ScoredUtterance, spans: Sequence[tuple[int, int]]) -> list[float | None]:
    """How much the fused query looks at each word: the sum of its tokens' attention, in multiples of a word's mean."""
    if "text" not in u.attention or not u.tokens:
        return [None] * len(spans)
    sums = np.zeros(len(spans))
    for (a, b), weight in zip(u.tokens, u.attention["text"][0], strict=True):
        for i, (first, end) in enumerate(spans):
            if b > a and min(b, end) > max(a, first):
                sums[i] += weight
                break
    return [float(x) for x in sums / max(sums.mean(), 1e-9)] if len(sums) else []


def clock(seconds: float, digits: int = 1) -> str:
    """Minutes and seconds, with hours where there are any."""
    rounded = round(max(seconds, 0.0), digits)
    minutes, rest = divmod(rounded, 60)
    text = f"{rest:0{3 + digits if digits else 2}.{digits}f}"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{text}" if hours else f"{minutes}:{text}"


def height(score: float) -> float:
    """Where a score, on the network's scale, is on the course, in per cent from the bottom."""
    return 100 * (min(max(score, CMU.low), CMU.high) - CMU.low) / (CMU.high - CMU.low)


def strength(score: float) -> float:
    """How strong the colour of a score, on the network's scale, is: from 0 (neutral) to 1."""
    return min(abs(score) / CMU.high, 1.0)


def _ticks(duration: float) -> list[float]:
    """Round times, at most six, from 0 on."""
    for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600):
        if duration / step <= 5.5:
            break
    return [round(float(t), 3) for t in np.arange(0, duration + 1e-9, step)]


def _printable(text: str) -> str:
    """A file's name as UTF-8: what cannot be decoded becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


_HEIGHT, _FPS, _RATE = 360, 25, 24000  # of what is encoded again
# What all common browsers play, telephones too: container, codecs of pictures, codecs of sound.
_MP4, _WEBM = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
_PLAYABLE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    _MP4: (("h264",), ("aac", "mp3")),
    _WEBM: (("vp8", "vp9"), ("opus", "vorbis")),
    "mp3": ((), ("mp3", "mp3float")),
    "wav": ((), ("pcm_s16le", "pcm_u8", "pcm_s24le")),
    "flac": ((), ("flac",)),
}
_TYPES = {_MP4: "mp4", _WEBM: "webm", "mp3": "mpeg"}


@dataclass(frozen=True)
class Player:
    """``kind`` is video or audio; ``source`` a data URI or a relative link; ``note`` says what was changed, if anything
    was, or why there is no player (``kind`` and ``source`` are empty then)."""

    kind: str
    source: str
    note: str = ""


def make_player(file: Path, page: Path | None, left: float = EMBEDDED, copy: str | None = None) -> Player:
    """What plays ``file`` on the page that is to be written as ``page``.

    A file of at most ``left`` bytes is part of the page; a larger one is linked relative to it. What browsers do not
    play is encoded again as MP4 (H.264 of at most 360 lines and 25 pictures a second, AAC of one channel) and, where
    that is larger, written beside the page as ``<copy>.sdumc.mp4``. Without ``page`` everything is embedded.
    """
    media_type = _playable(file)
    if media_type and file.stat().st_size <= left:
        return Player(media_type.partition("/")[0], _data_uri(media_type, file.read_bytes()))
    if media_type and page is not None:
        return Player(media_type.partition("/")[0], _link(file, page))
    try:
        kind, content = encode(file)
    except (UserError, av.error.FFmpegError, ValueError) as e:
        return Player("", "", f"no player: it could not be encoded for browsers ({e})")
    note = "a copy is played: one channel of sound" + (", small pictures" if kind == "video" else "")
    if len(content) <= left or page is None:
        return Player(kind, _data_uri(f"{kind}/mp4", content), note)
    beside = page.parent / f"{copy or file.stem}.sdumc.mp4"
    with atomic_write(beside, "wb") as f:
        f.write(content)
    return Player(kind, _link(beside, page), f"{note}; it is the file {beside.name} beside this page")


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _link(file: Path, page: Path) -> str:
    return quote(os.fsencode(os.path.relpath(file.absolute(), page.absolute().parent)))


def _playable(file: Path) -> str:
    """The media type with which browsers play a file as it is; empty if they do not."""
    try:
        found = describe(file)
    except UserError:
        return ""
    form, tracks = found.format, {"video": found.video, "audio": found.audio}
    if form not in _PLAYABLE or (form == _WEBM and file.suffix.lower() != ".webm"):
        return ""
    for kind, known in zip(("video", "audio"), _PLAYABLE[form], strict=True):
        # Of several tracks a browser may take another one than was scored; cover pictures are rare enough.
        names = {name for name, _ in tracks[kind]}
        if len(tracks[kind]) > 1 or not names <= {*known, *(f"lib{name}" for name in known)}:
            return ""
    if any(pixels not in ("yuv420p", "yuvj420p") for _, pixels in found.video):
        return ""
    return f"{'video' if found.video else 'audio'}/{_TYPES.get(form, form)}"


def encode(file: Path) -> tuple[str, bytes]:
    """``video`` or ``audio``, and the file as an MP4 for browsers.

    Raises:
        UserError: neither sound nor pictures can be read.
    """
    wave, problem = None, None
    try:
        wave, _ = read_sound(file, _RATE)
    except UserError as e:
        problem = e
    pictures: Iterator[tuple[float, np.ndarray]] = iter(())
    first = None
    with contextlib.suppress(UserError):
        pictures = read_frames(file, _FPS)
        first = next(pictures, None)
    if wave is None and first is None:
        raise problem or UserError(f"{file}: nothing in it can be read")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        tracks = _Tracks(container, None if first is None else first[1], wave)
        with contextlib.suppress(UserError):  # what could be read before is played
            for _, picture in chain([first] if first else [], pictures):
                tracks.show(picture)
        tracks.close()
    return ("audio" if first is None else "video"), out.getvalue()


class _Tracks:
    """Pictures and sound of a new MP4, interleaved."""

    def __init__(self, container: av.container.OutputContainer, first: np.ndarray | None, wave: np.ndarray | None):
        self.container, self.wave, self.count, self.sent = container, wave, 0, 0
        self.pictures = self.sound = None
        if first is not None:
            height, width = first.shape[:2]
            scale = min(1.0, _HEIGHT / height)
            self.pictures = container.add_stream("libx264", rate=_FPS)
            self.pictures.width, self.pictures.height = (max(round(n * scale / 2) * 2, 2) for n in (width, height))
            self.pictures.pix_fmt = "yuv420p"
            self.pictures.options = {"crf": "26", "preset": "veryfast"}
        if wave is not None:
            self.sound = container.add_stream("aac", rate=_RATE, layout="mono")
            self.sound.bit_rate = 64000

    def show(self, picture: np.ndarray) -> None:
        assert self.pictures is not None
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(self.pictures.width, self.pictures.height, "yuv420p")
        frame.pts, frame.time_base = self.count, Fraction(1, _FPS)
        self.container.mux(self.pictures.encode(frame))
        self.count += 1
        self._play(round(self.count / _FPS * _RATE))

    def _play(self, until: int) -> None:
        if self.sound is None or self.wave is None:
            return
        while self.sent < min(until, len(self.wave)):
            piece = np.clip(self.wave[None, self.sent : self.sent + 1024], -1, 1).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = _RATE, self.sent, Fraction(1, _RATE)
            self.container.mux(self.sound.encode(frame))
            self.sent += piece.shape[1]

    def close(self) -> None:
        if self.wave is not None:
            self._play(len(self.wave))
        if self.pictures is not None:
            self.container.mux(self.pictures.encode(None))
        if self.sound is not None:
            self.container.mux(self.sound.encode(None))
