"""Measures of images and ids: features, Fréchet distance, precision and recall. They know no model."""

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
