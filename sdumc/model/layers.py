"""The parts of the SDUMC network: pooling, cross-attention, imagination and small perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(in_dim: int, widths: Sequence[int], dropout: float) -> nn.Sequential:
    """A perceptron of (Linear, ReLU, Dropout) blocks with the given widths."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(dropout)]
        in_dim = width
    return nn.Sequential(*layers)


class FrameProjection(nn.Linear):
    """Linear map of frames that are first normalised with the train set's mean and deviation per dimension.

    Hidden states of large models have a few dimensions hundreds of times as wide as the rest, and layers differ in
    scale altogether. The normalisation is folded into the weights, so it costs nothing per frame. Mean 0 and inverse
    deviation 1, as made here, leave a plain Linear.
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


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis with zero weight where ``mask`` is False; a row with no frame gets finite weights.

    The lowest finite number stands for -inf because a row of -inf alone would give NaN, also in the gradient. Such
    rows belong to absent modalities, whose results the network multiplies by zero.
    """
    return torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1)


class _ByteDropout(torch.autograd.Function):
    """Dropout whose mask comes from random bytes: on a CPU drawing a float a place costs more than all else in it."""

    @staticmethod
    def forward(ctx, x: Tensor, threshold: int) -> Tensor:
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = (words.view(torch.uint8)[: x.numel()] >= threshold).view(x.shape)
        # One byte a place is kept for the way back, not the four of a factor.
        ctx.save_for_backward(keep)
        ctx.scale = 256 / (256 - threshold)
        return x * keep.to(x.dtype).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (keep,) = ctx.saved_tensors
        return gradient * keep.to(gradient.dtype).mul_(ctx.scale), None


class FrameDropout(nn.Module):
    """Dropout for (B, T, d) frames: torch's own on a GPU; on a CPU the rate is rounded to a 256th, drawn in bytes."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        threshold = round(256 * self.p)
        if not self.training or not threshold:
            return x
        if x.device.type != "cpu" or threshold == 256 or torch.compiler.is_compiling():
            return nn.functional.dropout(x, self.p)
        return _ByteDropout.apply(x, threshold)


class AttentivePooling(nn.Module):
    """Frames to one vector: a = softmax_t(s tanh(W x + b) . c), p = drop(sum_t a_t x_t) with x = drop(h)."""

    def __init__(self, dim: int, scale: float, dropout: float):
        super().__init__()
        self.scale = scale
        self.projection = nn.Linear(dim, dim)
        self.context = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.context, std=(2.0 / (dim + 1)) ** 0.5)  # Xavier for a (1, dim) matrix
        self.frame_dropout = FrameDropout(dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """h (B, T, d), mask (B, T) -> (B, d)."""
        x = self.frame_dropout(h)
        scores = self.scale * torch.tanh(self.projection(x)).matmul(self.context)
        weights = masked_softmax(scores, mask)
        return self.dropout(torch.bmm(weights.unsqueeze(1), x).squeeze(1))


class CrossAttention(nn.Module):
    """UMCA over one modality: the same queries that every modality is asked, answered by its frames.

    key = tanh(W_k x + b_k), query = W_q Q + b_q, a = softmax_t(s key . query), value = x, with x = drop(h).
    """

    def __init__(self, dim: int, scale: float, dropout: float):
        super().__init__()
        self.scale = scale
        self.key = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, dim)
        self.frame_dropout = FrameDropout(dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Let Q queries of N rows look at the frames of B utterances, N = F * B (flow-major).

        Args:
            queries: (N, Q, d).
            h: (B, T, d) frames; with B < N they are shared by the F flows.
            mask: (B, T) True at true frames.

        Returns:
            The attended values (N, Q, d) and the attention (N, Q, T).
        """
        rows, num_queries, dim = queries.shape
        size = h.shape[0]
        x = self.frame_dropout(h)
        key = torch.tanh(self.key(x))
        # (F * B, Q, d) -> (B, F * Q, d): all flows ask the same frames in one product.
        q = self.query(queries).view(-1, size, num_queries, dim).transpose(0, 1).reshape(size, -1, dim)
        attention = masked_softmax(self.scale * torch.bmm(q, key.transpose(1, 2)), mask.unsqueeze(1))
        values = torch.bmm(attention, x)
        return self.dropout(_rows_first(values, rows, num_queries)), _rows_first(attention, rows, num_queries)


def _rows_first(x: Tensor, rows: int, num_queries: int) -> Tensor:
    """(B, F * Q, K) -> (F * B, Q, K)."""
    return x.view(x.shape[0], -1, num_queries, x.shape[-1]).transpose(0, 1).reshape(rows, num_queries, x.shape[-1])


class Imagination(nn.Module):
    """MIA: text as the other modalities suggest it, dec(enc(transition([a; t; v]))) + t."""

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
    """One Linear of its own for each of Q queries, as a single batched product."""

    def __init__(self, num_queries: int, in_dim: int, out_dim: int):
        super().__init__()
        layers = [nn.Linear(in_dim, out_dim) for _ in range(num_queries)]  # for nn.Linear's initialisation
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().clone() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach().clone() for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, in) -> (N, Q, out)."""
        return torch.einsum("nqi,qoi->nqo", x, self.weight) + self.bias
