"""Features of audio, and the Fréchet audio distance over them."""

import pytest
import torch
from helpers.sounds import waveforms
from torch import Tensor

from discrete_lit.metrics.audio_features import AudioFeatures, MelStatistics
from discrete_lit.metrics.frechet import compare
from discrete_lit.metrics.moments import FeatureMoments, Moments


def moments_of(features: AudioFeatures, clips: Tensor) -> Moments:
    sums = FeatureMoments(features)
    for part in clips.split(7):
        sums.update(features(part))
    return sums.compute()


def test_loudness_moves_the_means_alone() -> None:
    """Twice as loud is log 2 in every band, and neither deviation nor change over time."""
    features, clips = MelStatistics(8000, window=64, bands=4), waveforms(3, 1, 2000)
    quiet, loud = features(clips).unflatten(1, (3, 4)), features(2 * clips).unflatten(1, (3, 4))
    moved = loud - quiet
    assert torch.allclose(moved[:, 0], torch.tensor(2.0).log().expand(3, 4), atol=0.01)
    assert moved[:, 1:].abs().max() < 0.01
    # Stereo is heard as the mean of its channels.
    assert torch.allclose(features(clips.repeat(1, 2, 1)), features(clips), atol=1e-5)


def test_the_distance_grows_with_the_damage() -> None:
    features, clips = MelStatistics(8000, window=64, bands=4), waveforms(40, 1, 1000)
    reference = moments_of(features, clips)
    distances = [
        compare(features, moments_of(features, clips + damage * waveforms(40, 1, 1000, seed=1)), reference, "real")
        for damage in (0.0, 0.3, 1.0)
    ]
    values = [each.value for each in distances]
    assert abs(values[0]) < 1e-6 and values[0] < values[1] < values[2]
    assert distances[0].metric == "FAD-mel4-64" and distances[0].count == 40


def test_clips_that_are_refused() -> None:
    features = MelStatistics(8000, window=64, bands=4)
    with pytest.raises(ValueError, match="clips of 100 samples are shorter than two windows, of 64"):
        features(waveforms(2, 1, 100))
    with pytest.raises(ValueError, match=r"takes waveforms \(B, C, T\)"):
        features(waveforms(2, 100))
    with pytest.raises(ValueError, match=r"bands in 1\.\.window / 4, got 8000, 64 and 17"):
        MelStatistics(8000, window=64, bands=17)
