"""Small sounds, and the files that hold them."""

import io
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor


def tone(frequency: float, *, seconds: float, sample_rate: int, channels: int = 1) -> np.ndarray:
    """A sine of amplitude 0.5, float32 `(n, C)`; the second channel is silent."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    sound = np.zeros((len(time), channels), dtype=np.float32)
    sound[:, 0] = 0.5 * np.sin(2 * np.pi * frequency * time)
    return sound


def audio_bytes(sound: np.ndarray, sample_rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """The bytes of a file of a sound `(n, C)`."""
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, sample_rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def write_tones(folder: Path, *, count: int = 8, seconds: float = 0.08, sample_rate: int = 8000) -> None:
    """Tones of two classes, `low` and `high`, with captions."""
    for number in range(count):
        name = ("low", "high")[number % 2]
        path = folder / name / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        frequency = (200 if name == "low" else 1500) + 20 * number
        path.write_bytes(audio_bytes(tone(frequency, seconds=seconds, sample_rate=sample_rate), sample_rate))
        path.with_suffix(".txt").write_text(f"a {name} tone")


def waveforms(*shape: int, seed: int = 0) -> Tensor:
    """Noise in about [-0.6, 0.6]."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2
