"""Templated English with graded opinions, and the function that grades a whole sentence.

A sentence holds one opinion, or, as people say it, two or three: clauses, ``the NOUN was [DEGREE] ADJECTIVE``, and
remarks such as ``i loved it`` before or after them; without a remark it may have an opener and a closer that say
nothing. Its sentiment is not a sum over its words: degree words multiply, a negation turns round and weakens, after
``but`` the second clause decides, and several opinions are averaged. See :func:`sentiment`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

OPENERS = (
    "honestly",
    "i think",
    "we thought",
    "to be fair",
    "my friend said",
    "they told us",
    "people agree that",
    "looking back",
)
CLOSERS = ("", "this time", "last night", "in the end", "once again", "on the whole", "yesterday evening")
NOUNS = (
    "movie",
    "story",
    "music",
    "acting",
    "picture",
    "book",
    "singer",
    "dinner",
    "hotel",
    "service",
    "garden",
    "phone",
    "camera",
    "lecture",
    "journey",
    "concert",
)
# Sentiment of each adjective; 0 is neutral. They are few, so that each occurs some dozens of times in train: the hidden
# states of the small LLM do not relate synonyms as a large model's do. Most are long, since opinion words of real
# speech are misheard no more often than others (README.md has the numbers).
ADJECTIVES = {
    "terrible": -2.2,
    "ridiculous": -1.5,
    "boring": -0.9,
    "typical": 0.0,
    "amusing": 0.9,
    "excellent": 1.5,
    "wonderful": 2.2,
}
# Words before the adjective, what they multiply its value by, and how often they are chosen.
DEGREES = {
    "": (1.0, 0.48),
    "slightly": (0.5, 0.14),
    "very": (1.35, 0.16),
    "not": (-0.7, 0.22),
}
# Opinions of a fixed wording, before or after the clauses, and what they say.
REMARKS = {
    "what a waste": -2.2,
    "i was disappointed": -1.5,
    "i fell asleep": -0.9,
    "it was worth it": 0.9,
    "i enjoyed it": 1.5,
    "i loved it": 2.2,
}
BUT_WEIGHTS = (0.25, 0.75)  # of the clause before "but" and of the one after it
AND_WEIGHTS = (0.5, 0.5)
# How many sentences hold one clause, two clauses, a clause and a remark, two clauses and a remark.
FORMS = (0.67, 0.12, 0.09, 0.12)
AGREE = 0.8  # chance that a further opinion has the sign of the first


@dataclass(frozen=True)
class Clause:
    """``the NOUN was [DEGREE] ADJECTIVE``."""

    noun: str
    degree: str
    adjective: str

    @property
    def words(self) -> str:
        return " ".join(part for part in ("the", self.noun, "was", self.degree, self.adjective) if part)

    @property
    def value(self) -> float:
        """Value of the adjective times that of the degree words, in [-3, 3]."""
        return ADJECTIVES[self.adjective] * DEGREES[self.degree][0]


@dataclass(frozen=True)
class Sentence:
    """An opener, a clause or two joined by ``and``/``but``, and a closer; either end may be a remark, or empty."""

    opener: str
    clauses: tuple[Clause, ...]
    joint: str
    closer: str

    @property
    def text(self) -> str:
        clauses = f" {self.joint} ".join(clause.words for clause in self.clauses)
        return " ".join(part for part in (self.opener, clauses, self.closer) if part)


def sentiment(sentence: Sentence) -> float:
    """What the words alone say, in [-3, 3].

    One clause: its value (adjective x degree; a negation multiplies by -0.7). Two clauses: the mean for ``and``,
    0.25 first + 0.75 second for ``but``. A remark counts as much as a clause.
    """
    values = [clause.value for clause in sentence.clauses]
    said = values[0]
    if len(values) == 2:
        first, second = BUT_WEIGHTS if sentence.joint == "but" else AND_WEIGHTS
        said = first * values[0] + second * values[1]
    remarks = [REMARKS[part] for part in (sentence.opener, sentence.closer) if part in REMARKS]
    return (len(values) * said + sum(remarks)) / (len(values) + len(remarks))


def vocabulary() -> list[str]:
    """Every word a sentence can hold, sorted."""
    parts = (OPENERS, CLOSERS, NOUNS, ADJECTIVES, DEGREES, REMARKS, ("the", "was", "and", "but"))
    return sorted({word for phrases in parts for phrase in phrases for word in phrase.split()})


def _draw_clause(rng: np.random.Generator, noun: str) -> Clause:
    degrees = list(DEGREES)
    degree = degrees[rng.choice(len(degrees), p=[DEGREES[d][1] for d in degrees])]
    # A neutral adjective takes no degree word.
    neutral = not degree and rng.random() < 0.2
    pool = [adjective for adjective, value in ADJECTIVES.items() if (value == 0) == neutral]
    return Clause(noun, degree, pool[rng.integers(len(pool))])


def _draw_agreeing(rng: np.random.Generator, noun: str, value: float) -> Clause:
    """A clause of the sign of ``value``, or of the other one (:data:`AGREE`)."""
    agrees = rng.random() < AGREE
    while True:
        clause = _draw_clause(rng, noun)
        if not clause.value * value or (clause.value * value > 0) == agrees:
            return clause


def draw_sentence(rng: np.random.Generator) -> Sentence:
    """Draw one sentence of 5 to 17 words, most of 8 to 12."""
    double, remarked = ((False, False), (True, False), (False, True), (True, True))[rng.choice(4, p=FORMS)]
    opener = OPENERS[rng.integers(len(OPENERS))]
    first, second = (NOUNS[i] for i in rng.choice(len(NOUNS), size=2, replace=False))
    clauses: tuple[Clause, ...] = (_draw_clause(rng, first),)
    joint = closer = ""
    if double:
        clauses = (clauses[0], _draw_agreeing(rng, second, clauses[0].value))
        # Mostly "and" between clauses of the same sign and "but" between opposite ones; 15% are the other way round.
        opposed = clauses[0].value * clauses[1].value < 0
        joint = "but" if opposed == (rng.random() < 0.85) else "and"
    if remarked:
        # The last clause is what the speaker means.
        sign = clauses[-1].value * (1 if rng.random() < AGREE else -1)
        pool = [remark for remark, value in REMARKS.items() if value * sign >= 0]
        remark = pool[rng.integers(len(pool))]
        opener, closer = (remark, "") if rng.random() < 0.5 else ("", remark)
    elif double:
        opener = opener if rng.random() < 0.3 else ""
    else:
        closer = CLOSERS[rng.integers(1, len(CLOSERS))]
    return Sentence(opener, clauses, joint, closer)


def draw_sentences(
    rng: np.random.Generator, count: int, taken: Collection[str] = (), words: Collection[str] | None = None
) -> list[Sentence]:
    """Draw ``count`` sentences, no two with the same text, none with a text in ``taken``, all of ``words`` if given."""
    seen = set(taken)
    sentences: list[Sentence] = []
    while len(sentences) < count:
        sentence = draw_sentence(rng)
        if sentence.text not in seen and (words is None or all(word in words for word in sentence.text.split())):
            seen.add(sentence.text)
            sentences.append(sentence)
    return sentences
