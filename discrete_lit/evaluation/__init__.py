"""Evaluation of samples and checkpoints: sets of images, their features, likelihoods, reports.

The two extractors can be named here in a configuration; what they are stands in `discrete_lit.metrics.extractors`.
"""

from discrete_lit.metrics import EfficientNetLite0, InceptionV3

__all__ = ["EfficientNetLite0", "InceptionV3"]
