"""Frozen speech encoders: waveforms in, frames of one hidden layer out, the same in a batch as alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sdumc.errors import UserError
from sdumc.pretrained.folders import load_model, model_folder, read_model_config
from sdumc.pretrained.states import decoder_layers, layer_index

RATE = 16000  # Hz, the sample rate of every encoder's input
MIN_SAMPLES = 2000  # shorter clips are padded with silence to 0.125 s: six frames, enough for one projector group
_WHISPER_WINDOW = 30 * RATE

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


class SpeechEncoder:
    """One hidden layer of a WavLM, wav2vec 2.0, HuBERT, data2vec-audio or Whisper encoder from transformers.

    Args:
        name: model folder, or a hub name that is in the local cache.
        layer: as in ``hidden_states[layer]``; -1 is the encoder's output (after its last layer norm where it has
            one; transformers 5 lists the state before that norm there), -5 the released audio features. Layers above
            it are not computed.
        normalised: scale each clip to zero mean and unit variance (not used by Whisper, which has its own scaling).

    Attributes:
        dim: width D of a frame. frame_rate: frames per second (50 for all released models of these kinds).

    Raises:
        UserError: the folder is incomplete, of another kind, or has no such layer.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layer: int = -1,
        normalised: bool = True,
    ):
        from transformers import AutoModel

        self.folder: Path = model_folder(name)
        self.device, self.dtype, self.normalised = torch.device(device), dtype, normalised
        config = read_model_config(self.folder)
        self.is_whisper = config["model_type"] == "whisper"
        model = load_model(AutoModel, self.folder, dtype, self.device)
        self.front: _RowByRow | None = None
        if self.is_whisper:
            from transformers import WhisperFeatureExtractor

            model = model.get_encoder()
            try:
                self.spectrogram = WhisperFeatureExtractor.from_pretrained(str(self.folder), local_files_only=True)
            except Exception as e:
                raise UserError(f"{self.folder}: no usable preprocessor_config.json ({e})") from None
            self.dim, stride = model.config.d_model, 320
        elif hasattr(model, "feature_extractor") and hasattr(model, "_get_feat_extract_output_lengths"):
            if getattr(model.config, "feat_extract_norm", "layer") == "group":
                self.front = model.feature_extractor = _RowByRow(model.feature_extractor)
            self.dim, stride = model.config.hidden_size, math.prod(model.config.conv_stride)
        else:
            raise UserError(f"{self.folder}: a {config['model_type']} model is not a speech encoder that this can use")
        self.frame_rate = RATE / stride
        self.model = model
        self._keep_layers(layer)

    def _keep_layers(self, layer: int) -> None:
        base = self.model if self.is_whisper else self.model.encoder
        stack = decoder_layers(base, str(self.folder))
        self.layer = layer_index(layer, len(stack), str(self.folder))
        self._tapped: Tensor | None = None
        if self.layer == len(stack):
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

    def num_frames(self, num_samples: int) -> int:
        """Frames that a clip of ``num_samples`` at 16 kHz gives."""
        num_samples = max(num_samples, MIN_SAMPLES)
        if self.is_whisper:
            return math.ceil(num_samples / 320)
        return int(self.model._get_feat_extract_output_lengths(num_samples))

    @torch.no_grad()
    def __call__(self, waves: Sequence[np.ndarray]) -> list[Tensor]:
        """Encode clips (T_i,) at 16 kHz -> list of (frames_i, D) on the encoder's device, in its dtype."""
        if self.is_whisper:
            return self._whisper(waves)
        waves = [normalise(w) if self.normalised else np.asarray(w, dtype=np.float32) for w in waves]
        waves = [np.pad(w, (0, max(0, MIN_SAMPLES - len(w)))) for w in waves]
        lengths = [len(w) for w in waves]
        batch = np.zeros((len(waves), max(lengths)), dtype=np.float32)
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = wave
        mask = torch.arange(batch.shape[1])[None] < torch.tensor(lengths)[:, None]
        if self.front is not None:
            self.front.lengths = lengths
        padded = min(lengths) < max(lengths)
        output = self.model(
            torch.from_numpy(batch).to(self.device, self.dtype),
            attention_mask=mask.to(self.device, torch.long) if padded else None,
        ).last_hidden_state
        if self._tapped is not None:
            output, self._tapped = self._tapped, None
        return [x[: self.num_frames(n)] for x, n in zip(output, lengths, strict=True)]

    def _whisper(self, waves: Sequence[np.ndarray]) -> list[Tensor]:
        # Whisper's input is exactly 30 s, padded with silence; a longer clip is split into windows.
        pieces = [
            (i, wave[start : start + _WHISPER_WINDOW])
            for i, wave in enumerate(waves)
            for start in range(0, max(1, len(wave)), _WHISPER_WINDOW)
        ]
        features = self.spectrogram([p for _, p in pieces], sampling_rate=RATE, return_tensors="pt").input_features
        output = self.model(features.to(self.device, self.dtype)).last_hidden_state
        if self._tapped is not None:
            output, self._tapped = self._tapped, None
        parts: list[list[Tensor]] = [[] for _ in waves]
        for (i, piece), x in zip(pieces, output, strict=True):
            frames = self.num_frames(len(piece)) if len(parts[i]) == 0 else math.ceil(len(piece) / 320)
            parts[i].append(x[:frames])
        return [torch.cat(p) for p in parts]
