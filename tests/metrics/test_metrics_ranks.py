"""Every streaming measure over ranks with unequal numbers of images, or none, is that of all images together."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from test_frechet import Flatten
from torch import Tensor

from discrete_lit.metrics.binned_mean import BinnedMean
from discrete_lit.metrics.classifier_scores import ClassAccuracy, InceptionScore
from discrete_lit.metrics.codebook_usage import CodebookUsage
from discrete_lit.metrics.extractors import FeatureSpace
from discrete_lit.metrics.feature_distances import (
    ClassFrechetDistance,
    GaussianDistance,
    KernelDistance,
    SlicedWasserstein,
)
from discrete_lit.metrics.frechet import FrechetDistance
from discrete_lit.metrics.kept_features import FeatureSet, KeptFeatures
from discrete_lit.metrics.moments import FeatureMoments
from discrete_lit.metrics.nearest_training import NearestTraining
from discrete_lit.metrics.precision_recall import ClassSpread, DensityCoverage, PrecisionRecall, WithinClassDiversity
from discrete_lit.metrics.reconstruction import ReconstructionFidelity

LOGITS = FeatureSpace(
    name="Classifier", dim=4, protocol="none", weights_sha256="0" * 64, metric_name="none", part="logits"
)
SHARES = {2: (slice(5), slice(5, None)), 3: (slice(5), slice(5, None), slice(0))}
"""The images of each rank: of three, the last has none."""


def kept_measures() -> dict[str, KeptFeatures]:
    """Every measure of kept features, with a reference that is the same on every rank."""
    extractor, random = Flatten(4), torch.Generator().manual_seed(1)
    real = FeatureSet(torch.randn(20, 4, generator=random) + 0.2, torch.arange(20) % 3)
    held_out = FeatureSet(torch.randn(20, 4, generator=random))
    return {
        "kid": KernelDistance(extractor, real, subsets=4, subset_size=9),
        "cmmd": GaussianDistance(extractor, real),
        "mind": SlicedWasserstein(extractor, real, projections=7, most=11),
        "classes": ClassFrechetDistance(extractor, real),
        "pr": PrecisionRecall(extractor, real),
        "dc": DensityCoverage(extractor, real),
        "nearest": NearestTraining(extractor, real, held_out=held_out),
    }


def measured(rows: slice) -> dict[str, Tensor]:
    """The results of all measures after some of 17 images."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(17, 4, dtype=torch.float64, generator=random)[rows]
    tokens = torch.randint(0, 20, (17, 3), generator=random)[rows]
    images = torch.randint(0, 256, (17, 3, 12, 12), dtype=torch.uint8, generator=random)[rows]
    rebuilt = torch.randint(0, 256, (17, 3, 12, 12), dtype=torch.uint8, generator=random)[rows]
    # In another order than that of the ranks.
    indices = torch.randperm(17, generator=random)[rows]
    labels = torch.arange(17)[rows] % 3
    moments, spread, usage, binned = FeatureMoments(Flatten(4)), ClassSpread(3, 4), CodebookUsage(32), BinnedMean(2)
    fidelity = ReconstructionFidelity(lpips=lambda first, second: (first - second).abs().mean())
    reference = FeatureMoments(Flatten(4))
    reference.update(torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    distance = FrechetDistance(Flatten(4), reference.moments())
    diversity = WithinClassDiversity(Flatten(4), torch.tensor([1.0, 2.0, 3.0]))
    score, accuracy = InceptionScore(LOGITS, 17, splits=3), ClassAccuracy(4)
    kept = kept_measures()
    if len(features):  # the measures of a rank without images are never told of any
        moments.update(features)
        spread.update(features, labels)
        usage.update(tokens)
        binned.update(features, features.sigmoid(), features.square())
        fidelity.update(rebuilt, images)
        distance.update(features)
        diversity.update(features, labels)
        score.update(features, indices=indices)
        accuracy.update(features, labels)
        for measure in kept.values():
            measure.update(features, labels, indices=indices)
    found = moments.compute()
    # A second time: what was added up over the ranks is not added up again.
    assert torch.equal(moments.compute().mean, found.mean)
    moments.update(features[:0])
    assert torch.equal(moments.compute().covariance, found.covariance)
    results = {name: measure.compute() for name, measure in kept.items()}
    return {
        "count": torch.tensor(found.count),
        "mean": found.mean,
        "covariance": found.covariance,
        "spread": spread.compute(),
        "usage": torch.stack(usage.compute()),
        "binned": torch.stack(binned.compute()),
        "fidelity": torch.stack(fidelity.compute()),
        "distance": distance.compute(),
        "diversity": diversity.compute(),
        "accuracy": accuracy.compute(),
        "score": torch.stack(list(score.compute().values())),
        **{
            f"kept {name}": torch.stack(list(result.values())) if isinstance(result, dict) else result
            for name, result in results.items()
        },
    }


def gather(rank: int, ranks: int, address: str, output: str) -> None:
    torch.set_num_threads(1)  # as in the tests
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    torch.save(measured(SHARES[ranks][rank]), f"{output}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow_but(1)
@pytest.mark.ddp
@pytest.mark.parametrize("ranks", [2, 3])
def test_measures_over_ranks_are_those_of_the_whole(tmp_path, ranks: int) -> None:
    context = multiprocessing.get_context("spawn")
    address = f"file://{tmp_path}/rendezvous"
    processes = [context.Process(target=gather, args=(rank, ranks, address, str(tmp_path))) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    assert [process.exitcode for process in processes] == [0] * ranks
    expected = measured(slice(None))
    assert expected["count"] == 17 and all(value.isfinite().all() for value in expected.values())
    for rank in range(ranks):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["count"] == 17
        for name, value in expected.items():
            if name.startswith("kept"):  # the same features in the same order: the same number
                assert torch.equal(found[name], value), name
            elif name == "fidelity":  # the terms of a batch are added in float32
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
            else:
                torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


def test_no_state_enters_a_checkpoint():
    plain = (FeatureMoments(Flatten(4)), ClassSpread(3, 4), ReconstructionFidelity(), CodebookUsage(8))
    for metric in (*plain, InceptionScore(LOGITS, 17, splits=3), ClassAccuracy(4), *kept_measures().values()):
        assert not metric.state_dict() and not list(metric.parameters()) and not list(metric.buffers())
