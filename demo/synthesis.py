"""Speech from text with espeak-ng through ctypes: 16 kHz, 16-bit mono, the same bytes for the same seed.

The PyPI wheel `espeakng-loader` brings the shared library and its data, so nothing is installed on the system.
espeak-ng synthesizes at 22,050 Hz and hands blocks of samples to a callback. The signal is low-passed at 7.2 kHz
by the anti-aliasing filter of the polyphase resampler (16,000/22,050 = 320/441), scaled to a fixed peak,
given a short silence on both sides and light seeded white noise: without noise, digital silence gives the
recognizer log-energies of minus infinity.

Limits: the library is global state in a process (one voice at a time, not thread-safe); use one `Voice` a process.
"""

import ctypes
import importlib
from typing import Any

import numpy as np

from mixbits.errors import DataError

SAMPLE_RATE = 16_000
_ESPEAK_RATE = 22_050
_UP, _DOWN = 320, 441  # 22,050 · 320 / 441 = 16,000
_CUTOFF_HERTZ = 7_200.0
_PEAK = 12_000.0
_SILENCE_SECONDS = 0.15
_SYNCHRONOUS, _DONT_EXIT, _RATE_PARAMETER, _UTF8 = 2, 0x8000, 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _load_library() -> tuple[Any, str]:
    try:
        loader = importlib.import_module("espeakng_loader")
    except ImportError as error:
        raise DataError(
            "the demo speaks its sentences with espeak-ng, but the package espeakng-loader is not installed; "
            "run: pip install 'mixbits[demo]'"
        ) from error
    try:
        return ctypes.CDLL(loader.get_library_path()), loader.get_data_path()
    except (OSError, RuntimeError) as error:
        raise DataError(f"espeakng-loader is installed but its library cannot be loaded: {error}") from error


class Voice:
    """An espeak-ng engine. `words_per_minute` is its speaking rate; the speaker is chosen sentence by sentence."""

    def __init__(self, *, words_per_minute: int = 150) -> None:
        from scipy.signal import firwin

        self._library, data_path = _load_library()
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data_path.encode(), _DONT_EXIT)
        if rate != _ESPEAK_RATE:
            raise DataError(
                f"espeak-ng could not start with the data in {data_path}: returned {rate}, expected {_ESPEAK_RATE}"
            )
        self._blocks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # kept: the library calls it later
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_SetParameter(_RATE_PARAMETER, words_per_minute, 0)
        self._words_per_minute = words_per_minute
        self._filter = firwin(20 * _DOWN + 1, _CUTOFF_HERTZ, fs=_ESPEAK_RATE * _UP)

    def _receive(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def speak(self, text: str, *, speaker: str, noise: float, seed: int) -> np.ndarray:
        """Samples of `text`, int16 at 16 kHz.

        `speaker` is an espeak-ng voice name such as `en-us` or `en-us+f2`; `noise` is the standard deviation of the
        added white noise in 16-bit units. Raises DataError when the voice is unknown or nothing was synthesized.
        """
        from scipy.signal import resample_poly

        if self._library.espeak_SetVoiceByName(speaker.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {speaker!r}")
        self._library.espeak_SetParameter(_RATE_PARAMETER, self._words_per_minute, 0)  # a voice may change it
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed & 0x7FFFFFFF))
        self._blocks.clear()
        encoded = text.encode()
        status = self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
        if status != 0 or not self._blocks:
            raise DataError(f"espeak-ng synthesized nothing for {text!r} (status {status})")
        signal = resample_poly(np.concatenate(self._blocks).astype(np.float64), _UP, _DOWN, window=self._filter)
        signal *= _PEAK / max(1.0, float(np.abs(signal).max()))
        pad = np.zeros(int(_SILENCE_SECONDS * SAMPLE_RATE))
        signal = np.concatenate([pad, signal, pad])
        signal += np.random.default_rng(seed).normal(0.0, noise, size=signal.shape)
        return np.clip(np.rint(signal), -32768, 32767).astype(np.int16)
