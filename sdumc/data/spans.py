"""Where the sound or the pictures of an utterance are: what tables say and media are read by."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MediaSpan:
    """A part of a media file: ``start`` to ``end`` in seconds, to the file's end when ``end`` is None.

    ``utterance`` only makes error messages better.
    """

    path: str
    start: float = 0.0
    end: float | None = None
    utterance: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.path if self.utterance is None else f"{self.path}: utterance {self.utterance!r}"
