"""What survives a kill: the resumable checkpoint, the best models, their average."""

from __future__ import annotations

import hashlib
import io
import pickle
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
PACKED = "model.safetensors"  # the only one of a packed model


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


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: until it is whole on disk the previous one stays.

    Raises:
        UserError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    content = io.BytesIO()
    torch.save(state, content)  # not to the file: when a write fails, torch's own writer reports something else
    with atomic_write(path, "wb") as f:
        f.write(content.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint (weights-only: tensors and plain values), or None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as e:
        why = str(e).partition(". ")[0]  # torch goes on for a paragraph
        raise UserError(f"{path}: damaged checkpoint ({why}); remove it to train from the start") from None


def settings_hash(settings: dict[str, Any]) -> str:
    """A short stable name for a set of plain settings."""
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]


class BestModels:
    """The n best epochs' weights on disk, the best of them under its own name, and in the end their average.

    Which epochs are kept is part of the checkpoint (:attr:`ranking`), and every file can be made again from the
    epoch files, so a kill between two writes is mended by the next :meth:`tidy`.
    """

    def __init__(self, exp_dir: Path, keep: int):
        self.exp_dir, self.keep = exp_dir, keep
        self.ranking: list[tuple[float, int]] = []  # (value on valid, epoch), best first

    def _file(self, epoch: int) -> Path:
        return self.exp_dir / "epochs" / f"epoch-{epoch:03d}.safetensors"

    def offer(self, value: float, epoch: int, model: nn.Module) -> bool:
        """Keep ``model`` if ``value`` (lower is better) is among the n best; True if it is the best so far."""
        self.ranking = sorted([*self.ranking, (value, epoch)])[: self.keep]
        if (value, epoch) in self.ranking:
            save_weights(self._file(epoch), model.state_dict())
        return self.ranking[0] == (value, epoch)

    def tidy(self) -> None:
        """Make the directory agree with :attr:`ranking`; call it when the checkpoint is safe."""
        if not self.ranking:
            return
        kept = [self._file(epoch) for _, epoch in self.ranking]
        best = self.exp_dir / VALID_BEST
        content = kept[0].read_bytes()
        if not best.exists() or best.read_bytes() != content:
            with atomic_write(best, "wb") as f:
                f.write(content)
        for path in (self.exp_dir / "epochs").iterdir():
            if path not in kept:
                path.unlink()

    def average(self) -> dict[str, Tensor]:
        """Write and return the mean of the kept weights."""
        states = [load_weights(self._file(epoch)) for _, epoch in sorted(self.ranking, key=lambda entry: entry[1])]
        mean = {
            name: torch.stack([s[name].double() for s in states]).mean(0).to(value.dtype)
            for name, value in states[0].items()
        }
        save_weights(self.exp_dir / AVERAGED, mean)
        return mean
