"""A feature extractor without weights."""

import torch
from torch import Tensor

from discrete_lit.metrics.extractors import FeatureExtractor


class ColourMeans(FeatureExtractor):
    """Mean and standard deviation of each colour."""

    name = "Means"
    dim = 6
    protocol = "none"
    weights_sha256 = "a" * 64

    def extract(self, images: Tensor) -> Tensor:
        values = images.double().flatten(2)
        return torch.cat((values.mean(2), values.std(2)), 1)
