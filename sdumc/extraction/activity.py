"""Find speech in long recordings, and cut them into utterances at the pauses.

Silero's voice activity detector gives, for each frame of 32 ms, the probability that somebody speaks in it. Its
weights are those in the package ``silero-vad`` (MIT licence), file ``silero_vad_16k.safetensors``. The package's
Python code is not imported: it sets torch to one thread for the whole process, and loads TorchScript by a function
that torch has deprecated. A long recording goes through the network in blocks.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from itertools import pairwise
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


@lru_cache(maxsize=1)
def _detector() -> SpeechDetector:
    return SpeechDetector()


RATE = 16000  # Hz
FRAME = SAMPLES / RATE  # seconds: 0.032, the detector's
SILENCE = 1e-3  # a frame whose root mean square is below this (-60 dB of full scale) is silent
_BEGIN, _GO_ON = 0.4, 0.25  # speech begins at the first probability, and goes on until it is below the second
_LOUD, _MOST_GAIN = 0.5, 30.0  # quiet recordings are amplified to this peak, at most by this factor
_PAUSE = 0.5  # seconds without speech that end an utterance
_SHORT = 1.0  # seconds; a shorter utterance joins a neighbour, if the pause between them is no longer than this
_LEAST_SPEECH = 0.3  # seconds; an utterance with less speech is taken as noise
_MARGIN = 0.15  # seconds kept before and after the speech, because its beginning and end are often quiet


def _frames(wave: np.ndarray) -> np.ndarray:
    """The whole frames of sound (T,): (T // 512, 512), a view."""
    return wave[: len(wave) // SAMPLES * SAMPLES].reshape(-1, SAMPLES)


def frame_levels(wave: np.ndarray) -> np.ndarray:
    """Root mean square of each whole frame of sound (T,) at 16 kHz: (T // 512,)."""
    frames = _frames(wave)
    return np.sqrt(np.einsum("ij,ij->i", frames, frames, dtype=np.float64) / SAMPLES)


def is_silent(wave: np.ndarray) -> bool:
    """Whether no frame of the sound is louder than -60 dB of full scale."""
    levels = frame_levels(wave) if len(wave) >= SAMPLES else np.sqrt(np.square(wave).mean(keepdims=True))
    return not bool((levels > SILENCE).any())


def lacks_speech(wave: np.ndarray, test: str = "detector") -> bool:
    """Whether nobody speaks in a clip (T,) at 16 kHz, by one of :data:`sdumc.conditions.SPEECH_TESTS`.

    With either, a silent clip has none. With ``detector``, a clip has none either when less than 0.3 s of it, and less
    than half of it, is speech: recognisers and LLMs write words for music and noise too.
    """
    if is_silent(wave) or test == "level":
        return is_silent(wave)
    return bool(find_speech(wave).sum() * FRAME < min(_LEAST_SPEECH, 0.5 * len(wave) / RATE))


def find_speech(wave: np.ndarray) -> np.ndarray:
    """Which frames of 32 ms of sound (T,) at 16 kHz are speech: bool (T // 512,), by Silero's detector.

    Raises:
        UserError: the package with the detector is not installed.
    """
    frames = _frames(wave)
    if not len(frames):
        return np.zeros(0, dtype=bool)
    # Recordings are often quiet. The gain is the same for the whole recording: a pause does not become loud.
    peak = float(np.quantile(np.maximum(frames.max(axis=1), -frames.min(axis=1)), 0.98))
    probabilities = _detector()(wave, min(max(_LOUD / max(peak, 1e-9), 1.0), _MOST_GAIN))
    return _hysteresis(probabilities)


def _hysteresis(probabilities: np.ndarray) -> np.ndarray:
    """Runs of frames above ``_GO_ON`` in which a frame reaches ``_BEGIN``, from that frame on: bool (N,)."""
    speech = np.zeros(len(probabilities), dtype=bool)
    speaking = False
    for i, p in enumerate(probabilities):
        speaking = bool(p >= (_GO_ON if speaking else _BEGIN))
        speech[i] = speaking
    return speech


def utterances(voiced: np.ndarray, levels: np.ndarray, max_seconds: float) -> list[tuple[float, float]]:
    """Divide a recording into utterances.

    A pause of half a second ends an utterance. An utterance longer than ``max_seconds`` is divided at its longest
    pause or, if it has none, at the quietest frame of its middle half. An utterance shorter than a second is joined to
    the nearer neighbour, if that is at most a second away. An utterance with less than 0.3 s of speech is left out.

    Args:
        voiced: (N,) bool, whether each frame of 32 ms is speech.
        levels: (N,) root mean square of each frame.
        max_seconds: longest utterance, margins included.

    Returns:
        (start, end) of each utterance in seconds, in time order.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], voiced.astype(np.int8), [0]])))
    runs = [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
    longest = max(int((max_seconds - 2 * _MARGIN) / FRAME), 1)
    groups: list[list[tuple[int, int]]] = []
    for run in runs:
        if groups and (run[0] - groups[-1][-1][1]) * FRAME < _PAUSE:
            groups[-1].append(run)
        else:
            groups.append([run])
    groups = _join_short([part for group in groups for part in _divide(group, levels, longest)], longest)
    spans = [(g[0][0], g[-1][1]) for g in groups if sum(b - a for a, b in g) * FRAME >= _LEAST_SPEECH]
    padded = []
    for i, (a, b) in enumerate(spans):
        low = (spans[i - 1][1] + a) / 2 if i else 0.0
        high = (b + spans[i + 1][0]) / 2 if i + 1 < len(spans) else float(len(voiced))
        padded.append((max(a - _MARGIN / FRAME, low) * FRAME, min(b + _MARGIN / FRAME, high) * FRAME))
    return [(round(a, 3), round(b, 3)) for a, b in padded]


def _divide(group: list[tuple[int, int]], levels: np.ndarray, longest: int) -> list[list[tuple[int, int]]]:
    """Divide a group of runs of speech (first and last frame + 1) until no part is longer than ``longest`` frames."""
    start, end = group[0][0], group[-1][1]
    if end - start <= longest:
        return [group]
    if len(group) > 1:
        # The longest pause; of pauses of equal length, the one nearest to the middle.
        pauses = [(b[0] - a[1], -abs(a[1] + b[0] - start - end), i) for i, (a, b) in enumerate(pairwise(group), 1)]
        at = max(pauses)[2]
        parts = [group[:at], group[at:]]
    else:
        quarter = max((end - start) // 4, 1)
        cut = start + quarter + int(np.argmin(levels[start + quarter : max(end - quarter, start + quarter + 1)]))
        parts = [[(start, cut)], [(cut, end)]]
    return [piece for part in parts for piece in _divide(part, levels, longest)]


def _join_short(groups: list[list[tuple[int, int]]], longest: int) -> list[list[tuple[int, int]]]:
    """Join groups shorter than a second to the nearer neighbour, where the result is at most ``longest`` frames."""
    joined = [list(g) for g in groups]
    i = 0
    while i < len(joined):
        start, end = joined[i][0][0], joined[i][-1][1]
        neighbours = []
        if (end - start) * FRAME < _SHORT:
            for j in (i - 1, i + 1):
                if 0 <= j < len(joined):
                    first, last = joined[min(i, j)], joined[max(i, j)]
                    pause = last[0][0] - first[-1][1]
                    if pause * FRAME <= _SHORT and last[-1][1] - first[0][0] <= longest:
                        neighbours.append((pause, min(i, j)))
        if not neighbours:
            i += 1
            continue
        at = min(neighbours)[1]
        joined[at : at + 2] = [joined[at] + joined[at + 1]]
        i = at
    return joined


def cut_speech(wave: np.ndarray, max_seconds: float) -> list[tuple[float, float]]:
    """The utterances in sound (T,) at 16 kHz as (start, end) in seconds; see :func:`utterances`."""
    length = len(wave) / RATE
    found = utterances(find_speech(wave), frame_levels(wave), max_seconds)
    return [(a, min(b, length)) for a, b in found]


def even_pieces(duration: float, max_seconds: float) -> list[tuple[float, float]]:
    """(start, end) of as few equal parts of ``duration`` seconds as possible, each at most ``max_seconds`` long."""
    count = max(1, int(np.ceil(duration / max_seconds - 1e-9)))
    return [(round(i * duration / count, 3), round((i + 1) * duration / count, 3)) for i in range(count)]
