"""Attention of a few queries over many frames, with its dropout: the most expensive part of the network.

Pooling (one learned query) and cross-attention (seven queries a row) are the same operation; see :func:`attend`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Elements of h in a block of utterances: the block and its gradients then fit into the processor's cache.
_BLOCK = 2**20


def attend(
    h: Tensor, mask: Tensor, queries: Tensor, key: nn.Linear, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Answer Q queries for each of B utterances with their frames.

    x = drop(h), k = tanh(W x + b), a = softmax_t(s q . k), v = sum_t a_t x_t.

    Args:
        h: (B, T, d) frames.
        mask: (B, T) True at true frames.
        queries: (B, Q, d).
        key: the Linear of W and b.
        scale: the factor s.
        dropout: probability that an element of h is dropped; 0 outside training. On a CPU it is rounded to a 256th.

    Returns:
        The values v (B, Q, d) and the attention a (B, Q, T). When training on a CPU, a carries no gradient.
    """
    if h.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _BlockedAttention.apply(h, mask, queries, key.weight, key.bias, scale, round(256 * dropout))
    x = nn.functional.dropout(h, dropout)
    k = torch.tanh(key(x))
    attention = masked_softmax(scale * torch.bmm(queries, k.transpose(1, 2)), mask.unsqueeze(1))
    return torch.bmm(attention, x), attention


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis, with weight 0 where ``mask`` is False.

    Masked scores become the lowest finite number, not -inf: in a row without any frame, -inf would give NaN weights and
    NaN gradients. Such a row belongs to an absent modality, and the network multiplies its result by zero.
    """
    return torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1)


class _BlockedAttention(torch.autograd.Function):
    """:func:`attend` on a CPU, where memory traffic dominates: one block of utterances at a time, in cache.

    Between forward and backward only h and one random byte for each element of h are kept. (A random float for each
    would take longer than the rest of dropout.) Dropped frames and keys are computed again in the backward pass, which
    is faster than storing and loading them.
    """

    @staticmethod
    def forward(ctx, h: Tensor, mask: Tensor, queries: Tensor, weight: Tensor, bias: Tensor, scale, threshold):
        noise = _random_bytes(h.shape) if threshold else None
        w, b, q = (t.to(h.dtype) for t in (weight, bias, queries))
        values, attention = [], []
        for block in _blocks(h):
            x, _ = _drop(h, noise, threshold, block)
            k = _keys(x, w, b)
            scores = scale * torch.bmm(q[block], k.transpose(1, 2))
            attention.append(masked_softmax(scores, mask[block].unsqueeze(1)))
            values.append(torch.bmm(attention[-1], x))
        joined = torch.cat(attention)
        ctx.save_for_backward(h, mask, queries, weight, bias, noise, joined)
        ctx.scale, ctx.threshold = scale, threshold
        ctx.mark_non_differentiable(joined)
        return torch.cat(values), joined

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor, _):
        h, mask, queries, weight, bias, noise, attention = ctx.saved_tensors
        w, b, q = (t.to(h.dtype) for t in (weight, bias, queries))
        of_h, of_queries = torch.empty_like(h), []
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for block in _blocks(h):
            x, factor = _drop(h, noise, ctx.threshold, block)
            k = _keys(x, w, b)
            a, g = attention[block], gradient[block]
            # Softmax: ds = a (da - sum a da). Rows of absent utterances have weights but no gradient.
            of_a = torch.bmm(g, x.transpose(1, 2))
            of_scores = a * (of_a - (of_a * a).sum(-1, keepdim=True))
            of_scores = of_scores.masked_fill_(~mask[block].unsqueeze(1), 0).mul_(ctx.scale)
            of_queries.append(torch.bmm(of_scores, k))
            # Through the tanh: dk (1 - k^2).
            of_k = torch.bmm(of_scores.transpose(1, 2), q[block])
            of_k = of_k.addcmul_(of_k, k.square_(), value=-1).flatten(0, 1)
            of_weight += of_k.t() @ x.flatten(0, 1)
            of_bias += of_k.sum(0)
            of_x = torch.bmm(a.transpose(1, 2), g)
            of_x.view(-1, of_x.shape[-1]).addmm_(of_k, w)
            of_h[block] = of_x if factor is None else of_x.mul_(factor)
        return of_h, None, torch.cat(of_queries).to(queries.dtype), of_weight, of_bias, None, None


def _blocks(h: Tensor) -> Iterator[slice]:
    """Ranges of utterances, each a block."""
    size = max(1, _BLOCK // max(1, h[0].numel()))
    for start in range(0, len(h), size):
        yield slice(start, start + size)


def _keys(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.linear(x, weight, bias).tanh_()


def _random_bytes(shape: torch.Size) -> Tensor:
    words = torch.empty((shape.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.uint8)[: shape.numel()].view(shape)


def _drop(h: Tensor, noise: Tensor | None, threshold: int, block: slice) -> tuple[Tensor, Tensor | None]:
    """A block of h after dropout, and the factors (0 or 1 / (1 - p)) that made it."""
    if noise is None:
        return h[block], None
    if threshold == 256:
        factor = torch.zeros_like(h[block])
    else:
        factor = (noise[block] >= threshold).to(h.dtype).mul_(256 / (256 - threshold))
    return h[block] * factor, factor
