"""Speech for models: a frozen encoder's frames, and the LLM's inputs that a projector makes of them.

:class:`SpeechEncoder`: waveforms in, frames of one hidden layer out, the same in a batch as alone. :class:`Projector`
turns k of these frames into one input embedding. :class:`SpeechReader` is encoder, projector and LLM together: from
sound to the LLM's input before its answer.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdumc.errors import UserError
from sdumc.files import read_yaml
from sdumc.pretrained.internals import decoder_layers, layer_index
from sdumc.pretrained.llm import RELEASED, SpeechLLM
from sdumc.pretrained.loading import (
    check_rate,
    load_model,
    model_folder,
    passed,
    read_model_config,
    try_clips,
    whisper_spectrogram,
)
from sdumc.pretrained.projector import TRAINED_ON, Projector, load_projector, project

log = logging.getLogger("sdumc")

RATE = 16000  # Hz, the sample rate of every encoder's input
MIN_SAMPLES = 2000  # shorter clips are padded with silence to 0.125 s: six frames, enough for one projector group
# What Whisper's encoder reads: each clip padded with silence to 30 s, as in its training; or the clip at its own
# length, as in SLAM-LLM's recipes, which for clips of a few seconds costs a tenth.
WINDOWS = ("30s", "clip")
_WHISPER_WINDOW = 30 * RATE
_WHISPER_STRIDE = 320  # samples from one frame to the next

# WavLM passes a bool padding mask and a float position bias. PyTorch warns of that; the result is right.
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")


def normalise(wave: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Zero mean and unit variance over the clip: ``(x - mean) / sqrt(var + eps)``, as the released projector saw it."""
    wave = np.asarray(wave, dtype=np.float32)
    return ((wave - wave.mean()) / np.sqrt(wave.var() + eps)).astype(np.float32)


class _RowByRow(nn.Module):
    """A convolutional front end run on each row at its true length.

    The first convolution of base-size models is followed by a group norm over time, whose statistics padding would
    change. The convolutions are a small part of the work, so running them one utterance at a time costs little.
    """

    def __init__(self, front: nn.Module):
        super().__init__()
        self.front = front
        self.lengths: list[int] = []

    def forward(self, waves: Tensor) -> Tensor:
        rows = [self.front(waves[i : i + 1, :n])[0].T for i, n in enumerate(self.lengths)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)


class WaveInput:
    """Clips as the padded input of a model that reads waveforms.

    Args:
        model: a wav2vec 2.0-like model of transformers, with or without a head. Where its first convolution is
            normalised over time, its front end is made to run row by row.
        normalised: scale each clip to zero mean and unit variance.
    """

    def __init__(self, model: Any, normalised: bool, dtype: torch.dtype, device: torch.device):
        self.normalised, self.dtype, self.device = normalised, dtype, device
        self.front: _RowByRow | None = None
        if getattr(model.config, "feat_extract_norm", "layer") == "group":
            base = model.base_model
            self.front = base.feature_extractor = _RowByRow(base.feature_extractor)

    def __call__(self, waves: Sequence[np.ndarray]) -> tuple[dict[str, Any], list[int]]:
        """Clips (T_i,) at 16 kHz -> arguments of the model, and the samples of each clip after padding to 0.125 s."""
        waves = [normalise(w) if self.normalised else np.asarray(w, dtype=np.float32) for w in waves]
        waves = [np.pad(w, (0, max(0, MIN_SAMPLES - len(w)))) for w in waves]
        lengths = [len(w) for w in waves]
        batch = nn.utils.rnn.pad_sequence([torch.from_numpy(w) for w in waves], batch_first=True)
        mask = torch.arange(batch.shape[1])[None] < torch.tensor(lengths)[:, None]
        if self.front is not None:
            self.front.lengths = lengths
        padded = min(lengths) < max(lengths)
        return {
            "input_values": batch.to(self.device, self.dtype),
            "attention_mask": mask.to(self.device, torch.long) if padded else None,
        }, lengths


class _FirstPositions(nn.Module):
    """The first ``num_embeddings`` of Whisper's positions: its encoder reads shorter sound than 30 s with these."""

    def __init__(self, positions: Any):
        super().__init__()
        self.positions, self.num_embeddings = positions, 0

    @property
    def weight(self) -> Tensor:
        return self.positions.weight[: self.num_embeddings]

    def forward(self, ids: Tensor) -> Tensor:
        return self.positions(ids)


def load_whole(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of an encoder's folder, with all its layers."""
    from transformers import AutoModel

    supported = "a speech encoder such as WavLM, wav2vec 2.0, HuBERT or Whisper"
    return load_model(AutoModel, model_folder(name), dtype, device, supported=supported)


def _with_own_parts(model: Any) -> Any:
    """A model of the same weights, whose front end and list of layers can be replaced without changing ``model``."""
    own = copy.copy(model)
    own._modules = {k: _with_own_parts(m) if k in ("encoder", "model") else m for k, m in model._modules.items()}
    return own


class SpeechEncoder:
    """One hidden layer of a WavLM, wav2vec 2.0, HuBERT, data2vec-audio or Whisper encoder from transformers.

    When it is loaded, the model is tried on three short clips. If its frames depend on the other clips of a batch
    (data2vec-audio, wav2vec2-conformer, HuBERT with batch norm, SEW), clips go through it one at a time.

    Args:
        name: model folder, or a hub name that is in the local cache.
        layer: as in ``hidden_states[layer]``; -1 is the encoder's output (after its last layer norm where it has
            one; transformers 5 lists the state before that norm there; after the adapter of a wav2vec 2.0 with one),
            -5 the released audio features. Layers above it are not computed.
        normalised: scale each clip to zero mean and unit variance (not used by Whisper, which has its own scaling).
        window: what Whisper reads: :data:`WINDOWS`. Others read the clip.
        loaded: the folder's model (:func:`load_whole`), when encoders of several layers share its weights.

    Attributes:
        dim: width D of a frame. frame_rate: frames per second (50 for all released models; 25 in SEW's middle layers).
        one_by_one: clips are computed one at a time.

    Raises:
        UserError: the folder is incomplete, of another kind, has no such layer, or the model fails the trial.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layer: int = -1,
        normalised: bool = True,
        loaded: Any = None,
        window: str = "30s",
    ):
        self.folder: Path = model_folder(name)
        self.device, self.dtype = torch.device(device), dtype
        config = read_model_config(self.folder)
        self.is_whisper = config["model_type"] == "whisper"
        self.window = window if self.is_whisper else "clip"
        check_rate(self.folder, RATE)
        model = load_whole(str(self.folder), dtype, self.device) if loaded is None else _with_own_parts(loaded)
        if self.is_whisper:
            model = model.get_encoder()
            if window == "clip":
                model.config, model.embed_positions = copy.copy(model.config), _FirstPositions(model.embed_positions)
            self.spectrogram = whisper_spectrogram(self.folder)
        elif hasattr(model, "feature_extractor") and hasattr(model, "_get_feat_extract_output_lengths"):
            self.input = WaveInput(model, normalised, dtype, self.device)
        else:
            raise UserError(f"{self.folder}: a {config['model_type']} model is not a speech encoder that this can use")
        self.model = model
        self._keep_layers(layer)
        self.frame_rate = RATE / self._stride()
        refusal = f"{self.folder}: this {config['model_type']} model cannot be used as a speech encoder"

        def trial() -> list:
            one_by_one, frames = try_clips(self._encode, self.num_frames, dtype, refusal)
            return [one_by_one, int(frames[0].shape[1])]

        settings = (
            "encoder",
            dtype,
            self.layer,
            normalised,
            *([window] if self.is_whisper and window != "30s" else []),
        )
        self.one_by_one, self.dim = passed(self.folder, self.device, settings, trial)
        if self.one_by_one and not self.is_whisper:
            log.info("%s: its frames depend on the other clips of a batch; clips go one at a time", self.folder)

    def _keep_layers(self, layer: int) -> None:
        base = self.model if self.is_whisper else self.model.encoder
        stack = decoder_layers(base, str(self.folder))
        self.layer = layer_index(layer, len(stack), str(self.folder))
        self._tapped: Tensor | None = None
        self.is_output = self.layer == len(stack)
        if self.is_output:
            return

        def before(_module, args, kwargs):
            self._tapped = args[0] if args else kwargs["hidden_states"]

        def after(_module, _args, output):
            self._tapped = output[0] if isinstance(output, tuple) else output

        if self.layer == 0:
            stack[0].register_forward_pre_hook(before, with_kwargs=True)
        else:
            stack[self.layer - 1].register_forward_hook(after)
        base.layers = stack[: max(1, self.layer)]

    def _stride(self) -> int:
        """Samples from one frame of the layer to the next."""
        if self.is_whisper:
            return _WHISPER_STRIDE
        config, stride = self.model.config, math.prod(self.model.config.conv_stride)
        if self.is_output:
            has_adapter = getattr(config, "add_adapter", False)
            return stride * (config.adapter_stride**config.num_adapter_layers if has_adapter else 1)
        return stride * getattr(config, "squeeze_factor", 1)

    def num_frames(self, num_samples: int) -> int:
        """Frames that a clip of ``num_samples`` at 16 kHz gives."""
        num_samples = max(num_samples, MIN_SAMPLES)
        if self.is_whisper:
            return math.ceil(num_samples / _WHISPER_STRIDE)
        if self.is_output:
            return int(self.model._get_feat_extract_output_lengths(num_samples))
        # In the middle there is no adapter yet, and SEW's layers see the average of every two frames.
        without = {"add_adapter": False} if getattr(self.model.config, "add_adapter", False) else {}
        frames = int(self.model._get_feat_extract_output_lengths(num_samples, **without))
        return frames // getattr(self.model.config, "squeeze_factor", 1)

    def __call__(self, waves: Sequence[np.ndarray]) -> list[Tensor]:
        """Encode clips (T_i,) at 16 kHz -> list of (frames_i, D) on the encoder's device, in its dtype."""
        if self.one_by_one:
            return [self._encode([wave])[0] for wave in waves]
        return self._encode(waves)

    @torch.no_grad()
    def _encode(self, waves: Sequence[np.ndarray]) -> list[Tensor]:
        if self.is_whisper:
            return self._whisper(waves)
        arguments, lengths = self.input(waves)
        output = self._take(self.model(**arguments))
        if len(lengths) == 1:
            return [output[0]]
        return [x[: self.num_frames(n)] for x, n in zip(output, lengths, strict=True)]

    def _take(self, output: Any) -> Tensor:
        """The wanted layer's states (B, T, D) of the forward pass that ended with ``output``."""
        tapped, self._tapped = self._tapped, None
        return output.last_hidden_state if tapped is None else tapped

    def _whisper(self, waves: Sequence[np.ndarray]) -> list[Tensor]:
        # Whisper's input is at most 30 s; a longer clip is split into windows.
        pieces = [
            (i, wave[start : start + _WHISPER_WINDOW])
            for i, wave in enumerate(waves)
            for start in range(0, max(1, len(wave)), _WHISPER_WINDOW)
        ]
        read = self._read_window if self.window == "30s" else self._read_clips
        parts: list[list[Tensor]] = [[] for _ in waves]
        for (i, piece), x in zip(pieces, read([p for _, p in pieces]), strict=True):
            frames = self.num_frames(len(piece)) if len(parts[i]) == 0 else math.ceil(len(piece) / _WHISPER_STRIDE)
            parts[i].append(x[:frames])
        return [torch.cat(p) for p in parts]

    def _read_window(self, pieces: Sequence[np.ndarray]) -> Tensor:
        """Each piece padded with silence to 30 s, as Whisper was trained."""
        features = self.spectrogram(list(pieces), sampling_rate=RATE, return_tensors="pt").input_features
        return self._take(self.model(features.to(self.device, self.dtype)))

    def _read_clips(self, pieces: Sequence[np.ndarray]) -> list[Tensor]:
        """Each piece at its own length."""
        outputs = []
        for piece in pieces:
            frames = math.ceil(max(len(piece), MIN_SAMPLES) / _WHISPER_STRIDE)
            wave = np.pad(piece, (0, frames * _WHISPER_STRIDE - len(piece)))
            features = self.spectrogram(wave, sampling_rate=RATE, return_tensors="pt", padding=False).input_features
            self.model.embed_positions.num_embeddings = self.model.config.max_source_positions = frames
            outputs.append(self._take(self.model(features.to(self.device, self.dtype)))[0])
        return outputs


@dataclass
class SpeechReader:
    """Encoder, projector and LLM together; ``contexts`` turns sound into the input before the answer.

    ``embedding_scale`` is what projected sound is multiplied by on its way into the LLM's first layer. ``others`` has
    the readers of those utterances that another projector is to read (cross-fitting).
    """

    encoder: SpeechEncoder
    projector: Projector
    llm: SpeechLLM
    embedding_scale: float | None = 1.0
    others: Mapping[str, SpeechReader] = field(default_factory=dict)

    def of(self, utt: str) -> SpeechReader:
        """The reader of an utterance."""
        return self.others.get(utt, self)

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
        return self.contexts_of(self.encoder(waves))

    def contexts_of(self, frames: list[Tensor]) -> list[Tensor]:
        """The same from the encoder's frames (T_i, D)."""
        return self.llm.contexts(project(self.projector, frames))


def without_first(states: Tensor, keep_first: bool) -> Tensor:
    """Drop the state before the first token (prompt's end, or BOS) unless it is kept or the only one."""
    return states if keep_first or len(states) == 1 else states[1:]


def _projector_config(projector_path: str) -> tuple[Path, dict[str, Any]]:
    """Path and content of the ``config.yaml`` that :mod:`sdumc.bin.train_projector` wrote; empty if there is none."""
    folder = Path(projector_path)
    config = (folder if folder.is_dir() else folder.parent) / "config.yaml"
    return config, read_yaml(config) if config.is_file() else {}


def learned_from(projector_path: str) -> frozenset[str] | None:
    """The utterances that a projector was trained on; None if it does not say."""
    trained = _projector_config(projector_path)[0].with_name(TRAINED_ON)
    return frozenset(trained.read_text(encoding="utf-8").splitlines()) if trained.is_file() else None


def projector_data(projector_path: str, utterances: Sequence[str]) -> dict[str, Any]:
    """What a projector was trained on: ``projector_data``, the data directory, and ``projector_saw``, how many of
    ``utterances`` that holds. Both are None for a projector that does not say."""
    learned, (_, content) = learned_from(projector_path), _projector_config(projector_path)
    saw = None if learned is None else len(learned.intersection(utterances))
    return {"projector_data": content.get("train_data_dir"), "projector_saw": saw}


def projector_window(projector_path: str) -> str:
    """What a Whisper encoder read when a projector was trained: one of :data:`WINDOWS`."""
    _, content = _projector_config(projector_path)
    return str(content.get("whisper_window", "30s"))


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
        if projector.vocabulary is not None:
            projector.vocabulary.embeddings.mul_(trained / now)
