"""What is computed from sound alone: features of a speech encoder, and ASR transcripts.

Transcripts become ``data/<set>/text_asr``: the words of the condition ``asr``. They also replace the LLM's failures in
simulated text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdumc.conditions import NO_SPEECH
from sdumc.data.kaldi_dir import KaldiDir
from sdumc.data.shards import ShardWriter
from sdumc.extraction.finishing import BAD_MEDIA
from sdumc.extraction.loop import Output, extract_shard, read_wave
from sdumc.prediction.activity import lacks_speech
from sdumc.pretrained.quality import judge
from sdumc.pretrained.recogniser import CtcRecogniser, Heard, WhisperRecogniser
from sdumc.pretrained.speech_encoder import SpeechEncoder


def extract_audio(
    data: KaldiDir, batches: Sequence[list[str]], encoder: SpeechEncoder, writer: ShardWriter, bad_media: str = "stop"
) -> None:
    """Write (frames, D) of the utterances in ``batches``: :func:`sdumc.extraction.loop.extract_shard`."""

    def compute(items: Sequence[tuple[str, np.ndarray]]) -> list[Output]:
        return [Output(x.float().cpu().numpy()) for x in encoder([wave for _, wave in items])]

    extract_shard(batches, writer, lambda utt: read_wave(data, utt), compute, bad_media)


def extract_transcripts(
    data: KaldiDir,
    batches: Sequence[list[str]],
    recogniser: CtcRecogniser | WhisperRecogniser,
    writer: ShardWriter,
    bad_media: str = "stop",
    speech_test: str = "level",
) -> None:
    """Note the transcripts of the utterances in ``batches``: :func:`sdumc.extraction.loop.extract_shard`.

    Args:
        speech_test: how clips without speech are found: :func:`sdumc.prediction.activity.lacks_speech`.
    """

    def compute(items: Sequence[tuple[str, np.ndarray]]) -> list[Output]:
        return [_transcript(heard) for heard in hear(recogniser, [wave for _, wave in items], speech_test)]

    def unheard(reason: str) -> Output:
        return Output(notes={"hyp": "", "status": "empty", "fallback": "absent", BAD_MEDIA: reason})

    extract_shard(batches, writer, lambda utt: read_wave(data, utt), compute, bad_media, unheard)


def hear(
    recogniser: CtcRecogniser | WhisperRecogniser, waves: Sequence[np.ndarray], speech_test: str = "level"
) -> list[Heard]:
    """Clips (T_i,) at 16 kHz -> transcripts; a clip without speech is not shown to the recogniser."""
    mute = [lacks_speech(wave, speech_test) for wave in waves]
    loud = [wave for wave, silent in zip(waves, mute, strict=True) if not silent]
    heard = iter(recogniser.hear(loud) if loud else [])
    return [Heard("", no_speech=True) if silent else next(heard) for silent in mute]


def status_of(heard: Heard) -> str:
    """``no-speech``, ``empty`` or ``ok``."""
    status = NO_SPEECH if heard.no_speech else judge(heard.text, heard.text.split())[0]
    return status if status in ("empty", NO_SPEECH) else "ok"


def _transcript(heard: Heard) -> Output:
    """Notes of a transcript; those of Whisper also say how sure it was, and whether its first attempt was given up."""
    notes = {"hyp": heard.text, "status": status_of(heard)}
    if heard.log_probability is not None:
        notes["log_probability"] = f"{heard.log_probability:.3f}"
    if heard.temperature > 0:
        notes |= {"fallback": "temperature", "temperature": f"{heard.temperature:g}"}
    return Output(notes=notes)
