"""Subtitles in SubRip (.srt) and WebVTT (.vtt): read as timed transcripts, written with scores."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdumc.errors import UserError

SUFFIXES = (".srt", ".vtt")
_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})")
_SENTENCE_END = re.compile(r"[.?!…。？！][\"'”’)\]]*$")
_PAUSE = 0.5  # seconds; a longer pause between two cues starts a new utterance


@dataclass(frozen=True)
class Cue:
    """One subtitle: ``start`` and ``end`` in seconds, and the words."""

    start: float
    end: float
    text: str


def read_subtitles(path: Path) -> list[Cue]:
    """The cues of an SRT or WebVTT file in time order, without markup and without empty cues.

    Raises:
        UserError: the file is not text, a time cannot be read, a cue ends before it starts, or there are no cues. The
            message names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the subtitles as UTF-8") from None
    cues, i = [], 0
    while i < len(lines):
        if "-->" not in lines[i]:
            i += 1
            continue
        number = i + 1
        start, _, rest = lines[i].partition("-->")
        times = [_seconds(t, path, number) for t in (start, rest)]
        if times[1] <= times[0]:
            raise UserError(f"{path}:{number}: the end is not after the start; correct the times")
        i += 1
        words = []
        while i < len(lines) and lines[i].strip() and "-->" not in lines[i]:
            words.append(lines[i])
            i += 1
        text = " ".join(re.sub(r"<[^>]*>|\{\\[^}]*\}", " ", " ".join(words)).split())
        if path.suffix.lower() == ".vtt":
            text = html.unescape(text)
        if text:
            cues.append(Cue(times[0], times[1], text))
    if not cues:
        raise UserError(f"{path}: no subtitles in it; expected lines such as 00:00:01,000 --> 00:00:04,000")
    return sorted(cues, key=lambda c: (c.start, c.end))


def _seconds(text: str, path: Path, number: int) -> float:
    match = _TIME.match(text.strip())
    if not match:
        raise UserError(f"{path}:{number}: {text.strip()!r} does not begin with a time such as 00:00:01,000")
    hours, minutes, seconds, fraction = match.groups()
    return 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds) + int(fraction.ljust(3, "0")) / 1000


def sentences(cues: Sequence[Cue], max_seconds: float) -> list[Cue]:
    """Join cues into utterances, which end with a sentence, at a pause of half a second, or before ``max_seconds``."""
    joined: list[Cue] = []
    for cue in cues:
        last = joined[-1] if joined else None
        if (
            last is not None
            and not _SENTENCE_END.search(last.text)
            and cue.start - last.end < _PAUSE
            and cue.end - last.start <= max_seconds
        ):
            joined[-1] = Cue(last.start, max(last.end, cue.end), f"{last.text} {cue.text}")
        else:
            joined.append(cue)
    return joined


def format_subtitles(cues: Sequence[Cue], kind: str) -> str:
    """The text of an ``srt`` or ``vtt`` file."""
    blocks = []
    for number, cue in enumerate(cues, start=1):
        # A blank line would end the cue, and "-->" would start another.
        text = " ".join(cue.text.split()).replace("-->", "->")
        if kind == "vtt":
            text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        times = f"{_clock(cue.start, kind)} --> {_clock(cue.end, kind)}"
        blocks.append(f"{number}\n{times}\n{text}\n")
    return ("WEBVTT\n\n" if kind == "vtt" else "") + "\n".join(blocks)


def _clock(seconds: float, kind: str) -> str:
    total = round(seconds * 1000)
    mark = "," if kind == "srt" else "."
    return f"{total // 3600000:02d}:{total // 60000 % 60:02d}:{total // 1000 % 60:02d}{mark}{total % 1000:03d}"
