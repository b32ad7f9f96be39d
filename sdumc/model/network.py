"""The SDUMC network: attentive pooling, imagination (MIA) and unified modality cross-attention (UMCA).

One set of weights serves two flows. The *complete* flow sees audio, real text and video; the *missing* flow sees
audio, simulated text (or none) and video, and imagines what the real text would have added. Both run in one pass:
whatever they share (everything before text enters) is computed once.

Shapes: B utterances, F flows, N = F * B rows (flow-major), T frames, D features, d = ``dim``, e = ``content_dim``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdumc.conditions import COMPLETE, FUSED_QUERIES, MISSING, MODALITIES, QUERIES, TEXT_OF_FLOW, modality
from sdumc.hyperparameters import ModelConfig
from sdumc.model.layers import (
    AttentivePooling,
    CrossAttention,
    FrameProjection,
    Imagination,
    PerQueryLinear,
    frame_mask,
    mean_and_deviation,
    mlp,
)

_TEXT_QUERY = QUERIES.index("text")
# 1 where the fused query of the row sums over the modality of the column.
_FUSIONS = [[float(m in summed) for m in MODALITIES] for summed in FUSED_QUERIES.values()]
CONTRAST_DIM = 64  # width of the projection that Rank-N-Contrast reads
_LOSS_INPUTS = ("prediction", "utterance", "contrast", "text_query", "text_content")


@dataclass
class FlowOutput:
    """What one flow computes for B utterances; with ``fusion: concat``, the fields from ``text_query`` on are None."""

    prediction: Tensor  # (B,) sentiment, unclipped
    utterance: Tensor  # (B, e) r, the vector the prediction is read from
    contrast: Tensor  # (B, CONTRAST_DIM) projection of r, for Rank-N-Contrast only
    text_feature: Tensor  # (B, d) z_t after imagination
    modality_weights: Tensor  # (B, 3) w, raw
    text_query: Tensor | None = None  # (B, d) the text query q_t
    text_content: Tensor | None = None  # (B, 7, e) c_t after imagination
    query_weights: Tensor | None = None  # (B, 7) beta, raw
    attention: dict[str, Tensor] | None = None  # per modality (B, 7, T), on request

    def loss_inputs(self) -> dict[str, Tensor]:
        """The tensors that the objective reads, by name."""
        return {name: value for name in _LOSS_INPUTS if (value := getattr(self, name)) is not None}


def empty_loss_inputs(config: ModelConfig, device: torch.device) -> dict[str, Tensor]:
    """:meth:`FlowOutput.loss_inputs` of no utterance at all: the same names and shapes, with B = 0."""
    shapes: dict[str, tuple[int, ...]] = {
        "prediction": (0,),
        "utterance": (0, config.content_dim),
        "contrast": (0, CONTRAST_DIM),
    }
    if config.fusion == "umca":
        shapes["text_query"] = (0, config.dim)
        shapes["text_content"] = (0, len(QUERIES), config.content_dim)
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}


class SDUMC(nn.Module):
    """The whole network (Weng et al., ICASSP 2025)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = c = config
        dims = dict(zip(MODALITIES, (c.audio_dim, c.text_dim, c.video_dim), strict=True))
        self.available = tuple(m for m in MODALITIES if dims[m] > 0)
        self.frame_projection = nn.ModuleDict({m: FrameProjection(dims[m], c.dim) for m in self.available})
        self.pooling = nn.ModuleDict({m: AttentivePooling(c.dim, c.scale, c.attention_dropout) for m in self.available})
        pooled = 3 * c.dim if c.pooling == "statistics" else c.dim
        self.utterance_mlp = nn.ModuleDict({m: mlp(pooled, (c.dim, c.dim), c.dropout) for m in self.available})
        if c.imagination in ("both", "utterance"):
            self.imagine_utterance = Imagination(c.dim, c.dim // 2)
        self.modality_weight_mlp = mlp(3 * c.dim, (c.dim, c.dim), c.dropout)
        self.modality_weight = nn.Linear(c.dim, 3)
        if c.fusion == "umca":
            self.query_mlp = nn.Sequential(PerQueryLinear(len(QUERIES), c.dim, c.dim), nn.ReLU(), nn.Dropout(c.dropout))
            self.cross_attention = nn.ModuleDict(
                {m: CrossAttention(c.dim, c.scale, c.attention_dropout) for m in self.available}
            )
            self.content_mlp = nn.ModuleDict({m: mlp(c.dim, (c.dim, c.content_dim), c.dropout) for m in self.available})
            if c.imagination in ("both", "content"):
                self.imagine_content = Imagination(c.content_dim, c.content_dim // 2)
            self.query_weight_mlp = mlp(len(QUERIES) * c.content_dim, (c.dim, c.content_dim), c.dropout)
            self.query_weight = nn.Linear(c.content_dim, len(QUERIES))
        else:
            self.concat_mlp = mlp(3 * c.dim, (c.dim, c.content_dim), c.dropout)
        self.output = nn.Linear(c.content_dim, 1)
        self.contrast_head = nn.Sequential(
            nn.Linear(c.content_dim, CONTRAST_DIM), nn.ReLU(), nn.Linear(CONTRAST_DIM, CONTRAST_DIM)
        )
        self.register_buffer("fusions", torch.tensor(_FUSIONS, dtype=torch.float32), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise so that gradients reach every block from the first step.

        The raw weights w and beta multiply everything that passes them, and torch's default initialisation shrinks
        each ReLU block to about 0.4 of its input. With w and beta near zero, only the last bias would learn for many
        epochs. So all modalities and queries start with an equal share, and perceptrons keep the scale of their input
        (He et al., 2015).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ("mlp" in name or name.startswith(("imagine", "contrast"))):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, PerQueryLinear):
                nn.init.normal_(module.weight, std=(2 / module.weight.shape[-1]) ** 0.5)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.modality_weight.bias, 1 / len(MODALITIES))
        if self.config.fusion == "umca":
            nn.init.constant_(self.query_weight.bias, 1 / len(QUERIES))

    def forward(
        self,
        features: dict[str, Tensor],
        lengths: dict[str, Tensor],
        flows: Sequence[str] = (COMPLETE, MISSING),
        with_attention: bool = False,
    ) -> dict[str, FlowOutput]:
        """Score B utterances in the given flows.

        Args:
            features: (B, T_m, D_m) float tensors, zero padded: ``audio``, ``video``, ``text`` (read by the complete
                flow) and ``text_sim`` (read by the missing flow). A name left out is absent for every utterance.
            lengths: (B,) true frames per name; 0 marks a modality that the utterance does not have. Absent
                modalities take no part in pooling, fusion or attention.
            flows: which flows to run. A row whose *real* text is absent is imagined, in the complete flow too.
            with_attention: also return the attention of the seven queries over frames.

        Returns:
            One :class:`FlowOutput` per flow.

        Raises:
            ValueError: no feature is given, or one has the wrong number of features per frame.
        """
        size, count = self._check(features, lengths), len(flows)
        hidden, mask, present = self._project(features, lengths, flows, size)
        imagined = self._imagined_rows(lengths, flows, present["text"])

        z = self._utterance_vectors(hidden, mask, present, imagined)
        stacked = torch.stack([z[m] for m in MODALITIES], dim=1)  # (N, 3, d)
        w = self.modality_weight(self.modality_weight_mlp(stacked.flatten(1)))  # (N, 3), raw

        if self.config.fusion == "concat":
            r = self.concat_mlp(stacked.flatten(1))
            return self._outputs(flows, r, {"text_feature": z["text"], "modality_weights": w})

        weighted = w.unsqueeze(-1) * stacked
        fused = torch.einsum("qm,nmd->nqd", self.fusions.to(weighted.dtype), weighted)
        queries = self.query_mlp(torch.cat([fused, stacked], dim=1))  # (N, 7, d)
        content, attention = self._content(queries, hidden, mask, present, imagined)

        g = torch.einsum("nm,mnqe->nqe", w, torch.stack([content[m] for m in MODALITIES]))  # (N, 7, e)
        beta = self.query_weight(self.query_weight_mlp(g.flatten(1)))  # (N, 7), raw
        r = torch.einsum("nq,nqe->ne", beta, g)
        parts = {
            "text_feature": z["text"],
            "modality_weights": w,
            "text_query": queries[:, _TEXT_QUERY],
            "text_content": content["text"],
            "query_weights": beta,
        }
        outputs = self._outputs(flows, r, parts)
        if with_attention:
            for i, flow in enumerate(flows):
                outputs[flow].attention = {m: a.reshape(count, size, *a.shape[1:])[i] for m, a in attention.items()}
        return outputs

    def _utterance_vectors(self, hidden, mask, present, imagined: Tensor) -> dict[str, Tensor]:
        """One vector per row and modality (N, d); zero where it is absent, imagined where there is no real text."""
        reference = next(iter(hidden.values()))
        z = {}
        for m in MODALITIES:
            if m not in hidden:
                z[m] = reference.new_zeros(len(imagined), self.config.dim)
                continue
            pooled = self.pooling[m](hidden[m], mask[m])
            if self.config.pooling == "statistics":
                pooled = torch.cat([pooled, mean_and_deviation(hidden[m], mask[m])], dim=-1)
            pooled = self.utterance_mlp[m](pooled)
            pooled = pooled.repeat(len(imagined) // len(pooled), 1)  # audio and video are the same in every flow
            z[m] = pooled * present[m].unsqueeze(-1)
        if hasattr(self, "imagine_utterance"):
            z["text"] = torch.where(imagined.unsqueeze(-1), self.imagine_utterance(z), z["text"])
        return z

    def _content(self, queries: Tensor, hidden, mask, present, imagined: Tensor):
        """The queries' answers (N, 7, e) and attention (N, 7, T) by modality; the answers as `_utterance_vectors`."""
        reference = next(iter(hidden.values()))
        content, attention = {}, {}
        for m in MODALITIES:
            if m not in hidden:
                content[m] = reference.new_zeros(*queries.shape[:2], self.config.content_dim)
                continue
            attended, attention[m] = self.cross_attention[m](queries, hidden[m], mask[m])
            content[m] = self.content_mlp[m](attended) * present[m].view(-1, 1, 1)
        if hasattr(self, "imagine_content"):
            content["text"] = torch.where(imagined.view(-1, 1, 1), self.imagine_content(content), content["text"])
        return content, attention

    def _check(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> int:
        sizes = set()
        for name, x in features.items():
            m = modality(name)
            if m not in self.available:
                raise ValueError(f"this model was made without {m}, but {name} was given")
            want = self.frame_projection[m].in_features
            if x.dim() != 3 or x.shape[-1] != want:
                raise ValueError(f"{name}: expected (B, T, {want}), got {tuple(x.shape)}")
            if lengths[name].shape != x.shape[:1]:
                raise ValueError(f"{name}: expected one length for each of {x.shape[0]} utterances")
            sizes.add(x.shape[0])
        if len(sizes) != 1:
            raise ValueError("no features given" if not sizes else f"batch sizes differ between features: {sizes}")
        return sizes.pop()

    def _project(self, features, lengths, flows, size):
        """Frames to the common width: hidden (rows, T, d), its mask (rows, T), and presence (N,) per modality.

        Audio and video have B rows. Text has N rows, real and simulated text side by side along the batch.
        """
        device = next(iter(features.values())).device
        nobody = torch.zeros(len(flows) * size, dtype=torch.bool, device=device)
        hidden, mask, present = {}, {}, dict.fromkeys(MODALITIES, nobody)
        for m in ("audio", "video"):
            if m in features:
                hidden[m] = self.frame_projection[m](features[m])
                mask[m] = frame_mask(lengths[m], features[m].shape[1], self.config.mask_padding)
                present[m] = (lengths[m] > 0).repeat(len(flows))
        names = [TEXT_OF_FLOW[flow] for flow in flows]
        given = [n for n in names if n in features]
        if given:
            frames = max(features[n].shape[1] for n in given)
            # Where the texts have different widths, pad after the projection: there it is d wide, not D_t.
            rows, keep, there = [], [], []
            for n in names:
                if n in features:
                    h = self.frame_projection["text"](features[n])
                    own = frame_mask(lengths[n], features[n].shape[1], self.config.mask_padding)
                    there.append(lengths[n] > 0)
                else:
                    some = features[given[0]]
                    h = self.frame_projection["text"](some.new_zeros(size, 1, some.shape[-1]))
                    own = torch.zeros(size, 1, dtype=torch.bool, device=device)
                    there.append(nobody[:size])
                extra = frames - h.shape[1]
                rows.append(nn.functional.pad(h, (0, 0, 0, extra)) if extra else h)
                keep.append(nn.functional.pad(own, (0, extra)) if extra else own)
            hidden["text"], mask["text"], present["text"] = torch.cat(rows), torch.cat(keep), torch.cat(there)
        return hidden, mask, present

    def _imagined_rows(self, lengths, flows, text_present: Tensor) -> Tensor:
        """(N,) True where a row is scored without its real text; MIA acts on those."""
        imagined = torch.ones_like(text_present).view(len(flows), -1)
        for i, flow in enumerate(flows):
            if flow == COMPLETE and "text" in lengths:
                imagined[i] = lengths["text"] == 0
        return imagined.flatten()

    def _outputs(self, flows, r: Tensor, parts: dict[str, Tensor]) -> dict[str, FlowOutput]:
        prediction, limit = self.output(r).squeeze(-1), self.config.output_range
        if limit:
            prediction = limit * torch.tanh(prediction / limit)
        parts = {"prediction": prediction, "utterance": r, "contrast": self.contrast_head(r), **parts}
        split: dict[str, Any] = {name: x.reshape(len(flows), -1, *x.shape[1:]) for name, x in parts.items()}
        return {flow: FlowOutput(**{name: x[i] for name, x in split.items()}) for i, flow in enumerate(flows)}
