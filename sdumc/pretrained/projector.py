"""The projector between a speech encoder and an LLM, and its file."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sdumc.errors import UserError
from sdumc.files import atomic_write, write_text

_SHARPNESS = 40.0  # of a vocabulary's scores at first, where a position equals a token's embedding; learned
_PREFIX = "encoder_projector."
_KEYS = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
_VOCABULARY_KEYS = tuple("vocabulary." + name for name in ("embeddings", "blank", "bias", "sharpness"))
FILE_NAME = "projector.safetensors"
TRAINED_ON = "train_utterances"  # beside it: the ids of the utterances that train_projector learned from


class Vocabulary(nn.Module):
    """Some tokens of the LLM, by their input embeddings, and a blank: what a position of a projector may stand for.

    A position is scored by its products with these. The LLM reads the mean embedding of the tokens, weighted by their
    probabilities; positions that are most likely blank are left out, and neighbours with the same best token are one.
    """

    embeddings: Tensor

    def __init__(self, embeddings: Tensor):
        super().__init__()
        tokens, dim = embeddings.shape
        self.register_buffer("embeddings", embeddings.detach().clone())
        self.blank = nn.Parameter(torch.randn(1, dim) / math.sqrt(dim))
        self.bias = nn.Parameter(torch.zeros(1 + tokens))
        self.sharpness = nn.Parameter(torch.tensor(math.log(_SHARPNESS)))

    @property
    def size(self) -> Tensor:
        """The usual norm of an embedding, which all products are relative to."""
        return self.embeddings.float().norm(dim=1).mean()

    def scores(self, rows: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """Positions (N, D) -> log-probabilities (N, 1 + tokens) of the blank and of ``tokens`` (all if not given)."""
        size, embeddings = self.size, self.embeddings
        bias: Tensor = self.bias
        if tokens is not None:
            embeddings, bias = embeddings[list(tokens)], bias[[0, *(i + 1 for i in tokens)]]
        similar = (rows.float() / size) @ torch.cat([self.blank.float(), embeddings.float() / size]).T
        return (similar * self.sharpness.float().exp() + bias.float()).log_softmax(-1)

    def best(self, rows: Tensor) -> list[int]:
        """The tokens of the best path."""
        return [int(i) - 1 for i in torch.unique_consecutive(self.scores(rows).argmax(-1)) if i]

    def read(self, rows: Tensor) -> Tensor:
        """Positions (N, D) -> what the LLM reads of them (M, D), at least one if there are any."""
        if len(rows) == 0:
            return rows
        scores = self.scores(rows)
        path = scores.argmax(-1)
        if not path.any():
            path[scores[:, 0].argmin()] = 1
        begins = torch.cat([path.new_ones(1).bool(), path[1:] != path[:-1]])
        segment, spoken = begins.cumsum(0) - 1, path != 0
        kept = torch.unique(segment[spoken])
        place = torch.searchsorted(kept, segment[spoken])
        mean = scores[spoken, 1:].softmax(-1) @ self.embeddings.float()
        sums = mean.new_zeros(len(kept), mean.shape[1]).index_add(0, place, mean)
        return (sums / torch.bincount(place, minlength=len(kept))[:, None]).to(rows)


class Projector(nn.Module):
    """Drop T mod k frames, concatenate each k frames, Linear, ReLU, Linear (SLAM-LLM's "linear" projector).

    The released one has k = 5, encoder_dim = 1024, hidden = 2048, llm_dim = 4096. One that had a warm start has a
    ``vocabulary`` behind it (Vocabulary).
    """

    def __init__(
        self, encoder_dim: int, llm_dim: int, k: int = 5, hidden: int = 2048, vocabulary: Vocabulary | None = None
    ):
        super().__init__()
        self.k, self.encoder_dim, self.llm_dim, self.hidden = k, encoder_dim, llm_dim, hidden
        self.linear1 = nn.Linear(k * encoder_dim, hidden)
        self.linear2 = nn.Linear(hidden, llm_dim)
        self.vocabulary = vocabulary

    def forward(self, frames: Tensor) -> Tensor:
        """(..., T, encoder_dim) -> (..., T // k, llm_dim)."""
        groups = frames.shape[-2] // self.k
        x = frames[..., : groups * self.k, :].reshape(*frames.shape[:-2], groups, self.k * self.encoder_dim)
        return self.linear2(torch.relu(self.linear1(x)))


def positions(projector: Projector, frames: Sequence[Tensor]) -> list[Tensor]:
    """Apply the projector to clips of different lengths, (T_i, D) -> (T_i // k, llm_dim), in one call."""
    parameter = projector.linear1.weight
    padded = nn.utils.rnn.pad_sequence(list(frames), batch_first=True).to(parameter.device, parameter.dtype)
    output = projector(padded)
    return [x[: len(f) // projector.k] for x, f in zip(output, frames, strict=True)]


def project(projector: Projector, frames: Sequence[Tensor]) -> list[Tensor]:
    """What the LLM reads of clips (T_i, D)."""
    output = positions(projector, frames)
    return output if projector.vocabulary is None else [projector.vocabulary.read(x) for x in output]


def save_projector(path: str | os.PathLike, projector: Projector, trained_on: Sequence[str] = ()) -> None:
    """Write the tensors under the released names as safetensors, atomically; and beside it the utterances, if any,
    that it was trained on."""
    tensors = {_PREFIX + k: v.detach().cpu().float().contiguous() for k, v in projector.state_dict().items()}
    with atomic_write(path, "wb") as f:
        f.write(save(tensors))
    if trained_on:
        write_text(Path(path).with_name(TRAINED_ON), "".join(f"{u}\n" for u in sorted(trained_on)))


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
    """Load our safetensors or the released flat torch dict, strictly: exactly its tensors, fitting shapes.

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
    has_vocabulary = "vocabulary.embeddings" in tensors
    known = {*_KEYS, *(_VOCABULARY_KEYS if has_vocabulary else ())}
    if set(tensors) != known:
        raise UserError(
            f"{path}: not this projector; missing {sorted(known - set(tensors))}, "
            f"unknown {sorted(map(str, set(tensors) - known))[:4]}"
        )
    hidden, inputs = tensors["linear1.weight"].shape
    outputs, hidden2 = tensors["linear2.weight"].shape
    if inputs % encoder_dim:
        raise UserError(f"{path}: takes {inputs} inputs, which is no multiple of the encoder's {encoder_dim}")
    if outputs != llm_dim or hidden2 != hidden:
        raise UserError(f"{path}: gives {outputs}-dimensional embeddings, the LLM takes {llm_dim}")
    vocabulary = Vocabulary(tensors["vocabulary.embeddings"]) if has_vocabulary else None
    projector = Projector(encoder_dim, llm_dim, inputs // encoder_dim, hidden, vocabulary)
    try:
        projector.load_state_dict(tensors, strict=True)
    except RuntimeError as e:
        raise UserError(f"{path}: {e}") from None
    if not all(torch.isfinite(p).all() for p in projector.parameters()):
        raise UserError(f"{path}: has weights that are NaN or infinite")
    return projector.to(device, dtype).eval().requires_grad_(False)
