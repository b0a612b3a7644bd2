"""Streaming measures of images, features and ids: they know no model, and every running sum is a `torchmetrics.Metric`.

`extractors` has the networks whose features are measured, `image_metrics` runs one for several measures at once. FID
and its kin are in `frechet`, of the `moments` of features; KID, CMMD, MIND and the distance of each class in
`feature_distances`, over the features that `kept_features` keeps; precision, recall, density, coverage and diversity in
`precision_recall`; the Inception Score and the accuracy of labels in `classifier_scores`; the nearest training image in
`nearest_training`; PSNR, SSIM and rates in `reconstruction`, of clips in `video`, of waveforms in `spectral`; usage of
ids in `codebook_usage`; curves over time or position in `binned_mean`. The names below are imported when they are asked
for: torchmetrics takes seconds, which `discrete-lit evaluate --help` does not wait for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from discrete_lit.metrics.classifier_scores import ClassAccuracy, InceptionScore
    from discrete_lit.metrics.extractors import (
        DINOv2,
        EfficientNetLite0,
        FeatureExtractor,
        FeatureSpace,
        InceptionV3,
        TimmExtractor,
    )
    from discrete_lit.metrics.feature_distances import (
        ClassFrechetDistance,
        GaussianDistance,
        KernelDistance,
        SlicedWasserstein,
    )
    from discrete_lit.metrics.frechet import FrechetDistance, FrechetRatio, FrechetResult, compare, frechet_distance
    from discrete_lit.metrics.image_metrics import ImageMetrics
    from discrete_lit.metrics.kept_features import FeatureSet, KeptFeatures
    from discrete_lit.metrics.moments import FeatureMoments, Moments
    from discrete_lit.metrics.nearest_training import NearestTraining
    from discrete_lit.metrics.precision_recall import DensityCoverage, PrecisionRecall, WithinClassDiversity
    from discrete_lit.metrics.video import ClipFeatures, VideoFidelity

__all__ = [
    "ClassAccuracy",
    "ClassFrechetDistance",
    "ClipFeatures",
    "DINOv2",
    "DensityCoverage",
    "EfficientNetLite0",
    "FeatureExtractor",
    "FeatureMoments",
    "FeatureSet",
    "FeatureSpace",
    "FrechetDistance",
    "FrechetRatio",
    "FrechetResult",
    "GaussianDistance",
    "ImageMetrics",
    "InceptionScore",
    "InceptionV3",
    "KeptFeatures",
    "KernelDistance",
    "Moments",
    "NearestTraining",
    "PrecisionRecall",
    "SlicedWasserstein",
    "TimmExtractor",
    "VideoFidelity",
    "WithinClassDiversity",
    "compare",
    "frechet_distance",
]

_FILES = {
    "classifier_scores": ("ClassAccuracy", "InceptionScore"),
    "extractors": ("DINOv2", "EfficientNetLite0", "FeatureExtractor", "FeatureSpace", "InceptionV3", "TimmExtractor"),
    "feature_distances": ("ClassFrechetDistance", "GaussianDistance", "KernelDistance", "SlicedWasserstein"),
    "image_metrics": ("ImageMetrics",),
    "kept_features": ("FeatureSet", "KeptFeatures"),
    "moments": ("FeatureMoments", "Moments"),
    "nearest_training": ("NearestTraining",),
    "precision_recall": ("DensityCoverage", "PrecisionRecall", "WithinClassDiversity"),
    "video": ("ClipFeatures", "VideoFidelity"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'discrete_lit.metrics' has no attribute {name!r}")
    return getattr(import_module(f"discrete_lit.metrics.{_FILE_OF.get(name, 'frechet')}"), name)
