"""What `discrete-lit sample` does for generators of audio: the prompt that a clip continues, and its files."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete_lit.core.audio import write_wav
from discrete_lit.core.files import atomic_write
from discrete_lit.data.audio_clips import decode_audio
from discrete_lit.data.media import UndecodableSample
from discrete_lit.generators import Generator
from discrete_lit.metrics.spectral import spectrogram_image
from discrete_lit.tokenizers import EnCodec

CLIPS_FOLDER = "clips"
_MOST_FILES = 200


def prompt_tokens(generator: Any, file: str, seconds: float | None) -> Tensor:
    """Encode the beginning of an audio file: `(1, T, K)` int64, its codes in the first frames and -1 behind them.

    Args:
        generator: of the codes of an `EnCodec`.
        file: of any sample rate; it is resampled.
        seconds: how much of it; all by default.

    Raises:
        ValueError: a generator of something else, a file that cannot be read, or a prompt that leaves nothing to draw.
    """
    if not isinstance(generator, Generator) or not isinstance(generator.tokenizer, EnCodec):
        raise ValueError(f"audio_prompt={file!r} is for generators of audio, with an EnCodec as their tokenizer")
    codec = generator.tokenizer
    if seconds is not None and not seconds > 0:
        raise ValueError(f"audio_prompt_seconds must be above 0, got {seconds}")
    try:
        waveform = decode_audio(Path(file).expanduser().read_bytes(), codec.sample_rate, channels=codec.image_channels)
    except (OSError, UndecodableSample) as error:
        raise ValueError(f"audio_prompt={file!r} cannot be read: {error}") from error
    wanted = waveform.shape[1] if seconds is None else min(round(seconds * codec.sample_rate), waveform.shape[1])
    frames = wanted // codec.hop
    total, books = generator.token_shape
    if not 1 <= frames < total:
        raise ValueError(
            f"audio_prompt={file!r} gives {frames} whole frames of {codec.hop} samples, and a clip of this generator "
            f"has {total}: between 1 and {total - 1} may be given (audio_prompt_seconds)"
        )
    tokens = torch.full((1, total, books), -1)
    with torch.no_grad():
        tokens[:, :frames] = codec.encode(torch.from_numpy(waveform)[None, :, : frames * codec.hop])
    return tokens


def write_clips(folder: Path, clips: np.ndarray, *, sample_rate: int) -> None:
    """Write the first clips, int16 `(N, T, C)`, as `clips/000000.wav`, ..., 200 at most; earlier ones are replaced."""
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
