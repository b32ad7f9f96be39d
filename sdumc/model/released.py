"""Translate the keys of the authors' released checkpoint to ours; none is ignored silently."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdumc.errors import UserError
from sdumc.hyperparameters import ModelConfig

PREFIX = "model."
# In the released file, but not used by the released forward pass.
DEAD_KEYS = frozenset(
    {"fc_out_e.weight", "fc_out_e.bias", "fc_out_ev.weight", "fc_out_ev.bias", "prelu.weight"}
    | {"layer_normali.weight", "layer_normali.bias"}
)
_MODALITIES = {"audio": "0", "text": "1", "video": "2"}
# In the order of sdumc.model.network.QUERIES.
_QUERIES = ("fused", "at", "tv", "av", "audio", "text", "video")
_IMAGINE = {
    "imagine_utterance": "missing_text_imagination_mlp",
    "imagine_content": "missing_cross_text_query_imagination_mlp",
}


def read_released(source: Path) -> dict[str, Any]:
    """The ``state_dict`` of the released file.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of plain tensors.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as e:
        raise UserError(f"{source}: not a checkpoint of plain tensors ({str(e).splitlines()[0]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{source}: has no `state_dict`; is it the released checkpoint?")
    return content["state_dict"]


def _linears() -> dict[str, str]:
    """Our Linear modules -> the released ones."""
    names = {
        "modality_weight_mlp.0": "attention_mlp.0",
        "modality_weight_mlp.3": "attention_mlp.3",
        "modality_weight": "fc_att",
        "query_weight_mlp.0": "cross_attention_mlp.0",
        "query_weight_mlp.3": "cross_attention_mlp.3",
        "query_weight": "cross_fc_att",
        "output": "fc_out_v",
        "contrast_head.0": "orgin_linear_change.0",
        "contrast_head.2": "orgin_linear_change.2",
    }
    for m, i in _MODALITIES.items():
        names[f"frame_projection.{m}"] = f"frame_dim_reshape_{i}"
        names[f"pooling.{m}.projection"] = f"fra2utt_{i}.input_proj"
        names[f"cross_attention.{m}.key"] = f"cross_att_fra2utt_{i}.input_proj"
        names[f"cross_attention.{m}.query"] = f"cross_att_fra2utt_{i}.query_proj"
        for layer in ("0", "3"):
            names[f"utterance_mlp.{m}.{layer}"] = f"{m}_mlp.{layer}"
            names[f"content_mlp.{m}.{layer}"] = f"cross_{m}_mlp.{layer}"
    for ours, theirs in _IMAGINE.items():
        names[f"{ours}.transition.0"] = f"{theirs}.transition.0"
        names[f"{ours}.transition.2"] = f"{theirs}.transition.2"
        names[f"{ours}.encoder"] = f"{theirs}.encoder_0.0"
        names[f"{ours}.decoder"] = f"{theirs}.decoder_0.0"
    return names


def import_released(
    released: dict[str, Tensor], imagination: str, mask_padding: bool
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Translate the released ``state_dict``.

    Args:
        released: tensors by released name, all under ``model.``.
        imagination: where MIA acts (the public forward has it nowhere, ``none``).
        mask_padding: False to attend over padding as the public forward does.

    Returns:
        The configuration read from the shapes, our state dict, and the released keys that are left out: the dead ones,
        and MIA's where ``imagination`` does not use it.

    Raises:
        UserError: a key is missing or unknown, or the shapes do not fit together.
    """
    state = {k.removeprefix(PREFIX): v for k, v in released.items() if k.startswith(PREFIX)}
    unknown = sorted(k for k in released if not k.startswith(PREFIX))
    linears = _linears()
    wanted = {f"{theirs}.{kind}" for theirs in linears.values() for kind in ("weight", "bias")}
    wanted |= {f"cross_{q}_query_mlp.0.{kind}" for q in _QUERIES for kind in ("weight", "bias")}
    wanted |= {f"fra2utt_{i}.attention_context_vector" for i in _MODALITIES.values()}
    missing = sorted((wanted | DEAD_KEYS) - state.keys())
    unknown += sorted(state.keys() - wanted - DEAD_KEYS)
    if missing or unknown:
        raise UserError(
            "not the released SDUMC checkpoint: "
            + "; ".join([f"missing {PREFIX}{k}" for k in missing[:3]] + [f"unknown {k}" for k in unknown[:3]])
            + (f"; {len(missing)} missing and {len(unknown)} unknown in all" if len(missing) + len(unknown) > 6 else "")
        )
    dims = {m: state[f"frame_dim_reshape_{i}.weight"].shape[1] for m, i in _MODALITIES.items()}
    config = ModelConfig(
        audio_dim=dims["audio"],
        text_dim=dims["text"],
        video_dim=dims["video"],
        dim=state["frame_dim_reshape_0.weight"].shape[0],
        content_dim=state["fc_out_v.weight"].shape[1],
        imagination=imagination,
        mask_padding=mask_padding,
    )
    used = {"imagine_utterance": ("both", "utterance"), "imagine_content": ("both", "content")}
    ours: dict[str, Tensor] = {}
    left_out = set(DEAD_KEYS)
    for name, theirs in linears.items():
        place = name.split(".")[0]
        for kind in ("weight", "bias"):
            if place in used and imagination not in used[place]:
                left_out.add(f"{theirs}.{kind}")
            else:
                ours[f"{name}.{kind}"] = state[f"{theirs}.{kind}"]
    for m, i in _MODALITIES.items():
        ours[f"pooling.{m}.context"] = state[f"fra2utt_{i}.attention_context_vector"].squeeze(0)
        ours[f"frame_projection.{m}.mean"] = torch.zeros(getattr(config, f"{m}_dim"))
        ours[f"frame_projection.{m}.inverse_deviation"] = torch.ones(getattr(config, f"{m}_dim"))
    for kind in ("weight", "bias"):
        ours[f"query_mlp.0.{kind}"] = torch.stack([state[f"cross_{q}_query_mlp.0.{kind}"] for q in _QUERIES])
    return config, {k: v.float() for k, v in ours.items()}, sorted(PREFIX + k for k in left_out)
