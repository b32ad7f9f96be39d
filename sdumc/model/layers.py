"""The parts of the SDUMC network: pooling, cross-attention, imagination and small perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdumc.model.attention import attend


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
