"""Batches of utterances for models that are not trained: similar lengths, longest first, the same at every run."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.data.kaldi_dir import KaldiDir
from sdumc.data.media import probe
from sdumc.errors import UserError


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
