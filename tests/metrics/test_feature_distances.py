"""KID, CMMD, MIND and the distance of each class against torch-fidelity, torchmetrics, loops and closed forms."""

import numpy as np
import pytest
import torch
from test_frechet import Flatten, moments_of
from torch import Tensor

from discrete_lit.metrics import feature_distances
from discrete_lit.metrics.feature_distances import (
    ClassFrechetDistance,
    GaussianDistance,
    KernelDistance,
    SlicedWasserstein,
    frechet_distance_of_features,
    gaussian_mmd,
    polynomial_mmd,
    sliced_wasserstein,
)
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.metrics.kept_features import FeatureSet, KeptFeatures

EXTRACTOR = Flatten(6)


def normal(count: int, dim: int = 6, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def measured(metric: KeptFeatures, samples: Tensor, labels: Tensor | None = None):
    for index in torch.arange(len(samples)).split(37):
        metric.update(samples[index], None if labels is None else labels[index])
    return metric.compute()


def test_kid_draws_and_computes_as_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    samples, reference = normal(150), normal(120, seed=1, shift=0.3)
    expected = kid_features_to_metric(samples, reference, kid_subsets=7, kid_subset_size=40, verbose=False)
    metric = KernelDistance(EXTRACTOR, FeatureSet(reference), subsets=7, subset_size=40, dtype=torch.float64)
    found = measured(metric, samples)
    assert float(found["kernel_distance"]) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert float(found["kernel_distance_std"]) == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-10)
    assert found["kernel_distance_std"] > 0


def test_the_full_estimate_is_that_of_torchmetrics_and_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image.kid import poly_mmd

    monkeypatch.setattr(feature_distances, "_VALUES_AT_ONCE", 100)  # several blocks
    samples, reference = normal(30), normal(30, seed=1, shift=0.3)
    assert polynomial_mmd(samples, reference) == pytest.approx(float(poly_mmd(samples, reference)), rel=1e-10)
    samples = samples[:17]

    def mean(first: Tensor, second: Tensor, *, without_itself: bool = False) -> float:
        values = [
            (float(x @ y) / 6 + 1) ** 3
            for i, x in enumerate(first)
            for j, y in enumerate(second)
            if not (without_itself and i == j)
        ]
        return sum(values) / len(values)

    expected = mean(samples, samples, without_itself=True) + mean(reference, reference, without_itself=True)
    expected -= 2 * mean(samples, reference)
    assert polynomial_mmd(samples, reference) == pytest.approx(expected, rel=1e-10)
    found = measured(KernelDistance(EXTRACTOR, FeatureSet(reference), subset_size=None, dtype=torch.float64), samples)
    assert float(found["kernel_distance"]) == pytest.approx(expected, rel=1e-10)
    assert found["kernel_distance_std"] == 0


def test_the_kernel_distance_of_two_points_has_a_closed_form() -> None:
    first, second = torch.full((5, 1), 2.0, dtype=torch.float64), torch.full((9, 1), -1.0, dtype=torch.float64)
    assert polynomial_mmd(first, second) == pytest.approx((4 + 1) ** 3 + (1 + 1) ** 3 - 2 * (-2 + 1) ** 3)


def test_the_halves_of_one_set_are_at_the_floor_of_every_distance() -> None:
    halves, shifted = normal(2000).chunk(2), normal(1000, seed=1, shift=0.2)
    reference = FeatureSet(halves[0])
    for metric, floor in (
        (KernelDistance(EXTRACTOR, reference, subset_size=None), 0.01),
        (GaussianDistance(EXTRACTOR, reference, bandwidth=1.0, scale=1.0), 0.01),
        (SlicedWasserstein(EXTRACTOR, reference), 0.15),
    ):
        near = metric.__class__.__name__, measured(metric, halves[1])
        metric.reset()
        far = measured(metric, shifted)
        values = [each["kernel_distance"] if isinstance(each, dict) else each for each in (near[1], far)]
        assert abs(float(values[0])) < floor, near
        assert float(values[1]) > 3 * abs(float(values[0])), (near, far)


def test_cmmd_of_two_directions_has_a_closed_form() -> None:
    """Unit vectors at a right angle are √2 apart, and the estimate compares each with itself too."""
    ones = torch.eye(6)
    metric = GaussianDistance(EXTRACTOR, FeatureSet(7 * ones[:1].repeat(4, 1)))
    expected = 1000 * (2 - 2 * np.exp(-2 / (2 * 10**2)))
    assert float(measured(metric, 3 * ones[1:2].repeat(5, 1))) == pytest.approx(expected, rel=1e-10)


def test_the_gaussian_kernel_of_two_gaussians_has_a_closed_form() -> None:
    """E exp(-|x-y|²/2σ²) = (1 + 2/σ²)^(-D/2) exp(-|m|²/(2σ² + 4)) for unit Gaussians whose means differ by m."""
    bandwidth = 1.5
    # Moved and turned so that mean and covariance are exact: what is left of the noise is of higher order.
    first, second = (
        torch.linalg.solve_triangular(torch.linalg.cholesky(each.T.cov()), (each - each.mean(0)).T, upper=False).T
        for each in (normal(3000, 2), normal(3000, 2, seed=1))
    )
    second = second + 0.7
    scale = 1 + 2 / bandwidth**2
    expected = 2 / scale * (1 - np.exp(-(2 * 0.7**2) / (2 * bandwidth**2 + 4)))
    assert gaussian_mmd(first, second, bandwidth=bandwidth) == pytest.approx(expected, rel=0.03)


def test_the_gaussian_kernel_is_that_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_distances, "_VALUES_AT_ONCE", 50)
    samples, reference = normal(11), normal(8, seed=1, shift=0.5)

    def mean(first: Tensor, second: Tensor) -> float:
        return float(torch.stack([torch.exp(-(x - y).square().sum() / 8) for x in first for y in second]).mean())

    expected = mean(samples, samples) + mean(reference, reference) - 2 * mean(samples, reference)
    assert gaussian_mmd(samples, reference, bandwidth=2.0) == pytest.approx(expected, rel=1e-10)


def test_cmmd_takes_features_as_they_are_where_asked() -> None:
    samples, reference = normal(20), normal(30, seed=1, shift=0.5)
    metric = GaussianDistance(
        EXTRACTOR, FeatureSet(reference), bandwidth=2.0, scale=10.0, normalize=False, dtype=torch.float64
    )
    assert float(measured(metric, samples)) == pytest.approx(10 * gaussian_mmd(samples, reference, bandwidth=2.0))


def test_mind_is_the_mean_over_torch_fidelitys_directions() -> None:
    """In one dimension each sorts the projections of a direction, drawn by `torch.randn` with the seed."""
    samples, reference = normal(50), normal(50, seed=1, shift=0.5)
    directions = torch.randn(13, 6, generator=torch.Generator().manual_seed(2020)).double().numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    differences = [np.mean((np.sort(samples.numpy() @ u) - np.sort(reference.numpy() @ u)) ** 2) for u in directions]
    metric = SlicedWasserstein(EXTRACTOR, FeatureSet(reference), projections=13, dtype=torch.float64)
    assert float(measured(metric, samples)) == pytest.approx(3 * 6 * np.mean(differences), rel=1e-9)
    assert metric.metric_name == "MIND-Pixels"


def test_mind_of_a_shift_has_a_closed_form() -> None:
    """Each direction sees the shift a as u·a, and 3 D times the mean of its square is 3 |a|²."""
    samples = normal(40, 1)
    assert sliced_wasserstein(samples, samples + 2.5) == pytest.approx(3 * 2.5**2, rel=1e-10)
    shift = torch.tensor([[1.0, 0, 0, 2.0, 0, 0]], dtype=torch.float64)
    samples = normal(40)
    assert sliced_wasserstein(samples, samples + shift, projections=20_000) == pytest.approx(3 * 5, rel=0.05)


def test_mind_of_gaussians_in_one_dimension_has_a_closed_form() -> None:
    """The Wasserstein-2 distance of N(0, 1) and N(a, s²) is a² + (1 - s)²."""
    found = sliced_wasserstein(normal(100_000, 1), 2 * normal(100_000, 1, seed=1) + 0.5, projections=2, most=100_000)
    assert found == pytest.approx(3 * (0.5**2 + 1), rel=0.03)


def test_mind_takes_as_many_of_the_larger_set() -> None:
    samples, reference = normal(30), normal(50, seed=1)
    chosen = torch.randperm(50, generator=torch.Generator().manual_seed(2020))[:30]
    random = torch.Generator().manual_seed(2020)
    torch.randperm(50, generator=random)
    directions = torch.randn(5, 6, generator=random).double()
    directions /= directions.norm(dim=1, keepdim=True)
    sets = [(each @ directions.T).sort(dim=0).values for each in (samples, reference[chosen])]
    expected = 18 * float((sets[0] - sets[1]).square().mean())
    assert sliced_wasserstein(samples, reference, projections=5) == pytest.approx(expected, rel=1e-9)
    assert sliced_wasserstein(samples, reference, projections=5, most=10) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("counts", [(5, 4), (5, 40), (40, 4), (40, 30)])
def test_the_distance_of_few_features_is_that_of_their_moments(counts: tuple[int, int]) -> None:
    first, second = normal(counts[0]), 2 * normal(counts[1], seed=1, shift=0.5)
    expected = frechet_distance(moments_of(first.numpy()), moments_of(second.numpy()))
    assert frechet_distance_of_features(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance_of_features(first, first.clone()) < 1e-12


def test_the_distance_of_each_class_is_that_of_its_images_alone() -> None:
    samples, reference = normal(60), normal(90, seed=1, shift=0.5)
    labels, wanted = torch.arange(60) % 4, torch.arange(90) % 3
    labels[labels == 3] = -1
    settings = {"num_classes": 5, "dtype": torch.float64}
    metric = ClassFrechetDistance(EXTRACTOR, FeatureSet(reference, wanted), per_class=True, **settings)
    found = measured(metric, samples, labels)
    for label in range(3):
        expected = frechet_distance(
            *(moments_of(each[of == label].numpy()) for each, of in ((samples, labels), (reference, wanted)))
        )
        assert float(found[label]) == pytest.approx(expected, rel=1e-9)
    assert found[3:].isnan().all()
    mean = measured(ClassFrechetDistance(EXTRACTOR, FeatureSet(reference, wanted), **settings), samples, labels)
    assert float(mean) == pytest.approx(float(found[:3].mean()))


def test_labels_that_are_missing_are_asked_for() -> None:
    labelled = FeatureSet(normal(9), torch.arange(9) % 3)
    with pytest.raises(ValueError, match="reference 'reference' has no labels"):
        ClassFrechetDistance(EXTRACTOR, FeatureSet(normal(9)))
    metric = ClassFrechetDistance(EXTRACTOR, labelled)
    with pytest.raises(ValueError, match=r"needs the labels.*missing"):
        metric.update(normal(3))
    metric.update(normal(3), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="no class has two images"):
        metric.compute()
    metric.update(normal(3), torch.tensor([0, 1, 7]))
    with pytest.raises(ValueError, match="label 7 is none of 3 classes"):
        metric.compute()


def every_distance(reference: FeatureSet) -> list[KeptFeatures]:
    classes = [KernelDistance, GaussianDistance, SlicedWasserstein]
    return [made(EXTRACTOR, reference) for made in classes]


def test_a_reference_of_another_extractor_or_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"made by Other with weights b+; this is Pixels"):
        every_distance(FeatureSet(normal(9), extractor="Other", weights_sha256="b" * 64))
    with pytest.raises(ValueError, match="has 5 features, Pixels gives 6"):
        every_distance(FeatureSet(normal(9, 5)))
    broken = normal(9)
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"reference 'reference': 1 of 9 are not finite"):
        every_distance(FeatureSet(broken))


def test_one_image_and_features_that_are_not_finite_are_refused() -> None:
    for metric in every_distance(FeatureSet(normal(9))):
        metric.update(normal(1))
        with pytest.raises(ValueError, match=r"needs at least (2|1,000) images, samples are 1"):
            metric.compute()
        metric.reset()
        metric.update(torch.full((2, 6), torch.nan))
        with pytest.raises(ValueError, match="2 of 2 are not finite"):
            metric.compute()


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (KernelDistance, {"subsets": 0}, "subsets=0 must be at least 1"),
        (KernelDistance, {"subset_size": 1}, "subset_size=1 at least 2"),
        (GaussianDistance, {"bandwidth": 0.0}, "bandwidth=0.0 must be above 0"),
        (SlicedWasserstein, {"projections": 0}, "projections=0 must be at least 1"),
        (SlicedWasserstein, {"most": 1}, "most=1 at least 2"),
    ],
)
def test_settings_without_a_meaning_are_refused(made: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(EXTRACTOR, FeatureSet(normal(9)), **settings)
