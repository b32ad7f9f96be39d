"""The projector between speech encoder and LLM: k encoder frames become one input embedding."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sdumc.errors import UserError
from sdumc.files import atomic_write

_PREFIX = "encoder_projector."
_KEYS = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
FILE_NAME = "projector.safetensors"


class Projector(nn.Module):
    """Drop T mod k frames, concatenate each k frames, Linear, ReLU, Linear (SLAM-LLM's "linear" projector).

    The released one has k = 5, encoder_dim = 1024, hidden = 2048, llm_dim = 4096.
    """

    def __init__(self, encoder_dim: int, llm_dim: int, k: int = 5, hidden: int = 2048):
        super().__init__()
        self.k, self.encoder_dim, self.llm_dim, self.hidden = k, encoder_dim, llm_dim, hidden
        self.linear1 = nn.Linear(k * encoder_dim, hidden)
        self.linear2 = nn.Linear(hidden, llm_dim)

    def forward(self, frames: Tensor) -> Tensor:
        """(..., T, encoder_dim) -> (..., T // k, llm_dim)."""
        groups = frames.shape[-2] // self.k
        x = frames[..., : groups * self.k, :].reshape(*frames.shape[:-2], groups, self.k * self.encoder_dim)
        return self.linear2(torch.relu(self.linear1(x)))


def project(projector: Projector, frames: list[Tensor]) -> list[Tensor]:
    """Apply the projector to clips of different lengths, (T_i, D) -> (T_i // k, llm_dim), in one call."""
    parameter = projector.linear1.weight
    padded = nn.utils.rnn.pad_sequence(frames, batch_first=True).to(parameter.device, parameter.dtype)
    output = projector(padded)
    return [x[: len(f) // projector.k] for x, f in zip(output, frames, strict=True)]


def save_projector(path: str | os.PathLike, projector: Projector) -> None:
    """Write the four tensors under the released names as safetensors, atomically."""
    tensors = {_PREFIX + k: v.detach().cpu().float().contiguous() for k, v in projector.state_dict().items()}
    with atomic_write(path, "wb") as f:
        f.write(save(tensors))


def projector_file(path: str | os.PathLike) -> Path:
    """A projector given as its file or as the folder that ``train_projector`` wrote."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path}: no such projector file; train one with sdumc.bin.train_projector")
    return path


def load_projector(
    path: str | os.PathLike,
    encoder_dim: int,
    llm_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Projector:
    """Load our safetensors or the released flat torch dict, strictly: exactly these four tensors, fitting shapes.

    Raises:
        UserError: not such a file, other keys, or dimensions that do not fit the encoder or the LLM.
    """
    path = projector_file(path)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(str(path))
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{path}: cannot be loaded as a projector ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise UserError(
            f"{path}: expected a flat dict of tensors with the keys {', '.join(_PREFIX + k for k in _KEYS)}"
        )
    if all(str(k).startswith(_PREFIX) for k in tensors):
        tensors = {k[len(_PREFIX) :]: v for k, v in tensors.items()}
    if set(tensors) != set(_KEYS):
        raise UserError(
            f"{path}: not this projector; missing {sorted(set(_KEYS) - set(tensors))}, "
            f"unknown {sorted(map(str, set(tensors) - set(_KEYS)))[:4]}"
        )
    hidden, inputs = tensors["linear1.weight"].shape
    outputs, hidden2 = tensors["linear2.weight"].shape
    if inputs % encoder_dim:
        raise UserError(f"{path}: takes {inputs} inputs, which is no multiple of the encoder's {encoder_dim}")
    if outputs != llm_dim or hidden2 != hidden:
        raise UserError(f"{path}: gives {outputs}-dimensional embeddings, the LLM takes {llm_dim}")
    projector = Projector(encoder_dim, llm_dim, k=inputs // encoder_dim, hidden=hidden)
    try:
        projector.load_state_dict(tensors, strict=True)
    except RuntimeError as e:
        raise UserError(f"{path}: {e}") from None
    if not all(torch.isfinite(p).all() for p in projector.parameters()):
        raise UserError(f"{path}: has weights that are NaN or infinite")
    return projector.to(device, dtype).eval().requires_grad_(False)
