"""Speech from the espeak-ng library, which the Python package espeakng_loader carries (no root needed)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from scipy.signal import resample_poly

from sdumc.errors import UserError

RATE = 16000  # Hz, of everything this module returns

# espeak-ng's speak_lib.h
_SYNCHRONOUS = 2
_CHARS_UTF8 = 1
_PARAMETER = {"rate": 1, "volume": 2, "pitch": 3, "range": 4}
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Voice:
    """How to say something: an espeak-ng voice such as ``en-us+f3``; words a minute; pitch and its range, 0 to 100."""

    name: str
    rate: int
    pitch: int
    range: int


class Synthesiser:
    """The espeak-ng library in this process. The library has one global state, so make one of these per process.

    Samples depend on what the process said before. For the same bytes in every run, start a fresh process for each
    fixed list of sentences and say them in order.

    Raises:
        UserError: the package espeakng_loader is missing or its library does not start.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError(
                "the speech synthesiser is missing: `pip install espeakng-loader`, or `pip install -e .[mini]`"
            ) from None
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        data = str(espeakng_loader.get_data_path()).encode()
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if rate <= 0:
            raise UserError(f"espeak-ng does not start with the data in {data.decode()}: reinstall espeakng-loader")
        self._rate = rate
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._collect)  # kept here: the library holds only a bare pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, count: int, events) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def say(self, text: str, voice: Voice, seed: int) -> np.ndarray:
        """Return ``text`` spoken by ``voice``: float32 (T,) at 16 kHz, about -1 to 1, silence at both ends cut.

        Raises:
            UserError: espeak-ng does not know the voice, or returns no sound.
        """
        library = self._library
        library.espeak_ng_SetRandSeed(seed)
        if library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice.name!r}")
        for key, value in (("rate", voice.rate), ("volume", 100), ("pitch", voice.pitch), ("range", voice.range)):
            library.espeak_SetParameter(_PARAMETER[key], int(value), 0)
        self._chunks = []
        encoded = text.encode() + b"\0"
        library.espeak_Synth(encoded, len(encoded), 0, 1, 0, _CHARS_UTF8, None, None)
        library.espeak_Synchronize()
        if not self._chunks:
            raise UserError(f"espeak-ng said nothing for {text!r} with voice {voice.name!r}")
        samples = np.concatenate(self._chunks).astype(np.float64) / 32768.0
        loud = np.flatnonzero(np.abs(samples) > 1e-3)
        if loud.size:
            samples = samples[loud[0] : loud[-1] + 1]
        divisor = np.gcd(self._rate, RATE)
        return resample_poly(samples, RATE // divisor, self._rate // divisor).astype(np.float32)


def scale(samples: np.ndarray, level: float) -> np.ndarray:
    """Scale (T,) so that its root mean square is ``level`` (of full scale)."""
    return samples * np.float32(level / max(float(np.sqrt(np.mean(np.square(samples)))), 1e-9))


def envelope(samples: np.ndarray, fps: float, frames: int, rate: int = RATE) -> np.ndarray:
    """Loudness at each video frame: (T,) -> (frames,), from 0 (silent) to 1 (the loudest frame)."""
    edges = (np.arange(frames + 1) * rate / fps).astype(int)
    power = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    edges = np.minimum(edges, len(samples))
    width = np.maximum(np.diff(edges), 1)
    rms = np.sqrt(np.maximum(np.diff(power[edges]), 0.0) / width)
    return rms / max(float(rms.max(initial=0.0)), 1e-9)
