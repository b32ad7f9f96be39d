"""Transcripts of the raw distributions: the words of each clip, and in MOSEI's its start and end.

MOSEI: ``Transcript/Segmented/Combined/<video>.txt`` with lines ``video___clip___start___end___text``. MOSI:
``Transcript/Segmented/<video>.annotprocessed`` with lines ``clip_DELIM_text``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdumc.data.tables import parse_number
from sdumc.errors import UserError


@dataclass(frozen=True)
class Clip:
    """A line of a transcript: ``start`` and ``end`` in seconds as written, ``where`` the file and line.

    The times are NaN in transcripts that have none, until :func:`give_times`.
    """

    video: str
    clip: str
    start: float
    end: float
    text: str
    where: str


@dataclass
class Transcripts:
    """Clips by video and clip id, and what could not be used: video -> clip or line -> reason."""

    clips: dict[str, dict[str, Clip]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def lack_times(self) -> bool:
        """Whether there is a clip without start and end."""
        return any(math.isnan(clip.end) for clips in self.clips.values() for clip in clips.values())


def read_transcripts(root: Path) -> Transcripts:
    """Read all transcripts below ``root``; a line that cannot be used is refused, with its reason.

    A clip id that a file gives twice is used when the lines are the same, and refused when they are not.

    Raises:
        UserError: there is no transcript folder, or it is empty.
    """
    folder = next(
        (f for f in (root / "Transcript/Segmented/Combined", root / "Transcript/Segmented") if f.is_dir()), None
    )
    if folder is None:
        raise UserError(f"{root}: has no Transcript/Segmented/Combined; complete the corpus or correct --corpus-dir")
    kinds = (".txt", ".annotprocessed")
    files = sorted(f for f in folder.iterdir() if f.suffix in kinds and not f.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: has no .txt or .annotprocessed files; complete the corpus")
    result = Transcripts()
    for file in files:
        clips, refused = _read_transcript(file)
        result.clips.setdefault(file.stem, {}).update(clips)
        if refused:
            result.refused.setdefault(file.stem, {}).update(refused)
    return result


def _read_transcript(file: Path) -> tuple[dict[str, Clip], dict[str, str]]:
    """The clips of one video, and clip or line -> why it is refused."""
    timed = file.suffix == ".txt"
    form = "video___clip___start___end___text of this video" if timed else "clip_DELIM_text"
    clips: dict[str, Clip] = {}
    refused: dict[str, str] = {}
    for number, line in _lines(file):
        where = f"{file}:{number}"
        clip = _parse_timed(line, file.stem, where) if timed else _parse_untimed(line, file.stem, where)
        if clip is None:
            refused[f"line{number}"] = f"not a line {form} ({where})"
        elif not _same(clip, clips.setdefault(clip.clip, clip)):
            refused[clip.clip] = f"clip twice in the transcript ({clips[clip.clip].where} and {where})"
    return {name: clip for name, clip in clips.items() if name not in refused}, refused


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and lines that are not empty; some transcripts were typed on Windows."""
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            line = raw.decode("cp1252", "replace")
        if line.strip():
            yield number, line


def _parse_timed(line: str, video: str, where: str) -> Clip | None:
    """A line ``video___clip___start___end___text`` of ``video``; None if it is not one."""
    # The video id can have underscores, also at its end; the text can have three in a row.
    if line.startswith(f"{video}___"):
        fields = [video, *line[len(video) + 3 :].split("___", 3)]
    else:
        fields = [f.strip() for f in line.split("___", 4)]
    if len(fields) != 5 or fields[0] != video or not fields[1].strip():
        return None
    start, end = seconds(fields[2]), seconds(fields[3])
    return None if math.isnan(start + end) else _clip(video, fields[1], start, end, fields[4], where)


def _parse_untimed(line: str, video: str, where: str) -> Clip | None:
    """A line ``clip_DELIM_text``; None if it is not one."""
    clip, delimiter, text = line.partition("_DELIM_")
    if not delimiter or not clip.strip():
        return None
    return _clip(video, clip, math.nan, math.nan, text, where)


def _clip(video: str, clip: str, start: float, end: float, text: str, where: str) -> Clip:
    return Clip(video, "".join(clip.split()), start, end, " ".join(text.split()), where)


def _same(a: Clip, b: Clip) -> bool:
    """Whether two lines say the same; NaN times are equal."""
    times = [(x, y) for x, y in ((a.start, b.start), (a.end, b.end)) if not math.isnan(x)]
    return a.text == b.text and all(x == y for x, y in times)


def give_times(transcripts: Transcripts, times: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Put start and end, by video and clip, into clips that have none."""
    for video, by_clip in times.items():
        clips = transcripts.clips.get(video, {})
        for name, (start, end) in by_clip.items():
            if name in clips and math.isnan(clips[name].end):
                clips[name] = replace(clips[name], start=start, end=end)


def seconds(text: str) -> float:
    """A finite number as written; NaN for anything else."""
    value = parse_number(text)
    return value if math.isfinite(value) else math.nan
