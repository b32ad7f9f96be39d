"""Audio features: one hidden layer of a speech encoder, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdumc.data.kaldi_dir import KaldiDir
from sdumc.data.shards import ShardWriter
from sdumc.extraction.loop import Output, extract_shard, read_wave
from sdumc.pretrained.speech_encoder import SpeechEncoder


def extract_audio(
    data: KaldiDir, batches: Sequence[list[str]], encoder: SpeechEncoder, writer: ShardWriter, bad_media: str = "stop"
) -> None:
    """Write (frames, D) of the utterances in ``batches``: :func:`sdumc.extraction.loop.extract_shard`."""

    def compute(items: Sequence[tuple[str, np.ndarray]]) -> list[Output]:
        return [Output(x.float().cpu().numpy()) for x in encoder([wave for _, wave in items])]

    extract_shard(batches, writer, lambda utt: read_wave(data, utt), compute, bad_media)
