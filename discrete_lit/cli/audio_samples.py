"""Files that play and spectrograms, which `discrete-lit sample` writes of audio beside its array."""

import shutil
from pathlib import Path

import numpy as np
import torch

from discrete_lit.core.audio import write_wav
from discrete_lit.core.files import atomic_write
from discrete_lit.metrics.spectral import spectrogram_image

CLIPS_FOLDER = "clips"
_MOST_FILES = 200


def write_audio_files(folder: Path, clips: np.ndarray, *, sample_rate: int) -> None:
    """Write the first clips as `clips/000000.wav`, ..., 200 at most; earlier files there are replaced.

    Args:
        folder: where to.
        clips: int16 `(N, T, C)`.
        sample_rate: in hertz.
    """
    target = folder / CLIPS_FOLDER
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for number in range(min(len(clips), _MOST_FILES)):
        with atomic_write(target / f"{number:06d}.wav") as file:
            write_wav(file, np.asarray(clips[number]), sample_rate)


def spectrograms(clips: np.ndarray) -> np.ndarray:
    """Draw the spectrogram of each clip, int16 `(n, T, C)`: uint8 `(n, H, W, 1)`."""
    pictures = [spectrogram_image(torch.from_numpy(np.array(clip)).movedim(-1, 0) / 32767) for clip in clips]
    return torch.stack(pictures).mul(255).round().byte()[..., None].numpy()
