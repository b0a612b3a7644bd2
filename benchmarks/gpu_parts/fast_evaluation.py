"""How fast an evaluation goes: Inception's features, and the Fréchet distance over 2,048 of them."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from side_by_side.timing import repeated
from torch import Tensor, nn

from discrete_lit.backbones.execution import count_flops
from discrete_lit.core.files import file_sha256
from discrete_lit.metrics.extractors import InceptionV3
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.metrics.moments import Moments
from gpu_parts.part import Measurement, Setting, part
from gpu_parts.speed import measurement

# Seconds that the distance of others, or on the CPU, may take: decompositions of matrices of 2,048 rows.
OTHERS_NEED = 5.0


@part("evaluation", kind="fast", seconds=12, what="Inception's features a second; the distance of 2,048 features")
def evaluation(setting: Setting) -> Iterator[Measurement]:
    yield from features(setting)
    yield from distance(setting)


def features(setting: Setting) -> Iterator[Measurement]:
    """Measure the extractor in float32 without TF32, as every distance is computed."""
    extractor = random_inception(setting.output).to(setting.device)
    batch, size = (1, 32) if setting.tiny else (128, 256)
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=setting.device)
    flops = count_flops(extractor, lambda network: partial(network.extract, torch.zeros_like(images)))
    taken = repeated(lambda: extractor(images), repeats=1 if setting.tiny else 5, warmup=1 if setting.tiny else 2)
    yield measurement(
        setting,
        "Inception's features",
        f"batch {batch}, {size} pixels, float32",
        taken,
        amount=batch,
        unit="images/s",
        least=flops / setting.machine.rate(torch.float32),
        least_of="its convolutions at the measured float32 rate, TF32 off",
        note="torch-fidelity's network with random weights",
    )


def random_inception(folder: Path) -> InceptionV3:
    """Build the extractor with random weights, which are written to a file for it to read."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    torch.manual_seed(0)
    path = folder / "inception.pth"
    with (
        patch.object(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None),
        patch.object(fidelity.torch, "load", lambda *_, **__: {}),
    ):
        network: nn.Module = fidelity.FeatureExtractorInceptionV3(
            "random", ["2048"], feature_extractor_weights_path=str(path)
        )
    torch.save(network.state_dict(), path)
    return InceptionV3(str(path), sha256=file_sha256(path))


def distance(setting: Setting) -> Iterator[Measurement]:
    """Measure the distance on the device, as torchmetrics computes it there, and on the CPU, in float64."""
    width, count = (16, 64) if setting.tiny else (2048, 10_000)
    case = f"{width:,} features, float64"
    sets = [torch.randn(count, width, device=setting.device) for _ in range(2)]
    on_device = [moments_of(features) for features in sets]
    here = repeated(lambda: frechet_distance(*on_device), repeats=2)
    yield measurement(setting, "Fréchet distance, on the device", case, here)
    if setting.seconds_left() > OTHERS_NEED:
        theirs = repeated(of_torchmetrics(sets, setting.device), repeats=1, warmup=0)
        ours = ("frechet_distance on the device", here.median)
        yield measurement(setting, "Fréchet distance, torchmetrics' compute on the device", case, theirs, peer=ours)
    if setting.device.type == "cuda" and setting.seconds_left() > OTHERS_NEED:
        on_cpu = [Moments(each.mean.cpu(), each.covariance.cpu(), count=each.count) for each in on_device]
        there = repeated(lambda: frechet_distance(*on_cpu), repeats=1, warmup=0)
        yield measurement(setting, "Fréchet distance, on the CPU", case, there)


def moments_of(features: Tensor) -> Moments:
    """Mean and covariance of features `(n, D)`, in float64, where they lie."""
    features = features.double()
    return Moments(features.mean(dim=0), features.T.cov(), count=len(features))


def of_torchmetrics(sets: list[Tensor], device: torch.device) -> Callable[[], float]:
    """torchmetrics' distance between two sets of features, which are given to it as if they were images."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = nn.Identity()
    network.num_features = sets[0].shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=network).to(device)
    for features, real in zip(sets, (True, False), strict=True):
        metric.update(features, real=real)

    def compute() -> float:
        metric._computed = None  # it remembers
        return float(metric.compute())

    return compute
