"""The page of scored clips, ``sdumc predict --html``: players, the course of sentiment, transcripts, attention.

A page is one file with inline style, pictures as data URIs and a script of its own; a policy in it forbids the browser
every connection. Its look is that of the report.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from sdumc.conditions import MODALITIES
from sdumc.errors import UserError
from sdumc.files import write_text
from sdumc.prediction.player import EMBEDDED, Player, make_player
from sdumc.prediction.scorer import ScoredFile, ScoredUtterance
from sdumc.reporting.drawing import HeatMap, Scale, heat_map, picture_of, scale_of, time_axis, words_axis
from sdumc.reporting.report import templates
from sdumc.scale import CMU, LabelScale

if TYPE_CHECKING:
    from jinja2 import Environment

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
        if self.single:
            clip = make_clip(scored, self.target, self._left)
            self._left -= len(clip.player.source) * 3 // 4
            self._clips.append(clip)
            return
        page = self._page(scored.file)
        clip = make_clip(scored, page)
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


def make_clip(scored: ScoredFile, page: Path | None, left: float = EMBEDDED, name: str = "") -> Clip:
    """What a page shows of a file; ``left`` and ``page`` as :func:`sdumc.prediction.player.make_player` has them."""
    scales = {}
    for m in MODALITIES:
        if maps := [u.attention[m] for u in scored.utterances if m in u.attention]:
            scales[m] = scale_of(maps)
    utterances = [_utterance(i, u, scales) for i, u in enumerate(scored.utterances, start=1)]
    player = make_player(Path(scored.file), page, left)
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
