"""Audio features: one hidden layer of a speech encoder, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from sdumc.data.ark import ShardWriter
from sdumc.data.kaldi_dir import KaldiDir
from sdumc.extraction.jobs import Progress, ahead, read_waves
from sdumc.pretrained.memory import halving
from sdumc.pretrained.speech_encoder import SpeechEncoder


def extract_audio(
    data: KaldiDir, batches: Sequence[list[str]], encoder: SpeechEncoder, writer: ShardWriter, bad_media: str = "stop"
) -> None:
    """Write (frames, D) of every utterance in ``batches`` that ``writer`` does not have yet; commit each batch.

    Raises:
        UserError: a media file cannot be read, or a feature is not finite (fp16 overflows in some models).
    """
    todo = [b for b in ([u for u in batch if u not in writer.done] for batch in batches) if b]
    progress = Progress(sum(map(len, batches)), len(writer.done))
    for batch, (waves, reasons) in ahead(todo, lambda b: read_waves(data, b, bad_media)):
        utts = [u for u in batch if u in waves]
        items = [(u, waves[u]) for u in utts]
        encoded = halving(items, lambda part: encoder([w for _, w in part]), itemgetter(0)) if items else []
        features = dict(zip(utts, encoded, strict=True))
        for utt in batch:
            if utt in reasons:
                writer.absent(utt, reasons[utt], bad_media=reasons[utt])
            else:
                writer.write(utt, features[utt].float().cpu().numpy())
        writer.commit()
        progress.step(len(batch))
