"""Text features: hidden states of the LLM at each token of a given text, behind sound and prompt, prompt or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sdumc.data.kaldi_dir import KaldiDir
from sdumc.data.shards import ShardWriter
from sdumc.errors import UserError
from sdumc.extraction.finishing import BAD_MEDIA
from sdumc.extraction.loop import Output, extract_shard, read_wave
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.speech_reader import SpeechReader, without_first


@dataclass(frozen=True)
class TextEncoder:
    """Hidden states of an LLM at the tokens of given texts.

    ``context`` is what stands before a text: ``audio+prompt`` the projected sound and the chat prompt, as in simulated
    text (this needs ``reader``); ``prompt`` the prompt alone; ``none`` only BOS, as in the released features of real
    text. ``keep_first`` also keeps the state before the first token (the prompt's end, or BOS).
    """

    llm: SpeechLLM
    context: str
    keep_first: bool = False
    reader: SpeechReader | None = None

    @property
    def reads_sound(self) -> bool:
        """Whether sound stands before the text."""
        return self.context == "audio+prompt"

    def __call__(self, texts: Sequence[str], waves: Sequence[np.ndarray | None]) -> list[Tensor]:
        """Texts, and the sound (T_i,) of each at 16 kHz or None -> states (N_i, D) float32.

        A text whose sound is None has the prompt alone before it, where others have sound and prompt.
        """
        states: dict[int, Tensor] = {}
        heard = [i for i, wave in enumerate(waves) if self.reads_sound and wave is not None]
        silent = [i for i in range(len(texts)) if i not in heard]
        if silent:
            chat = self.context != "none"
            contexts = self.llm.contexts([None] * len(silent), chat=chat)
            ids = [self.llm.answer_ids(texts[i]) if chat else self.llm.plain_ids(texts[i]) for i in silent]
            states.update(zip(silent, self.llm.encode(contexts, ids), strict=True))
        if heard:
            assert self.reader is not None
            contexts = self.reader.contexts([wave for wave in waves if wave is not None])
            ids = [self.llm.answer_ids(texts[i]) for i in heard]
            states.update(zip(heard, self.llm.encode(contexts, ids), strict=True))
        return [without_first(states[i], self.keep_first) for i in range(len(texts))]


@dataclass(frozen=True)
class _Unreadable:
    """In place of sound that could not be read."""

    reason: str


def extract_text(
    data: KaldiDir,
    texts: Mapping[str, str],
    batches: Sequence[list[str]],
    encoder: TextEncoder,
    writer: ShardWriter,
    bad_media: str = "stop",
    without: Mapping[str, str] | None = None,
) -> None:
    """Write the states of the utterances in ``batches``: :func:`sdumc.extraction.loop.extract_shard`.

    An utterance in ``without`` (id -> reason) has no text: the feature is absent.

    An empty text (a recogniser that heard nothing) gives one frame, the state before the first token. Sound that
    cannot be read, with ``bad_media`` "absent", is left out of the context.

    Raises:
        UserError: a text is absent, and as there.
    """
    for utt in (u for b in batches for u in b):
        if utt not in texts and utt not in (without or {}):
            raise UserError(f"{data.path}: utterance {utt!r} has no text to encode")

    def read(utt: str) -> np.ndarray | None:
        return read_wave(data, utt) if encoder.reads_sound and utt in texts else None

    def compute(items: Sequence[tuple[str, Any]]) -> list[Output]:
        said = [(utt, x) for utt, x in items if utt in texts]
        waves = [None if isinstance(x, _Unreadable) else x for _, x in said]
        states = encoder([texts[utt] for utt, _ in said], waves) if said else []
        notes = [{BAD_MEDIA: x.reason} if isinstance(x, _Unreadable) else {} for _, x in said]
        found = {u: Output(s.cpu().numpy(), notes=n) for (u, _), s, n in zip(said, states, notes, strict=True)}
        return [found[utt] if utt in found else Output(absent=(without or {})[utt]) for utt, _ in items]

    extract_shard(batches, writer, read, compute, bad_media, _Unreadable)
