"""ASR transcripts: what a recogniser hears, without features.

They become ``data/<set>/text_asr``: the words of the condition ``asr``. They also replace the LLM's failures in
simulated text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdumc.data.kaldi_dir import KaldiDir
from sdumc.data.shards import ShardWriter
from sdumc.extraction.finishing import BAD_MEDIA
from sdumc.extraction.loop import Output, extract_shard, read_wave
from sdumc.pretrained.quality import judge
from sdumc.pretrained.recogniser import CtcRecogniser, WhisperRecogniser


def extract_transcripts(
    data: KaldiDir,
    batches: Sequence[list[str]],
    recogniser: CtcRecogniser | WhisperRecogniser,
    writer: ShardWriter,
    bad_media: str = "stop",
) -> None:
    """Note the transcripts of the utterances in ``batches``: :func:`sdumc.extraction.loop.extract_shard`."""

    def compute(items: Sequence[tuple[str, np.ndarray]]) -> list[Output]:
        return [_transcript(text) for text in recogniser([wave for _, wave in items])]

    def unheard(reason: str) -> Output:
        return Output(notes={"hyp": "", "status": "empty", "fallback": "absent", BAD_MEDIA: reason})

    extract_shard(batches, writer, lambda utt: read_wave(data, utt), compute, bad_media, unheard)


def _transcript(text: str) -> Output:
    status, _ = judge(text, text.split())
    return Output(notes={"hyp": text, "status": "empty" if status == "empty" else "ok"})
