"""Spectra of waveforms, and how far apart two waveforms are: SI-SNR, and a distance of mel spectra at several scales.

`torch.stft` computes spectra, torchmetrics SI-SNR; the mel bands are here, so that nothing else is needed for them.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import log10

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.audio import scale_invariant_signal_noise_ratio

from discrete_lit.core.modules import full_precision
from discrete_lit.metrics.binned_mean import Mean

SCALES = (32, 64, 128, 256, 512, 1024, 2048)
"""Windows of the multi-scale spectral loss of EnCodec: 2^5 to 2^11 samples."""
_QUIET = 1e-3


class MultiScaleSpectralDistance(nn.Module):
    """Compare waveforms by their mel spectra at several scales (EnCodec: Défossez et al., 2022, eq. 1 and 2).

    The mean over scales of `mean |S(x) - S(y)| + sqrt(mean (S(x) - S(y))^2)`, with S the magnitudes in mel bands of a
    spectrum of windows of so many samples that overlap by three quarters. The paper has sums where means stand here, so
    that the number does not depend on the length of a clip.

    With `log_weight` a scale also has `log_weight * mean |log(S(x) + e) - log(S(y) + e)|` (DDSP: Engel et al., 2020,
    eq. 4), e = 0.001: the quiet bands, of which magnitudes say little, then count as the loud ones do.

    Args:
        sample_rate: in hertz.
        windows: of the scales, in samples. Those that are longer than a clip are left out.
        bands: mel bands; of short windows at most a quarter as many as they have samples, 1 at least.
        log_weight: of the distance of logarithms, in nepers; 0 leaves it out.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self, sample_rate: int, *, windows: Sequence[int] = SCALES, bands: int = 64, log_weight: float = 0.0
    ) -> None:
        super().__init__()
        if sample_rate < 1 or not windows or min(windows) < 4 or bands < 1 or not log_weight >= 0:
            raise ValueError(
                "a multi-scale spectral distance needs a sample_rate and bands of at least 1, windows of at least 4 "
                f"samples and a log_weight of at least 0, got {sample_rate}, {bands}, {list(windows)} and {log_weight}"
            )
        self.sample_rate, self.windows, self.bands = sample_rate, tuple(windows), bands
        self.log_weight = log_weight

    def forward(self, outputs: Tensor, waveforms: Tensor) -> Tensor:
        """Compare `(B, C, T)` with `(B, C, T)`: the distance of each, `(B,)`. Differentiable.

        Raises:
            ValueError: a clip that is shorter than the shortest window.
        """
        fitting = [window for window in self.windows if window <= waveforms.shape[-1]]
        if not fitting:
            raise ValueError(
                f"clips of {waveforms.shape[-1]} samples are shorter than the shortest window, {min(self.windows)} "
                "samples: give longer clips (length of the data) or shorter windows"
            )
        total = outputs.new_zeros(len(outputs))
        with full_precision(outputs.device):
            for window in fitting:
                bands = min(self.bands, max(window // 4, 1))
                own = mel_spectrum(outputs, self.sample_rate, window=window, bands=bands)
                other = mel_spectrum(waveforms, self.sample_rate, window=window, bands=bands)
                difference = (own - other).flatten(1)
                if self.log_weight:
                    ratio = ((own + _QUIET) / (other + _QUIET)).log().flatten(1)
                    total = total + self.log_weight * ratio.abs().mean(dim=1)
                # Beside 0, where the root has no derivative.
                total = total + difference.abs().mean(dim=1) + (difference.square().mean(dim=1) + 1e-12).sqrt()
        return total / len(fitting)


def mel_spectrum(waveforms: Tensor, sample_rate: int, *, window: int, bands: int) -> Tensor:
    """Magnitudes in mel bands of `(B, C, T)`: `(B, C, bands, frames)`, by Hann windows that overlap by three quarters.

    The spectrum is divided by the root of the window's energy. Float32 at least.
    """
    shape = waveforms.shape
    hann = torch.hann_window(window, device=waveforms.device, dtype=waveforms.dtype)
    spectrum = torch.stft(
        waveforms.flatten(0, 1),
        window,
        hop_length=window // 4,
        window=hann,
        center=False,
        return_complex=True,
    )
    magnitudes = (spectrum.abs() / hann.square().sum().sqrt()).unflatten(0, shape[:2])
    filters = mel_bands(window, sample_rate, bands).to(magnitudes)
    return torch.einsum("bcfn,fm->bcmn", magnitudes, filters)


def mel_bands(window: int, sample_rate: int, bands: int) -> Tensor:
    """Triangular filters over the frequencies of a window, `(window // 2 + 1, bands)` float64, of peak 1.

    Their centres are equally spaced on the mel scale `2595 log10(1 + f / 700)` from 0 to half the sample rate
    (O'Shaughnessy, 1987; HTK). A band that falls between two frequencies of the window has the nearest one.
    """
    # Not the tensor is kept: one that is made while operations are counted has no numbers.
    return torch.from_numpy(_mel_bands(window, sample_rate, bands).copy())


@lru_cache(maxsize=64)
def _mel_bands(window: int, sample_rate: int, bands: int) -> np.ndarray:
    frequencies = np.linspace(0, sample_rate / 2, window // 2 + 1)
    highest = 2595 * log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, bands + 2) / 2595) - 1)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies[:, None] - low) / (centre - low)
    falling = (high - frequencies[:, None]) / (high - centre)
    filters = np.minimum(rising, falling).clip(min=0)
    empty = np.flatnonzero(filters.sum(axis=0) == 0)
    filters[np.abs(frequencies[:, None] - centre[empty]).argmin(axis=0), empty] = 1.0
    return filters


def si_snr(outputs: Tensor, waveforms: Tensor) -> Tensor:
    """The scale-invariant signal-to-noise ratio of `(B, C, T)` in decibels, `(B,)`: the mean over channels.

    (Luo and Mesgarani, "TasNet", 2018.) Waveforms that are constant, silence among them, have none: NaN.
    """
    ratios = scale_invariant_signal_noise_ratio(outputs, waveforms).mean(dim=1)
    silent = (waveforms.amax(dim=-1) == waveforms.amin(dim=-1)).any(dim=1)
    return ratios.masked_fill(silent, torch.nan)


class SISNR(Mean):
    """Average the SI-SNR of waveforms in decibels, over all batches and ranks; silent ones are left out."""

    def update(self, outputs: Tensor, waveforms: Tensor) -> None:  # type: ignore[override]
        """Add outputs and their originals, both `(B, C, T)`."""
        ratios = si_snr(outputs, waveforms)
        super().update(ratios[~ratios.isnan()])


class SpectralDistance(Mean):
    """Average the `MultiScaleSpectralDistance` of waveforms, over all batches and ranks.

    Args:
        sample_rate, windows, bands: of the distance.
    """

    def __init__(self, sample_rate: int, *, windows: Sequence[int] = SCALES, bands: int = 64) -> None:
        super().__init__()
        self.distance = MultiScaleSpectralDistance(sample_rate, windows=windows, bands=bands)

    def update(self, outputs: Tensor, waveforms: Tensor) -> None:  # type: ignore[override]
        """Add outputs and their originals, both `(B, C, T)`."""
        super().update(self.distance(outputs, waveforms))


def spectrogram_image(waveform: Tensor, *, window: int = 256) -> Tensor:
    """The spectrogram of a waveform `(C, T)` as a picture: float `(H, W)` in [0, 1], low frequencies at the bottom.

    The brightness is the logarithm of the magnitude, from 80 dB below the loudest (black) to it (white).
    """
    mono = waveform.float().mean(dim=0)
    mono = F.pad(mono, (0, max(window - len(mono), 0)))
    hann = torch.hann_window(window, device=mono.device)
    spectrum = torch.stft(mono, window, hop_length=window // 4, window=hann, center=False, return_complex=True)
    decibels = 20 * spectrum.abs().clamp(min=1e-8).log10()
    return ((decibels - decibels.max()) / 80 + 1).clamp(0, 1).flip(0)
