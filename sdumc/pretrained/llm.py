"""A frozen causal LLM that reads audio embeddings and a prompt, writes a transcript, and gives its hidden states.

Layout of the input, as in SLAM-LLM: ``[audio embeddings][BOS]"USER: {prompt}\n ASSISTANT:"`` and then the answer; or
that of another template (:func:`resolve_template`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdumc.errors import UserError
from sdumc.files import read_json
from sdumc.pretrained.beam_search import Winner, beam_search, call_with_cache, new_cache, prompt_positions
from sdumc.pretrained.internals import (
    Attention,
    StateTap,
    decoder_layers,
    embedding_scale,
    find_attention,
    layer_index,
    longest_context,
)
from sdumc.pretrained.loading import (
    attempt,
    load_model,
    load_tokenizer,
    model_folder,
    passed,
    plain_config,
    read_model_config,
)

PROMPTS = {
    "short": "Transcribe speech to text. ",
    "long": (
        "Transcribe speech to text. Output the transcription directly without redundant content. "
        "Ensure that the output is not duplicated. "
    ),
}

PROMPT, SOUND, BOS = "{prompt}", "{sound}", "{bos}"
RELEASED = "released"
RELEASED_TEXT = SOUND + BOS + "USER: {prompt}\n ASSISTANT:"

# Some templates state the date; the LLM's input must be the same every day.
_FIXED_DATE = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"


def prompt_text(value: str) -> str:
    """The text of ``--prompt``."""
    return PROMPTS.get(value, value)


def resolve_template(value: str, prompt: str, tokenizer: Any, name: str) -> str:
    """``--prompt-template`` as it is recorded: ``released``, or a text with ``{prompt}`` and ``{sound}`` in it.

    Args:
        value: ``released``; ``chat``, the tokenizer's own chat template; ``auto``, that or else ``released``; or a text
            with ``{prompt}``. ``{sound}`` and ``{bos}`` in it say where the sound and the BOS token stand; without
            them, both stand before the text.

    Raises:
        UserError: the template drops the prompt or has it or the sound twice, or the tokenizer has no chat template.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if value == RELEASED or (value == "auto" and not has_chat):
        return RELEASED
    if value in ("chat", "auto"):
        if not has_chat:
            raise UserError(f"{name}: its tokenizer has no chat template; use --prompt-template released, or a text")
        return _chat_template(prompt, tokenizer, name)
    if value.count(PROMPT) != 1 or value.count(SOUND) > 1:
        raise UserError(
            f"--prompt-template {value!r}: must be released, chat, auto, or a text with {PROMPT} once (and {SOUND} at "
            "most once) in it"
        )
    return value


def _chat_template(prompt: str, tokenizer: Any, name: str) -> str:
    """A tokenizer's chat template with one user turn, in which the sound stands before the prompt."""
    asked = prompt.strip()  # many templates strip a turn
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            chat_template=_FIXED_DATE + tokenizer.get_chat_template(),
        )
    except Exception as e:  # a template may raise anything
        raise UserError(
            f"{name}: its chat template cannot be used: {str(e).splitlines()[0] if str(e) else e!r}"
        ) from None
    before, found, after = text.rpartition(asked)
    if not asked or not found:
        raise UserError(
            f"{name}: its chat template drops the prompt {prompt!r}; use --prompt-template released, or a text"
        )
    return before + SOUND + PROMPT + after


def around_sound(template: str, prompt: str) -> tuple[str, str]:
    """The text before the sound and the text after it, ``{bos}`` still in them, of a resolved template.

    Only the released template keeps the spaces around the prompt, as its projector was trained with them.
    """
    text = RELEASED_TEXT if template == RELEASED else template
    if SOUND not in text:
        text = SOUND + (text if BOS in text else BOS + text)
    before, after = text.split(SOUND)
    asked = prompt if template == RELEASED else prompt.strip()
    return before.replace(PROMPT, asked), after.replace(PROMPT, asked)


log = logging.getLogger("sdumc")

# Texts and log-probabilities of the hypotheses of each utterance -> the number of the chosen one.
Choose = Callable[[Sequence[Sequence[str]], Sequence[Sequence[float]]], Sequence[int]]

# What a model's generation config may set that changes the tokens of a beam search, and its value for "no change".
_NOT_FOLLOWED = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}


@dataclass
class Transcript:
    """What the LLM wrote for one utterance.

    Attributes:
        tokens: token ids without EOS. text: those decoded. ended: False if ``max_new_tokens`` came before EOS.
        states: float32 (N, D), the sum of the chosen layers. Row t is the state AT token t - 1, the one that predicts
            token t; row 0 is the state at the prompt's end. N = len(tokens) + 1 (row N - 1 predicts EOS), or
            len(tokens) if the answer did not end.
        log_probability: mean over the tokens, EOS among them: how sure the LLM was.
    """

    tokens: list[int]
    text: str
    ended: bool
    states: Tensor
    log_probability: float | None = None


@dataclass
class _Prompted:
    """What the LLM computed for B prompts: keys and values per layer, mask (B, P), next-token logits, last states."""

    past: list[tuple[Any, Any]]
    mask: Tensor
    logits: Tensor
    states: Tensor

    def cache(self):
        cache = new_cache()
        for i, (keys, values) in enumerate(self.past):
            cache.update(keys, values, i)
        return cache


def _check_kind(folder: Path) -> None:
    """Refuse the folder of another kind of model by its name: what is wrong with its tokenizer says little."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    config = read_model_config(folder)
    kind = config["model_type"]
    attempt(lambda: plain_config(folder, config), f"{folder}/config.json: cannot be used")
    if kind not in CAUSAL or config.get("is_encoder_decoder"):
        raise UserError(f"{folder}: a {kind} model is no causal LLM; give the folder of a decoder-only language model")


class SpeechLLM:
    """A causal LM of transformers (Vicuna, Llama, Qwen2, ...) with its tokenizer, for inference.

    Args:
        name: model folder, or a hub name that is in the local cache.
        prompt: the instruction; the projector must have been trained with the same one.
        layers: which ``hidden_states`` are summed for the text representation, e.g. (-4,) or (-4, -3, -2, -1).
        template: what stands around the prompt: :func:`resolve_template`.

    Raises:
        UserError: incomplete folder, unusable tokenizer, no EOS token, no such layer, a template without the prompt, or
            an LLM that fails the trial (:func:`sdumc.pretrained.internals.find_attention`).
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prompt: str = PROMPTS["short"],
        layers: Sequence[int] = (-1,),
        template: str = RELEASED,
    ):
        from transformers import AutoModelForCausalLM

        self.folder: Path = model_folder(name)
        self.device, self.dtype, self.layers = torch.device(device), dtype, list(layers)
        _check_kind(self.folder)
        self.tokenizer = load_tokenizer(self.folder)
        self.bos_id: int | None = self.tokenizer.bos_token_id
        self._rows: int | None = None
        self._set_prompt(prompt, template)
        self.model = load_model(AutoModelForCausalLM, self.folder, dtype, self.device)
        self.base = self.model.base_model
        if self.base is self.model:  # Llama 4, and Gemma 3 of transformers 4, name a part that is not there
            self.base = getattr(self.model, "model", self.model)
        self.base = getattr(self.base, "language_model", self.base)  # of Gemma 3, which sees pictures too
        tokens = self.model.get_input_embeddings()
        self._rows, self.dim = tokens.weight.shape
        self._check_ids([*self._before, *self._after])
        self.num_layers = len(decoder_layers(self.base, str(self.folder)))
        for layer in self.layers:
            layer_index(layer, self.num_layers, str(self.folder))
        if not self.layers:
            raise UserError("no LLM layer was chosen; give at least one, e.g. -1")
        self.eos_ids = self._eos_ids()
        self.most_positions = longest_context(self.base, tokens, self.base.config)
        reach, per_kind = passed(self.folder, self.device, ("llm", dtype, self.layers), self._try_attention)
        self.attention = Attention(reach, per_kind)
        self._log_what_is_not_followed()

    def _try_attention(self) -> list:
        found = find_attention(self)
        return [dict(found.reach), found.per_kind]

    def _set_prompt(self, prompt: str, template: str) -> None:
        """Token ids before and after the sound; the text and ids of the last piece, which the answer follows."""
        self.prompt = prompt
        self.template = resolve_template(template, prompt, self.tokenizer, str(self.folder))
        before, after = around_sound(self.template, prompt)
        self._before, self._after = self._template_ids(before), self._template_ids(after)
        self._chat_text = after.rsplit(BOS, 1)[-1]
        self.chat_ids = self._ids(self._chat_text)

    def _template_ids(self, text: str) -> list[int]:
        first, *others = text.split(BOS)
        bos = [] if self.bos_id is None else [self.bos_id]
        return [*self._ids(first), *(i for piece in others for i in [*bos, *self._ids(piece)])]

    def _log_what_is_not_followed(self) -> None:
        config = self.model.generation_config
        found = [
            f"{name}={value}"
            for name, none in _NOT_FOLLOWED.items()
            if (value := getattr(config, name, None)) is not None and value != none
        ]
        if found:
            log.info(
                "%s: its generation config asks for %s; the search does not do that", self.folder, ", ".join(found)
            )

    @functools.cached_property
    def embedding_scale(self) -> float | None:
        """What the LLM multiplies projected sound by: :func:`sdumc.pretrained.internals.embedding_scale`."""
        return embedding_scale(self.base, self.dim, str(self.folder))

    @property
    def scale_depends_on_version(self) -> bool:
        """Whether another version of transformers is known to have another :attr:`embedding_scale`."""
        return self.model.config.model_type in ("gemma", "gemma2")

    def _eos_ids(self) -> list[int]:
        read_json(self.folder / "generation_config.json", "fetch the model again", absent={})  # or it would not count
        named = getattr(self.model.generation_config, "eos_token_id", None)
        named = named if isinstance(named, (list, tuple)) else [named]
        found = {i for i in [self.tokenizer.eos_token_id, *named] if i is not None}
        if wrong := [i for i in found if not isinstance(i, int)]:
            raise UserError(f"{self.folder}/generation_config.json: eos_token_id must be numbers, not {wrong[0]!r}")
        if not (found := {i for i in found if 0 <= i < (self._rows or 0)}):
            raise UserError(f"{self.folder}: neither tokenizer nor generation config names an end-of-sentence token")
        return sorted(found)

    def _ids(self, text: str) -> list[int]:
        ids = [] if not text else list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        self._check_ids(ids)
        return ids

    def _check_ids(self, ids: list[int]) -> None:
        """Refuse tokens that the model has no embedding of: a GPU would not say so, but stop."""
        if self._rows is not None and ids and (most := max(ids)) >= self._rows:
            raise UserError(
                f"{self.folder}: its tokenizer gives {self.tokenizer.decode([most])!r} the number {most}, but the "
                f"model has {self._rows} tokens; the tokenizer is another model's, or tokens were added to it"
            )

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
        """Input embeddings that stand before the answer, (P_i, D) each: audio (may be None), BOS and prompt as the
        template has them; with ``chat`` off, audio and BOS.

        Raises:
            UserError: nothing stands before the answer (``chat`` is off, there is no audio, and no BOS token).
        """
        bos = [] if self.bos_id is None else [self.bos_id]
        before, after = map(self.embed, (self._before, self._after) if chat else ([], bos))
        parts = [torch.cat([before, *([] if a is None else [a.to(after)]), after]) for a in audio]
        if any(len(p) == 0 for p in parts):
            raise UserError(
                f"{self.folder}: the tokenizer has no BOS token, so text cannot be encoded without a prompt"
            )
        return parts

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Token ids -> input embeddings (N, D)."""
        return self.model.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.long, device=self.device))

    def check_room(self, contexts: Sequence[Tensor], tokens: int) -> None:
        """Refuse contexts (P_i, D) that leave no room for ``tokens`` more.

        Raises:
            UserError: the LLM has no positions for so many, or changes its rotary frequencies at that length.
        """
        longest = max(map(len, contexts))
        if self.most_positions is not None and longest + tokens > self.most_positions:
            raise UserError(
                f"{self.folder}: {longest} positions of sound and prompt and {tokens} tokens are more than the "
                f"{self.most_positions} that this LLM can read; cut the utterance, lower --max-new-tokens, or give "
                "another LLM"
            )

    @torch.inference_mode()
    def read(self, contexts: Sequence[Tensor]) -> _Prompted:
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
                position_ids=prompt_positions(mask),
                logits_to_keep=1,
            )
            states = tap.take()
        layers: list[Any] = cache.layers
        past = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
        return _Prompted(past, mask, output.logits[:, -1], states)

    @torch.inference_mode()
    def force(
        self, prompted: _Prompted, answers: Sequence[Sequence[int]], attention: Attention | None = None
    ) -> list[Tensor]:
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
        positions = prompted.mask.sum(1, keepdim=True) + torch.arange(longest, device=self.device)
        keys = torch.cat([prompt_positions(prompted.mask), positions], dim=1)
        with StateTap(self.base, self.layers, str(self.folder)) as tap:
            call_with_cache(
                self.model,
                prompted.cache(),
                input_ids=tokens,
                attention_mask=(attention or self.attention).mask(allowed, positions, keys, self.dtype),
                position_ids=positions,
                logits_to_keep=1,
            )
            states = torch.cat([first, tap.take()], dim=1)
        return [s[: len(a) + 1] for s, a in zip(states, answers, strict=True)]

    # ---- transcribing and encoding

    def transcribe(
        self,
        contexts: Sequence[Tensor],
        beam: int = 4,
        max_new_tokens: int = 200,
        length_penalty: float = 1.0,
        choose: Choose | None = None,
    ) -> list[Transcript]:
        """Beam search for a batch, then the winners teacher-forced once, on the prompts' cache, for their states.

        Args:
            choose: may take another hypothesis of the beam than the best: from the texts of each utterance's
                hypotheses, best first, and their log-probabilities to the number of one of them.
        """
        self.check_room(contexts, max_new_tokens)
        prompted = self.read(contexts)
        winners = self.search(prompted, beam, max_new_tokens, length_penalty)
        if choose is not None:
            beams = [[w, *w.rivals] for w in winners]
            texts = [[self.decode(h.tokens) for h in hypotheses] for hypotheses in beams]
            scores = [[h.log_probability(length_penalty) for h in hypotheses] for hypotheses in beams]
            winners = [b[i] for b, i in zip(beams, choose(texts, scores), strict=True)]
        # Without EOS, the state at the last token predicts a token that was not generated: it is left out.
        states = self.force(prompted, [w.tokens if w.ended else w.tokens[:-1] for w in winners])
        return [
            Transcript(w.tokens, self.decode(w.tokens), w.ended, s, w.per_token(length_penalty))
            for w, s in zip(winners, states, strict=True)
        ]

    def search(
        self,
        prompted: _Prompted,
        beam: int,
        max_new_tokens: int,
        length_penalty: float,
        attention: Attention | None = None,
        eos_ids: Sequence[int] | None = None,
    ) -> list[Winner]:
        """Beam search behind prompts that were read; ``attention`` and ``eos_ids`` are the LLM's own if not given."""
        return beam_search(
            self.model,
            prompted.cache(),
            prompted.mask,
            prompted.logits,
            self.eos_ids if eos_ids is None else eos_ids,
            beam,
            max_new_tokens,
            length_penalty,
            attention or self.attention,
        )

    def encode(self, contexts: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """States of given answers behind their contexts: float32 (len + 1, D); row 0 is the context's end."""
        self.check_room(contexts, max(map(len, answers)))
        return self.force(self.read(contexts), answers)
