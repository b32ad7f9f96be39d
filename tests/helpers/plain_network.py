"""The network once more, as plainly as it can be said: one utterance, float64, no batch, no padding, no masks.

It reads the released names, so that it also checks how those are mapped to ours.
"""

from __future__ import annotations

import torch

_INDEX = {"audio": 0, "text": 1, "video": 2}
SCALE = 0.3


def _linear(w, name, x):
    return w[f"{name}.weight"].double() @ x + w[f"{name}.bias"].double()


def _two_layers(w, name, x):
    return torch.relu(_linear(w, f"{name}.3", torch.relu(_linear(w, f"{name}.0", x))))


def _imagine(w, name, a, t, v):
    joined = _linear(w, f"{name}.transition.0", torch.cat([a, t, v]))
    moved = _linear(w, f"{name}.transition.2", torch.relu(joined))
    return _linear(w, f"{name}.decoder_0.0", _linear(w, f"{name}.encoder_0.0", moved)) + t


def plain_forward(weights: dict[str, torch.Tensor], frames: dict[str, torch.Tensor], imagine=(False, False)) -> dict:
    """weights: released names without `model.`; frames: (T, D) for audio, text, video; imagine: at either place."""
    w = weights
    h, z = {}, {}
    for m, i in _INDEX.items():
        h[m] = [_linear(w, f"frame_dim_reshape_{i}", x) for x in frames[m].double()]
        context = w[f"fra2utt_{i}.attention_context_vector"].double()[0]
        scores = torch.stack([SCALE * context.dot(torch.tanh(_linear(w, f"fra2utt_{i}.input_proj", x))) for x in h[m]])
        weight = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
        z[m] = _two_layers(w, f"{m}_mlp", sum(a * x for a, x in zip(weight, h[m], strict=True)))
    if imagine[0]:
        z["text"] = _imagine(w, "missing_text_imagination_mlp", z["audio"], z["text"], z["video"])
    wa, wt, wv = _linear(w, "fc_att", _two_layers(w, "attention_mlp", torch.cat([z["audio"], z["text"], z["video"]])))
    a, t, v = z["audio"], z["text"], z["video"]
    asked = {
        "fused": wa * a + wt * t + wv * v,
        "at": wa * a + wt * t,
        "tv": wt * t + wv * v,
        "av": wa * a + wv * v,
        "audio": a,
        "text": t,
        "video": v,
    }
    queries = {q: torch.relu(_linear(w, f"cross_{q}_query_mlp.0", x)) for q, x in asked.items()}
    content = {m: [] for m in _INDEX}
    for m, i in _INDEX.items():
        keys = [torch.tanh(_linear(w, f"cross_att_fra2utt_{i}.input_proj", x)) for x in h[m]]
        for query in queries.values():
            q = _linear(w, f"cross_att_fra2utt_{i}.query_proj", query)
            scores = torch.stack([SCALE * q.dot(k) for k in keys])
            weight = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
            value = sum(p * x for p, x in zip(weight, h[m], strict=True))
            content[m].append(_two_layers(w, f"cross_{m}_mlp", value))
    if imagine[1]:
        content["text"] = [
            _imagine(w, "missing_cross_text_query_imagination_mlp", *parts)
            for parts in zip(content["audio"], content["text"], content["video"], strict=True)
        ]
    g = [
        wa * ca + wt * ct + wv * cv
        for ca, ct, cv in zip(content["audio"], content["text"], content["video"], strict=True)
    ]
    beta = _linear(w, "cross_fc_att", _two_layers(w, "cross_attention_mlp", torch.cat(g)))
    r = sum(b * x for b, x in zip(beta, g, strict=True))
    head = _linear(w, "orgin_linear_change.2", torch.relu(_linear(w, "orgin_linear_change.0", r)))
    return {
        "prediction": _linear(w, "fc_out_v", r)[0],
        "utterance": r,
        "contrast": head,
        "text_query": queries["text"],
        "text_content": torch.stack(content["text"]),
        "modality_weights": torch.stack([wa, wt, wv]),
        "query_weights": beta,
    }


def released_weights(dims=(12, 20, 9), dim=16, content=8, seed=0) -> dict[str, torch.Tensor]:
    """Random weights under the released names (without `model.`), at any dimensions."""
    g = torch.Generator().manual_seed(seed)
    w: dict[str, torch.Tensor] = {}

    def linear(name: str, out: int, into: int) -> None:
        w[f"{name}.weight"] = torch.randn(out, into, generator=g) / into**0.5
        w[f"{name}.bias"] = torch.randn(out, generator=g) * 0.1

    for i, m in enumerate(_INDEX):
        linear(f"frame_dim_reshape_{i}", dim, dims[i])
        w[f"fra2utt_{i}.attention_context_vector"] = torch.randn(1, dim, generator=g)
        linear(f"fra2utt_{i}.input_proj", dim, dim)
        linear(f"{m}_mlp.0", dim, dim)
        linear(f"{m}_mlp.3", dim, dim)
        linear(f"cross_att_fra2utt_{i}.query_proj", dim, dim)
        linear(f"cross_att_fra2utt_{i}.input_proj", dim, dim)
        linear(f"cross_{m}_mlp.0", dim, dim)
        linear(f"cross_{m}_mlp.3", content, dim)
    for name, width in (("missing_text_imagination_mlp", dim), ("missing_cross_text_query_imagination_mlp", content)):
        linear(f"{name}.transition.0", width, 3 * width)
        linear(f"{name}.transition.2", width, width)
        linear(f"{name}.encoder_0.0", width // 2, width)
        linear(f"{name}.decoder_0.0", width, width // 2)
    for q in ("fused", "at", "tv", "av", "audio", "text", "video"):
        linear(f"cross_{q}_query_mlp.0", dim, dim)
    linear("attention_mlp.0", dim, 3 * dim)
    linear("attention_mlp.3", dim, dim)
    linear("fc_att", 3, dim)
    linear("cross_attention_mlp.0", dim, 7 * content)
    linear("cross_attention_mlp.3", content, dim)
    linear("cross_fc_att", 7, content)
    linear("fc_out_e", 1, content)
    linear("fc_out_v", 1, content)
    linear("fc_out_ev", 1, 1)
    linear("orgin_linear_change.0", 64, content)
    linear("orgin_linear_change.2", 64, 64)
    w["prelu.weight"] = torch.full((6,), 0.25)
    w["layer_normali.weight"], w["layer_normali.bias"] = torch.ones(dim), torch.zeros(dim)
    return w
