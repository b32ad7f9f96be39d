"""Starting from a model: weights of a training here, of a packed model, or of the authors' released checkpoint.

The released checkpoint's keys are translated to ours; none is ignored silently.
"""

from __future__ import annotations

import logging
import pickle
import tarfile
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from sdumc.data.dump import Dump
from sdumc.errors import UserError
from sdumc.files import read_yaml, write_text
from sdumc.hyperparameters import ModelConfig
from sdumc.model.network import SDUMC
from sdumc.training.checkpoint import CHECKPOINT, PACKED, hub_pack, load_weights, weights_file, with_statistics

log = logging.getLogger("sdumc")

INIT = "init.yaml"  # of an exp folder: where weights came from, which were taken, and which started anew
_PROJECTION = "frame_projection."


def start_from(model: SDUMC, settings: Namespace, exp_dir: Path, train: Dump, write: bool) -> frozenset[str]:
    """Copy the weights of ``settings.init`` into the model; returns the names of the tensors that were loaded.

    The projection of a feature of another dimension starts anew, and so does what the other model does not have. A
    loaded projection keeps the statistics that its weights were learned with. A run that goes on from its checkpoint
    only needs the names, which are in ``init.yaml``.

    Raises:
        UserError: there are no such weights, or the networks differ in width.
    """
    record = exp_dir / INIT
    if (exp_dir / CHECKPOINT).exists() and record.is_file():
        return frozenset(read_yaml(record).get("loaded", ()))
    source = Path(settings.init)
    theirs, ours = read_weights(source, settings), model.state_dict()
    fits = {name for name, x in ours.items() if name in theirs and theirs[name].shape == x.shape}
    other = [name for name in ours if name in theirs and name not in fits]
    if wrong := [name for name in other if not name.startswith(_PROJECTION)]:
        name = wrong[0]
        raise UserError(
            f"--init {source}: {name} is {tuple(theirs[name].shape)} there and {tuple(ours[name].shape)} here; train "
            "with the settings of that model (--dim, --content-dim, --fusion)"
        )
    anew = {name.split(".")[1] for name in other}  # modalities whose features have another dimension
    loaded = frozenset(name for name in fits if not any(name.startswith(f"{_PROJECTION}{m}.") for m in anew))
    if not loaded:
        raise UserError(f"--init {source}: has no weights of this network")
    model.load_state_dict({**ours, **{name: theirs[name] for name in loaded}})
    new = sorted(ours.keys() - loaded)
    left_out = sorted(theirs.keys() - ours.keys())
    log.info("--init %s: %d of %d tensors loaded", source, len(loaded), len(ours))
    if new:
        log.info("starting anew: %s", ", ".join(_modules(new)))
    if left_out:
        log.info("not used here: %s", ", ".join(_modules(left_out)))
    for warning in _other_features(source, train, anew):
        log.warning("%s", warning)
    if write:
        content = {"from": str(source), "loaded": sorted(loaded), "anew": new, "left_out": left_out}
        write_text(record, yaml.safe_dump(content, sort_keys=False))
    return loaded


def read_weights(source: Path, settings: Namespace) -> dict[str, Tensor]:
    """The weights, under our names, of an exp folder, a packed folder or archive, one in the hub's cache
    (``OWNER/NAME``), or the released checkpoint.

    Raises:
        UserError: it is none of these, or damaged.
    """
    if not source.exists():
        source = hub_pack(str(source)) or source
    if source.is_dir():
        return load_weights(weights_file(source))
    if not source.is_file():
        raise UserError(f"--init {source}: no such exp folder, packed model or checkpoint")
    if source.suffix in (".pt", ".pth", ".ckpt"):
        return import_released(read_released(source), settings.imagination, settings.mask_padding)[1]
    if source.suffix == ".safetensors":
        return load_weights(source)
    try:
        with tarfile.open(source) as archive:
            member = next((m for m in archive if m.isfile() and Path(m.name).name == PACKED), None)
            content = archive.extractfile(member) if member else None
            if content is None:
                raise UserError(f"--init {source}: no {PACKED} in it; is it an archive of sdumc.bin.pack?")
            return with_statistics(safetensors.torch.load(content.read()))
    except (tarfile.TarError, EOFError, OSError, SafetensorError) as e:
        raise UserError(f"--init {source}: not an exp folder, packed model or released checkpoint ({e})") from None


def _modules(names: Collection[str]) -> list[str]:
    """The modules that tensors belong to: ``frame_projection.audio``, ``imagine_content``."""
    found: dict[str, None] = {}
    for name in sorted(names):
        first, *rest = name.split(".")
        found[f"{first}.{rest[0]}" if rest and rest[0] in ("audio", "text", "video") else first] = None
    return list(found)


def _other_features(source: Path, train: Dump, anew: Collection[str]) -> list[str]:
    """Warnings where a loaded projection was learned on features of another model or layer."""
    path = source / "extractors.yaml"
    if not path.is_file():
        return []
    theirs: Mapping[str, Any] = read_yaml(path)
    found = []
    for name, feature in train.features.items():
        if name in anew or name not in theirs:
            continue
        for key in ("model_hash", "layers", "layer", "pooling"):
            a, b = theirs[name].get(key), feature.meta.get(key)
            if a is not None and b is not None and a != b:
                found.append(f"{name}: {key} is {b} here and {a} where the weights come from; they may not fit")
    return found


def parameter_groups(model: nn.Module, loaded: Collection[str], factor: float) -> list[dict[str, Any]]:
    """The optimiser's groups: what starts anew, and what was loaded with ``factor`` on its step size."""
    if not loaded or factor == 1:
        return [{"params": list(model.parameters()), "factor": 1.0}]
    both: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        both[name in loaded].append(parameter)
    groups = [{"params": both[False], "factor": 1.0}, {"params": both[True], "factor": factor}]
    return [group for group in groups if group["params"]]


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
