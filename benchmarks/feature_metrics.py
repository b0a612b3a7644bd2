"""The Fréchet distance over 2,048 features beside torchmetrics' and SciPy's, and what measures add to an evaluation.

    OMP_NUM_THREADS=2 python benchmarks/feature_metrics.py
    OMP_NUM_THREADS=2 python benchmarks/feature_metrics.py --width 512 --rounds 3

First `compute` of `FrechetDistance` and of torchmetrics' `FrechetInceptionDistance`, both in float64 from the sums over
two sets of 5,000 features whose variances fall as 1/k, in turns; then the distance by SciPy's `sqrtm` of the same
moments, once. Then all three for a set of half as many images as features, at a quarter of the width.

Last, batches of 16 images of 224 pixels through EfficientNet-Lite0 and through Inception with random weights, at 256
pixels: what the updates of the Fréchet distance, KID, precision and recall, density and coverage and MIND together, and
with Inception sFID and the Inception Score, take beside the features that they are given.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from side_by_side.timing import alternate, milliseconds, ratio
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from discrete_lit.core.files import file_sha256
from discrete_lit.metrics import (
    DensityCoverage,
    EfficientNetLite0,
    FeatureMoments,
    FeatureSet,
    FeatureSpace,
    FrechetDistance,
    ImageMetrics,
    InceptionScore,
    InceptionV3,
    KernelDistance,
    Moments,
    PrecisionRecall,
    SlicedWasserstein,
)
from discrete_lit.metrics import extractors as extractor_file
from discrete_lit.metrics.extractors import FeatureExtractor, FeatureSource

SPEED_TARGET, ERROR_TARGET, ADDED_TARGET = 3.0, 1e-6, 0.05
BATCH = 16


def features(count: int, width: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    deviations = torch.arange(1, width + 1).rsqrt()
    return torch.randn(count, width, generator=random) * deviations * (1 + 0.1 * seed) + 0.3


def space(width: int) -> FeatureSpace:
    return FeatureSpace(name="random", dim=width, protocol="none", weights_sha256="0" * 64, metric_name="FD-random")


def ours(samples: Tensor, reference: Tensor) -> tuple[Callable[[], float], Moments, Moments]:
    summed = [FeatureMoments(space(samples.shape[1])) for _ in range(2)]
    for moments, given in zip(summed, (samples, reference), strict=True):
        moments.update(given)
    metric = FrechetDistance(space(samples.shape[1]), summed[1].compute())
    metric.update(samples)

    def compute() -> float:
        metric._computed = None  # it remembers
        return float(metric.compute())

    return compute, summed[0].compute(), summed[1].compute()


def of_torchmetrics(samples: Tensor, reference: Tensor) -> Callable[[], float]:
    """Compute their distance, with features given to it as if they were images."""
    network = nn.Identity()
    network.num_features = samples.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    for given, real in ((samples, False), (reference, True)):
        metric.update(given.double(), real=real)

    def compute() -> float:
        metric._computed = None
        return float(metric.compute())

    return compute


def of_scipy(first: Moments, second: Moments) -> float:
    root = np.real(np.asarray(scipy.linalg.sqrtm(first.covariance.numpy() @ second.covariance.numpy())))
    traces = np.trace(first.covariance.numpy() + second.covariance.numpy() - 2 * root)
    return float((first.mean - second.mean).square().sum()) + float(traces)


def measure_distance(width: int, rounds: int) -> None:
    samples, reference = features(5000, width, 0), features(5000, width, 1)
    compute, *moments = ours(samples, reference)
    arms = {"ours": compute, "torchmetrics": of_torchmetrics(samples, reference)}
    taken = alternate(arms, rounds, warmup=0)
    print(f"\nFréchet distance of {width:,} features, {torch.get_num_threads()} threads, {rounds} rounds")
    for name, times in taken.items():
        print(f"  {name:24s} {milliseconds(times)}")
    print(f"  torchmetrics / ours: {ratio(taken['torchmetrics'], taken['ours'], f'at least {SPEED_TARGET}')}")
    exact = of_scipy(*moments)
    error = abs(compute() - exact) / exact
    print(f"  ours {compute():.9f}, SciPy {exact:.9f}: relative difference {error:.1e}; target {ERROR_TARGET:.0e}")


def measure_few(width: int) -> None:
    """Compare the distances where there are half as many images as features."""
    few, reference = features(width // 2, width, 0), features(5000, width, 1)
    compute, *moments = ours(few, reference)
    theirs, exact = of_torchmetrics(few, reference)(), of_scipy(*moments)
    print(f"\n{width:,} features of {len(few):,} images")
    print(f"  ours {compute():.9f}, torchmetrics {theirs:.9f}, SciPy {exact:.9f}")


def random_inception(folder: str) -> InceptionV3:
    torch.manual_seed(0)
    path = Path(folder) / "inception.pth"
    torch.save(extractor_file._InceptionLayers().state_dict(), path)
    return InceptionV3(str(path), sha256=file_sha256(path))


def every_measure(extractor: FeatureExtractor) -> ImageMetrics:
    def moments(source: FeatureSource) -> Moments:
        dim = source.dim
        return Moments(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))

    kept = FeatureSet(torch.randn(100, extractor.dim))
    made: dict[str, FrechetDistance | KernelDistance | PrecisionRecall | SlicedWasserstein | InceptionScore] = {
        "fd": FrechetDistance(extractor, moments(extractor)),
        "kid": KernelDistance(extractor, kept),
        "pr": PrecisionRecall(extractor, kept),
        "dc": DensityCoverage(extractor, kept),
        "mind": SlicedWasserstein(extractor, kept),
    }
    if isinstance(extractor, InceptionV3):
        spatial = extractor.space("spatial")
        made |= {"sfid": FrechetDistance(spatial, moments(spatial))}
        made |= {"is": InceptionScore(extractor.space("logits"), 10**7)}
    return ImageMetrics(extractor, made)


def measure_added(extractor: FeatureExtractor, size: int, rounds: int) -> None:
    images = torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8)
    measures = every_measure(extractor)
    parts = tuple(measures.collections)
    given = extractor.features(images, parts)

    def update() -> None:
        for part, collection in measures.collections.items():
            collection.update(given[part])

    for _ in range(2):  # the second finds which measures share what they keep
        update()
    taken = alternate({"features": lambda: extractor.features(images, parts), "measures": update}, rounds)
    print(
        f"\n{BATCH} images of {size} pixels through {extractor.name}, "
        f"{torch.get_num_threads()} threads, {rounds} rounds"
    )
    for name, times in taken.items():
        print(f"  {name:24s} {milliseconds(times)}")
    print(f"  measures / features: {ratio(taken['measures'], taken['features'], f'at most {ADDED_TARGET}')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="of the features")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    measure_distance(options.width, options.rounds)
    measure_few(options.width // 4)
    measure_added(EfficientNetLite0(), 224, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        measure_added(random_inception(folder), 256, options.rounds)


if __name__ == "__main__":
    main()
