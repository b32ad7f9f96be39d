"""Beam search that stores the prompt once per utterance and never re-orders the cache.

The usual search copies the prompt's keys and values once per beam and re-orders the whole cache at every step. Here
the beams of an utterance are K query positions of one row: each step appends K columns to the row's cache, and a mask
says which of the columns are a beam's own ancestors. Columns that no running beam descends from are dropped now and
then, and an utterance leaves the batch as soon as its winner is certain. Scores, length penalty and stopping rule are
those of transformers' ``generate(num_beams=K, do_sample=False, early_stopping=False)``, and so are the tokens.

Also here: the cache itself, which grows without copying, and the name under which transformers takes it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sdumc.pretrained.internals import EVERYTHING, Attention

ROOM = 32  # columns that a growing cache makes at once


@functools.lru_cache(maxsize=32)
def _cache_argument(forward: Callable[..., Any]) -> str:
    """``cache`` since transformers 5.24, which will drop ``past_key_values`` in 5.40; 4.57 knows only the latter."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def call_with_cache(model: nn.Module, cache: Any, **inputs: Any) -> Any:
    """``model(**inputs)`` that reads and extends ``cache`` in place, whatever this transformers calls the argument."""
    return model(**{_cache_argument(type(model).forward): cache}, use_cache=True, **inputs)


@functools.cache
def _growing_cache_class() -> Callable[[], Any]:
    from transformers.cache_utils import Cache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        room: tuple[Tensor, Tensor] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
                self.keys, self.values = key_states, value_states
                return key_states, value_states
            assert self.keys is not None and self.values is not None
            old, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
            # Where rows or columns were taken out, keys and values are no longer a part of the room.
            room = self.room
            if room is None or self.keys.data_ptr() != room[0].data_ptr() or end > room[0].shape[2]:
                self.room = room = self._widened(self.keys, end), self._widened(self.values, end)
            room[0][:, :, old:end], room[1][:, :, old:end] = key_states, value_states
            self.keys, self.values = room[0][:, :, :end], room[1][:, :, :end]
            return self.keys, self.values

        @staticmethod
        def _widened(x: Tensor, end: int) -> Tensor:
            wide = x.new_empty(*x.shape[:2], end + ROOM, x.shape[3])
            wide[:, :, : x.shape[2]] = x
            return wide

    return functools.partial(Cache, layer_class_to_replicate=GrowingLayer)


def new_cache() -> Any:
    """An empty cache of a decoder, with room to grow; ``DynamicCache`` copies all that it holds at each step."""
    return _growing_cache_class()()


_IMPOSSIBLE = -1e9
_PRUNE_AT = 32  # unused cache columns that are tolerated before they are dropped


@dataclass
class Winner:
    """The best hypothesis of one utterance: token ids without EOS, whether EOS came, and its log-probability per
    token (with the length penalty's exponent). ``rivals`` are the other finished hypotheses of the beam, best first."""

    tokens: list[int]
    ended: bool
    score: float
    rivals: list[Winner] = field(default_factory=list)

    def log_probability(self, length_penalty: float) -> float:
        """The sum of its tokens' log-probabilities, EOS among them, whatever the penalty was."""
        return self.score * (len(self.tokens) + self.ended) ** length_penalty

    def per_token(self, length_penalty: float) -> float:
        """The mean log-probability of its tokens, EOS among them, whatever the penalty was."""
        return self.log_probability(length_penalty) / max(len(self.tokens) + self.ended, 1)


def _select_columns(cache, prompt_length: int, columns: Tensor) -> None:
    """Keep the prompt and the generated ``columns`` (R, n) of each row, in every layer of ``cache``."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            full = getattr(layer, name)
            generated = full[:, :, prompt_length:]
            index = columns[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3])
            kept = torch.cat([full[:, :, :prompt_length], generated.gather(2, index)], dim=2)
            setattr(layer, name, kept)


class _Hypotheses:
    """The hypotheses of the utterances that are still searched: R rows of K running and K finished ones.

    Attributes:
        rows: (R,) number of each row's utterance. open: (R,) whether a finished hypothesis could still be beaten.
        scores, tokens: (R, K) log-probabilities and (R, K, t) token ids of the running ones, best first.
        done_scores, done_tokens, done_lengths, done_flags: the finished ones, best first: (R, K) scores with the length
            penalty, (R, K, max_new_tokens) token ids, (R, K) their number, and (R, K) False where there is none yet.
    """

    _PER_ROW = ("rows", "open", "scores", "tokens", "done_scores", "done_tokens", "done_lengths", "done_flags")

    def __init__(self, rows: int, beam: int, eos_ids: Sequence[int], limit: int, penalty: float, device: torch.device):
        self.beam, self.limit, self.penalty, self.eos_ids = beam, limit, penalty, set(eos_ids)
        self.eos = torch.tensor(list(eos_ids), device=device)
        self.candidates = max(2, 1 + len(self.eos)) * beam  # enough that K go on even if all others end
        self.may_finish = torch.arange(self.candidates, device=device) < beam  # only the best K may

        def new(value: float, *shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.full((rows, beam, *shape), value, dtype=kind, device=device)

        self.rows = torch.arange(rows, device=device)
        self.open = torch.ones(rows, dtype=torch.bool, device=device)
        self.scores, self.tokens = new(_IMPOSSIBLE), new(0, 0, kind=torch.int64)
        self.scores[:, 0] = 0.0  # all beams begin alike: only one of them counts
        self.done_scores, self.done_tokens = new(_IMPOSSIBLE), new(0, limit, kind=torch.int64)
        self.done_lengths, self.done_flags = new(0, kind=torch.int64), new(0, kind=torch.bool)

    def extend(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the next tokens from their log-probabilities (R, K, V).

        Returns:
            (R, K) the beam that each new running hypothesis continues, and (R, K) its new token.
        """
        step, vocabulary = self.tokens.shape[2], log_probs.shape[-1]
        total = (log_probs + self.scores[..., None]).flatten(1)
        scores, index = total.topk(self.candidates)
        parents, tokens = index // vocabulary, index % vocabulary
        history = self.tokens.gather(1, parents[..., None].expand(-1, -1, step))
        extended = torch.cat([history, tokens[..., None]], dim=-1)  # (R, candidates, t + 1)
        last = step + 1 == self.limit
        ends = torch.ones_like(tokens, dtype=torch.bool) if last else torch.isin(tokens, self.eos)
        self.scores, chosen = (scores + ends * _IMPOSSIBLE).topk(self.beam)
        self.tokens = extended.gather(1, chosen[..., None].expand(-1, -1, step + 1))
        self._finish(extended, scores, ends & self.may_finish)
        possible = self.scores[:, :1] / (step + 1) ** self.penalty
        worst = torch.where(self.done_flags, self.done_scores.min(dim=1, keepdim=True).values, _IMPOSSIBLE)
        self.open = torch.zeros_like(self.open) if last else self.open & (possible > worst).any(dim=1)
        return parents.gather(1, chosen), tokens.gather(1, chosen)

    def _finish(self, extended: Tensor, scores: Tensor, ends: Tensor) -> None:
        """Keep the best K of the finished hypotheses and of those candidates that end now."""
        length = extended.shape[2]
        final = scores / length**self.penalty
        final = final + (~self.open[:, None] * _IMPOSSIBLE) + (~ends * _IMPOSSIBLE)
        self.done_scores, best = torch.cat([self.done_scores, final], dim=1).topk(self.beam)
        padded = torch.nn.functional.pad(extended, (0, self.limit - length))
        index = best[..., None].expand(-1, -1, self.limit)
        self.done_tokens = torch.cat([self.done_tokens, padded], dim=1).gather(1, index)
        lengths = torch.full(ends.shape, length, dtype=torch.int64, device=ends.device)
        self.done_lengths = torch.cat([self.done_lengths, lengths], dim=1).gather(1, best)
        self.done_flags = torch.cat([self.done_flags, ends], dim=1).gather(1, best)

    def _finished(self, row: int, k: int) -> Winner:
        tokens = self.done_tokens[row, k, : int(self.done_lengths[row, k])].tolist()
        ended = bool(tokens) and tokens[-1] in self.eos_ids
        return Winner(tokens[: len(tokens) - ended], ended, float(self.done_scores[row, k]))

    def take_winners(self, winners: list[Winner | None]) -> Tensor:
        """Put the best of each decided row into ``winners``; drop these rows, and return the indices of the others."""
        for r in (~self.open).nonzero()[:, 0].tolist():
            best, *rivals = [self._finished(r, k) for k in range(self.beam) if k == 0 or bool(self.done_flags[r, k])]
            best.rivals = rivals
            winners[int(self.rows[r])] = best
        alive = self.open.nonzero()[:, 0]
        for name in self._PER_ROW:
            setattr(self, name, getattr(self, name)[alive])
        return alive


def prompt_positions(mask: Tensor) -> Tensor:
    """Positions (B, P) of the columns of left-padded prompts, from ``mask`` (B, P), False on padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class _Columns:
    """Which columns of the cache each beam may look at: the prompt's, and of the generated ones its own ancestors.

    Attributes:
        prompt: (R, P) bool, False on left padding. ancestors: (R, K, C) bool, over the C generated columns.
        positions: (R, P + C) position of each column's token; the K columns of one step have the same.
        next: (R,) position of the next token.
    """

    def __init__(self, prompt: Tensor, beam: int):
        self.prompt = prompt
        self.ancestors = torch.zeros(len(prompt), beam, 0, dtype=torch.bool, device=prompt.device)
        self.own = torch.eye(beam, dtype=torch.bool, device=prompt.device)
        self.positions, self.next = prompt_positions(prompt), prompt.sum(1)

    def keep_rows(self, alive: Tensor) -> None:
        self.prompt, self.ancestors = self.prompt[alive], self.ancestors[alive]
        self.positions, self.next = self.positions[alive], self.next[alive]

    def extend(self, cache, parents: Tensor) -> tuple[Tensor, Tensor]:
        """K further columns, one for each beam, which continues the beam ``parents`` (R, K).

        Columns that no beam descends from are dropped from ``cache`` when there are many.

        Returns:
            (R, K, P + C) bool, what each beam may look at; (R, K) the position of the new columns.
        """
        columns = self.ancestors.shape[2]
        self.ancestors = self.ancestors.gather(1, parents[..., None].expand(-1, -1, columns))
        if columns > _PRUNE_AT:
            self._prune(cache)
        own = self.own.expand(len(self.prompt), -1, -1)
        self.ancestors = torch.cat([self.ancestors, own], dim=2)
        new = self.next[:, None].expand(-1, len(self.own))
        self.positions, self.next = torch.cat([self.positions, new], dim=1), self.next + 1
        return torch.cat([self.prompt[:, None].expand(-1, len(self.own), -1), self.ancestors], dim=2), new

    def _prune(self, cache) -> None:
        used = self.ancestors.any(dim=1)
        widest = int(used.sum(1).max())
        if used.shape[1] - widest < _PRUNE_AT:
            return
        order = torch.argsort(used, dim=1, descending=True, stable=True)[:, :widest]
        _select_columns(cache, self.prompt.shape[1], order)
        self.ancestors = self.ancestors.gather(2, order[:, None].expand(-1, len(self.own), -1))
        prompt, generated = self.positions.split([self.prompt.shape[1], used.shape[1]], dim=1)
        self.positions = torch.cat([prompt, generated.gather(1, order)], dim=1)


@torch.inference_mode()
def beam_search(
    model: torch.nn.Module,
    cache,
    prompt_mask: Tensor,
    logits: Tensor,
    eos_ids: Sequence[int],
    beam: int = 4,
    max_new_tokens: int = 200,
    length_penalty: float = 1.0,
    attention: Attention = EVERYTHING,
) -> list[Winner]:
    """Continue B prompts that ``model`` has already read.

    Args:
        model: a causal LM of transformers.
        cache: its cache (of :func:`new_cache`) after the prompt, (B, ...) rows; it is used up.
        prompt_mask: (B, P) bool, False on left padding.
        logits: (B, V) for the first new token.
        eos_ids: tokens that end a hypothesis.
        attention: how far the model's layers look back.

    Returns:
        The winner of each utterance.
    """
    dtype = next(model.parameters()).dtype
    hypotheses = _Hypotheses(len(logits), beam, eos_ids, max_new_tokens, length_penalty, logits.device)
    columns = _Columns(prompt_mask, beam)
    winners: list[Winner | None] = [None] * len(logits)
    log_probs = torch.log_softmax(logits.float(), dim=-1)[:, None].expand(-1, beam, -1)
    while True:
        parents, tokens = hypotheses.extend(log_probs)
        if not bool(hypotheses.open.all()):
            alive = hypotheses.take_winners(winners)
            if len(alive) == 0:
                return [w for w in winners if w is not None]
            cache.batch_select_indices(alive)
            columns.keep_rows(alive)
            parents, tokens = parents[alive], tokens[alive]
        allowed, positions = columns.extend(cache, parents)
        output = call_with_cache(
            model,
            cache,
            input_ids=tokens,
            attention_mask=attention.mask(allowed, positions, columns.positions, dtype),
            position_ids=positions,
        )
        log_probs = torch.log_softmax(output.logits.float(), dim=-1)
