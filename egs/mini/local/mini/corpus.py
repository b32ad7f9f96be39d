"""The mini corpus on disk: ``clips/<speaker>/<utt>.mp4``, ``corpus.tsv`` and ``speakers.json``; writing and reading it.

The clips of the set that models are pretrained on are sound only, ``<utt>.wav``.

The plan of the whole corpus is made first; the clips of one speaker are then made in order by one fresh process, so
that the bytes do not depend on how many processes there are.
"""

from __future__ import annotations

import csv
import io
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

from mini import face, plan, speech
from mini.clips import write_clip, write_sound
from mini.plan import Clip, Settings
from sdumc.errors import UserError
from sdumc.files import read_json, write_json, write_text
from sdumc.machine import die_with

TABLE = "corpus.tsv"
SPEAKERS = "speakers.json"
COLUMNS = ("utt", "set", "speaker", "text", "label", "sentiment", "arousal", "expression", "noise", "clip")


def render(clip: Clip, synthesiser: speech.Synthesiser, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Make one clip: sound float32 (T,) at 16 kHz, and the face's track (frames, 5)."""
    rng = np.random.default_rng([clip.seed, 1])
    voice, level = plan.voice_of(clip)
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
    return f"clips/{clip.speaker.name}/{clip.utt}.{'wav' if clip.speaker.set == plan.PRETRAIN else 'mp4'}"


def _make_speaker(clips: list[Clip], settings: Settings, folder: Path, parent: int, failure: Connection) -> None:
    """Write the clips of one speaker; an error's text goes to ``failure``."""
    die_with(parent)
    try:
        synthesiser = speech.Synthesiser()
        for clip in clips:
            sound, track = render(clip, synthesiser, settings)
            path = folder / clip_path(clip)
            path.parent.mkdir(parents=True, exist_ok=True)
            if clip.speaker.set == plan.PRETRAIN:
                write_sound(path, sound, speech.RATE)
                continue
            frames = (face.draw_face(clip.speaker.looks, values, settings.size) for values in track)
            write_clip(path, frames, settings.fps, sound, speech.RATE)
    except UserError as e:
        failure.send(str(e))
        sys.exit(1)


def _make_speakers(by_speaker: dict[str, list[Clip]], settings: Settings, folder: Path, jobs: int) -> None:
    """A fresh process for each speaker, ``jobs`` at a time: espeak-ng's sound depends on what it said before.

    Not a pool: it starts its processes from a thread, and ``die_with`` would end them with that thread.
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
    """Write the clips, corpus.tsv and speakers.json to ``folder``, which appears only when whole.

    Args:
        jobs: processes; they change the time, not the bytes.

    Raises:
        UserError: ``folder`` holds something that is no mini corpus, or the synthesiser does not work.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / TABLE).is_file():
        raise UserError(f"{folder} is not empty and holds no {TABLE}: choose another folder for the corpus")
    clips = plan.plan_corpus(settings)
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
    """Lists as tuples, which JSON does not have."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def read_looks(folder: str | Path, set_name: str) -> list[face.Looks]:
    """The looks of the speakers of a set, from ``speakers.json``.

    Raises:
        UserError: the file is missing or not what :func:`make_corpus` writes.
    """
    path = Path(folder) / SPEAKERS
    speakers = read_json(path, "make the corpus first")
    try:
        chosen = [speakers[name]["looks"] for name in sorted(speakers) if speakers[name]["set"] == set_name]
        return [face.Looks(**_tuples(looks)) for looks in chosen]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: not a speaker list of the mini corpus; make the corpus again") from None
