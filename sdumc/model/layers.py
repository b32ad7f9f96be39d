"""The parts of the SDUMC network: pooling, cross-attention, imagination and small perceptrons.

Pooling (one learned query) and cross-attention (seven queries a row) are the same operation, the most expensive part
of the network: see :func:`attend`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def mlp(in_dim: int, widths: Sequence[int], dropout: float) -> nn.Sequential:
    """A perceptron of (Linear, ReLU, Dropout) blocks with the given widths."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(dropout)]
        in_dim = width
    return nn.Sequential(*layers)


class FrameProjection(nn.Linear):
    """Linear map of frames that are first normalised with the train set's mean and deviation per dimension.

    Hidden states of large models have a few dimensions that vary hundreds of times as much as the others, and the scale
    differs between layers. The normalisation is folded into the weights, so it takes no time per frame. The initial
    mean 0 and inverse deviation 1 give a plain Linear.
    """

    mean: Tensor
    inverse_deviation: Tensor

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("inverse_deviation", torch.ones(in_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, d)."""
        weight = self.weight * self.inverse_deviation
        return nn.functional.linear(x, weight, self.bias - weight @ self.mean)


def frame_mask(lengths: Tensor, frames: int, mask_padding: bool = True) -> Tensor:
    """(B, frames) True at true frames of utterances with the given (B,) lengths.

    With ``mask_padding`` False, padded frames of present utterances count as true ones (the released behaviour).
    """
    if not mask_padding:
        return (lengths > 0).unsqueeze(1).expand(-1, frames)
    return torch.arange(frames, device=lengths.device).unsqueeze(0) < lengths.unsqueeze(1)


def mean_and_deviation(h: Tensor, mask: Tensor) -> Tensor:
    """Mean and standard deviation over the true frames: h (B, T, d), mask (B, T) -> (B, 2d); 0 where there are none."""
    weight = mask.unsqueeze(-1).to(h.dtype) / mask.sum(1).clamp_min(1).view(-1, 1, 1)
    mean = (weight * h).sum(1)
    variance = (weight * (h - mean.unsqueeze(1)).square()).sum(1)
    return torch.cat([mean, (variance + 1e-5).sqrt()], dim=-1)


class AttentivePooling(nn.Module):
    """Frames to one vector: a = softmax_t(s tanh(W x + b) . c), p = drop(sum_t a_t x_t) with x = drop(h)."""

    def __init__(self, dim: int, scale: float, dropout: float):
        super().__init__()
        self.scale = scale
        self.projection = nn.Linear(dim, dim)
        self.context = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.context, std=(2.0 / (dim + 1)) ** 0.5)  # Xavier for a (1, dim) matrix
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """h (B, T, d), mask (B, T) -> (B, d)."""
        query = self.context.expand(h.shape[0], 1, -1)
        rate = self.dropout.p if self.training else 0.0
        return self.dropout(attend(h, mask, query, self.projection, self.scale, rate)[0].squeeze(1))


class CrossAttention(nn.Module):
    """UMCA over one modality: queries, the same for all modalities, attend over its frames.

    key = tanh(W_k x + b_k), query = W_q Q + b_q, a = softmax_t(s key . query), value = x, with x = drop(h).
    """

    def __init__(self, dim: int, scale: float, dropout: float):
        super().__init__()
        self.scale = scale
        self.key = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend with Q queries of N rows over the frames of B utterances, N = F * B (flow-major).

        Args:
            queries: (N, Q, d).
            h: (B, T, d) frames; if B < N, the F flows share them.
            mask: (B, T) True at true frames.

        Returns:
            The attended values (N, Q, d) and the attention (N, Q, T).
        """
        rows, num_queries, dim = queries.shape
        size = h.shape[0]
        # (F * B, Q, d) -> (B, F * Q, d): one product for all flows, which attend over the same frames.
        q = self.query(queries).view(-1, size, num_queries, dim).transpose(0, 1).reshape(size, -1, dim)
        values, attention = attend(h, mask, q, self.key, self.scale, self.dropout.p if self.training else 0.0)
        return self.dropout(_rows_first(values, rows, num_queries)), _rows_first(attention, rows, num_queries)


def _rows_first(x: Tensor, rows: int, num_queries: int) -> Tensor:
    """(B, F * Q, K) -> (F * B, Q, K)."""
    return x.view(x.shape[0], -1, num_queries, x.shape[-1]).transpose(0, 1).reshape(rows, num_queries, x.shape[-1])


class Imagination(nn.Module):
    """MIA: text estimated from all modalities, dec(enc(transition([a; t; v]))) + t."""

    def __init__(self, dim: int, bottleneck: int):
        super().__init__()
        self.transition = nn.Sequential(nn.Linear(3 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.encoder = nn.Linear(dim, bottleneck)
        self.decoder = nn.Linear(bottleneck, dim)

    def forward(self, z: dict[str, Tensor]) -> Tensor:
        """audio, text and video, each (..., dim), to imagined text (..., dim)."""
        joined = torch.cat([z["audio"], z["text"], z["video"]], dim=-1)
        return self.decoder(self.encoder(self.transition(joined))) + z["text"]


class PerQueryLinear(nn.Module):
    """A separate Linear for each of Q queries, computed as one batched product."""

    def __init__(self, num_queries: int, in_dim: int, out_dim: int):
        super().__init__()
        layers = [nn.Linear(in_dim, out_dim) for _ in range(num_queries)]  # for nn.Linear's initialisation
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().clone() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach().clone() for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, in) -> (N, Q, out)."""
        return torch.einsum("nqi,qoi->nqo", x, self.weight) + self.bias
