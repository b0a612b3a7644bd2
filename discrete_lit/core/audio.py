"""Waveforms as they are stored: 16-bit samples, and files that any player opens."""

from __future__ import annotations

import wave
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def to_int16(waveforms: Tensor) -> Tensor:
    """Convert float waveforms in [-1, 1] of any shape to int16: clamp, then round to the nearest."""
    return waveforms.float().clamp(-1, 1).mul(32767).round().short()


def write_wav(file: IO[bytes], samples: np.ndarray, sample_rate: int) -> None:
    """Write int16 samples `(T, C)` as a WAV file.

    Args:
        file: opened for writing.
        samples: of the clip.
        sample_rate: in hertz.
    """
    with wave.open(file, "wb") as clip:
        clip.setnchannels(samples.shape[1])
        clip.setsampwidth(2)
        clip.setframerate(sample_rate)
        clip.writeframes(np.ascontiguousarray(samples, dtype="<i2").tobytes())
