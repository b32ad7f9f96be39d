"""Transcribed speech as the projector's training reads it: transcripts, and frames of the speech encoder."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sdumc.data.kaldi_dir import KaldiDir
from sdumc.errors import UserError
from sdumc.extraction.batches import make_batches
from sdumc.extraction.loop import read_ahead, read_wave
from sdumc.pretrained.speech_encoder import SpeechEncoder

log = logging.getLogger("sdumc")

_BATCH = 16  # utterances that are encoded or validated at once
_ENCODED_SECONDS = 200.0  # most seconds of sound in such a batch, padded


class TranscribedSpeech:
    """Utterances with sound and transcript; encoder outputs are kept in memory while there is room.

    Raises:
        UserError: an utterance has no transcript. When reading: its sound cannot be read.
    """

    def __init__(self, data: KaldiDir, texts: Mapping[str, str], encoder: SpeechEncoder, cache_bytes: int):
        missing = [u for u in data.utterances if u not in texts]
        if missing:
            raise UserError(f"{data.path}: training a projector needs transcripts; {missing[0]!r} has none in text")
        self.data, self.texts, self.encoder = data, texts, encoder
        self.room = cache_bytes
        self._kept: dict[str, Tensor] = {}

    @property
    def utterances(self) -> list[str]:
        return self.data.utterances

    def batches(self, utterances: Sequence[str], seconds: float) -> list[list[str]]:
        """Fixed batches of similar length, at most so many seconds of sound each."""
        return make_batches({u: self.data.utt2dur.get(u, 0.0) for u in utterances}, _BATCH, seconds)

    def fill_cache(self, utterances: Sequence[str]) -> None:
        """Encode ``utterances`` until there is no more room.

        This happens in fixed batches before the first step, so that what is kept, and its last bits, do not depend on
        the step at which a resumed run begins.
        """
        batches = self.batches(utterances, _ENCODED_SECONDS)
        for batch, waves in read_ahead(batches, lambda b: [read_wave(self.data, u) for u in b]):
            for utt, frames in zip(batch, self.encoder(waves), strict=True):
                size = frames.numel() * frames.element_size()
                if size > self.room:
                    log.info("%s: %d of %d clips kept in memory", self.data.path, len(self._kept), len(utterances))
                    return
                self.room -= size
                self._kept[utt] = frames.cpu()

    def read(self, batch: Sequence[str]) -> dict[str, np.ndarray]:
        """The sound of those utterances whose frames are not kept; called in a thread ahead of time."""
        return {u: read_wave(self.data, u) for u in batch if u not in self._kept}

    def frames(self, batch: Sequence[str], waves: Mapping[str, np.ndarray]) -> list[Tensor]:
        """Encoder frames (T_i, D) of a batch, given what :meth:`read` returned for it."""
        todo = [u for u in batch if u not in self._kept]
        fresh = dict(zip(todo, self.encoder([waves[u] for u in todo]) if todo else [], strict=True))
        return [fresh[u] if u in fresh else self._kept[u].to(self.encoder.device) for u in batch]


def epoch_batches(utterances: Sequence[str], batch_size: int, seed: int, epoch: int) -> list[list[str]]:
    """Shuffled batches of an epoch, the same for the same seed; a short last batch is kept."""
    order = sorted(utterances)
    random.Random(f"{seed} {epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def spread(utterances: Sequence[str], count: int) -> list[str]:
    """At most ``count`` utterances, evenly from the sorted list."""
    utterances = sorted(utterances)
    if len(utterances) <= count:
        return list(utterances)
    return [utterances[i * len(utterances) // count] for i in range(count)]
