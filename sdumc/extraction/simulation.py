"""Text from sound alone: transcripts by the speech LLM with their hidden states, and what to do when it fails."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdumc.data.ark import ShardWriter
from sdumc.data.kaldi_dir import KaldiDir
from sdumc.errors import UserError
from sdumc.extraction.jobs import Progress, ahead, read_waves
from sdumc.files import read_yaml
from sdumc.pretrained.llm import SpeechLLM, Transcript
from sdumc.pretrained.memory import halving
from sdumc.pretrained.projector import Projector, load_projector, project
from sdumc.pretrained.quality import judge, normalise
from sdumc.pretrained.speech_encoder import SpeechEncoder

log = logging.getLogger("sdumc")


@dataclass
class SpeechReader:
    """Encoder, projector and LLM together; ``contexts`` turns sound into what stands before the answer.

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
        """Clips (T_i,) -> input embeddings (P_i, D): projected sound, BOS, prompt."""
        return self.llm.contexts(project(self.projector, self.encoder(waves)))


@dataclass(frozen=True)
class Search:
    """Settings of decoding: beams, most new tokens, exponent of the length penalty."""

    beam: int = 4
    max_new_tokens: int = 200
    length_penalty: float = 1.0


@dataclass
class Simulated:
    """Simulated text of one utterance.

    ``states`` (N, D) float32; ``text`` is the transcript that the states belong to, ``raw`` what the LLM wrote;
    ``fallback`` is one of none, asr, cut, prompt.
    """

    states: Tensor
    text: str
    raw: str
    status: str
    fallback: str


def without_first(states: Tensor, keep_first: bool) -> Tensor:
    """Drop the state before the first token (prompt's end, or BOS) unless it is kept or the only one."""
    return states if keep_first or len(states) == 1 else states[1:]


def simulate(
    reader: SpeechReader,
    waves: Sequence[np.ndarray],
    asr_texts: Sequence[str | None],
    search: Search,
    keep_first: bool = False,
) -> list[Simulated]:
    """Simulated text for a batch of clips.

    When the LLM refuses or says nothing, its answer is replaced by the ASR transcript, read behind the same sound and
    prompt (fallback ``asr``), or, without one, by the single state at the prompt's end (``prompt``). An endless repeat
    is cut where it begins (``cut``).
    """
    llm = reader.llm
    contexts = reader.contexts(waves)
    written = llm.transcribe(contexts, search.beam, search.max_new_tokens, search.length_penalty)
    verdicts = [judge(t.text, t.tokens, t.ended) for t in written]
    results: list[Simulated | None] = [
        _kept(llm, t, status, kept, keep_first) if status not in ("empty", "refusal") else None
        for t, (status, kept) in zip(written, verdicts, strict=True)
    ]
    failed = [i for i, r in enumerate(results) if r is None]
    with_asr = [i for i in failed if asr_texts[i] and normalise(asr_texts[i] or "")]
    if with_asr:
        answers = [llm.answer_ids(asr_texts[i] or "") for i in with_asr]
        for i, states in zip(with_asr, llm.encode([contexts[i] for i in with_asr], answers), strict=True):
            results[i] = Simulated(
                without_first(states, keep_first), asr_texts[i] or "", written[i].text, verdicts[i][0], "asr"
            )
    for i in failed:
        if results[i] is None:
            results[i] = Simulated(written[i].states[:1], "", written[i].text, verdicts[i][0], "prompt")
    return [r for r in results if r is not None]


def _kept(llm: SpeechLLM, written: Transcript, status: str, kept: int, keep_first: bool) -> Simulated:
    if status != "repeat":
        return Simulated(without_first(written.states, keep_first), written.text, written.text, status, "none")
    states = without_first(written.states[: kept + 1], keep_first)
    return Simulated(states, llm.decode(written.tokens[:kept]), written.text, status, "cut")


def simulate_shard(
    data: KaldiDir,
    batches: Sequence[list[str]],
    reader: SpeechReader,
    writer: ShardWriter,
    asr_texts: Mapping[str, str],
    search: Search,
    keep_first: bool = False,
    bad_media: str = "stop",
) -> None:
    """Simulate every utterance in ``batches`` that ``writer`` does not have yet; commit each batch.

    Raises:
        UserError: a media file cannot be read, or one clip alone does not fit into the GPU's memory.
    """
    todo = [b for b in ([u for u in batch if u not in writer.done] for batch in batches) if b]
    progress = Progress(sum(map(len, batches)), len(writer.done))
    for batch, (waves, reasons) in ahead(todo, lambda b: read_waves(data, b, bad_media)):

        def work(part: Sequence[str], waves=waves) -> list[Simulated]:
            return simulate(reader, [waves[u] for u in part], [asr_texts.get(u) for u in part], search, keep_first)

        utts = [u for u in batch if u in waves]
        results = dict(zip(utts, halving(utts, work) if utts else [], strict=True))
        for utt in batch:
            if utt in reasons:
                told = {"hyp": "", "raw": "", "status": "empty", "fallback": "absent", "bad_media": reasons[utt]}
                writer.absent(utt, reasons[utt], **told)
                continue
            r = results[utt]
            writer.write(utt, r.states.cpu().numpy(), hyp=r.text, raw=r.raw, status=r.status, fallback=r.fallback)
        writer.commit()
        progress.step(len(batch))


def _projector_config(projector_path: str) -> tuple[Path, dict[str, Any]]:
    """Path and content of the ``config.yaml`` that :mod:`sdumc.bin.train_projector` wrote; empty if there is none."""
    folder = Path(projector_path)
    config = (folder if folder.is_dir() else folder.parent) / "config.yaml"
    return config, read_yaml(config) if config.is_file() else {}


def check_projector_prompt(projector_path: str, prompt: str) -> None:
    """Raise a :class:`UserError` when a projector that was trained here saw another prompt than is used now."""
    config, content = _projector_config(projector_path)
    trained = content.get("prompt")
    if isinstance(trained, str) and trained != prompt:
        raise UserError(
            f"{config}: the projector was trained with the prompt {trained!r}, not {prompt!r}; use the same --prompt"
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
