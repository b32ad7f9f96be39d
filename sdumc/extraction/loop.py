"""A job of stages 2 and 3: what its command line means, and the one loop over its shard.

The loop reads ahead, computes in batches, writes, commits and reports. Batches have utterances of similar length,
longest first, and are the same at every run. What is read and what is computed differs: :mod:`.features`,
:mod:`.simulation`.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sdumc.data.kaldi_dir import KaldiDir, load_kaldi_dir, shard
from sdumc.data.media import probe, read_audio
from sdumc.data.shards import ShardWriter
from sdumc.data.tables import read_table
from sdumc.errors import UserError
from sdumc.extraction.finishing import BAD_MEDIA
from sdumc.machine import halve_when_out_of_memory, installed_versions, pick_device
from sdumc.pretrained.llm import SpeechLLM, prompt_text
from sdumc.pretrained.loading import DTYPES, fingerprint
from sdumc.pretrained.projector import projector_file
from sdumc.pretrained.recogniser import CtcRecogniser, WhisperRecogniser, load_recogniser
from sdumc.pretrained.speech import (
    SpeechEncoder,
    SpeechReader,
    check_projector_prompt,
    learned_from,
    projector_window,
)

FOLDS = "utt2fold"  # in a folder of projectors that were trained without a part each: the part of each utterance


def durations(data: KaldiDir, utterances: Sequence[str]) -> dict[str, float]:
    """Seconds of each utterance, from the tables if they say, else from the media's headers (0 if unreadable)."""
    result = {}
    for utt in utterances:
        if utt in data.utt2dur:
            result[utt] = data.utt2dur[utt]
        elif data.segments:
            result[utt] = data.segments[utt].end - data.segments[utt].start
        else:
            try:
                result[utt] = probe(data.wav[utt]).duration
            except UserError:
                result[utt] = 0.0  # reading it raises the precise error
    return result


def make_batches(seconds: dict[str, float], batch_size: int, batch_seconds: float) -> list[list[str]]:
    """Utterances of similar length together, longest first, so that lack of memory shows at once.

    The batches depend on the arguments alone; a job that is resumed therefore repeats the very same ones. One has at
    most ``batch_size`` utterances and, padded to its longest, ``batch_seconds`` (a longer utterance is alone).
    """
    batches: list[list[str]] = []
    longest = 0.0
    for utt in sorted(seconds, key=lambda u: (-seconds[u], u)):
        if batches and len(batches[-1]) < batch_size and longest * (len(batches[-1]) + 1) <= batch_seconds:
            batches[-1].append(utt)
        else:
            batches.append([utt])
            longest = seconds[utt]
    return batches


log = logging.getLogger("sdumc")
R = TypeVar("R")


@dataclass
class Output:
    """What is written for an utterance: its feature, or the reason for its absence, or, with neither, notes alone.

    ``feature`` is (T, D).
    """

    feature: np.ndarray | None = None
    absent: str | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def write(self, utt: str, writer: ShardWriter) -> None:
        """Add it to a shard."""
        if self.feature is not None:
            writer.write(utt, self.feature, **self.notes)
        elif self.absent is not None:
            writer.absent(utt, self.absent, **self.notes)
        else:
            writer.note(utt, **self.notes)


def absent_for_bad_media(reason: str) -> Output:
    """The feature of an utterance whose media cannot be read: absent."""
    return Output(absent=reason, notes={BAD_MEDIA: reason})


def extract_shard(
    batches: Sequence[list[str]],
    writer: ShardWriter,
    read: Callable[[str], Any],
    compute: Callable[[Sequence[tuple[str, Any]]], list[Output]],
    bad_media: str = "stop",
    instead: Callable[[str], Any] = absent_for_bad_media,
) -> None:
    """Extract a feature for the utterances in ``batches`` that ``writer`` does not have yet; commit each batch.

    Args:
        read: what ``compute`` needs of an utterance; called in a thread while the batch before is computed. It may
            also return the :class:`Output` itself, where nothing has to be computed.
        compute: the outputs of a batch of utterances, each with what was read. When the GPU's memory does not suffice,
            it is called again with the halves of the batch.
        bad_media: whether media that cannot be read (a UserError of ``read``) "stop" the job or count as "absent".
        instead: takes the place of ``read`` for such media; its argument is the reason.

    Raises:
        UserError: media cannot be read; a feature is not finite (fp16 overflows in some models); one utterance alone
            does not fit into the GPU's memory.
    """

    def read_batch(batch: list[str]) -> list[tuple[str, Any]]:
        items = []
        for utt in batch:
            try:
                items.append((utt, read(utt)))
            except UserError as e:
                items.append((utt, instead(reason_if_allowed(utt, e, bad_media))))
        return items

    todo = [b for b in ([u for u in batch if u not in writer.done] for batch in batches) if b]
    progress = Progress(sum(map(len, batches)), len(writer.done))
    for batch, items in read_ahead(todo, read_batch):
        outputs = {utt: x for utt, x in items if isinstance(x, Output)}
        rest = [(utt, x) for utt, x in items if not isinstance(x, Output)]
        if rest:
            computed = halve_when_out_of_memory(rest, compute, lambda item: f"utterance {item[0]!r}")
            outputs.update(zip(map(itemgetter(0), rest), computed, strict=True))
        for utt in batch:
            outputs[utt].write(utt, writer)
        writer.commit()
        progress.step(len(batch))


def reason_if_allowed(utt: str, error: UserError, bad_media: str) -> str:
    """Why an utterance's media count as absent, after saying so in the log; raises if they must "stop" the job."""
    if bad_media != "absent":
        raise UserError(f"{error} (or go on without it: --bad-media absent)") from None
    log.warning("%s: taken as absent: %s", utt, error)
    return str(error)


def read_ahead(batches: Sequence[list[str]], read: Callable[[list[str]], R]) -> Iterator[tuple[list[str], R]]:
    """``(batch, read(batch))`` one after another; the next one is read in a thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = None
        for i, batch in enumerate(batches):
            current = future or pool.submit(read, batch)
            future = pool.submit(read, batches[i + 1]) if i + 1 < len(batches) else None
            yield batch, current.result()


def read_wave(data: KaldiDir, utt: str) -> np.ndarray:
    """Sound (T,) of an utterance at 16 kHz; :class:`UserError` if it cannot be read."""
    return read_audio(data.audio_source(utt))


class Progress:
    """A line in the log now and then: how many utterances are done, and how fast."""

    def __init__(self, total: int, done: int = 0, every: float = 30.0):
        self.total, self.done, self.every = total, done, every
        self.begin = self.last = time.monotonic()
        self.start = done

    def step(self, count: int) -> None:
        """``count`` more utterances are done."""
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.every or self.done >= self.total:
            self.last = now
            rate = (self.done - self.start) / max(now - self.begin, 1e-9)
            log.info("%d of %d utterances, %.2f a second", self.done, self.total, rate)


def load_job(args: argparse.Namespace) -> tuple[KaldiDir, list[str]]:
    """The data directory of a job and the utterances of its shard."""
    if args.batch_size < 1 or args.batch_seconds <= 0:
        raise UserError("--batch-size and --batch-seconds must be positive")
    data = load_kaldi_dir(args.data_dir)
    return data, shard(data.utterances, args.shard)


def open_shard(args: argparse.Namespace, settings: Mapping[str, Any], utterances: Sequence[str]) -> ShardWriter:
    """The writer of a job's shard; what an earlier run left is continued if settings and utterances are the same."""
    job = int(args.shard.split("/")[0])
    if getattr(args, "compress", "no") != "no":
        settings = {**settings, "compression": args.compress}
    return ShardWriter(args.dump_dir, args.name, job, settings, utterances, installed_versions())


def data_hash(data: KaldiDir, *files: str | os.PathLike) -> str:
    """A hash of where the media are and of further files: work of a killed job on other data is not continued."""
    digest = hashlib.sha256(repr((data.wav, data.video, data.segments)).encode())
    for file in files:
        path = Path(file)
        digest.update(path.read_bytes() if path.is_file() else b"absent")
    return digest.hexdigest()[:16]


def sound_batches(
    args: argparse.Namespace, data: KaldiDir, utterances: Sequence[str], reader: SpeechReader | None = None
) -> list[list[str]]:
    """The job's utterances in batches by the length of their sound, each for one of the readers that ``reader`` has."""
    groups: dict[int, list[str]] = {}
    for utt in utterances:
        groups.setdefault(id(reader.of(utt)) if reader else 0, []).append(utt)
    return [
        batch
        for group in groups.values()
        for batch in make_batches(durations(data, group), args.batch_size, args.batch_seconds)
    ]


def load_reader(args: argparse.Namespace, data: KaldiDir) -> tuple[SpeechReader, dict[str, Any]]:
    """Encoder, projectors and LLM of the command line, and the part of a feature's settings that describes them.

    Raises:
        UserError: a folder is incomplete, parts do not fit, or the projector was trained with another prompt.
    """
    if not args.encoder or not args.projector:
        raise UserError("this needs --encoder and --projector (or, for extract_text, another --context)")
    llm, settings = load_llm(args)
    projector = projector_file(args.projector)
    check_projector_prompt(str(projector), llm.prompt, llm.template)
    dtype, device, window = DTYPES[args.dtype], pick_device(args.device), projector_window(str(projector))
    encoder = SpeechEncoder(args.encoder, dtype, device, args.encoder_layer, window=window)
    settings |= {
        "encoder": args.encoder,
        "encoder_hash": fingerprint(encoder.folder),
        "encoder_layer": args.encoder_layer,
        "projector": args.projector,
        "projector_hash": fingerprint(projector),
    }
    reader = SpeechReader.load(encoder, str(projector), llm)
    if encoder.is_whisper and window != "30s":
        settings["whisper_window"] = window
    if llm.scale_depends_on_version or reader.embedding_scale != 1:
        settings["embedding_scale"] = reader.embedding_scale
    if args.projector_folds:
        settings |= add_folds(reader, Path(args.projector_folds), data)
    return reader, settings


def add_folds(reader: SpeechReader, folder: Path, data: KaldiDir) -> dict[str, Any]:
    """Give each utterance the projector in ``folder`` that was trained without its part (cross-fitting).

    Returns:
        The part of a feature's settings that describes it.

    Raises:
        UserError: the folder is not whole, an utterance has no part, or a projector has learned from what it reads.
    """
    again = "run stage 2 again, or all of it with --force"
    table, readers, hashes = folder / FOLDS, {}, []
    part_of = read_table(table)
    if lost := next((u for u in data.utterances if u not in part_of), None):
        raise UserError(f"{table}: utterance {lost!r} of {data.path} has no part; {again}")
    for part in sorted(set(part_of.values()), key=lambda p: (len(p), p)):
        path = projector_file(str(folder / part))
        learned, own = learned_from(str(path)), {u for u, p in part_of.items() if p == part}
        if learned is None or learned & own:
            seen = min(learned & own) if learned else min(own)
            raise UserError(f"{path}: may have learned from utterance {seen!r}, which it is to read; {again}")
        check_projector_prompt(str(path), reader.llm.prompt, reader.llm.template)
        readers[part] = SpeechReader.load(reader.encoder, str(path), reader.llm)
        hashes.append(fingerprint(path))
    reader.others = {u: readers[part_of[u]] for u in data.utterances}
    together = {(speaker, part_of[u]) for u, speaker in data.utt2spk.items()}
    by_speaker = len(together) == len(set(data.utt2spk.values())) < len(data.utterances)
    return {
        "projector_parts": len(readers),
        "projector_parts_of": "speakers" if by_speaker else "utterances",
        "projector_parts_hash": hashlib.sha256(repr((sorted(part_of.items()), hashes)).encode()).hexdigest()[:16],
    }


def load_rescorer(args: argparse.Namespace) -> tuple[CtcRecogniser | WhisperRecogniser | None, dict[str, Any]]:
    """The recogniser that helps to choose a hypothesis, if there is one, and the part of the settings about it."""
    if not args.rescorer:
        return None, {}
    rescorer = load_recogniser(args.rescorer, DTYPES[args.dtype], pick_device(args.device), args.rescore_language)
    return rescorer, {
        "rescorer": args.rescorer,
        "rescorer_hash": fingerprint(rescorer.folder),
        "rescore_weight": args.rescore_weight,
        "rescore_language": args.rescore_language,
    }


def load_llm(args: argparse.Namespace) -> tuple[SpeechLLM, dict[str, Any]]:
    """The LLM of the command line, and the part of a feature's settings that describes it."""
    prompt = prompt_text(args.prompt)
    llm = SpeechLLM(args.llm, DTYPES[args.dtype], pick_device(args.device), prompt, args.layers, args.prompt_template)
    return llm, {
        "model": args.llm,
        "model_hash": fingerprint(llm.folder),
        "layers": args.layers,
        "first_state": args.first_state,
        "prompt": prompt,
        "prompt_template": llm.template,
        "frame_rate": None,  # one frame per token
        "dtype": args.dtype,
    }
