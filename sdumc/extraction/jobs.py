"""What the commands of stages 2 and 3 share: their options, fixed batches, reading ahead, and halving on low memory."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sdumc.cli import Parser
from sdumc.data.ark import ShardWriter
from sdumc.data.kaldi_dir import KaldiDir, load_kaldi_dir, shard
from sdumc.device import add_device_option
from sdumc.errors import UserError
from sdumc.versions import installed_versions

log = logging.getLogger("sdumc")
R = TypeVar("R")


def add_job_options(parser: Parser, name: str, batch_size: int = 16) -> None:
    """Options of a command that writes one shard of a feature, called ``name`` unless the user says otherwise."""
    group = parser.add_argument_group("data and job")
    group.add_argument("--data-dir", required=True, metavar="DIR", help="Kaldi data directory, e.g. data/train")
    group.add_argument("--dump-dir", required=True, metavar="DIR", help="where the shard goes, e.g. dump/train")
    group.add_argument("--name", default=name, help="name of the feature; `finish_dump --name` takes it too")
    group.add_argument("--shard", default="1/1", metavar="JOB/JOBS", help="which part of the utterances, from 1")
    group.add_argument(
        "--bad-media",
        choices=("stop", "absent"),
        default="stop",
        help="a media file that cannot be read stops the job, or counts as an absent modality (listed)",
    )
    if name != "asr_hyp":  # which has transcripts only
        group.add_argument(
            "--compress",
            choices=("no", "two-byte", "one-byte"),
            default="no",
            help="store values as Kaldi's compressed matrices: half or a quarter of the space, rounded values",
        )
    add_compute_options(parser)
    group = parser.add_argument_group("batches")
    group.add_argument("--batch-size", type=int, default=batch_size, metavar="N", help="most utterances in a batch")
    group.add_argument(
        "--batch-seconds", type=float, default=400.0, metavar="S", help="most seconds of sound in a batch, padded"
    )


def add_compute_options(parser: Parser) -> None:
    """``--device`` and ``--dtype``."""
    group = parser.add_argument_group("computing")
    add_device_option(group)
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="number format of the models")


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


def durations(data: KaldiDir, utterances: Sequence[str]) -> dict[str, float]:
    """Seconds of each utterance, from the tables if they say, else from the media's headers (0 if unreadable)."""
    from sdumc.data.media import probe

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
                result[utt] = 0.0  # reading it will say what is wrong
    return result


def make_batches(seconds: dict[str, float], batch_size: int, batch_seconds: float) -> list[list[str]]:
    """Utterances of similar length together, longest first, so that too little memory shows at once.

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


def ahead(batches: Sequence[list[str]], read: Callable[[list[str]], R]) -> Iterator[tuple[list[str], R]]:
    """``(batch, read(batch))`` one after another, the next one being read in a thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = None
        for i, batch in enumerate(batches):
            current = future or pool.submit(read, batch)
            future = pool.submit(read, batches[i + 1]) if i + 1 < len(batches) else None
            yield batch, current.result()


def read_waves(data: KaldiDir, batch: Sequence[str], bad_media: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Sound of a batch at 16 kHz, and the reason for each clip that has none (only if ``bad_media`` is "absent").

    Raises:
        UserError: a clip cannot be read and ``bad_media`` is "stop".
    """
    from sdumc.data.media import read_audio

    waves, reasons = {}, {}
    for utt in batch:
        try:
            waves[utt] = read_audio(data.audio_source(utt))
        except UserError as e:
            if bad_media != "absent":
                raise UserError(f"{e} (or go on without it: --bad-media absent)") from None
            log.warning("%s: taken as absent: %s", utt, e)
            reasons[utt] = str(e)
    return waves, reasons


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
