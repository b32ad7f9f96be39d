"""The plan of the mini corpus: sentences, voices, faces and labels of all clips, from one seed.

The label of a clip is a stated function of its text, voice and face, see :func:`label_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mini import face, sentences, speech
from sdumc.errors import UserError

# What the pretrained models learn from, then the recipe's own sets. pretrain is sound only, as LibriSpeech is.
PRETRAIN = "pretrain"
SETS = (PRETRAIN, "train", "valid", "test")

# label = TEXT_WEIGHT sentiment + VOICE_WEIGHT arousal + FACE_WEIGHT expression + noise of LABEL_NOISE sd
TEXT_WEIGHT = 1.0
VOICE_WEIGHT = 0.6
FACE_WEIGHT = 0.8
# Arousal and expression are AGREEMENT * sentiment plus a uniform value in [-OWN_PART, OWN_PART].
AGREEMENT = 0.12
OWN_PART = 0.85
LABEL_NOISE = 0.15
LABEL_RANGE = (-3.0, 3.0)

# Voices of espeak-ng. All are used in pretrain; the other sets have them at other pitches and rates.
VARIANTS = ("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m7", "m8")


@dataclass(frozen=True)
class Settings:
    """Size and difficulty of the corpus; noise levels are standard deviations in full scale."""

    seed: int = 1
    pretrain: int = 400
    train: int = 600
    valid: int = 150
    test: int = 300
    pretrain_speakers: int = 20
    train_speakers: int = 30
    valid_speakers: int = 10
    test_speakers: int = 20
    noise_min: float = 0.12
    noise_max: float = 0.27
    pretrain_noise_min: float = 0.1
    pretrain_noise_max: float = 0.22
    fps: float = 10.0
    size: int = 96

    def count(self, name: str) -> tuple[int, int]:
        """Clips and speakers of a set."""
        return getattr(self, name), getattr(self, f"{name}_speakers")

    def noise(self, name: str) -> tuple[float, float]:
        """Least and most noise of a set."""
        if name == PRETRAIN:
            return self.pretrain_noise_min, self.pretrain_noise_max
        return self.noise_min, self.noise_max


@dataclass(frozen=True)
class Speaker:
    """A voice at rest (espeak-ng variant, pitch 0..100, words per minute) and the looks of a face."""

    name: str
    set: str
    variant: str
    pitch: float
    rate: float
    looks: face.Looks


@dataclass(frozen=True)
class Clip:
    """One utterance and what its label is made of."""

    utt: str
    speaker: Speaker
    text: str
    label: float  # [-3, 3], a multiple of 1/3
    sentiment: float  # of the text, [-3, 3]
    arousal: float  # of the voice, [-1, 1]
    expression: float  # the face's peak, [-1, 1]
    noise: float  # of the recording, full scale
    seed: int


def label_of(sentiment: float, arousal: float, expression: float, noise: float) -> float:
    """The label of a clip: a multiple of 1/3 in [-3, 3].

    sentiment + 0.6 arousal + 0.8 expression + noise (normal, sd 0.15), clipped to [-3, 3], rounded to thirds.
    Sentiment in [-3, 3] is what the words say (:func:`mini.sentences.sentiment`); arousal in [-1, 1] is how
    high, fast, lively and loud the speaker talks, measured from this speaker's own voice (:func:`voice_of`);
    expression in [-1, 1] is the peak of a brief movement of the face (:func:`mini.face.expression_track`).
    Both are 0.12 sentiment plus a uniform value in [-0.85, 0.85].
    """
    value = TEXT_WEIGHT * sentiment + VOICE_WEIGHT * arousal + FACE_WEIGHT * expression + noise
    return round(float(np.clip(value, *LABEL_RANGE)) * 3) / 3


def plan_corpus(settings: Settings) -> list[Clip]:
    """Decide everything about every clip; in order of set, then speaker, then utterance.

    No sentence and no speaker occurs in two sets, and every word of the other sets occurs in pretrain.

    Raises:
        UserError: a set has fewer clips than speakers, or no speaker.
    """
    rng = np.random.default_rng(settings.seed)
    taken: set[str] = set()
    words: set[str] | None = None
    clips: list[Clip] = []
    number = 0
    for name in SETS:
        count, speaker_count = settings.count(name)
        if not 1 <= speaker_count <= count:
            raise UserError(f"the {name} set needs at least one speaker and one clip for each, not {count} clips and "
                            f"{speaker_count} speakers")  # fmt: skip
        speakers = []
        for _ in range(speaker_count):
            number += 1
            variant = VARIANTS[3 * number % len(VARIANTS)]
            speakers.append(_draw_speaker(rng, f"spk{number:02d}", name, variant))
        drawn = sentences.draw_sentences(rng, count, taken, words)
        if name == PRETRAIN:
            words = {word for sentence in drawn for word in sentence.text.split()}
        taken |= {sentence.text for sentence in drawn}
        for i, sentence in enumerate(drawn):
            clips.append(_draw_clip(rng, settings, speakers[i * speaker_count // count], i, sentence))
    return clips


def _draw_speaker(rng: np.random.Generator, name: str, set_name: str, variant: str) -> Speaker:
    return Speaker(
        name=name,
        set=set_name,
        variant=variant,
        pitch=round(float(rng.uniform(38, 58)), 1),
        rate=round(float(rng.uniform(175, 195)), 1),
        looks=face.draw_looks(rng),
    )


def _draw_clip(
    rng: np.random.Generator, settings: Settings, speaker: Speaker, index: int, sentence: sentences.Sentence
) -> Clip:
    sentiment = round(sentences.sentiment(sentence), 4)
    own = rng.uniform(-OWN_PART, OWN_PART, 2)
    arousal, expression = (round(float(np.clip(AGREEMENT * sentiment + v, -1, 1)), 4) for v in own)
    return Clip(
        utt=f"{speaker.name}-{index + 1:04d}",
        speaker=speaker,
        text=sentence.text,
        label=label_of(sentiment, arousal, expression, LABEL_NOISE * float(rng.standard_normal())),
        sentiment=sentiment,
        arousal=arousal,
        expression=expression,
        noise=round(float(np.exp(rng.uniform(*np.log(settings.noise(speaker.set))))), 5),
        seed=int(rng.integers(1, 2**31)),
    )


def voice_of(clip: Clip) -> tuple[speech.Voice, float]:
    """How the speaker says this clip, and how loud (root mean square, full scale).

    Arousal a moves the speaker's own voice: pitch +22 a and its range +30 a (espeak-ng's scales of 0 to 100), rate
    +12 a %, loudness +5 a dB.
    """
    a, speaker = clip.arousal, clip.speaker
    voice = speech.Voice(
        name=f"en-us+{speaker.variant}",
        rate=round(speaker.rate * (1 + 0.12 * a)),
        pitch=round(speaker.pitch + 22 * a),
        range=round(50 + 30 * a),
    )
    return voice, 0.09 * 10 ** (5 * a / 20)
