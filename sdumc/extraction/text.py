"""Text features: hidden states of the LLM at each token of a given text, behind sound and prompt, prompt or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sdumc.data.ark import ShardWriter
from sdumc.data.kaldi_dir import KaldiDir
from sdumc.errors import UserError
from sdumc.extraction.jobs import Progress, ahead, read_waves
from sdumc.extraction.simulation import SpeechReader, without_first
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.memory import halving


def encode_texts(
    llm: SpeechLLM,
    texts: Sequence[str],
    context: str,
    keep_first: bool = False,
    reader: SpeechReader | None = None,
    waves: Sequence[np.ndarray] | None = None,
) -> list[Tensor]:
    """Hidden states (N_i, D) float32 at the tokens of ``texts``.

    Args:
        context: ``audio+prompt`` puts the projected sound and the chat prompt before the text, just as the simulated
            text has them; ``prompt`` the prompt alone; ``none`` only BOS (as the released real-text features).
        keep_first: also keep the state before the first token (the prompt's end, or BOS).
        reader, waves: needed for ``audio+prompt``.
    """
    if context == "audio+prompt":
        assert reader is not None and waves is not None
        contexts = reader.contexts(waves)
        answers = [llm.answer_ids(t) for t in texts]
    elif context == "prompt":
        contexts, answers = llm.contexts([None] * len(texts)), [llm.answer_ids(t) for t in texts]
    else:
        contexts, answers = llm.contexts([None] * len(texts), chat=False), [llm.plain_ids(t) for t in texts]
    return [without_first(s, keep_first) for s in llm.encode(contexts, answers)]


def extract_text(
    data: KaldiDir,
    texts: Mapping[str, str],
    batches: Sequence[list[str]],
    llm: SpeechLLM,
    writer: ShardWriter,
    context: str = "audio+prompt",
    keep_first: bool = False,
    reader: SpeechReader | None = None,
    bad_media: str = "stop",
) -> None:
    """Write the states of every utterance in ``batches`` that ``writer`` does not have yet; commit each batch.

    An empty text (a recogniser that heard nothing) gives one frame, the state before the first token. Sound that
    cannot be read, with ``bad_media`` "absent", is left out of the context.

    Raises:
        UserError: a text or media file is missing.
    """
    for utt in (u for b in batches for u in b):
        if utt not in texts:
            raise UserError(f"{data.path}: utterance {utt!r} has no text to encode")
    todo = [b for b in ([u for u in batch if u not in writer.done] for batch in batches) if b]
    progress = Progress(sum(map(len, batches)), len(writer.done))

    def read(batch: list[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return read_waves(data, batch, bad_media) if context == "audio+prompt" else ({}, {})

    for batch, (waves, reasons) in ahead(todo, read):

        def work(part: Sequence[str], waves=waves, reasons=reasons) -> list[Tensor]:
            silent = [u for u in part if u in reasons]
            heard = [u for u in part if u not in reasons]
            found: dict[str, Tensor] = {}
            if silent:
                states = encode_texts(llm, [texts[u] for u in silent], "prompt", keep_first)
                found.update(zip(silent, states, strict=True))
            if heard:
                sound = [waves[u] for u in heard] if context == "audio+prompt" else None
                states = encode_texts(llm, [texts[u] for u in heard], context, keep_first, reader, sound)
                found.update(zip(heard, states, strict=True))
            return [found[u] for u in part]

        for utt, states in zip(batch, halving(batch, work), strict=True):
            writer.write(utt, states.cpu().numpy(), **({"bad_media": reasons[utt]} if utt in reasons else {}))
        writer.commit()
        progress.step(len(batch))
