"""A frozen causal LLM that reads audio embeddings and a prompt, writes a transcript, and gives its hidden states.

Layout of the input, as in SLAM-LLM: ``[audio embeddings][BOS]"USER: {prompt}\\n ASSISTANT:"`` and then the answer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdumc.errors import UserError
from sdumc.pretrained.beam_search import Winner, additive_mask, beam_search
from sdumc.pretrained.cache import call_with_cache, new_cache
from sdumc.pretrained.folders import load_model, load_tokenizer, model_folder
from sdumc.pretrained.prompts import PROMPTS
from sdumc.pretrained.states import StateTap, decoder_layers, embedding_scale, layer_index


@dataclass
class Transcript:
    """What the LLM wrote for one utterance.

    Attributes:
        tokens: token ids without EOS. text: those decoded. ended: False if ``max_new_tokens`` came before EOS.
        states: float32 (N, D), the sum of the chosen layers. Row t is the state AT token t - 1, the one that predicts
            token t; row 0 is the state at the prompt's end. N = len(tokens) + 1 (row N - 1 predicts EOS), or
            len(tokens) if the answer did not end.
    """

    tokens: list[int]
    text: str
    ended: bool
    states: Tensor


@dataclass
class _Prompted:
    """What the LLM computed for B prompts: keys and values per layer, mask (B, P), next-token logits, last states."""

    past: list[tuple[Tensor, Tensor]]
    mask: Tensor
    logits: Tensor
    states: Tensor

    def cache(self):
        cache = new_cache()
        for i, (keys, values) in enumerate(self.past):
            cache.update(keys, values, i)
        return cache


class SpeechLLM:
    """A causal LM of transformers (Vicuna, Llama, Qwen2, ...) with its tokenizer, for inference.

    Args:
        name: model folder, or a hub name that is in the local cache.
        prompt: put between ``USER: `` and ``\\n ASSISTANT:``; the projector must have been trained with the same one.
        layers: which ``hidden_states`` are summed for the text representation, e.g. (-4,) or (-4, -3, -2, -1).

    Raises:
        UserError: incomplete folder, unusable tokenizer, no EOS token, no such layer.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prompt: str = PROMPTS["short"],
        layers: Sequence[int] = (-1,),
    ):
        from transformers import AutoModelForCausalLM

        self.folder: Path = model_folder(name)
        self.device, self.dtype, self.layers = torch.device(device), dtype, list(layers)
        self.tokenizer = load_tokenizer(self.folder)
        self.model = load_model(AutoModelForCausalLM, self.folder, dtype, self.device)
        self.base = self.model.base_model
        self.dim: int = self.model.get_input_embeddings().weight.shape[1]
        stack = decoder_layers(self.base, str(self.folder))
        for layer in self.layers:
            layer_index(layer, len(stack), str(self.folder))
        if not self.layers:
            raise UserError("no LLM layer was chosen; give at least one, e.g. -1")
        self.bos_id: int | None = self.tokenizer.bos_token_id
        self.eos_ids = self._eos_ids()
        self.prompt = prompt
        self.chat_ids = self._ids(f"USER: {prompt}\n ASSISTANT:")
        self._chat_text = f"USER: {prompt}\n ASSISTANT:"

    @functools.cached_property
    def embedding_scale(self) -> float | None:
        """What the LLM multiplies projected sound by: :func:`sdumc.pretrained.states.embedding_scale`."""
        return embedding_scale(self.base, self.dim, str(self.folder))

    @property
    def scale_depends_on_version(self) -> bool:
        """Whether another version of transformers is known to have another :attr:`embedding_scale`."""
        return self.model.config.model_type in ("gemma", "gemma2")

    def _eos_ids(self) -> list[int]:
        named = getattr(self.model.generation_config, "eos_token_id", None)
        named = named if isinstance(named, (list, tuple)) else [named]
        found = {i for i in [self.tokenizer.eos_token_id, *named] if i is not None}
        if not found:
            raise UserError(f"{self.folder}: neither tokenizer nor generation config names an end-of-sentence token")
        return sorted(found)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of ``text`` as the answer that follows the prompt, in training and in :meth:`encode`.

        Prompt and answer are tokenised together, as in SLAM-LLM: the answer's first token may depend on "ASSISTANT:"
        before it. Where the tokenizer merges characters of both into one token, the answer is tokenised alone.
        """
        together = self._ids(self._chat_text + text)
        if together[: len(self.chat_ids)] == self.chat_ids:
            return together[len(self.chat_ids) :]
        return self._ids(text)

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of ``text`` with nothing but BOS before it."""
        return self._ids(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids -> text on one line."""
        return " ".join(self.tokenizer.decode(list(tokens), skip_special_tokens=True).split())

    # ---- context

    def contexts(self, audio: Sequence[Tensor | None], chat: bool = True) -> list[Tensor]:
        """Input embeddings that stand before the answer, (P_i, D) each: audio (may be None), BOS, chat prompt.

        Raises:
            UserError: nothing stands before the answer (``chat`` is off, there is no audio, and no BOS token).
        """
        ids = ([] if self.bos_id is None else [self.bos_id]) + (self.chat_ids if chat else [])
        head = self.embed(ids)
        parts = [head if a is None else torch.cat([a.to(head), head]) for a in audio]
        if any(len(p) == 0 for p in parts):
            raise UserError(
                f"{self.folder}: the tokenizer has no BOS token, so text cannot be encoded without a prompt"
            )
        return parts

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Token ids -> input embeddings (N, D)."""
        return self.model.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.long, device=self.device))

    @torch.inference_mode()
    def _read(self, contexts: Sequence[Tensor]) -> _Prompted:
        """Run the prompts through the LLM once, left padded."""
        longest = max(len(c) for c in contexts)
        embeds = torch.zeros(len(contexts), longest, self.dim, dtype=self.dtype, device=self.device)
        mask = torch.zeros(len(contexts), longest, dtype=torch.bool, device=self.device)
        for i, context in enumerate(contexts):
            embeds[i, longest - len(context) :] = context
            mask[i, longest - len(context) :] = True
        cache = new_cache()
        with StateTap(self.base, self.layers, str(self.folder), last_only=True) as tap:
            output = call_with_cache(
                self.model,
                cache,
                inputs_embeds=embeds,
                attention_mask=mask.long(),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=1,
            )
            states = tap.take()
        layers: list[Any] = cache.layers
        past = [(layer.keys, layer.values) for layer in layers]
        return _Prompted(past, mask, output.logits[:, -1], states)

    @torch.inference_mode()
    def _force(self, prompted: _Prompted, answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """States at the prompt's end and at each token of ``answers``: float32 (len + 1, D) each."""
        longest = max(len(a) for a in answers)
        first = prompted.states
        if longest == 0:
            return list(first)
        tokens = torch.zeros(len(answers), longest, dtype=torch.long, device=self.device)
        for row, answer in zip(tokens, answers, strict=True):
            row[: len(answer)] = torch.tensor(list(answer), dtype=torch.long)
        # Padding is on the right here, where the causal mask hides it from all real tokens.
        causal = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        allowed = torch.cat(
            [prompted.mask[:, None].expand(-1, longest, -1), causal.expand(len(answers), -1, -1)], dim=2
        )
        steps = torch.arange(longest, device=self.device)
        with StateTap(self.base, self.layers, str(self.folder)) as tap:
            call_with_cache(
                self.model,
                prompted.cache(),
                input_ids=tokens,
                attention_mask=additive_mask(allowed, self.dtype),
                position_ids=prompted.mask.sum(1, keepdim=True) + steps,
                logits_to_keep=1,
            )
            states = torch.cat([first, tap.take()], dim=1)
        return [s[: len(a) + 1] for s, a in zip(states, answers, strict=True)]

    # ---- transcribing and encoding

    def transcribe(
        self, contexts: Sequence[Tensor], beam: int = 4, max_new_tokens: int = 200, length_penalty: float = 1.0
    ) -> list[Transcript]:
        """Beam search for a batch, then the winners teacher-forced once, on the prompts' cache, for their states."""
        prompted = self._read(contexts)
        winners = self._search(prompted, beam, max_new_tokens, length_penalty)
        # Without EOS, the state at the last token predicts a token that was not generated: it is left out.
        states = self._force(prompted, [w.tokens if w.ended else w.tokens[:-1] for w in winners])
        return [Transcript(w.tokens, self.decode(w.tokens), w.ended, s) for w, s in zip(winners, states, strict=True)]

    def _search(self, prompted: _Prompted, beam: int, max_new_tokens: int, length_penalty: float) -> list[Winner]:
        return beam_search(
            self.model,
            prompted.cache(),
            prompted.mask,
            prompted.logits,
            self.eos_ids,
            beam,
            max_new_tokens,
            length_penalty,
        )

    def encode(self, contexts: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """States of given answers behind their contexts: float32 (len + 1, D); row 0 is the context's end."""
        return self._force(self._read(contexts), answers)
