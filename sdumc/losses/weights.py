"""The factors of the objective's terms. No torch here: the command line reads its defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveWeights:
    """The factor of each term; 0 leaves a term out. The defaults are the released system's.

    ``temperature`` is Rank-N-Contrast's.
    """

    mse_complete: float = 0.5
    mse_missing: float = 0.5
    distil_query: float = 0.1
    distil_content: float = 0.7
    similarity: float = 0.13
    contrast: float = 0.5
    temperature: float = 2.0
