"""Transcripts of a recogniser, for the `asr` condition and in place of the LLM's failures."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from sdumc.data.ark import ShardWriter
from sdumc.data.kaldi_dir import KaldiDir
from sdumc.extraction.jobs import Progress, ahead, read_waves
from sdumc.pretrained.memory import halving
from sdumc.pretrained.quality import judge
from sdumc.pretrained.recogniser import CtcRecogniser, WhisperRecogniser


def recognise_shard(
    data: KaldiDir,
    batches: Sequence[list[str]],
    recogniser: CtcRecogniser | WhisperRecogniser,
    writer: ShardWriter,
    bad_media: str = "stop",
) -> None:
    """Note the transcript of every utterance in ``batches`` that ``writer`` does not have yet; commit each batch.

    Raises:
        UserError: a media file cannot be read, or one clip alone does not fit into the GPU's memory.
    """
    todo = [b for b in ([u for u in batch if u not in writer.done] for batch in batches) if b]
    progress = Progress(sum(map(len, batches)), len(writer.done))
    for batch, (waves, reasons) in ahead(todo, lambda b: read_waves(data, b, bad_media)):
        utts = [u for u in batch if u in waves]
        items = [(u, waves[u]) for u in utts]
        texts = halving(items, lambda part: recogniser([w for _, w in part]), itemgetter(0)) if items else []
        found = dict(zip(utts, texts, strict=True))
        for utt in batch:
            if utt in reasons:
                writer.note(utt, hyp="", status="empty", fallback="absent", bad_media=reasons[utt])
            else:
                status, _ = judge(found[utt], found[utt].split())
                writer.note(utt, hyp=found[utt], status="empty" if status == "empty" else "ok")
        writer.commit()
        progress.step(len(batch))
