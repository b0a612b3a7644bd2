"""The DataModule of audio clips: `.wav`, `.flac` and `.ogg` files, decoded by soundfile, resampled by SciPy.

Both are the extra `discrete-lit[audio]`. Resampling is SciPy's `resample_poly`, a polyphase filter.
"""

import io
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from math import gcd
from typing import Any, Literal, get_args

import numpy as np
import torch

from discrete_lit.data.captions import Captions
from discrete_lit.data.clips import Clips, clip_start, clip_uniform
from discrete_lit.data.image_batches import EvaluationCrops, LabelledSample, SamplePipeline, label_batch
from discrete_lit.data.loaders import Batch
from discrete_lit.data.media import AUDIO_FILES, UndecodableSample

TimeCrop = Literal["random", "start", "middle"]
_HIGHEST_RATE, _LONGEST, _MOST_CHANNELS = 768_000, 2**26, 64


class AudioClips(Clips):
    """Batches of audio clips, `{"audio": (B, C, T) float32 in [-1, 1], ...}`, from a folder or from shards.

    Beside the waveforms a batch has `"label"`, `"caption"`, `"key"` and `"index"` as image batches have, see
    `image_batches.image_batch`. A clip that is shorter than `length` ends with silence. One that cannot be read, is cut
    off, empty, or holds values that are not finite is a bad sample: replaced in training, left out in evaluation,
    logged and counted.

    Args:
        train: folder (`<folder>/<class>/**/<clip>`, or clips alone) or shards of training clips; None where only the
            other split is used.
        validation: the same of validation.
        sample_rate: of the waveforms that come out, in hertz; files of another rate are resampled.
        length: T, samples of a clip at that rate.
        batch_size: clips of a batch on each rank.
        channels: C: 1 is the mean of a file's channels; a file of one channel is repeated.
        crop: which part of a longer clip training takes: a `"random"` one, its `"start"` or its `"middle"`. Evaluation
            takes the start where training does, and else the middle.
        num_workers: processes that decode; 0 decodes in the training process.
        seed: decides the order and the crops.
        max_bad_fraction: fraction of an epoch's clips that may be unreadable before the run fails.
        labels: False reads every clip below a folder, at any depth, without a label.
        captions: where the captions are, in files beside the clips, see `captions.Captions`.
        shuffle_window: of shards, see `ImageShards`.
        train_count, validation_count, num_classes: of shards without a manifest, see `ImageShards`.
        persistent_workers: keep the processes between epochs.

    Raises:
        ValueError: a setting is out of range, soundfile or SciPy is missing, or what `Clips` raises.
    """

    modality = "audio"
    pipeline: "AudioPipeline"

    def __init__(
        self,
        train: str | list[str] | None,
        validation: str | list[str] | None = None,
        *,
        sample_rate: int,
        length: int,
        batch_size: int,
        channels: int = 1,
        crop: TimeCrop = "random",
        num_workers: int = 2,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
        labels: bool = True,
        captions: Captions | None = None,
        shuffle_window: int = 1000,
        train_count: int | list[int] | None = None,
        validation_count: int | list[int] | None = None,
        num_classes: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        super().__init__(
            AudioPipeline(sample_rate, length, seed=seed, channels=channels, crop=crop),
            AUDIO_FILES,
            train=train,
            validation=validation,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
            labels=labels,
            captions=captions,
            shuffle_window=shuffle_window,
            train_count=train_count,
            validation_count=validation_count,
            num_classes=num_classes,
            persistent_workers=persistent_workers,
        )
        self.sample_rate = sample_rate
        self.image_size = (length,)
        self.image_channels = channels


@dataclass(frozen=True)
class AudioPipeline(SamplePipeline):
    """Decode, resample and cut audio files.

    Args:
        sample_rate: in hertz, of the waveforms that come out.
        length: T, their samples.
        seed: decides the crops.
        channels: C.
        crop: of training, see `AudioClips`.

    Raises:
        ValueError: a setting out of its range, or soundfile or SciPy is missing.
    """

    sample_rate: int
    length: int
    _: KW_ONLY
    seed: int
    channels: int = 1
    crop: TimeCrop = "random"

    def __post_init__(self) -> None:
        for name, most in (("sample_rate", _HIGHEST_RATE), ("length", _LONGEST), ("channels", _MOST_CHANNELS)):
            if not 1 <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name} of audio clips is {value}; it must be in 1..{most:,}")
        if self.crop not in get_args(TimeCrop):
            raise ValueError(f"crop is {self.crop!r}; of audio clips it must be 'random', 'start' or 'middle'")
        _readers()

    def training(self, data: bytes, epoch: int, key: str) -> np.ndarray:
        """Decode and crop a clip: float32 `(C, T)`."""
        uniform = clip_uniform(self.seed, epoch, key) if self.crop == "random" else None
        return self._cut(data, uniform)

    def evaluation(self, data: bytes, crops: EvaluationCrops) -> np.ndarray:
        """Decode a clip and cut its middle, or its start where training does: float32 `(C, T)`."""
        return self._cut(data, None)

    def batch(self, samples: Sequence[LabelledSample]) -> Batch:
        """Make a batch: `{"audio": float32 (B, C, T), ...}`."""
        waveforms = np.zeros((len(samples), self.channels, self.length), dtype=np.float32)
        for row, sample in enumerate(samples):
            waveforms[row] = sample.values
        return {"audio": torch.from_numpy(waveforms), **label_batch(samples)}

    def _cut(self, data: bytes, uniform: float | None) -> np.ndarray:
        waveform = decode_audio(data, self.sample_rate, channels=self.channels)
        steps = waveform.shape[1]
        start = 0 if self.crop == "start" else clip_start(steps, self.length, uniform=uniform)
        cut = np.zeros((self.channels, self.length), dtype=np.float32)
        cut[:, : min(steps, self.length)] = waveform[:, start : start + self.length]
        return cut


def decode_audio(data: bytes, sample_rate: int, *, channels: int) -> np.ndarray:
    """Decode an audio file: float32 `(C, n)` in [-1, 1] at the sample rate that is asked for.

    Args:
        data: the file's bytes.
        sample_rate: in hertz; of n samples at another rate about n * sample_rate / rate come out.
        channels: C: as many as the file has, or 1, the mean of them; a file of one channel is repeated.

    Raises:
        UndecodableSample: the bytes are no audio that is read, are cut off, hold no sample or one that is not a finite
            number, or have other channels than can be made of them.
        ValueError: soundfile or SciPy is missing.
    """
    soundfile, signal = _readers()
    if (problem := _cut_off(data)) is not None:
        raise UndecodableSample(problem)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            declared, rate = file.frames, file.samplerate
            found = file.read(dtype="float32", always_2d=True).T
    # Broken files raise what libsndfile says, or what reading the bytes of another format does.
    except Exception as error:
        raise UndecodableSample(f"{type(error).__name__}: {error}") from error
    if found.shape[1] < declared:
        raise UndecodableSample(f"it is cut off: {found.shape[1]:,} of {declared:,} samples can be read")
    if found.shape[1] == 0:
        raise UndecodableSample("it holds no sample")
    if not np.isfinite(found).all():
        raise UndecodableSample(f"{int((~np.isfinite(found)).sum()):,} of its samples are not finite numbers")
    if channels == 1:
        found = found.mean(axis=0, keepdims=True)
    elif len(found) == 1:
        found = found.repeat(channels, axis=0)
    elif len(found) != channels:
        raise UndecodableSample(
            f"it has {len(found)} channels, and {channels} are asked for: of other files than mono ones only their own "
            "number can be made, or channels: 1, the mean of them"
        )
    if rate != sample_rate:
        divisor = gcd(rate, sample_rate)
        found = signal.resample_poly(found, sample_rate // divisor, rate // divisor, axis=1)
    return np.clip(found, -1, 1).astype(np.float32, copy=False)


@cache
def _readers() -> tuple[Any, Any]:
    """The modules soundfile and scipy.signal, which are imported where audio is read.

    Raises:
        ValueError: one is missing.
    """
    try:
        import soundfile
        from scipy import signal
    except (ImportError, OSError) as error:
        raise ValueError(
            f"audio files need soundfile and SciPy ({error}): pip install 'discrete-lit[audio]'"
        ) from error
    return soundfile, signal


def _cut_off(data: bytes) -> str | None:
    """Say how a RIFF or Ogg file is cut off, of which libsndfile would read the rest in silence; None if it is not."""
    if data[:4] == b"RIFF":
        claimed = int.from_bytes(data[4:8], "little")
        # Programs that write to a pipe do not know the size: they leave 0 or the largest number.
        if claimed not in (0, 2**32 - 1) and claimed + 8 > len(data) + 1:  # a byte of padding is often left out
            return f"it is cut off: {len(data):,} of {claimed + 8:,} bytes are there"
    if data[:4] == b"OggS":
        page = data.rfind(b"OggS")
        header = data[page : page + 27]
        table = data[page + 27 : page + 27 + header[26]] if len(header) == 27 else b""
        whole = len(header) == 27 and len(table) == header[26] and page + 27 + len(table) + sum(table) <= len(data)
        if not whole or not header[5] & 4:
            return "it is cut off: its last Ogg page is not the end of a stream"
    return None
