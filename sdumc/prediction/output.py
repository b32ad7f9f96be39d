"""Scores for people: an aligned table, and subtitles."""

from __future__ import annotations

from pathlib import Path

from sdumc.errors import UserError
from sdumc.files import shown, write_text
from sdumc.prediction.scorer import ScoredFile, ScoredUtterance
from sdumc.prediction.subtitles import Cue, format_subtitles
from sdumc.scale import LabelScale

_HEADER = ("start", "end", "score", "audio", "text", "video", "transcript")


def table(scored: ScoredFile) -> str:
    """The utterances of a file in columns, the overall score, and notes."""
    rows = [_row(u, _scale(scored)) for u in scored.utterances]
    rows.append(("", "all", _scale(scored).format(scored.overall), "", "", "", ""))
    widths = [max(len(r[i]) for r in [_HEADER, *rows]) for i in range(len(_HEADER))]
    lines = [f"{shown(scored.file)} ({scored.duration:.1f} s), scores from {_scale(scored).ends}"]
    for row in (_HEADER, *rows):
        numbers = [cell.rjust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        words = [cell.ljust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  " + "  ".join(numbers + words).rstrip())
    return "\n".join([*lines, *(f"  note: {note}" for note in scored.notes)])


def _scale(scored: ScoredFile) -> LabelScale:
    return LabelScale(*scored.scale, scheme="none")


def _row(u: ScoredUtterance, scale: LabelScale) -> tuple[str, ...]:
    audio, video = ("yes" if m in u.modalities else "-" for m in ("audio", "video"))
    # Of simulated and recognised text, what is not as it should be.
    doubt = u.status if u.status not in (None, "ok") else "unlikely" if u.unlikely else None
    text = (u.text or "-") + (f" ({doubt})" if doubt else "")
    return (f"{u.start:.2f}", f"{u.end:.2f}", scale.format(u.score), audio, text, video, u.transcript)


def subtitles(scored: ScoredFile, kind: str) -> str:
    """An ``srt`` or ``vtt`` file with a cue for each utterance: its score and its transcript."""
    cues = [
        Cue(u.start, u.end, f"[{_scale(scored).format(u.score, 1)}] {u.transcript}".strip()) for u in scored.utterances
    ]
    return format_subtitles(cues, kind)


def write_subtitles(scored: ScoredFile, kind: str, output_dir: Path | None = None) -> Path:
    """Write ``<name>.sdumc.<kind>`` beside the file or into ``output_dir``; players show such a file with the video.

    Raises:
        UserError: it cannot be written there.
    """
    file = Path(scored.file)
    path = (output_dir or file.parent) / f"{file.stem}.sdumc.{kind}"
    try:
        write_text(path, subtitles(scored, kind))
    except OSError as e:
        raise UserError(
            f"{shown(path)}: cannot be written ({e.strerror}); give another place with --output-dir"
        ) from None
    return path
