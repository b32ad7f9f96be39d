"""What survives a kill: the checkpoint from which a run continues, the weights of the best epochs, their average."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sdumc.errors import UserError
from sdumc.files import atomic_write

CHECKPOINT = "checkpoint.pt"
VALID_BEST = "model.valid-best.safetensors"
AVERAGED = "model.averaged.safetensors"
PACKED = "model.safetensors"  # the only weights of a packed model


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    with atomic_write(path, "wb") as f:
        f.write(safetensors.torch.save({name: x.detach().cpu().contiguous() for name, x in state.items()}))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: the file is absent or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; has training finished an epoch? Run stage 4") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: damaged weights ({e}); remove the file and run stage 4 again") from None


def load_into(model: nn.Module, path: Path) -> None:
    """Load weights strictly.

    Raises:
        UserError: the weights do not belong to this model; the differences are named.
    """
    state, own = load_weights(path), model.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unknown {k}" for k in state if k not in own]
    wrong += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if wrong:
        raise UserError(f"{path}: not weights of the model in config.yaml: " + "; ".join(wrong[:5]))
    model.load_state_dict(state)


def save_checkpoint(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write a run's state and the settings that made it, atomically: the previous file stays until this one is whole.

    Raises:
        UserError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    content = io.BytesIO()
    # In memory first: when a write to a file fails, torch's own writer hides the reason.
    torch.save({**state, "settings": dict(settings)}, content)
    with atomic_write(path, "wb") as f:
        f.write(content.getbuffer())


def load_checkpoint(
    path: Path, settings: Mapping[str, Any], may_change: Collection[str] = (), elsewhere: str = "another folder"
) -> dict[str, Any] | None:
    """Read a checkpoint (weights-only: tensors and plain values), or None where there is none.

    Args:
        settings: those of the run that is to continue from it.
        may_change: names of settings that do not change the result.
        elsewhere: how the user gives another folder, for the message "or give ...".

    Raises:
        UserError: the file is damaged or of another version, or was made with other settings, which are named.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as e:
        why = str(e).partition(". ")[0]  # torch's message is a paragraph
        raise UserError(f"{path}: damaged checkpoint ({why}); remove it to train from the start") from None
    old = state.pop("settings", {})
    if old.keys() != settings.keys():
        names = ", ".join(sorted(old.keys() ^ settings.keys())) if old else "all"
        raise UserError(
            f"{path}: a checkpoint of another version of this program, whose settings differ in name: {names}. Go on "
            "with that version, or remove the file to train from the start"
        )
    if changed := differences(old, settings, may_change):
        raise UserError(
            f"{path.parent}: its checkpoint was made with other settings: {'; '.join(changed)}. Go on with the old "
            f"ones, or give {elsewhere}, or remove the folder"
        )
    return state


def differences(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """`name: old -> new` of each setting that differs, unless it is among ``may_change``."""
    return [f"{k}: {old[k]} -> {new[k]}" for k in sorted(new) if k not in may_change and old[k] != new[k]]


# ------------------------------------------------------------------------------------------- weights of the best epochs
# Which epochs are kept is part of the checkpoint, and all other files are made from the epochs' files. So after a kill
# between two writes, the next call of `keep_best` corrects the folder.


def epoch_file(exp_dir: Path, epoch: int) -> Path:
    """Where the weights of an epoch are, while it is among the best."""
    return exp_dir / "epochs" / f"epoch-{epoch:03d}.safetensors"


def keep_best(exp_dir: Path, epochs: Sequence[int]) -> None:
    """Copy the weights of the first of ``epochs`` (best first) to VALID_BEST, and remove those of all other epochs.

    Call it after the checkpoint with this ranking is on disk.
    """
    if not epochs:
        return
    content = epoch_file(exp_dir, epochs[0]).read_bytes()
    best = exp_dir / VALID_BEST
    if not best.exists() or best.read_bytes() != content:
        with atomic_write(best, "wb") as f:
            f.write(content)
    kept = {epoch_file(exp_dir, epoch) for epoch in epochs}
    for path in (exp_dir / "epochs").iterdir():
        if path not in kept:
            path.unlink()


def average_best(exp_dir: Path, epochs: Sequence[int]) -> None:
    """Write the mean of the epochs' weights, added up in float64."""
    states = [load_weights(epoch_file(exp_dir, epoch)) for epoch in sorted(epochs)]
    mean = {
        name: torch.stack([s[name].double() for s in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }
    save_weights(exp_dir / AVERAGED, mean)
