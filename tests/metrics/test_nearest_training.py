"""The nearest training image: copies, new images, and a brute-force search."""

from math import isnan

import pytest
import torch
from test_frechet import Flatten
from torch import Tensor

from discrete_lit.metrics import nearest_training
from discrete_lit.metrics.kept_features import FeatureSet
from discrete_lit.metrics.nearest_training import NearestTraining, nearest_features

EXTRACTOR = Flatten(5)


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def measured(samples: Tensor, training: Tensor, held_out: Tensor, dtype: torch.dtype = torch.float64):
    metric = NearestTraining(EXTRACTOR, FeatureSet(training), held_out=FeatureSet(held_out), dtype=dtype)
    for part in samples.split(13):
        metric.update(part)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("at_once", [7, 2**25])
def test_the_nearest_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(nearest_training, "_DISTANCES_AT_ONCE", at_once)
    features, training = normal(20, 0) + 50, normal(30, 1) + 50
    found = nearest_features(features, training)
    for feature, distance, index in zip(features, *found, strict=True):
        distances = (training - feature).norm(dim=1)
        assert index == distances.argmin() and float(distance) == pytest.approx(float(distances.min()), rel=1e-12)
    others = nearest_features(training, training, leave_out_itself=True)
    for row, (distance, index) in enumerate(zip(*others, strict=True)):
        distances = (training - training[row]).norm(dim=1)
        distances[row] = torch.inf
        assert index == distances.argmin() and float(distance) == pytest.approx(float(distances.min()), rel=1e-12)


def test_copies_are_at_distance_zero_also_in_float16() -> None:
    training = normal(40, 0) + 30
    for dtype in (torch.float16, torch.float64):
        found = measured(training[:17], training, normal(40, 1) + 30, dtype)
        assert found == {"nearest_distance_ratio": 0, "nearer_than_held_out": 1, "authenticity": 0}


def test_new_images_are_as_far_as_held_out_ones() -> None:
    found = measured(normal(1000, 0), normal(1000, 1), normal(1000, 2))
    assert found["nearest_distance_ratio"] == pytest.approx(1, abs=0.1)
    assert found["nearer_than_held_out"] == pytest.approx(0.5, abs=0.05)
    assert found["authenticity"] == pytest.approx(0.5, abs=0.1)
    # The same images as the held-out ones: ties count by half.
    same = measured(normal(100, 2), normal(100, 1), normal(100, 2))
    assert same["nearest_distance_ratio"] == 1 and same["nearer_than_held_out"] == pytest.approx(0.5)


def test_the_figures_are_those_of_their_definitions() -> None:
    """On a line, with training images at 0 and 10, whose nearest others are at 10."""
    training = torch.zeros(2, 5, dtype=torch.float64)
    training[1, 0] = 10

    def at(*places: float) -> Tensor:
        features = torch.zeros(len(places), 5, dtype=torch.float64)
        features[:, 0] = torch.tensor(places)
        return features

    found = measured(at(1, 7, -12), training, at(2, -3, 14))
    # Distances 1, 3 and 12 of samples; 2, 3 and 4 of held-out images.
    assert found["nearest_distance_ratio"] == 1
    assert found["nearer_than_held_out"] == pytest.approx((3 + 1.5 + 0) / 9)
    assert found["authenticity"] == pytest.approx(1 / 3)


def test_held_out_copies_have_no_ratio() -> None:
    training = normal(9, 0)
    assert isnan(measured(normal(9, 1), training, training)["nearest_distance_ratio"])


def test_what_cannot_be_compared_is_refused() -> None:
    real = FeatureSet(normal(9, 0))
    with pytest.raises(ValueError, match="reference 'held_out' has 4 features, Pixels gives 5"):
        NearestTraining(EXTRACTOR, real, held_out=FeatureSet(torch.zeros(3, 4)))
    with pytest.raises(ValueError, match="'training' was made by Other"):
        NearestTraining(EXTRACTOR, FeatureSet(normal(9, 0), extractor="Other", weights_sha256="b" * 64), held_out=real)
    with pytest.raises(ValueError, match="training needs 2 images, held_out 1; they have 1 and 9"):
        NearestTraining(EXTRACTOR, FeatureSet(normal(1, 0)), held_out=real)
    metric = NearestTraining(EXTRACTOR, real, held_out=real)
    metric.update(normal(0, 0))
    with pytest.raises(ValueError, match="of no sample"):
        metric.compute()
