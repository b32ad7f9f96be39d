"""Speech encoder, projector and LLM together: from sound to the LLM's input before its answer.

The projector turns k encoder frames into one input embedding.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sdumc.errors import UserError
from sdumc.files import atomic_write, read_yaml, write_text
from sdumc.pretrained.llm import RELEASED, SpeechLLM
from sdumc.pretrained.speech_encoder import SpeechEncoder

_PREFIX = "encoder_projector."
_KEYS = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
FILE_NAME = "projector.safetensors"
TRAINED_ON = "train_utterances"  # beside it: the ids of the utterances that train_projector learned from


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


def save_projector(path: str | os.PathLike, projector: Projector, trained_on: Sequence[str] = ()) -> None:
    """Write the four tensors under the released names as safetensors, atomically; and beside it the utterances, if any,
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


log = logging.getLogger("sdumc")


@dataclass
class SpeechReader:
    """Encoder, projector and LLM together; ``contexts`` turns sound into the input before the answer.

    ``embedding_scale`` is what projected sound is multiplied by on its way into the LLM's first layer.
    """

    encoder: SpeechEncoder
    projector: Projector
    llm: SpeechLLM
    embedding_scale: float | None = 1.0

    @classmethod
    def load(
        cls, encoder: SpeechEncoder, projector_path: str, llm: SpeechLLM, embedding_scale: float | None = None
    ) -> SpeechReader:
        """Load a projector between a loaded encoder and LLM.

        Args:
            embedding_scale: what the LLM multiplied projected sound by when the projector was trained; None: as the
                ``config.yaml`` beside the projector says.

        Raises:
            UserError: the projector does not fit encoder or LLM.
        """
        projector = load_projector(projector_path, encoder.dim, llm.dim)
        if embedding_scale is None:
            embedding_scale = trained_scale(projector_path, llm)
        if embedding_scale != llm.embedding_scale:
            rescale(projector, projector_path, embedding_scale, llm)
        return cls(encoder, projector.to(llm.device, llm.dtype), llm, embedding_scale)

    def contexts(self, waves: Sequence[np.ndarray]) -> list[Tensor]:
        """Clips (T_i,) -> input embeddings (P_i, D): projected sound, BOS and prompt, in the template's order."""
        return self.llm.contexts(project(self.projector, self.encoder(waves)))


def without_first(states: Tensor, keep_first: bool) -> Tensor:
    """Drop the state before the first token (prompt's end, or BOS) unless it is kept or the only one."""
    return states if keep_first or len(states) == 1 else states[1:]


def _projector_config(projector_path: str) -> tuple[Path, dict[str, Any]]:
    """Path and content of the ``config.yaml`` that :mod:`sdumc.bin.train_projector` wrote; empty if there is none."""
    folder = Path(projector_path)
    config = (folder if folder.is_dir() else folder.parent) / "config.yaml"
    return config, read_yaml(config) if config.is_file() else {}


def projector_data(projector_path: str, utterances: Sequence[str]) -> dict[str, Any]:
    """What a projector was trained on: ``projector_data``, the data directory, and ``projector_saw``, how many of
    ``utterances`` that holds. Both are None for a projector that does not say."""
    config, content = _projector_config(projector_path)
    trained = config.with_name(TRAINED_ON)
    saw = None
    if trained.is_file():
        saw = len(set(trained.read_text(encoding="utf-8").splitlines()) & set(utterances))
    return {"projector_data": content.get("train_data_dir"), "projector_saw": saw}


def check_projector_prompt(projector_path: str, prompt: str, template: str) -> None:
    """Raise a :class:`UserError` when a projector that was trained here saw another prompt or template than is used
    now; ``template`` is a resolved one (:func:`sdumc.pretrained.llm.resolve_template`)."""
    config, content = _projector_config(projector_path)
    trained = content.get("prompt")
    if isinstance(trained, str) and trained != prompt:
        raise UserError(
            f"{config}: the projector was trained with the prompt {trained!r}, not {prompt!r}; use the same --prompt"
        )
    before = content.get("prompt_template", RELEASED)
    if content and before != template:
        raise UserError(
            f"{config}: the projector was trained with the prompt template {before!r}, not {template!r}; use the same "
            "--prompt-template"
        )


def trained_scale(projector_path: str, llm: SpeechLLM) -> float | None:
    """What the LLM multiplied a projector's output by in training, from the projector's ``config.yaml``.

    A projector that does not say so is taken to fit the LLM as it is; where another version of transformers scales
    otherwise, the log says so.
    """
    config, content = _projector_config(projector_path)
    if "embedding_scale" in content:
        return content["embedding_scale"]
    if llm.scale_depends_on_version:
        log.warning(
            "%s does not say by what the LLM scaled its input embeddings in training (here %s). Transformers 4 and 5 "
            "differ in that for this LLM: if transcripts are bad, train the projector again",
            config if content else projector_path,
            llm.embedding_scale,
        )
    return llm.embedding_scale


def rescale(projector: Projector, projector_path: str, trained: float | None, llm: SpeechLLM) -> None:
    """Correct a projector trained where the LLM scaled input embeddings by ``trained`` for what it does here.

    Raises:
        UserError: one of the two is no scaling, so that no factor makes up for the difference.
    """
    now = llm.embedding_scale
    if not isinstance(trained, (int, float)) or not now or not math.isfinite(trained) or trained <= 0:
        raise UserError(
            f"{projector_path}: trained where {llm.folder} scaled its input embeddings by {trained}, here by {now}; "
            "use the version of transformers that its config.yaml names, or train it again"
        )
    if math.isclose(trained, now, rel_tol=0.01):  # number formats round the factor
        return
    log.info("%s: trained with input embeddings scaled by %g, here by %g; corrected", projector_path, trained, now)
    with torch.no_grad():
        for parameter in projector.linear2.parameters():
            parameter.mul_(trained / now)
