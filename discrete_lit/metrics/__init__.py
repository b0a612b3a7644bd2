"""Streaming measures of images, features and ids: they know no model, and every running sum is a `torchmetrics.Metric`.

FID and its kin are in `frechet` and `extractors`, precision, recall and diversity in `precision_recall`, PSNR, SSIM and
rates in `reconstruction`, usage and perplexity of ids in `codebook_usage`, curves over time or position in
`binned_mean`. The names below are imported when they are asked for: torchmetrics takes seconds, which
`discrete-lit evaluate --help` does not wait for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from discrete_lit.metrics.extractors import EfficientNetLite0, FeatureExtractor, InceptionV3
    from discrete_lit.metrics.frechet import FeatureMoments, FrechetResult, Moments, compare, frechet_distance

__all__ = [
    "EfficientNetLite0",
    "FeatureExtractor",
    "FeatureMoments",
    "FrechetResult",
    "InceptionV3",
    "Moments",
    "compare",
    "frechet_distance",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'discrete_lit.metrics' has no attribute {name!r}")
    file = "extractors" if name in ("EfficientNetLite0", "FeatureExtractor", "InceptionV3") else "frechet"
    return getattr(import_module(f"discrete_lit.metrics.{file}"), name)
