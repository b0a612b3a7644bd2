"""Evaluation of samples and checkpoints: sets of images, their features, likelihoods, reports.

The two extractors can be named here in a configuration, and one of your own is a `FeatureExtractor`; what they are
stands in `discrete_lit.metrics.extractors`.
"""

from discrete_lit.metrics import EfficientNetLite0, FeatureExtractor, InceptionV3

__all__ = ["EfficientNetLite0", "FeatureExtractor", "InceptionV3"]
