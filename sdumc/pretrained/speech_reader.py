"""Speech encoder, projector and LLM together: from sound to the LLM's input before its answer."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdumc.errors import UserError
from sdumc.files import read_yaml
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.projector import Projector, load_projector, project
from sdumc.pretrained.prompts import RELEASED
from sdumc.pretrained.speech_encoder import SpeechEncoder

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


def check_projector_prompt(projector_path: str, prompt: str, template: str) -> None:
    """Raise a :class:`UserError` when a projector that was trained here saw another prompt or template than is used
    now; ``template`` is a resolved one (:func:`sdumc.pretrained.prompts.resolve_template`)."""
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
