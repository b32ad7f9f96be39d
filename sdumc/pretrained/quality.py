"""Quality of a model's transcript: word error rate, and detection of refusals, endless repeats and empty text."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sdumc.conditions import TEXT_STATUSES

# What chat models answer instead of a transcript. Kept narrow: people in real clips do say "I'm sorry, but I ...".
_REFUSALS = [
    r"\bas an? (ai|artificial intelligence)\b",
    r"\bi('m| am) (just |only |merely )?(an? )?(ai\b|artificial intelligence|(large )?language model|text[- ]based)",
    r"\bai language model\b",
    r"\blanguage model (developed|trained|created|made) by\b",
    r"\b(can't|cannot|can not|unable to|not able to|don't have the (ability|capability) to|"
    r"do not have the (ability|capability) to) (directly )?(transcribe|listen|hear|access|process|play)\b.{0,40}"
    r"\b(audio|speech|sound|recording|voice|file)",
    r"\bsorry,? (but )?i (can't|cannot|am unable to|'m unable to) (assist|help|fulfil+|transcribe|provide)\b",
    r"\b(please|could you|can you) (provide|upload|share|send)( me)?( with)? (the |an? |your |some )?(more )?"
    r"(audio|speech|recording|sound|voice)\b",
    r"\bno (audio|speech|recording|sound)( file| clip| input)? (was |were |is |has been )?(provided|attached|given)\b",
]
_REFUSAL = re.compile("|".join(_REFUSALS))


def normalise(text: str) -> str:
    """The form in which transcripts are compared.

    Unicode NFKC, lower case, typographic apostrophes made plain, hyphens and dashes made spaces, all other
    punctuation and symbols removed save apostrophes inside words, runs of white space made one space. Numbers and
    contractions stay as they are written.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub("[‘’ʼ`´]", "'", text)
    text = "".join(
        c if c == "'" or unicodedata.category(c)[0] not in "PSC" else (" " if unicodedata.category(c) == "Pd" else "")
        for c in re.sub(r"\s", " ", text)
    )
    text = re.sub(r"(?<!\w)'|'(?!\w)", "", text)
    return " ".join(text.split())


def word_error_rate(references: Mapping[str, str], hypotheses: Mapping[str, str]) -> dict[str, Any]:
    """Corpus word error rate of normalised texts over the ids that both sides have.

    Returns:
        ``wer`` (errors over reference words; None if there is no reference word), ``substitutions``, ``deletions``,
        ``insertions``, ``words`` of the references, ``utterances`` compared. References that are empty once
        normalised are left out.
    """
    import jiwer

    pairs = [
        (normalise(references[u]), normalise(hypotheses[u])) for u in sorted(references.keys() & hypotheses.keys())
    ]
    pairs = [(r, h) for r, h in pairs if r]
    if not pairs:
        return {"wer": None, "substitutions": 0, "deletions": 0, "insertions": 0, "words": 0, "utterances": 0}
    output = jiwer.process_words([r for r, _ in pairs], [h for _, h in pairs])
    words = output.hits + output.substitutions + output.deletions
    return {
        "wer": (output.substitutions + output.deletions + output.insertions) / words,
        "substitutions": output.substitutions,
        "deletions": output.deletions,
        "insertions": output.insertions,
        "words": words,
        "utterances": len(pairs),
    }


def find_loop(items: Sequence[Hashable], min_repeats: int = 4, min_length: int = 16) -> int | None:
    """Where a sequence starts to repeat a pattern without end.

    A loop is a pattern of any length that comes ``min_repeats`` times in a row or more and covers at least
    ``min_length`` items ("very very very good" is none).

    Returns:
        How many items to keep so that the loop's pattern stays once, or None if there is no loop.
    """
    n = len(items)
    best: int | None = None
    for period in range(1, n // min_repeats + 1):
        run = 0  # items in a row with items[i] == items[i - period]
        for i in range(period, n):
            run = run + 1 if items[i] == items[i - period] else 0
            if run + period >= max(period * min_repeats, min_length):
                keep = i + 1 - run
                best = keep if best is None else min(best, keep)
                break
    return best


def judge(text: str, tokens: Sequence[Hashable], ended: bool = True) -> tuple[str, int]:
    """Status of a transcript and how many of its tokens are kept.

    Args:
        text: the decoded transcript. tokens: its tokens, on which loops are looked for.
        ended: False if generation ran into its limit; shorter loops count then.

    Returns:
        ``(status, kept)`` with status one of ``ok``, ``empty``, ``refusal``, ``repeat`` (kept < len(tokens)), and
        ``limit`` (not ended, though no loop was found).
    """
    if not normalise(text):
        return "empty", 0
    if _REFUSAL.search(re.sub("[‘’ʼ`´]", "'", text.lower())):
        return "refusal", 0
    loop = find_loop(tokens) if ended else find_loop(tokens, min_repeats=3, min_length=9)
    if loop is not None:
        return "repeat", loop
    return ("ok" if ended else "limit"), len(tokens)


LIKELIHOOD = "log_probability"  # the name of a transcript's mean log-probability in notes, tables and yaml
_PERCENTILES = (1, 5, 25, 50, 75)


def likelihood(notes: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """How sure the writer of a set's transcripts was of those that are used as they are (``ok``, ``limit``): their
    number, mean and percentiles of the mean log-probability of a token. Empty where none has one."""
    values = [float(n[LIKELIHOOD]) for n in notes if n.get("status") in ("ok", "limit") and LIKELIHOOD in n]
    if not values:
        return {}
    points = np.percentile(values, _PERCENTILES)
    percentiles = {f"p{p}": round(float(x), 3) for p, x in zip(_PERCENTILES, points, strict=True)}
    return {"n": len(values), "mean": round(float(np.mean(values)), 3), **percentiles}


# ------------------------------------------------------------------------------------- sound like that of the train set

SOUND = "sound"  # the name of a clip's sketch in notes, and of what a set's sketches are like in its yaml
_SKETCH = 32  # numbers
_FEWEST = 50  # clips that say how the sound of a set is spread
_FOLDS = 20
_SHRINK = 0.02  # of the covariance towards a multiple of the identity


@lru_cache(maxsize=2)
def _directions(dim: int) -> np.ndarray:
    """(dim, 32): random, and the same for ever (numpy keeps RandomState's numbers)."""
    return np.random.RandomState(0).standard_normal((dim, _SKETCH)) / np.sqrt(dim)


def sketch(mean: np.ndarray) -> np.ndarray:
    """A clip's sound in 32 numbers: the mean (D,) of its encoder frames along fixed random directions."""
    return np.asarray(mean, np.float64) @ _directions(len(mean))


@dataclass(frozen=True)
class Sounds:
    """How the sketches of a set's clips are spread.

    Attributes:
        mean: (32,). whitening: (32, 32); a sketch less the mean, times this, has about unit variance in all directions.
        limit: the distance from the mean that one clip in a hundred of the set exceeds.
    """

    mean: np.ndarray
    whitening: np.ndarray
    limit: float

    @classmethod
    def of(cls, sketches: np.ndarray, speakers: Sequence[str]) -> Sounds | None:
        """From the sketches (N, 32) of a set's clips and their speakers; None where they are too few.

        So that a new voice does not count as strange, each clip's distance is measured from clips of other speakers
        (cross-validation over 20 groups of speakers); where those are too few, from all.
        """
        if len(sketches) < _FEWEST or not np.isfinite(sketches).all():
            return None
        group = {name: i % _FOLDS for i, name in enumerate(sorted(set(speakers)))}
        groups = np.array([group[name] for name in speakers])
        distances = np.zeros(len(sketches))
        for fold in np.unique(groups):
            own = groups == fold
            others = sketches[~own] if np.count_nonzero(~own) >= _FEWEST else sketches
            distances[own] = cls(*_spread(others), 0.0).distances(sketches[own])
        return cls(*_spread(sketches), float(np.percentile(distances, 99)))

    def distances(self, sketches: np.ndarray) -> np.ndarray:
        """(N, 32) -> (N,): how far sketches are from the mean, in standard deviations (Mahalanobis)."""
        return np.linalg.norm((sketches - self.mean) @ self.whitening, axis=1)

    def strange(self, found: np.ndarray | None) -> bool:
        """Whether a clip's sketch is farther away than those of 99% of the set's clips. None is no sound: False."""
        return found is not None and float(self.distances(found[None])[0]) > self.limit

    def as_dict(self) -> dict[str, Any]:
        """For yaml, a line for each row."""
        return {
            "limit": round(self.limit, 4),
            "mean": numbers(self.mean),
            "whitening": [numbers(row) for row in self.whitening],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sounds:
        """What :meth:`as_dict` wrote."""
        rows = [from_numbers(row) for row in values["whitening"]]
        return cls(from_numbers(values["mean"]), np.stack(rows), float(values["limit"]))


def _spread(sketches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    covariance = np.cov(sketches.T)
    level = max(float(np.trace(covariance)) / _SKETCH, 1e-12)
    covariance = (1 - _SHRINK) * covariance + _SHRINK * level * np.eye(_SKETCH)
    return sketches.mean(0), np.linalg.inv(np.linalg.cholesky(covariance)).T


def numbers(values: np.ndarray) -> str:
    """(N,) as text with spaces."""
    return " ".join(f"{v:.5g}" for v in values)


def from_numbers(text: str) -> np.ndarray:
    """What :func:`numbers` wrote."""
    return np.array([float(v) for v in text.split()])


def summarise(statuses: Mapping[str, str], fallbacks: Mapping[str, str]) -> dict[str, Any]:
    """``n``, ``counts`` of every status and of every fallback taken, for quality.json."""
    counts = Counter(statuses.values())
    return {
        "n": len(statuses),
        "counts": {s: counts.get(s, 0) for s in TEXT_STATUSES},
        "fallbacks": dict(sorted(Counter(f for f in fallbacks.values() if f and f != "none").items())),
    }
