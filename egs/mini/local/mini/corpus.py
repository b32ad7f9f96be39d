"""The mini corpus: who says what, in which voice and with which face, and the clips that show it.

The label of a clip is a stated function of its text, voice and face, see :func:`label_of`. Everything follows from
one seed. The plan of the whole corpus is made first; the clips of one speaker are then made in order by one fresh
process, so that the bytes do not depend on how many processes there are.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from mini import face, sentences, speech
from sdumc.data import media
from sdumc.errors import UserError
from sdumc.files import write_json, write_text
from sdumc.processes import die_with

SETS = ("train", "valid", "test")
TABLE = "corpus.tsv"
SPEAKERS = "speakers.json"
COLUMNS = ("utt", "set", "speaker", "text", "label", "sentiment", "arousal", "expression", "noise", "clip")

# label = TEXT_WEIGHT sentiment + VOICE_WEIGHT arousal + FACE_WEIGHT expression + noise of LABEL_NOISE sd
TEXT_WEIGHT = 1.0
VOICE_WEIGHT = 0.6
FACE_WEIGHT = 0.8
# Voice and face lean to what is said: per unit of sentiment, beside a uniform part of their own.
AGREEMENT = 0.12
OWN_PART = 0.85
LABEL_NOISE = 0.15
LABEL_RANGE = (-3.0, 3.0)

# Voices of espeak-ng. Every one speaks in train; valid and test have them at other pitches and rates.
VARIANTS = ("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m7", "m8")


@dataclass(frozen=True)
class Settings:
    """Size and difficulty of the corpus; noise levels are standard deviations in full scale."""

    seed: int = 1
    train: int = 400
    valid: int = 50
    test: int = 60
    train_speakers: int = 20
    valid_speakers: int = 4
    test_speakers: int = 5
    noise_min: float = 0.03
    noise_max: float = 0.08
    fps: float = 25.0
    size: int = 96

    def count(self, name: str) -> tuple[int, int]:
        """Clips and speakers of a set."""
        return getattr(self, name), getattr(self, f"{name}_speakers")


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
    Both lean to the sentiment by 0.12 of it, beside a uniform part in [-0.85, 0.85] of their own.
    """
    value = TEXT_WEIGHT * sentiment + VOICE_WEIGHT * arousal + FACE_WEIGHT * expression + noise
    return round(float(np.clip(value, *LABEL_RANGE)) * 3) / 3


def plan_corpus(settings: Settings) -> list[Clip]:
    """Decide everything about every clip; in order of set, then speaker, then utterance.

    No sentence occurs in two sets, and every word that valid and test use occurs in train.

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
        if name == "train":
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
        noise=round(float(np.exp(rng.uniform(np.log(settings.noise_min), np.log(settings.noise_max)))), 5),
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


def render(clip: Clip, synthesiser: speech.Synthesiser, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Make one clip: sound float32 (T,) at 16 kHz, and the face's track (frames, 5)."""
    rng = np.random.default_rng([clip.seed, 1])
    voice, level = voice_of(clip)
    spoken = speech.scale(synthesiser.say(clip.text, voice, clip.seed), level)
    lead, tail = rng.uniform(0.08, 0.2, 2)
    spoken = np.pad(spoken, [int(lead * speech.RATE), int(tail * speech.RATE)])
    frames = int(np.ceil(len(spoken) / speech.RATE * settings.fps))
    # Picture and sound end together.
    spoken = np.pad(spoken, [0, max(0, round(frames * speech.RATE / settings.fps) - len(spoken))])
    loudness = speech.envelope(spoken, settings.fps, frames)
    noisy = spoken + clip.noise * rng.standard_normal(len(spoken)).astype(np.float32)
    track = face.expression_track(rng, clip.expression, loudness, settings.fps)
    return np.clip(noisy, -1, 1).astype(np.float32), track


def clip_path(clip: Clip) -> str:
    """Where a clip lies inside the corpus folder."""
    return f"clips/{clip.speaker.name}/{clip.utt}.mp4"


def _make_speaker(clips: list[Clip], settings: Settings, folder: Path, parent: int, failure: Connection) -> None:
    """Write the clips of one speaker; an error's text goes to ``failure``."""
    die_with(parent)
    try:
        synthesiser = speech.Synthesiser()
        for clip in clips:
            sound, track = render(clip, synthesiser, settings)
            path = folder / clip_path(clip)
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = (face.draw_face(clip.speaker.looks, values, settings.size) for values in track)
            media.write_clip(path, frames, settings.fps, sound, speech.RATE)
    except UserError as e:
        failure.send(str(e))
        sys.exit(1)


def _make_speakers(by_speaker: dict[str, list[Clip]], settings: Settings, folder: Path, jobs: int) -> None:
    """A fresh process for each speaker, ``jobs`` at a time: espeak-ng's sound depends on what it said before.

    Plain processes, as those of a pool are started by a thread, whose end would count as their parent's.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(by_speaker.items())
    running: dict[Any, tuple[str, Any, Any]] = {}  # by sentinel: speaker, process, its failure's pipe
    try:
        while waiting or running:
            while waiting and len(running) < max(1, jobs):
                speaker, clips = waiting.pop(0)
                failure, sender = context.Pipe(duplex=False)
                process = context.Process(target=_make_speaker, args=(clips, settings, folder, os.getpid(), sender))
                process.start()
                sender.close()
                running[process.sentinel] = speaker, process, failure
            for sentinel in wait(list(running)):
                speaker, process, failure = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    try:
                        message = failure.recv()
                    except EOFError:  # its traceback is on stderr, unless a signal ended it
                        message = f"the process that makes its clips ended with exit code {process.exitcode}"
                    raise UserError(f"{speaker}: {message}")
    finally:
        for _, process, _ in running.values():
            process.kill()
            process.join()


def make_corpus(settings: Settings, folder: str | Path, jobs: int) -> list[Clip]:
    """Write clips/<speaker>/<utt>.mp4, corpus.tsv and speakers.json to ``folder``, which appears only when whole.

    Args:
        jobs: processes; they change the time, not the bytes.

    Raises:
        UserError: ``folder`` holds something that is no mini corpus, or the synthesiser does not work.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / TABLE).is_file():
        raise UserError(f"{folder} is not empty and holds no {TABLE}: choose another folder for the corpus")
    clips = plan_corpus(settings)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    by_speaker: dict[str, list[Clip]] = {}
    for clip in clips:
        by_speaker.setdefault(clip.speaker.name, []).append(clip)
    _make_speakers(by_speaker, settings, partial, jobs)
    speakers = {clip.speaker.name: asdict(clip.speaker) for clip in clips}
    write_json(partial / SPEAKERS, speakers)
    write_text(partial / TABLE, _table(clips))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return clips


def _table(clips: list[Clip]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
    writer.writerow(COLUMNS)
    for c in sorted(clips, key=lambda c: c.utt):
        numbers = (f"{c.label:.4f}", *(f"{v:g}" for v in (c.sentiment, c.arousal, c.expression, c.noise)))
        writer.writerow([c.utt, c.speaker.set, c.speaker.name, c.text, *numbers, clip_path(c)])
    return out.getvalue()


@dataclass(frozen=True)
class Row:
    """A line of ``corpus.tsv``."""

    utt: str
    set: str
    speaker: str
    text: str
    label: float
    clip: Path


def read_corpus(folder: str | Path, set_name: str | None = None) -> list[Row]:
    """Read ``corpus.tsv``, of one set or of all; sorted by utterance id.

    Raises:
        UserError: the table is missing or not what :func:`make_corpus` writes, or it has no clip of the set.
    """
    path = Path(folder) / TABLE
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}): make the corpus first") from None
    return list(_rows(content, path, Path(folder), set_name))


def _rows(content: str, path: Path, folder: Path, set_name: str | None) -> Iterator[Row]:
    lines = content.splitlines()
    if not lines or lines[0].split("\t") != list(COLUMNS):
        raise UserError(f"{path}: line 1: expected the columns {', '.join(COLUMNS)}; make the corpus again")
    found = False
    for number, line in enumerate(lines[1:], 2):
        fields = dict(zip(COLUMNS, line.split("\t"), strict=False))
        if len(fields) != len(COLUMNS):
            raise UserError(f"{path}: line {number}: {len(fields)} columns, expected {len(COLUMNS)}")
        if set_name is not None and fields["set"] != set_name:
            continue
        found = True
        try:
            label = float(fields["label"])
        except ValueError:
            raise UserError(f"{path}: line {number}: {fields['utt']}: label {fields['label']!r} is no number") from None
        yield Row(fields["utt"], fields["set"], fields["speaker"], fields["text"], label, folder / fields["clip"])
    if not found:
        raise UserError(f"{path}: no clip of the set {set_name!r}" if set_name else f"{path}: no clips")


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists as tuples again; JSON knows none."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def read_looks(folder: str | Path, set_name: str) -> list[face.Looks]:
    """The looks of the speakers of a set, from ``speakers.json``.

    Raises:
        UserError: the file is missing or not what :func:`make_corpus` writes.
    """
    path = Path(folder) / SPEAKERS
    try:
        speakers = json.loads(path.read_text(encoding="utf-8"))
        chosen = [speakers[name]["looks"] for name in sorted(speakers) if speakers[name]["set"] == set_name]
        return [face.Looks(**_tuples(looks)) for looks in chosen]
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}): make the corpus first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a speaker list of the mini corpus; make the corpus again") from None
