"""Silero's voice activity detector: for each frame of 32 ms, the probability that somebody speaks in it.

The weights are those in the package ``silero-vad`` (MIT licence), file ``silero_vad_16k.safetensors``. The package's
Python code is not imported: it sets torch to one thread for the whole process, and loads TorchScript by a function
that torch has deprecated. A long recording goes through the network in blocks.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from sdumc.errors import UserError

SAMPLES = 512  # of a frame, at 16 kHz
_CONTEXT = 64  # samples of the frame before that the network sees too
_BLOCK = 2048  # frames at once, about a minute: bounds the memory
_INSTALL = "pip install 'silero-vad>=6.2.1,<7'"


class _Network(nn.Module):
    """Spectrum, four convolutions, an LSTM over the frames, a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, frames: torch.Tensor, state: tuple | None) -> tuple[torch.Tensor, tuple]:
        """(N, 64 + 512) consecutive frames -> (N,) probabilities, and the LSTM's state for the next block."""
        x = self.stft_conv(F.pad(frames[:, None], (0, 64), mode="reflect"))  # real and imaginary parts
        x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        x, state = self.lstm(x.transpose(1, 2).reshape(1, len(frames), 128), state)
        return self.final_conv(x[0, :, :, None].relu()).sigmoid().flatten(), state


class SpeechDetector:
    """Sound (T,) float32 at 16 kHz -> (T // 512,) probabilities of speech.

    Raises:
        UserError: the package with the weights is not installed, or is another version than expected.
    """

    def __init__(self) -> None:
        found = importlib.util.find_spec("silero_vad")  # finds the folder; does not run the package's code
        if found is None or not found.submodule_search_locations:
            raise UserError(f"cutting long files needs a voice activity detector: {_INSTALL}")
        file = Path(found.submodule_search_locations[0]) / "data/silero_vad_16k.safetensors"
        with torch.device("meta"):  # no random numbers are drawn for weights that are replaced
            self.network = _Network()
        try:
            weights = load_file(file)
            names = {
                k: k.replace("lstm_cell.", "lstm.") + ("_l0" if k.startswith("lstm_cell.") else "") for k in weights
            }
            self.network.load_state_dict({names[k]: v for k, v in weights.items()}, assign=True)
        except (OSError, SafetensorError, RuntimeError):
            raise UserError(f"{file}: not the weights of the voice activity detector: {_INSTALL}") from None
        self.network.eval()

    @torch.inference_mode()
    def __call__(self, wave: np.ndarray, gain: float = 1.0) -> np.ndarray:
        """The probabilities for ``gain * wave``. Memory beyond the sound itself does not grow with its length."""
        found, state = [], None
        for first in range(0, len(wave) // SAMPLES, _BLOCK):
            count = min(_BLOCK, len(wave) // SAMPLES - first)
            start = first * SAMPLES
            part = wave[max(start - _CONTEXT, 0) : start + count * SAMPLES].astype(np.float32) * np.float32(gain)
            part = np.pad(part, (_CONTEXT if start == 0 else 0, 0))
            frames = torch.from_numpy(part).unfold(0, _CONTEXT + SAMPLES, SAMPLES)
            probabilities, state = self.network(frames, state)
            found.append(probabilities.numpy())
        return np.concatenate(found) if found else np.zeros(0, np.float32)
