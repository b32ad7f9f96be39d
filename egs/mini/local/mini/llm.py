"""The LLM: a Llama trained on text and on noisy spellings of it, with its tokenizer."""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mini import corpus
from mini.plan import PRETRAIN
from mini.training import optimise, save_whole, seed_everything

log = logging.getLogger("sdumc")


@dataclass(frozen=True)
class LanguageSettings:
    """Size and training of the LLM."""

    seed: int = 1
    steps: int = 500
    batch_size: int = 24
    lr: float = 2e-3
    warmup: int = 60
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 256
    plain: float = 0.17  # share of steps on text without a spelling before it
    slot: float = 0.2  # seconds of speech that one slot of a spelling stands for
    letters_per_second: float = 16.0
    deletions: float = 0.06
    substitutions: float = 0.04
    noise: float = 0.3  # of slots, in root mean squares of the embeddings
    joined: tuple[float, ...] = (0.1, 0.3, 0.3, 0.3)  # shares of sentences as they are, and joined from 2, 3, 4


PROMPT = "Transcribe speech to text. "
CHAT = f"USER: {PROMPT}\n ASSISTANT:"


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE like Llama's, learned from ``texts`` and the chat prompt.

    Every word of ``texts`` is one token; other words become letters and other characters bytes, so that any text can be
    encoded. Text is lower-cased. ``<unk>``, ``<s>``, ``</s>`` and ``<pad>`` are 0, 1, 2 and 3.
    """
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]

    def arrange(tokenizer: Tokenizer) -> Tokenizer:
        tokenizer.normalizer = normalizers.Lowercase()
        # Punctuation is split off, so that words are the same tokens after "ASSISTANT:" as anywhere else.
        marks = pre_tokenizers.Split(Regex(r"[^\w\s']|\n"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [marks, pre_tokenizers.Metaspace("▁", prepend_scheme="always")]
        )
        return tokenizer

    learner = arrange(Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True)))
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=list("▁'" + string.ascii_lowercase),
        show_progress=False,
    )
    learner.train_from_iterator([*texts, CHAT], trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    pieces = special + bytes_ + pieces[len(special) :]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = arrange(
        Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds token types, which Llama does not take
    )


def spell(text: str, letter_ids: dict[str, int], rng: np.random.Generator, settings: LanguageSettings) -> np.ndarray:
    """A noisy, time-stretched spelling: weights (slots, vocabulary letters) of each slot's letters, rows summing to 1.

    Letters last a random time; a slot is the overlap-weighted mean of those that fall into it, as a projector's output
    for a group of frames would be. Some letters are left out or exchanged for others.
    """
    letters = []
    for letter in " " + text + " ":
        if rng.random() < settings.deletions:
            continue
        if rng.random() < settings.substitutions:
            letter = str(rng.choice(list(letter_ids)))
        letters.append(letter_ids.get(letter, letter_ids[" "]))
    rate = settings.letters_per_second * rng.uniform(0.85, 1.2)
    ends = np.cumsum(rng.gamma(4.0, 0.25 / rate, len(letters))) + rng.uniform(0, settings.slot)
    starts = np.concatenate([[0.0], ends[:-1]])
    slots = max(1, int(ends[-1] / settings.slot))
    edges = settings.slot * np.arange(slots + 1)
    overlap = np.minimum(ends[None], edges[1:, None]) - np.maximum(starts[None], edges[:-1, None])
    weights = np.zeros((slots, len(letter_ids)), np.float32)
    for column, index in enumerate(letters):
        weights[:, index] += np.maximum(overlap[:, column], 0)
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-6)


class _Examples:
    """Draws the batches of the LLM's training: embeddings to read, and the tokens to be predicted from them."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, embedding: Any, settings: LanguageSettings, rng):
        self.texts, self.tokenizer, self.embedding, self.settings, self.rng = texts, tokenizer, embedding, settings, rng
        self.letters = {c: i for i, c in enumerate(" " + string.ascii_lowercase)}
        self.letter_tokens = torch.tensor(tokenizer.convert_tokens_to_ids(["▁", *string.ascii_lowercase]))
        self.chat = tokenizer(CHAT)["input_ids"]

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, T, D), mask (B, T), and targets (B, T) with -100 where nothing is predicted."""
        plain = self.rng.random() < self.settings.plain
        head = self.chat if not plain or self.rng.random() < 0.5 else [self.tokenizer.bos_token_id]
        rows, labels = [], []
        for _ in range(self.settings.batch_size):
            text = self._draw_text()
            answer = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
            row = self.embedding(torch.tensor([*head, *answer]))
            before = len(head)
            if not plain:
                slots = self._noisy_spelling(text)
                row = torch.cat([slots, row])
                before += len(slots)
            rows.append(row)
            labels.append(torch.tensor([-100] * before + answer))
        lengths = torch.tensor([len(r) for r in rows])
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        # Padding is on the right: no real token attends to it.
        mask = (torch.arange(x.shape[1])[None] < lengths[:, None]).long()
        return x, mask, targets

    def _draw_text(self) -> str:
        """A sentence, or the beginning and end of different ones joined."""
        rng, texts = self.rng, self.texts
        words = texts[rng.integers(len(texts))].split()
        for _ in range(rng.choice(4, p=self.settings.joined)):
            other = texts[rng.integers(len(texts))].split()
            here = rng.integers(1, len(words))
            there = int(np.clip(here + rng.integers(-2, 3), 1, len(other) - 1))
            words = words[:here] + other[there:]
        return " ".join(words)

    def _noisy_spelling(self, text: str) -> Tensor:
        """Embeddings (slots, D) of a spelling, with noise."""
        letters = self.embedding(self.letter_tokens)
        slots = torch.from_numpy(spell(text, self.letters, self.rng, self.settings)) @ letters
        level = self.settings.noise * letters.detach().square().mean().sqrt()
        return slots + level * torch.randn_like(slots)


def train_llm(corpus_dir: Path, models_dir: Path, settings: LanguageSettings) -> None:
    """Train a Llama with its tokenizer on the transcripts of pretrain; write ``llm``.

    It learns to write the sentence whose noisy spelling stands before the chat prompt,
    ``[spelling][BOS]"USER: ...\\n ASSISTANT:"sentence[EOS]``, since the projector's output will stand there. With so
    small a projector an LLM trained on plain text alone does not learn to follow its input. Most sentences are joined
    from parts of several, so that the LLM has to read and cannot recite.

    Raises:
        UserError: the corpus is missing.
    """
    rng = seed_everything(settings.seed)
    texts = [row.text for row in corpus.read_corpus(corpus_dir, PRETRAIN)]
    tokenizer = build_tokenizer(texts)
    model = _build_model(tokenizer, settings)
    examples = _Examples(texts, tokenizer, model.get_input_embeddings(), settings, rng)

    def loss_at(step: int) -> Tensor:
        x, mask, targets = examples.draw()
        hidden = model.model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        wanted = targets[:, 1:] != -100
        return nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[:, 1:][wanted])

    log.info("LLM: %d sentences, %d tokens in the vocabulary", len(texts), len(tokenizer))
    optimise(model, settings.steps, settings.lr, settings.warmup, loss_at)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    save_whole(models_dir / "llm", save)


def _build_model(tokenizer: Any, settings: LanguageSettings) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    embedding: Any = model.get_input_embeddings()
    nn.init.normal_(embedding.weight)  # unit variance, so hidden states still identify their token
    return model
