"""The spread of a class equals the mean over its pairs."""

import itertools

import pytest
import torch

from discrete_lit.metrics.precision_recall import ClassSpread, within_class_diversity


def spread(features: torch.Tensor, labels: torch.Tensor, num_classes: int = 3) -> ClassSpread:
    gathered = ClassSpread(num_classes, features.shape[1])
    for start in range(0, len(features), 4):
        gathered.update(features[start : start + 4], labels[start : start + 4])
    return gathered


def test_equals_the_mean_over_pairs():
    features = torch.randn(15, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    labels = torch.arange(15) % 3
    found = spread(features, labels).compute()
    for label in range(3):
        pairs = itertools.combinations(features[labels == label], 2)
        distances = [float((first - second).square().sum()) for first, second in pairs]
        assert float(found[label]) == pytest.approx(sum(distances) / len(distances), rel=1e-12)


def test_one_image_repeated_has_no_diversity_and_real_ones_have_one():
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    real = spread(features, labels)
    assert within_class_diversity(real, real).tolist() == [1, 1, 1]
    collapsed = within_class_diversity(spread(features[labels], labels), real)
    assert collapsed.abs().max() < 1e-12
    twice = within_class_diversity(spread(features * 2, labels), real)
    torch.testing.assert_close(twice, torch.full((3,), 4.0, dtype=torch.float64))


def test_a_class_with_one_image_has_none():
    found = spread(torch.randn(3, 2), torch.tensor([0, 0, 2])).compute()
    assert found[0] > 0 and found[1:].isnan().all()
