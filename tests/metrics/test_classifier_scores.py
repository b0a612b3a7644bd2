"""The Inception Score against torch-fidelity and closed forms, and the accuracy of labels against torchmetrics."""

import math

import pytest
import torch
from torch import Tensor

from discrete_lit.metrics.classifier_scores import ClassAccuracy, InceptionScore
from discrete_lit.metrics.extractors import FeatureSpace


def space(dim: int, part: str = "logits") -> FeatureSpace:
    return FeatureSpace(
        name="Classifier", dim=dim, protocol="none", weights_sha256="0" * 64, metric_name="none", part=part
    )


def logits(count: int, dim: int = 7, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(0))


def score(given: Tensor, splits: int = 10, order: Tensor | None = None) -> dict[str, Tensor]:
    metric = InceptionScore(space(given.shape[1]), len(given), splits=splits)
    for index in (torch.arange(len(given)) if order is None else order).split(11):
        metric.update(given[index], indices=None if order is None else index)
    return metric.compute()


@pytest.mark.parametrize("count", [100, 103])
def test_it_is_torch_fidelitys_over_consecutive_splits(count: int) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    expected = isc_features_to_metric(logits(count), splits=10, shuffle=False)
    found = score(logits(count))
    assert float(found["inception_score"]) == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert float(found["inception_score_std"]) == pytest.approx(expected["inception_score_std"], rel=1e-10)


def test_it_is_that_of_torchmetrics_but_for_its_permutation() -> None:
    from torchmetrics.image.inception import InceptionScore as Theirs

    with pytest.warns(UserWarning, match="save all extracted features"):
        theirs = Theirs(feature=torch.nn.Identity())
    theirs.update(logits(100).double())
    torch.manual_seed(0)
    mean, deviation = theirs.compute()
    torch.manual_seed(0)
    found = score(logits(100)[torch.randperm(100)])
    assert float(found["inception_score"]) == pytest.approx(float(mean), rel=1e-12)
    # Theirs divides by the number of splits less one.
    assert float(found["inception_score_std"]) == pytest.approx(float(deviation) * 0.9**0.5, rel=1e-10)


def test_the_order_of_arrival_does_not_matter() -> None:
    order = torch.randperm(103, generator=torch.Generator().manual_seed(1))
    for name, value in score(logits(103), order=order).items():
        assert float(value) == pytest.approx(float(score(logits(103))[name]), rel=1e-12)


def test_closed_forms() -> None:
    """Sure of K equally frequent classes it is K; never sure, or of one class alone, it is 1."""
    sure = 1e4 * torch.eye(7).repeat(20, 1)
    assert float(score(sure, splits=5)["inception_score"]) == pytest.approx(7, rel=1e-12)
    for dull in (torch.zeros(20, 7), 1e4 * torch.eye(7)[:1].repeat(20, 1)):
        assert float(score(dull, splits=5)["inception_score"]) == pytest.approx(1, rel=1e-12)
    # Half of the images are sure of class 0 and half of class 1, each with the probability p.
    margin = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).repeat(10, 1)
    p = 1 / (1 + math.exp(-2))
    expected = math.exp(math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p))
    assert float(score(margin, splits=2)["inception_score"]) == pytest.approx(expected, rel=1e-12)


def test_sorted_samples_score_less() -> None:
    """Not permuted: a split that holds one class tells nothing of the others."""
    sure = 1e4 * torch.eye(5).repeat_interleave(20, 0)
    assert float(score(sure, splits=5)["inception_score"]) == pytest.approx(1, rel=1e-12)


def test_the_memory_is_that_of_the_splits() -> None:
    metric = InceptionScore(space(7), 1000)
    metric.update(logits(900))
    assert sum(getattr(metric, name).numel() for name in metric._defaults) == 10 * (7 + 2)


def test_another_number_of_images_is_refused() -> None:
    metric = InceptionScore(space(7), 20, splits=2)
    metric.update(logits(12))
    with pytest.raises(ValueError, match=r"num_images=20 images was asked for, there were 12"):
        metric.compute()
    with pytest.raises(ValueError, match="image 23 is none of num_images=20"):
        metric.update(logits(12))
    metric.reset()
    metric.update(logits(20))
    assert metric.compute()["inception_score"] > 1


def test_what_has_no_inception_score_is_refused() -> None:
    with pytest.raises(ValueError, match=r"taken over logits, Classifier names 'pool' features.*space\(\"logits\"\)"):
        InceptionScore(space(7, "pool"))
    with pytest.raises(ValueError, match="splits=10 must be at least 1 and at most num_images=9"):
        InceptionScore(space(7), 9)
    metric = InceptionScore(space(7), 2, splits=1)
    metric.update(torch.full((2, 7), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        metric.compute()


def test_accuracy_is_that_of_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassAccuracy

    given, labels = logits(50), torch.arange(50) % 6
    for average, per_class in (("micro", False), ("none", True)):
        theirs = MulticlassAccuracy(7, average=average)  # type: ignore[arg-type]
        ours = ClassAccuracy(7, per_class=per_class)
        for index in torch.arange(50).split(13):
            theirs.update(given[index], labels[index])
            ours.update(given[index], labels[index])
        expected, found = theirs.compute().double(), ours.compute()
        if per_class:
            assert found[6].isnan()  # theirs is 0 where there is no image
            expected, found = expected[:6], found[:6]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert 0 < found.mean() < 1


def test_images_without_a_class_do_not_count() -> None:
    metric = ClassAccuracy(2)
    metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, -1]))
    assert metric.compute() == 1


def test_what_has_no_accuracy_is_refused() -> None:
    metric = ClassAccuracy(7)
    with pytest.raises(ValueError, match=r"labels.*missing"):
        metric.update(logits(2))
    with pytest.raises(ValueError, match="label 7 is none of 7"):
        metric.update(logits(2), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="not finite"):
        metric.update(torch.full((2, 7), torch.inf), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"are not \(B, 7\)"):
        metric.update(torch.zeros(2, 8), torch.tensor([0, 1]))
    metric.update(logits(1), torch.tensor([-1]))
    with pytest.raises(ValueError, match="no labelled image"):
        metric.compute()
