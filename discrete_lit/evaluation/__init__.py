"""Evaluation of samples and checkpoints: sets of images, their statistics, likelihoods, reports."""

from discrete_lit.metrics import EfficientNetLite0, InceptionV3

__all__ = ["EfficientNetLite0", "InceptionV3"]
