"""SI-SNR against its definition, mel bands against tones, and the distance of spectra."""

from math import log10

import pytest
import torch
from helpers.sounds import tone, waveforms

from discrete_lit.metrics.spectral import (
    SISNR,
    MultiScaleSpectralDistance,
    SpectralDistance,
    mel_bands,
    mel_spectrum,
    si_snr,
    spectrogram_image,
)


def test_si_snr_is_its_definition() -> None:
    """10 log10(|s|^2 / |e|^2) of a signal and noise that is orthogonal to it; whatever the scale."""
    signal, noise = waveforms(2, 1, 512), waveforms(2, 1, 512, seed=1)
    signal, noise = (each - each.mean(dim=-1, keepdim=True) for each in (signal, noise))
    noise = noise - (noise * signal).sum(-1, keepdim=True) / signal.square().sum(-1, keepdim=True) * signal
    expected = [10 * log10(float(s.square().sum() / n.square().sum())) for s, n in zip(signal, noise, strict=True)]
    for scale in (1.0, 0.3):
        found = si_snr(scale * (signal + noise), signal)
        assert found.tolist() == pytest.approx(expected, abs=1e-3)


def test_silence_has_no_si_snr() -> None:
    clips = torch.stack((waveforms(1, 400), torch.zeros(1, 400)))
    metric = SISNR()
    metric.update(clips + 0.01 * waveforms(2, 1, 400, seed=2), clips)
    ratios = si_snr(clips + 0.01 * waveforms(2, 1, 400, seed=2), clips)
    assert ratios[1].isnan() and metric.compute() == pytest.approx(float(ratios[0]), abs=1e-4)


@pytest.mark.parametrize("frequency", [300, 1000, 3000])
def test_mel_bands_hold_a_tone_where_it_is(frequency: int) -> None:
    sound = torch.from_numpy(tone(frequency, seconds=0.2, sample_rate=8000)).T[None]
    bands = mel_spectrum(sound, 8000, window=512, bands=40).mean(dim=-1)[0, 0]
    centres = torch.linspace(0, 2595 * log10(1 + 4000 / 700), 42)[1:-1]
    nearest = (centres - 2595 * log10(1 + frequency / 700)).abs().argmin()
    assert abs(int(bands.argmax()) - int(nearest)) <= 1


def test_every_mel_band_hears_something() -> None:
    for window in (32, 256):
        filters = mel_bands(window, 8000, window // 4)
        assert filters.shape == (window // 2 + 1, window // 4)
        assert filters.amin() >= 0 and filters.amax() <= 1 and filters.sum(dim=0).gt(0).all()


def test_spectral_distance() -> None:
    """0 of equal clips, grows with the noise, does not see a phase, and has gradients also where clips are equal."""
    distance = MultiScaleSpectralDistance(8000, windows=(64, 256))
    clips = waveforms(2, 1, 1024)
    far = [distance(clips + level * waveforms(2, 1, 1024, seed=3), clips).mean() for level in (0.0, 0.1, 0.5)]
    assert far[0] < 1e-5 and far[0] < far[1] < far[2]
    outputs = clips.clone().requires_grad_()
    distance(outputs, clips).sum().backward()
    assert outputs.grad is not None and outputs.grad.isfinite().all()
    assert distance(-clips, clips).max() < 1e-5
    metric = SpectralDistance(8000, windows=(64, 256))
    for row in range(2):
        metric.update(clips[row : row + 1] * 0.5, clips[row : row + 1])
    assert metric.compute() == pytest.approx(float(distance(clips * 0.5, clips).mean()), rel=1e-5)


def test_clips_shorter_than_every_window() -> None:
    distance = MultiScaleSpectralDistance(8000, windows=(64, 256))
    assert distance(waveforms(1, 1, 100), waveforms(1, 1, 100)).shape == (1,)  # the long window is left out
    with pytest.raises(ValueError, match="clips of 32 samples are shorter than the shortest window, 64 samples"):
        distance(waveforms(1, 1, 32), waveforms(1, 1, 32))


def test_a_spectrogram_is_a_picture() -> None:
    picture = spectrogram_image(torch.from_numpy(tone(2000, seconds=0.2, sample_rate=8000)).T)
    assert picture.min() >= 0 and picture.max() == 1
    # Half of the highest frequency: the middle row.
    assert abs(int(picture.mean(dim=1).argmax()) - len(picture) // 2) <= 1
    assert spectrogram_image(torch.zeros(1, 10)).isfinite().all()


def test_the_distance_of_logarithms_hears_quiet_bands() -> None:
    """A clip of half the size is log 2 away, loud or quiet; below the floor it counts no more."""
    plain, logarithms = (MultiScaleSpectralDistance(8000, windows=(64,), log_weight=weight) for weight in (0.0, 1.0))
    loud = 0.5 * waveforms(2, 1, 1024).sign()
    for level, expected in ((1.0, 0.69), (0.1, 0.69), (1e-6, 0.0)):
        clips = level * loud
        found = logarithms(0.5 * clips, clips) - plain(0.5 * clips, clips)
        assert torch.allclose(found, torch.tensor(expected), atol=0.02)
    with pytest.raises(ValueError, match=r"a log_weight of at least 0, got 8000, 64, .* and -1"):
        MultiScaleSpectralDistance(8000, log_weight=-1)
