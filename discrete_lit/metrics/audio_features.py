"""Features of audio for a Fréchet audio distance (FAD: Kilgour et al., "Fréchet Audio Distance", Interspeech 2019).

The distance is `frechet.compare` over the features of an `AudioFeatures`: `FAD-<extractor>`. FAD without a name is that
of VGGish, whose weights are not read here; any network takes its place as a class with `extract`.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from discrete_lit.core.modules import full_precision
from discrete_lit.metrics.extractors import POOL
from discrete_lit.metrics.spectral import mel_spectrum

NO_WEIGHTS = "0" * 64
"""In the place of the hash of an extractor's weights, where it has none."""


class AudioFeatures(nn.Module, ABC):
    """A fixed map from waveforms to vectors, over which a Fréchet distance is taken.

    Subclasses set the attributes and implement `extract`. Calling one runs it without gradients in float32.
    """

    name: str
    """Names it in reports, with its settings; the distance is called `FAD-<name>`."""
    dim: int
    """Width of the features."""
    sample_rate: int
    """Samples a second of the waveforms that it takes; others are refused."""
    protocol: str
    """How a waveform becomes features, in words."""
    weights_sha256: str = NO_WEIGHTS
    """SHA-256 of the weights: two distances are comparable only if it agrees."""
    part: str = POOL

    @property
    def metric_name(self) -> str:
        """The name of the distance over these features."""
        return f"FAD-{self.name}"

    @abstractmethod
    def extract(self, waveforms: Tensor) -> Tensor:
        """Compute features `(B, dim)` of waveforms `(B, 1, T)` in [-1, 1]."""

    def forward(self, waveforms: Tensor) -> Tensor:
        """Compute features `(B, dim)` of waveforms `(B, C, T)` in [-1, 1], of whose channels the mean is heard.

        Raises:
            ValueError: another shape.
        """
        if waveforms.ndim != 3:
            raise ValueError(f"{type(self).__name__} takes waveforms (B, C, T), got {tuple(waveforms.shape)}")
        with torch.no_grad(), full_precision(waveforms.device):
            found = self.extract(waveforms.float().mean(dim=1, keepdim=True))
        assert found.shape == (len(waveforms), self.dim), (found.shape, self.dim)
        return found


class MelStatistics(AudioFeatures):
    """The mean, the deviation and the mean change over time of a clip's logarithmic mel spectrum, by band.

    Needs no weights. It hears loudness, timbre and how fast they change; not the order of sounds, nor words.

    Args:
        sample_rate: of the waveforms, in hertz.
        window: of the spectrum, in samples.
        bands: mel bands; there are three features of each.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, sample_rate: int, *, window: int = 512, bands: int = 32) -> None:
        super().__init__()
        if sample_rate < 1 or window < 8 or not 1 <= bands <= window // 4:
            raise ValueError(
                f"mel statistics need a sample_rate of at least 1, a window of at least 8 samples and bands in "
                f"1..window / 4, got {sample_rate}, {window} and {bands}"
            )
        self.sample_rate, self.window, self.bands = sample_rate, window, bands
        self.name, self.dim = f"mel{bands}-{window}", 3 * bands
        self.protocol = f"log mel spectrum of {bands} bands, windows of {window} at {sample_rate} Hz: mean, deviation,"
        self.protocol += " mean absolute change over time"

    def extract(self, waveforms: Tensor) -> Tensor:
        if waveforms.shape[-1] < 2 * self.window:
            raise ValueError(f"clips of {waveforms.shape[-1]} samples are shorter than two windows, of {self.window}")
        mel = mel_spectrum(waveforms, self.sample_rate, window=self.window, bands=self.bands)[:, 0]
        mel = (mel + 1e-4).log()
        return torch.cat((mel.mean(dim=-1), mel.std(dim=-1), mel.diff(dim=-1).abs().mean(dim=-1)), dim=1)
