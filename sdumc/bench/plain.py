"""The plain way of the same computation, to measure against: what one writes first, and what public code does.

Two flows one after the other, each with its own pass over audio and video; a loop over the seven queries; no masks;
Rank-N-Contrast by its definition, anchor pair by anchor pair.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdumc.conditions import MODALITIES
from sdumc.hyperparameters import ModelConfig
from sdumc.model.layers import Imagination, mlp


class PlainPooling(nn.Module):
    """Attentive pooling with torch's dropout."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.projection, self.context = nn.Linear(c.dim, c.dim), nn.Parameter(torch.randn(c.dim) / c.dim**0.5)
        self.scale, self.drop = c.scale, nn.Dropout(c.attention_dropout)

    def forward(self, h: Tensor) -> Tensor:
        x = self.drop(h)
        score = torch.tanh(self.projection(x)) @ self.context
        return self.drop((torch.softmax(self.scale * score, dim=1).unsqueeze(-1) * x).sum(1))


class PlainSDUMC(nn.Module):
    """The network of FlowOutput's first five fields for one flow at a time; shapes as in sdumc.model.network."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        dims = {"audio": c.audio_dim, "text": c.text_dim, "video": c.video_dim}
        self.c = c
        self.frame = nn.ModuleDict({m: nn.Linear(dims[m], c.dim) for m in MODALITIES})
        self.pool = nn.ModuleDict({m: PlainPooling(c) for m in MODALITIES})
        self.utterance = nn.ModuleDict({m: mlp(c.dim, (c.dim, c.dim), c.dropout) for m in MODALITIES})
        self.imagine_utterance = Imagination(c.dim, c.dim // 2)
        self.imagine_content = Imagination(c.content_dim, c.content_dim // 2)
        self.weight_mlp, self.weight = mlp(3 * c.dim, (c.dim, c.dim), c.dropout), nn.Linear(c.dim, 3)
        self.query = nn.ModuleList([mlp(c.dim, (c.dim,), c.dropout) for _ in range(7)])
        self.key = nn.ModuleDict({m: nn.Linear(c.dim, c.dim) for m in MODALITIES})
        self.ask = nn.ModuleDict({m: nn.Linear(c.dim, c.dim) for m in MODALITIES})
        self.content = nn.ModuleDict({m: mlp(c.dim, (c.dim, c.content_dim), c.dropout) for m in MODALITIES})
        self.query_weight_mlp = mlp(7 * c.content_dim, (c.dim, c.content_dim), c.dropout)
        self.query_weight = nn.Linear(c.content_dim, 7)
        self.output = nn.Linear(c.content_dim, 1)
        self.head = nn.Sequential(nn.Linear(c.content_dim, 64), nn.ReLU(), nn.Linear(64, 64))
        self.drop = nn.Dropout(c.attention_dropout)

    def forward(self, x: dict[str, Tensor], imagine: bool) -> dict[str, Tensor]:
        h = {m: self.frame[m](x[m]) for m in MODALITIES}
        z = {m: self.utterance[m](self.pool[m](h[m])) for m in MODALITIES}
        if imagine:
            z["text"] = self.imagine_utterance(z)
        a, t, v = z["audio"], z["text"], z["video"]
        w = self.weight(self.weight_mlp(torch.cat([a, t, v], 1)))
        wa, wt, wv = w[:, :1], w[:, 1:2], w[:, 2:]
        asked = [wa * a + wt * t + wv * v, wa * a + wt * t, wt * t + wv * v, wa * a + wv * v, a, t, v]
        queries = [layer(q) for layer, q in zip(self.query, asked, strict=True)]
        c = {}
        for m in MODALITIES:
            values = self.drop(h[m])
            key = torch.tanh(self.key[m](values))
            answers = []
            for q in queries:
                score = self.c.scale * (key * self.ask[m](q).unsqueeze(1)).sum(-1)
                answers.append((torch.softmax(score, dim=1).unsqueeze(-1) * values).sum(1))
            c[m] = self.content[m](self.drop(torch.stack(answers, 1)))
        if imagine:
            c["text"] = self.imagine_content(c)
        g = sum(w[:, i].view(-1, 1, 1) * c[m] for i, m in enumerate(MODALITIES))
        beta = self.query_weight(self.query_weight_mlp(g.flatten(1)))
        r = (beta.unsqueeze(-1) * g).sum(1)
        return {
            "prediction": self.output(r).squeeze(-1),
            "utterance": r,
            "contrast": self.head(r),
            "text_query": queries[5],
            "text_content": c["text"],
        }


def plain_rank_n_contrast(features: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """Rank-N-Contrast by its definition: (n, n, D) differences, and for each other sample a mask over all pairs."""
    n = len(features)
    logits = -(features.unsqueeze(1) - features.unsqueeze(0)).norm(dim=-1) / temperature
    distance = (labels.unsqueeze(1) - labels.unsqueeze(0)).abs()
    keep = ~torch.eye(n, dtype=torch.bool, device=features.device)
    logits, distance = logits[keep].view(n, n - 1), distance[keep].view(n, n - 1)
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    exp = logits.exp()
    loss = features.new_zeros(())
    for k in range(n - 1):
        farther = (distance >= distance[:, k : k + 1] - 1e-4).to(exp.dtype)
        loss = loss - (logits[:, k] - (farther * exp).sum(1).log()).sum()
    return loss / (n * (n - 1))


def plain_objective(full: dict[str, Tensor], missing: dict[str, Tensor], y: Tensor) -> Tensor:
    """The objective with the released factors."""

    def rmse(name: str, teach: bool) -> Tensor:
        target = full[name].detach() if teach else full[name]
        return (missing[name] - target).square().mean().sqrt()

    views = torch.cat([full["contrast"], missing["contrast"]])
    return (
        0.5 * (full["prediction"] - y).square().mean()
        + 0.5 * (missing["prediction"] - y).square().mean()
        + 0.1 * rmse("text_query", True)
        + 0.7 * rmse("text_content", True)
        + 0.13 * rmse("utterance", False)
        + 0.5 * plain_rank_n_contrast(views, torch.cat([y, y]))
    )
