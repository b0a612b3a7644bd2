"""Measuring samples: features, Fréchet distances, a judge of the intended class, reports."""

from discrete_lit.evaluation.efficientnet import EfficientNetLite0
from discrete_lit.evaluation.features import FeatureExtractor
from discrete_lit.evaluation.frechet import FrechetResult, compare, frechet_distance
from discrete_lit.evaluation.inception import InceptionV3
from discrete_lit.evaluation.moments import FeatureMoments, Moments

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
