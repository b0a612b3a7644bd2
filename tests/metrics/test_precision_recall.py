"""Manifolds of features, counted by hand, by brute force, and by torch-fidelity; and the spread of classes by pairs."""

import itertools

import pytest
import torch
from test_frechet import Flatten

from discrete_lit.evaluation.feature_statistics import EvenSample
from discrete_lit.metrics import precision_recall
from discrete_lit.metrics.kept_features import FeatureSet
from discrete_lit.metrics.precision_recall import (
    ClassSpread,
    DensityCoverage,
    Manifold,
    PrecisionRecall,
    WithinClassDiversity,
    density_and_coverage,
    precision_and_recall,
    within_class_diversity,
)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def test_balls_on_a_line() -> None:
    """Second neighbours: of 0, 1, 3, 10 the radii are 3, 2, 3, 9."""
    manifold = Manifold(column(0, 1, 3, 10), neighbours=2)
    assert manifold.radii.tolist() == [3, 2, 3, 9]
    # The border belongs to a ball; 19 is at distance 9 of 10, -3 at distance 3 of 0.
    covered = {-3.0: 1, -3.1: 0, 0.5: 1, 19.0: 1, 19.1: 0}
    for value, expected in covered.items():
        assert manifold.fraction_covered(column(value)) == expected, value
    assert manifold.fraction_covered(column(*covered)) == 3 / 5


def test_precision_and_recall_are_not_swapped() -> None:
    """All samples at one mode of two: each lies among the reference's, which they cover half of."""
    reference = column(0, 1, 2, 3, 100, 101, 102, 103)
    assert precision_and_recall(column(0.5, 1.5, 2.5, 1.0), Manifold(reference, 2)) == (1.0, 0.5)
    # Half of the samples are far from all reference features, and the other half covers them.
    samples = column(0, 1, 2, 3, 1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3)
    assert precision_and_recall(samples, Manifold(column(0.1, 1.1, 2.1, 3.1), 2)) == (0.5, 1.0)


def brute_force(samples: torch.Tensor, reference: torch.Tensor, k: int) -> tuple[float, float]:
    def covered(points: torch.Tensor, centres: torch.Tensor) -> float:
        hits = 0
        for point in points:
            for index, centre in enumerate(centres):
                others = [float((centre - other).norm()) for at, other in enumerate(centres) if at != index]
                hits += float((point - centre).norm()) <= sorted(others)[k - 1]
                if float((point - centre).norm()) <= sorted(others)[k - 1]:
                    break
        return hits / len(points)

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("distances_at_once", [1, 50, 2**25])
def test_against_brute_force_in_blocks_of_any_size(
    k: int, distances_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_recall, "_DISTANCES_AT_ONCE", distances_at_once)
    random = torch.Generator().manual_seed(k)
    reference = torch.randn(17, 4, generator=random, dtype=torch.float64)
    samples = torch.randn(12, 4, generator=random, dtype=torch.float64) * 0.8 + 0.5
    found = precision_and_recall(samples, Manifold(reference, k))
    assert found == pytest.approx(brute_force(samples, reference, k))
    assert 0 < found[1] < found[0] < 1


@pytest.mark.parity
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (100.0, 0.01)])
def test_against_torch_fidelity(mean: float, spread: float) -> None:
    """Also where distances are small beside the features themselves: there float32 products lose them."""
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    random = torch.Generator().manual_seed(0)
    reference = torch.randn(300, 16, generator=random) * spread + mean
    samples = torch.randn(200, 16, generator=random) * 0.8 * spread + mean
    expected = calculate_precision_recall_full(samples.double(), reference.double(), neighborhood=3)
    assert precision_and_recall(samples, Manifold(reference)) == pytest.approx(expected)
    assert 0 < expected[1] < expected[0] < 1


def test_the_radii_of_an_earlier_manifold_are_taken() -> None:
    features = torch.randn(40, 3, dtype=torch.float64)
    features[7:10] = features[3]
    first = Manifold(features, 2)
    again = Manifold(features, 2, squared_radii=first.squared_radii)
    assert torch.equal(again.radii, first.radii)
    assert precision_and_recall(features + 0.1, again) == precision_and_recall(features + 0.1, first)
    others = first.squared_radii.clone()
    others[8] += 1
    for wrong, message in (
        (first.squared_radii[1:], "float64"),
        (first.squared_radii.float(), "float64"),
        (-1 - others, "from 0"),
        (others, "copies of one feature have several"),
    ):
        with pytest.raises(ValueError, match=message):
            Manifold(features, 2, squared_radii=wrong)


def test_a_collapsed_set_covers_only_itself() -> None:
    """Twenty times one image: balls without a radius, which hold their own centre."""
    random = torch.Generator().manual_seed(0)
    reference = torch.randn(20, 512, generator=random) + 100
    repeated = reference[:1].repeat(20, 1)
    assert precision_and_recall(repeated, Manifold(reference)) == (1.0, 1 / 20)


@pytest.mark.parametrize(("count", "neighbours"), [(3, 3), (5, 0)])
def test_mistakes_are_refused(count: int, neighbours: int) -> None:
    with pytest.raises(ValueError, match=f"got {neighbours} and {count}"):
        Manifold(torch.zeros(count, 2), neighbours)


@pytest.mark.parametrize(("limit", "total"), [(None, 10), (4, 10), (10, 10), (99, 10), (3, 7), (1, 5)])
@pytest.mark.parametrize("batch", [1, 3, 10])
def test_an_even_sample_has_its_size_whatever_the_batches(limit: int | None, total: int, batch: int) -> None:
    sample = EvenSample(limit, total)
    kept = torch.cat([rows[sample.chosen(rows)] for rows in torch.arange(total).split(batch)]).tolist()
    wanted = total if limit is None else min(limit, total)
    assert len(kept) == wanted and kept[0] == 0
    # A k-th of the rows lies in each k-th of the stream.
    assert kept == [-(-index * total // wanted) for index in range(wanted)]


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


def test_a_single_class_is_a_row_of_one():
    features = torch.randn(6, 2)
    assert within_class_diversity(*(spread(features, torch.zeros(6, dtype=torch.long), 1) for _ in "ab")).tolist() == [
        1
    ]


def exact(samples: torch.Tensor, reference: torch.Tensor, k: int) -> tuple[float, float]:
    """Equations 1 and 2 by differences in float64, one feature at a time."""

    def squares(point: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        return (point.double() - centres.double()).square().sum(1)

    def covered(points: torch.Tensor, centres: torch.Tensor) -> float:
        radii = torch.stack([squares(centre, centres).sort().values[k] for centre in centres])
        return sum(bool((squares(point, centres) <= radii).any()) for point in points) / len(points)

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("offset", [0.0, 20.0, 1000.0])
@pytest.mark.parametrize("dim", [1, 7, 64])
@pytest.mark.parametrize("whole", [False, True])
def test_repeats_and_ties_are_decided_exactly(offset: float, dim: int, whole: bool) -> None:
    """Images that are repeated have balls of radius 0; whole numbers meet on the border of balls."""
    random = torch.Generator().manual_seed(dim)
    reference = torch.randn(90, dim, generator=random) + offset
    reference = torch.cat((reference, reference[:30].repeat(4, 1)))
    samples = torch.cat((reference[:20].repeat(2, 1), torch.randn(20, dim, generator=random) + offset))
    if whole:
        reference, samples = reference.round(), samples.round()
    for k in (1, 3):
        assert precision_and_recall(samples, Manifold(reference, k)) == exact(samples, reference, k)


@pytest.mark.parametrize("offset", [0.0, 20.0, 1000.0])
def test_a_ball_without_a_radius_holds_its_own_image_wherever_the_features_lie(offset: float) -> None:
    """Thirty images, each four times: exactly the samples that equal one of them are covered."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(30, 64, generator=random) + offset
    manifold = Manifold(images.repeat(4, 1))
    assert manifold.radii.eq(0).all()
    others = torch.randn(15, 64, generator=random) + offset
    assert manifold.fraction_covered(torch.cat((images, others))) == 30 / 45
    # The nearest other float32 value is another image.
    assert manifold.fraction_covered(images.nextafter(torch.tensor(torch.inf))) == 0


def test_a_collapsed_set_is_as_fast_as_any() -> None:
    """One image 3,000 times: no more of its copies than neighbours are compared."""
    assert precision_and_recall(torch.ones(3000, 256), Manifold(torch.ones(3000, 256))) == (1.0, 1.0)


def test_features_that_are_not_finite_are_refused() -> None:
    features = torch.randn(9, 2)
    manifold = Manifold(features)
    features[4, 1] = torch.nan
    for use in (manifold.fraction_covered, Manifold):
        with pytest.raises(ValueError, match="not finite"):
            use(features)


def test_a_class_whose_real_images_are_equal_has_no_ratio() -> None:
    """Rounding is no spread: nothing is divided by it."""
    labels = torch.arange(21) % 3
    for seed in range(8):
        features = torch.randn(21, 5, generator=torch.Generator().manual_seed(seed)) + 100
        equal = torch.where((labels == 1)[:, None], features[1], features)
        ratios = within_class_diversity(spread(features, labels), spread(equal, labels))
        assert ratios.isnan().tolist() == [False, True, False]
        assert within_class_diversity(spread(equal, labels), spread(features, labels))[1] == 0


def by_loop(samples: torch.Tensor, reference: torch.Tensor, k: int) -> tuple[float, float]:
    """Density and coverage by their definitions, with one ball after the other."""
    inside = []
    for centre in reference.double():
        radius = (reference.double() - centre).square().sum(1).sort().values[k]
        inside.append((samples.double() - centre).square().sum(1) <= radius)
    counts = torch.stack(inside)
    return float(counts.sum()) / (k * len(samples)), float(counts.any(1).double().mean())


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("whole", [False, True])
def test_density_and_coverage_are_those_of_their_definitions(k: int, whole: bool) -> None:
    random = torch.Generator().manual_seed(k)
    reference, samples = torch.randn(80, 4, generator=random), 0.8 * torch.randn(50, 4, generator=random) + 0.2
    if whole:  # repeated images, and borders that are met
        reference, samples = (2 * reference).round(), (2 * samples).round()
    found = density_and_coverage(samples, Manifold(reference, k))
    assert found == pytest.approx(by_loop(samples, reference, k), rel=1e-12)
    assert 0 < found[1] < 1


@pytest.mark.parametrize("k", [3, 5])
def test_the_reference_itself_is_in_k_and_one_balls_of_each_image(k: int) -> None:
    reference = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    assert density_and_coverage(reference, Manifold(reference, k)) == (pytest.approx((k + 1) / k), 1.0)


def test_an_outlier_of_the_reference_raises_precision_and_not_density() -> None:
    """The example of Naeem et al.: its ball holds samples that are nowhere near real images."""
    random = torch.Generator().manual_seed(0)
    reference = torch.randn(200, 4, generator=random)
    outlier = torch.cat((reference, torch.full((1, 4), 30.0)))
    samples = torch.randn(100, 4, generator=random) + 12
    before, after = (precision_and_recall(samples, Manifold(each, 3))[0] for each in (reference, outlier))
    assert before == 0 and after == 1
    assert density_and_coverage(samples, Manifold(outlier, 3))[0] < 0.5


def test_the_metrics_give_what_the_functions_do() -> None:
    random = torch.Generator().manual_seed(0)
    reference, samples = torch.randn(80, 4, generator=random), torch.randn(50, 4, generator=random) + 0.3
    made = {"dtype": torch.float32}
    both = [
        PrecisionRecall(Flatten(4), FeatureSet(reference), **made),
        DensityCoverage(Flatten(4), FeatureSet(reference), **made),
    ]
    for metric in both:
        for batch in samples.split(13):
            metric.update(batch)
    assert tuple(map(float, both[0].compute().values())) == precision_and_recall(samples, Manifold(reference, 3))
    assert tuple(map(float, both[1].compute().values())) == density_and_coverage(samples, Manifold(reference, 5))
    assert list(both[0].compute()) == ["precision", "recall"] and list(both[1].compute()) == ["density", "coverage"]


def test_precision_and_recall_are_those_of_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    random = torch.Generator().manual_seed(0)
    reference, samples = torch.randn(150, 6, generator=random), torch.randn(120, 6, generator=random) + 0.5
    expected = prc_features_to_metric(samples, reference, prc_neighborhood=3, verbose=False, save_cpu_ram=False)
    metric = PrecisionRecall(Flatten(6), FeatureSet(reference), dtype=torch.float32)
    metric.update(samples)
    found = metric.compute()
    assert float(found["precision"]) == pytest.approx(expected["precision"], abs=1e-6)
    assert float(found["recall"]) == pytest.approx(expected["recall"], abs=1e-6)
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1


def test_too_few_images_and_no_neighbours_are_refused() -> None:
    reference = FeatureSet(torch.randn(9, 4))
    for made in (PrecisionRecall, DensityCoverage):
        with pytest.raises(ValueError, match="neighbours=0 must be at least 1"):
            made(Flatten(4), reference, neighbours=0)
        metric = made(Flatten(4), reference, neighbours=3)
        metric.update(torch.randn(1, 4))
        with pytest.raises(ValueError, match=f"{made.__name__} needs at least 4 images, samples are 1"):
            metric.compute()


def test_the_diversity_metric_is_the_mean_of_the_ratios() -> None:
    features, labels = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    real = spread(2 * features, labels)
    for per_class in (True, False):
        metric = WithinClassDiversity(Flatten(4), real.compute(), per_class=per_class)
        for index in torch.arange(30).split(7):
            metric.update(features[index], labels[index])
        # An image without a class counts for nothing.
        metric.update(1e3 * features[:1], torch.tensor([-1]))
        expected = torch.full((3,), 0.25, dtype=torch.float64)
        torch.testing.assert_close(metric.compute(), expected if per_class else expected[0], rtol=1e-10, atol=0)


def test_a_diversity_without_labels_or_a_class_is_refused() -> None:
    metric = WithinClassDiversity(Flatten(4), torch.ones(3))
    with pytest.raises(ValueError, match=r"needs the labels.*missing"):
        metric.update(torch.randn(2, 4))
    with pytest.raises(ValueError, match="label 3 is none of 3 classes"):
        metric.update(torch.randn(2, 4), torch.tensor([0, 3]))
    metric.update(torch.randn(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="no class has two images"):
        metric.compute()
