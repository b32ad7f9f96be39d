"""Sound in blocks: one channel out of several, and another sample rate. Memory does not grow with the length."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_OPPOSED = 0.01  # the mean of channels with less than this share of the loudest one's energy: they cancel each other
_UNUSED = 1e-3  # a channel of more than two with less than this share (-30 dB) of the loudest one's energy
_BLOCK_SECONDS = 10.0


class Mixer:
    """Averages channels, and finds out whether that lost the sound.

    Two channels that are each other's opposite cancel; a voice in one channel of six is divided by six. At the end
    :meth:`better` says which weights would have kept it.
    """

    def __init__(self, weights: np.ndarray | None = None):
        self.weights = weights
        self.energy = np.zeros(0)  # of each channel
        self.mixed = 0.0  # energy of the mean

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """(T, C) -> (T,) float32."""
        channels = block.shape[1]
        if channels == 1:
            return block[:, 0]
        if self.weights is not None and len(self.weights) == channels:
            return block @ self.weights
        mono = block.mean(axis=1, dtype=np.float32)
        if not len(self.energy):
            self.energy = np.zeros(channels)
        if len(self.energy) == channels:
            self.energy += np.einsum("tc,tc->c", block, block)
            self.mixed += float(mono @ mono)
        return mono

    def better(self) -> tuple[np.ndarray, str] | None:
        """Other weights (C,), and a note that says why; None when the mean is good."""
        channels, most = len(self.energy), self.energy.max(initial=0.0)
        if channels < 2 or not most > 0:
            return None
        loudest = int(self.energy.argmax())
        if self.mixed < _OPPOSED * most / channels**2:
            weights = np.zeros(channels, np.float32)
            weights[loudest] = 1
            return weights, f"its channels cancel each other; channel {loudest + 1} of {channels} is used alone"
        used = self.energy > _UNUSED * most
        if channels > 2 and not used.all():
            names = ", ".join(str(i + 1) for i in np.flatnonzero(used))
            kind = f"channel {names} has" if used.sum() == 1 else f"channels {names} have"
            return (used / used.sum()).astype(np.float32), f"of its {channels} channels, {kind} the sound"
        return None


class Resampler:
    """Changes the sample rate of sound that comes in blocks, with the polyphase low-pass filter of
    ``scipy.signal.resample_poly`` (Kaiser window, beta 5, ten zero crossings on each side)."""

    def __init__(self, source: int, target: int):
        common = math.gcd(source, target)
        self.up, self.down = target // common, source // common
        self.filter = _low_pass(self.up, self.down)
        half = 10 * max(self.up, self.down)
        self.context = -(-(half // self.up + 1) // self.down) * self.down  # input samples on each side of a block
        self.block = -(-int(_BLOCK_SECONDS * source) // self.down) * self.down
        self.waiting: list[np.ndarray] = []
        self.count = 0  # samples in `waiting`, of which the first `before` are context
        self.before = 0

    def push(self, samples: np.ndarray) -> list[np.ndarray]:
        """Take (T,) float32; gives the output that is complete."""
        if self.up == self.down:
            return [samples]
        self.waiting.append(samples)
        self.count += len(samples)
        found = []
        while self.count >= self.before + self.block + self.context:
            held = np.concatenate(self.waiting)
            found.append(self._convert(held[: self.before + self.block + self.context], self.block))
            first = max(self.before + self.block - self.context, 0)
            self.before, rest = self.before + self.block - first, held[first:].copy()
            self.waiting, self.count = [rest], len(rest)
        return found

    def finish(self) -> list[np.ndarray]:
        """The rest of the output."""
        if self.up == self.down or self.count <= self.before:
            return []
        held = np.concatenate(self.waiting)
        self.waiting, self.count = [], 0
        return [self._convert(held, len(held) - self.before)]

    def _convert(self, held: np.ndarray, wanted: int) -> np.ndarray:
        """The output for ``wanted`` samples from ``before`` on; what lies outside ``held`` is silence."""
        up, down = self.up, self.down
        taps = self.filter.shape[1]
        skipped = self.before * up // down
        count = -(-wanted * up // down)
        half = 10 * max(up, down)
        padded = np.concatenate([np.zeros(taps, np.float32), held, np.zeros(taps + down, np.float32)])
        out = np.empty(count, np.float32)
        step = padded.strides[0]
        for phase in range(min(up, count)):
            # Output m is the sum over k of filter[m * down + half - k * up] * input[k].
            at = (skipped + phase) * down + half
            last = at // up  # the last input sample with a tap
            rows = -(-(count - phase) // up)
            begin = last - taps + 1 + taps
            view = np.lib.stride_tricks.as_strided(padded[begin:], (rows, taps), (down * step, step), writeable=False)
            out[phase::up] = view @ self.filter[at % up]
        return out


@lru_cache(maxsize=16)
def _low_pass(up: int, down: int) -> np.ndarray:
    """The filter's taps (up, N) for each of the ``up`` phases, in the order of the input."""
    widest = max(up, down)
    half = 10 * widest
    k = np.arange(-half, half + 1)
    taps = np.sinc(k / widest) * np.kaiser(2 * half + 1, 5.0)
    taps *= up / taps.sum()
    each = -(-len(taps) // up)
    phases = np.zeros((up, each), np.float32)
    for phase in range(up):
        part = taps[phase::up]
        phases[phase, each - len(part) :] = part[::-1]
    return phases


def resample(audio: np.ndarray, source: int, target: int) -> np.ndarray:
    """Change the sample rate of sound (T,) from ``source`` to ``target`` Hz."""
    if source == target or not len(audio):
        return audio
    converter = Resampler(source, target)
    return np.concatenate([*converter.push(audio.astype(np.float32, copy=False)), *converter.finish()])
