"""Starting from a model: weights of a training here, of a packed model, or of the authors' released checkpoint."""

from __future__ import annotations

import logging
import tarfile
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from sdumc.data.dump import Dump
from sdumc.errors import UserError
from sdumc.files import read_yaml, write_text
from sdumc.model.network import SDUMC
from sdumc.model.released import import_released, read_released
from sdumc.training.checkpoint import CHECKPOINT, PACKED, load_weights, with_statistics
from sdumc.training.experiment import weights_file

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
    """The weights of an exp folder, a packed folder or archive, or the released checkpoint, under our names.

    Raises:
        UserError: it is none of these, or damaged.
    """
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
