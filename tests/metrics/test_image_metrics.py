"""Measures of images in a LightningModule, and ADM's evaluation recomputed from a matrix of features."""

from pathlib import Path

import lightning
import numpy as np
import pytest
import scipy.linalg
import torch
from test_extractors import TinyConvolution
from test_frechet import Flatten
from torch import Tensor, nn
from torch.utils.data import DataLoader

from discrete_lit.metrics import (
    DensityCoverage,
    FeatureMoments,
    FeatureSet,
    FrechetDistance,
    ImageMetrics,
    InceptionScore,
    KernelDistance,
    Moments,
    PrecisionRecall,
)
from discrete_lit.metrics.extractors import FeatureExtractor


class ThreeParts(FeatureExtractor):
    """Random maps of pixels in the place of Inception's pooled features, spatial features and logits."""

    name, dim, protocol, weights_sha256 = "Three", 8, "none", "0" * 64

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        random = torch.Generator().manual_seed(0)
        for part, dim in self.dims.items():
            self.register_buffer(f"map_{part}", torch.randn(27, dim, generator=random))

    @property
    def dims(self) -> dict[str, int]:
        return {"pool": 8, "spatial": 5, "logits": 6}

    def extract(self, images: Tensor) -> Tensor:
        return self.extract_parts(images, ("pool",))["pool"]

    def extract_parts(self, images: Tensor, parts) -> dict[str, Tensor]:
        self.calls += 1
        return {part: images.flatten(1).float() / 128 @ self.get_buffer(f"map_{part}") for part in parts}


def pictures(count: int, seed: int, least: int = 0) -> Tensor:
    return torch.randint(least, 256, (count, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def adms_evaluation(samples: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """What `evaluator.py` of guided-diffusion computes from activations, in NumPy and SciPy."""

    def distance(first: np.ndarray, second: np.ndarray) -> float:
        means, covariances = zip(*((each.mean(0), np.cov(each, rowvar=False)) for each in (first, second)), strict=True)
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
        return float(((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real))

    def pairwise(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return ((first[:, None] - second[None]) ** 2).sum(2)

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.partition(pairwise(centres, centres), 3, axis=1)[:, 3]
        return float((pairwise(points, centres) <= radii).any(1).mean())

    exponentials = np.exp(samples["logits"])
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    scores = []
    for part in np.split(probabilities, 10):
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return {
        "fid": distance(samples["pool"], reference["pool"]),
        "sfid": distance(samples["spatial"], reference["spatial"]),
        "inception_score": float(np.mean(scores)),
        "precision": covered(samples["pool"], reference["pool"]),
        "recall": covered(reference["pool"], samples["pool"]),
    }


def test_adms_evaluation_is_recomputed_from_a_matrix_of_features() -> None:
    extractor, parts = ThreeParts(), ("pool", "spatial", "logits")
    samples, reference = pictures(200, 0, least=40), pictures(150, 1)
    features = {
        name: {part: values.double().numpy() for part, values in extractor.features(images, parts).items()}
        for name, images in (("samples", samples), ("reference", reference))
    }
    expected = adms_evaluation(features["samples"], features["reference"])
    moments = {}
    for part in ("pool", "spatial"):
        summed = FeatureMoments(extractor.space(part))
        summed.update(extractor.features(reference, (part,))[part])
        moments[part] = summed.compute()
    pooled = FeatureSet(extractor(reference), extractor="Three", weights_sha256="0" * 64)
    measures = ImageMetrics(
        extractor,
        {
            "fid": FrechetDistance(extractor, moments["pool"]),
            "sfid": FrechetDistance(extractor.space("spatial"), moments["spatial"]),
            "is": InceptionScore(extractor.space("logits"), 200),
            "pr": PrecisionRecall(extractor, pooled, dtype=torch.float32),
        },
    )
    before = extractor.calls
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    for index in order.split(64):
        measures.update(samples[index], indices=index)
    assert extractor.calls == before + 4, "one pass a batch"
    found = {name: float(value) for name, value in measures.compute().items()}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert 0 < expected["recall"] <= 1 < expected["inception_score"]
    measures.reset()
    with pytest.raises(ValueError, match="needs at least 2 samples"):
        measures.collections["pool"].get_submodule("fid").moments()  # type: ignore[operator]


class Generator(lightning.LightningModule):
    """A user's module, which measures what it makes."""

    def __init__(self, extractor: FeatureExtractor, reference: Moments, features: FeatureSet) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.fd = FrechetDistance(extractor, reference)
        made = {
            "kd": KernelDistance(extractor, features, subsets=3, subset_size=10),
            "dc": DensityCoverage(extractor, features),
        }
        self.measures = ImageMetrics(extractor, made)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch.float().mean((1, 2, 3))[:, None]).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.measures.update(batch)
        self.fd.update(self.measures.extractor(batch))
        self.log("validation/fd", self.fd)

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"validation/{name}": value for name, value in self.measures.compute().items()})
        self.measures.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_lightning_module_measures_and_its_checkpoint_does_not_grow(tmp_path: Path) -> None:
    extractor = TinyConvolution()
    images, real = pictures(40, 0), pictures(50, 1)
    moments = FeatureMoments(extractor)
    moments.update(extractor(real))
    features = FeatureSet(extractor(real))
    module = Generator(extractor, moments.compute(), features)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, *(DataLoader(list(images), batch_size=size) for size in (8, 16)))
    alone = FrechetDistance(extractor, moments.compute())
    alone.update(extractor(images))
    # The same number in the second epoch, in half-precision training, as alone in full precision.
    assert float(trainer.callback_metrics["validation/fd"]) == pytest.approx(float(alone.compute()), rel=1e-5)
    logged = {name.removeprefix("validation/") for name in trainer.callback_metrics}
    assert {"kernel_distance", "kernel_distance_std", "density", "coverage"} <= logged
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert set(saved) == {"layer.weight", "layer.bias"}
    assert {name for name, _ in module.named_parameters()} == {"layer.weight", "layer.bias"}


def test_float_images_are_measured_as_they_are_stored() -> None:
    images, extractor = pictures(20, 0), TinyConvolution()
    found = []
    for given in (images, images.float() / 127.5 - 1):
        measures = ImageMetrics(extractor, {"fd": FrechetDistance(extractor, moments_of(extractor, pictures(30, 1)))})
        measures.update(given)
        found.append(float(measures.compute()["fd"]))
    assert found[0] == found[1] > 0


def moments_of(extractor: FeatureExtractor, images: Tensor) -> Moments:
    moments = FeatureMoments(extractor)
    moments.update(extractor(images))
    return moments.compute()


def test_no_measure_and_a_part_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="metrics is empty"):
        ImageMetrics(Flatten(27), {})
    space = ThreeParts().space("logits")
    with pytest.raises(ValueError, match=r"Pixels gives \['pool'\], not 'logits'"):
        ImageMetrics(Flatten(27), {"is": InceptionScore(space, 20)})
