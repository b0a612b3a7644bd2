"""Kept features: their order, their precision, their files, and that measures of one collection share them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_frechet import Flatten
from torch import Tensor, nn
from torchmetrics import MetricCollection

from discrete_lit.metrics.feature_distances import GaussianDistance, KernelDistance, SlicedWasserstein
from discrete_lit.metrics.kept_features import FeatureSet, KeptFeatures

EXTRACTOR = Flatten(3)


def features(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def test_they_come_in_the_order_of_their_indices_in_float16() -> None:
    metric, given = KeptFeatures(EXTRACTOR), features(10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    for index in order.split(4):
        metric.update(given[index], index % 3, indices=index)
    found = metric.compute()
    assert torch.equal(found.features, given.half()) and torch.equal(found.labels, torch.arange(10) % 3)
    assert (found.extractor, found.weights_sha256) == ("Pixels", "0" * 64)
    metric.reset()
    metric.update(given)
    assert torch.equal(metric.compute().features, given.half()) and metric.compute().labels.eq(-1).all()


def test_no_image_gives_an_empty_set() -> None:
    metric = KeptFeatures(EXTRACTOR, dtype=torch.float32)
    metric.update(features(0))
    found = metric.compute()
    assert len(found) == 0 and found.features.shape == (0, 3) and found.features.dtype == torch.float32


def test_they_are_written_and_read(tmp_path: Path) -> None:
    kept = FeatureSet(features(5).half(), torch.arange(5), extractor="Pixels", weights_sha256="0" * 64)
    kept.save(tmp_path / "kept.npz")
    found = FeatureSet.load(tmp_path / "kept.npz", EXTRACTOR)
    assert torch.equal(found.features, kept.features) and torch.equal(found.labels, kept.labels)
    assert (found.extractor, found.weights_sha256, found.dim) == ("Pixels", "0" * 64, 3)
    FeatureSet(features(5)).save(tmp_path / "unknown.npz")
    assert FeatureSet.load(tmp_path / "unknown.npz", EXTRACTOR).labels is None


def test_a_file_of_other_features_is_refused(tmp_path: Path) -> None:
    def written(**arrays: np.ndarray) -> str:
        np.savez(tmp_path / "file.npz", **arrays)
        return str(tmp_path / "file.npz")

    with pytest.raises(ValueError, match=r"holds \['mu'\]; a file of features holds 'features'"):
        FeatureSet.load(written(mu=np.zeros(3)))
    with pytest.raises(ValueError, match="must be floats"):
        FeatureSet.load(written(features=np.zeros((4, 3), dtype=np.int64)))
    with pytest.raises(ValueError, match="1 of 4 are not finite"):
        FeatureSet.load(written(features=np.array([[0.0, 1, 2]] * 3 + [[0.0, np.inf, 2]])))
    with pytest.raises(ValueError, match="has 4 features, Pixels gives 3"):
        FeatureSet.load(written(features=np.zeros((4, 4))), EXTRACTOR)
    with pytest.raises(ValueError, match=r"this is Pixels with weights 0+"):
        FeatureSet.load(written(features=np.zeros((4, 3)), weights_sha256=np.array("b" * 64)), EXTRACTOR)


def test_a_truncated_and_a_pickled_file_are_refused(tmp_path: Path) -> None:
    FeatureSet(features(50)).save(tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cut\.npz"):
        FeatureSet.load(tmp_path / "cut.npz")
    np.savez(tmp_path / "pickled.npz", features=np.array([[{}]], dtype=object))
    with pytest.raises(ValueError, match=r"pickled\.npz.*must be floats"):
        FeatureSet.load(tmp_path / "pickled.npz")


def test_a_set_is_a_matrix_with_as_many_labels() -> None:
    with pytest.raises(ValueError, match=r"must be \(n, D\) of a floating type"):
        FeatureSet(torch.zeros(3))
    with pytest.raises(ValueError, match="3 features need as many labels"):
        FeatureSet(features(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"are not \(B, 3\), which Pixels gives"):
        KeptFeatures(EXTRACTOR).update(torch.zeros(2, 4))


def test_beyond_float16_is_an_error_that_says_what_to_do() -> None:
    metric = KeptFeatures(EXTRACTOR)
    metric.update(features(2) * 1e6)
    with pytest.raises(ValueError, match=r"not finite.*keep float32"):
        metric.compute()


def test_measures_of_one_collection_share_what_they_keep() -> None:
    reference = FeatureSet(features(30, seed=1))
    made = {"kid": KernelDistance(EXTRACTOR, reference, subset_size=10, subsets=3)}
    made |= {"mind": SlicedWasserstein(EXTRACTOR, reference), "cmmd": GaussianDistance(EXTRACTOR, reference)}
    apart = {name: metric.clone() for name, metric in made.items()}
    together = MetricCollection(made)
    for index in torch.arange(20).split(6):
        together.update(features(20)[index], indices=index)
        for metric in apart.values():
            metric.update(features(20)[index], indices=index)
    assert len(together.compute_groups) == 1
    found = together.compute()
    kept = [metric.features for metric in together.values(copy_state=False)]
    assert kept[0] is kept[1] is kept[2]
    assert found["kernel_distance"] == apart["kid"].compute()["kernel_distance"]
    assert found["mind"] == apart["mind"].compute() and found["cmmd"] == apart["cmmd"].compute()


def test_they_keep_their_precision_in_a_module_of_half_precision() -> None:
    module = nn.ModuleDict({"kept": KeptFeatures(EXTRACTOR, dtype=torch.float32)})
    module["kept"].update(features(4))
    module.to(torch.bfloat16)
    assert torch.equal(module["kept"].compute().features, features(4))
    assert not module.state_dict()


def test_features_of_inference_mode_are_kept() -> None:
    metric = KeptFeatures(EXTRACTOR)
    with torch.inference_mode():
        metric.update(features(4))
    assert torch.equal(metric.compute().features, features(4).half())
