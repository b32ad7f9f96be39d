"""Frozen speech encoders: waveforms in, frames of one hidden layer out, the same in a batch as alone."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdumc.errors import UserError
from sdumc.pretrained.folders import first_line, load_model, model_folder, read_model_config
from sdumc.pretrained.states import decoder_layers, layer_index
from sdumc.pretrained.trial import passed, try_clips

log = logging.getLogger("sdumc")

RATE = 16000  # Hz, the sample rate of every encoder's input
MIN_SAMPLES = 2000  # shorter clips are padded with silence to 0.125 s: six frames, enough for one projector group
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
    ):
        self.folder: Path = model_folder(name)
        self.device, self.dtype = torch.device(device), dtype
        config = read_model_config(self.folder)
        self.is_whisper = config["model_type"] == "whisper"
        model = load_whole(str(self.folder), dtype, self.device) if loaded is None else _with_own_parts(loaded)
        if self.is_whisper:
            model = model.get_encoder()
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

        settings = ("encoder", dtype, self.layer, normalised)
        self.one_by_one, self.dim = passed(self.folder, self.device, settings, trial)
        if self.one_by_one:
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
        # Whisper's input is exactly 30 s, padded with silence; a longer clip is split into windows.
        pieces = [
            (i, wave[start : start + _WHISPER_WINDOW])
            for i, wave in enumerate(waves)
            for start in range(0, max(1, len(wave)), _WHISPER_WINDOW)
        ]
        features = self.spectrogram([p for _, p in pieces], sampling_rate=RATE, return_tensors="pt").input_features
        output = self._take(self.model(features.to(self.device, self.dtype)))
        parts: list[list[Tensor]] = [[] for _ in waves]
        for (i, piece), x in zip(pieces, output, strict=True):
            frames = self.num_frames(len(piece)) if len(parts[i]) == 0 else math.ceil(len(piece) / _WHISPER_STRIDE)
            parts[i].append(x[:frames])
        return [torch.cat(p) for p in parts]


def whisper_spectrogram(folder: Path) -> Any:
    """Whisper's feature extractor; :class:`UserError` if the folder has no usable one."""
    from transformers import WhisperFeatureExtractor

    try:
        return WhisperFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:
        raise UserError(f"{folder}: no usable preprocessor_config.json ({first_line(e)})") from None
