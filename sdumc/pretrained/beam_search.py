"""Beam search in which the prompt is stored once per utterance and nothing is ever re-ordered.

The usual search copies the prompt's keys and values once per beam and re-orders the whole cache at every step. Here
the beams of an utterance are K query positions of one row: each step appends K columns to the row's cache, and a mask
says which of the columns are a beam's own ancestors. Columns that no living beam descends from are dropped now and
then, and an utterance leaves the batch as soon as its search is decided. Scores, length penalty and stopping rule are
those of transformers' ``generate(num_beams=K, do_sample=False, early_stopping=False)``, and so are the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdumc.pretrained.cache import call_with_cache

_IMPOSSIBLE = -1e9
_PRUNE_AT = 32  # unused cache columns that are tolerated before they are dropped


@dataclass
class Winner:
    """The best hypothesis of one utterance: token ids without EOS, whether EOS came, and its log-probability per
    token (with the length penalty's exponent)."""

    tokens: list[int]
    ended: bool
    score: float


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, Q, C) bool, True where a query may look -> (B, 1, Q, C) with 0 there and the lowest number elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def _select_columns(cache, prompt_length: int, columns: Tensor) -> None:
    """Keep the prompt and the generated ``columns`` (R, n) of each row, in every layer of ``cache``."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            full = getattr(layer, name)
            generated = full[:, :, prompt_length:]
            index = columns[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3])
            kept = torch.cat([full[:, :, :prompt_length], generated.gather(2, index)], dim=2)
            setattr(layer, name, kept)


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
) -> list[Winner]:
    """Continue B prompts that ``model`` has already read.

    Args:
        model: a causal LM of transformers.
        cache: its cache (of :func:`sdumc.pretrained.cache.new_cache`) after the prompt, (B, ...) rows; it is used up.
        prompt_mask: (B, P) bool, False on left padding.
        logits: (B, V) for the first new token.
        eos_ids: tokens that end a hypothesis.

    Returns:
        The winner of each utterance.
    """
    device, dtype = logits.device, next(model.parameters()).dtype
    rows = torch.arange(len(logits), device=device)  # which utterance each living row is
    eos = torch.tensor(list(eos_ids), device=device)
    prompt_length, num_prompt = prompt_mask.shape[1], prompt_mask.sum(1)
    keep = max(2, 1 + len(eos)) * beam
    first = torch.arange(keep, device=device) < beam  # only the best K candidates may finish

    def new(value: float, *shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.full((len(rows), beam, *shape), value, dtype=kind, device=device)

    running_scores = new(_IMPOSSIBLE)
    running_scores[:, 0] = 0.0
    running = new(0, 0, kind=torch.int64)  # (R, K, t)
    ancestors = new(0, 0, kind=torch.bool)  # (R, K, C): the generated columns that a beam may look at
    done_scores, done = new(_IMPOSSIBLE), new(0, max_new_tokens, kind=torch.int64)
    done_lengths, done_flags = new(0, kind=torch.int64), new(0, kind=torch.bool)
    winners: list[Winner | None] = [None] * len(rows)
    open_rows = torch.ones(len(rows), dtype=torch.bool, device=device)  # could a finished hypothesis still be beaten?

    log_probs = torch.log_softmax(logits.float(), dim=-1)[:, None].expand(-1, beam, -1)
    for step in range(max_new_tokens):
        vocabulary = log_probs.shape[-1]
        total = (log_probs + running_scores[..., None]).flatten(1)
        scores, index = total.topk(keep)
        parents, tokens = index // vocabulary, index % vocabulary
        history = running.gather(1, parents[..., None].expand(-1, -1, step))
        candidates = torch.cat([history, tokens[..., None]], dim=-1)  # (R, keep, t + 1)
        stops = torch.isin(tokens, eos)
        if step + 1 == max_new_tokens:
            stops = torch.ones_like(stops)

        running_scores, chosen = (scores + stops * _IMPOSSIBLE).topk(beam)
        running = candidates.gather(1, chosen[..., None].expand(-1, -1, step + 1))
        next_parents, next_tokens = parents.gather(1, chosen), tokens.gather(1, chosen)

        final = scores / (step + 1) ** length_penalty
        final = final + (~open_rows[:, None] * _IMPOSSIBLE) + (~(stops & first) * _IMPOSSIBLE)
        merged_scores = torch.cat([done_scores, final], dim=1)
        done_scores, best = merged_scores.topk(beam)
        padded = torch.nn.functional.pad(candidates, (0, max_new_tokens - step - 1))
        done = torch.cat([done, padded], dim=1).gather(1, best[..., None].expand(-1, -1, max_new_tokens))
        lengths = torch.full_like(tokens, step + 1)
        done_lengths = torch.cat([done_lengths, lengths], dim=1).gather(1, best)
        done_flags = torch.cat([done_flags, stops & first], dim=1).gather(1, best)

        possible = running_scores[:, :1] / (step + 1) ** length_penalty
        worst = torch.where(done_flags, done_scores.min(dim=1, keepdim=True).values, _IMPOSSIBLE)
        open_rows = open_rows & (possible > worst).any(dim=1)
        if step + 1 == max_new_tokens:
            open_rows = torch.zeros_like(open_rows)

        if not bool(open_rows.all()):
            for r in (~open_rows).nonzero()[:, 0].tolist():
                found = done[r, 0, : int(done_lengths[r, 0])].tolist()
                ended = bool(found) and found[-1] in eos_ids
                winners[int(rows[r])] = Winner(found[: len(found) - ended], ended, float(done_scores[r, 0]))
            alive = open_rows.nonzero()[:, 0]
            if len(alive) == 0:
                break
            cache.batch_select_indices(alive)
            rows, open_rows, prompt_mask, num_prompt = (x[alive] for x in (rows, open_rows, prompt_mask, num_prompt))
            running, running_scores, ancestors = running[alive], running_scores[alive], ancestors[alive]
            done, done_scores, done_lengths, done_flags = (
                x[alive] for x in (done, done_scores, done_lengths, done_flags)
            )
            next_parents, next_tokens = next_parents[alive], next_tokens[alive]

        columns = ancestors.shape[2]
        ancestors = ancestors.gather(1, next_parents[..., None].expand(-1, -1, columns))
        if columns > _PRUNE_AT:
            used = ancestors.any(dim=1)
            widest = int(used.sum(1).max())
            if columns - widest >= _PRUNE_AT:
                order = torch.argsort(used, dim=1, descending=True, stable=True)[:, :widest]
                _select_columns(cache, prompt_length, order)
                ancestors = ancestors.gather(2, order[:, None].expand(-1, beam, -1))
        own = torch.eye(beam, dtype=torch.bool, device=device).expand(len(rows), -1, -1)
        ancestors = torch.cat([ancestors, own], dim=2)
        allowed = torch.cat([prompt_mask[:, None].expand(-1, beam, -1), ancestors], dim=2)
        output = call_with_cache(
            model,
            cache,
            input_ids=next_tokens,
            attention_mask=additive_mask(allowed, dtype),
            position_ids=(num_prompt + step)[:, None].expand(-1, beam),
        )
        log_probs = torch.log_softmax(output.logits.float(), dim=-1)
    return winners  # type: ignore[return-value]  # every row was filled when it closed
