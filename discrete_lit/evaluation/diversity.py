"""Do the samples of a class differ from each other?"""

import torch
from torch import Tensor


class ClassSpread:
    """Mean squared distance between two images of the same class, in feature space, gathered batch by batch in float64.

    For class c with n images x_i it is the mean over all pairs i ≠ j of |x_i - x_j|², which equals
    2 / (n - 1) * (sum |x_i|² - |sum x_i|² / n): no pair has to be formed.

    Args:
        num_classes: K.
        dim: D, width of the features.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        self.total = torch.zeros(num_classes, dim, dtype=torch.float64)
        self.squares = torch.zeros(num_classes, dtype=torch.float64)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add features `(B, D)` of images with labels `(B,)` in [0, K)."""
        features, labels = features.cpu().double(), labels.cpu()
        self.count.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        self.total.index_add_(0, labels, features)
        self.squares.index_add_(0, labels, features.square().sum(1))

    def compute(self) -> Tensor:
        """`(K,)` float64; NaN for a class with fewer than two images."""
        spread = 2 / (self.count - 1) * (self.squares - self.total.square().sum(1) / self.count)
        return torch.where(self.count > 1, spread.clamp(min=0), torch.nan)


def within_class_diversity(samples: ClassSpread, real: ClassSpread) -> Tensor:
    """`(K,)`: the spread of each class's samples as a share of the spread of its real images.

    1 is as varied as real images, 0 the same image every time. Noise also spreads: read it beside the Fréchet distance.
    NaN for a class with fewer than two images in either set.
    """
    return samples.compute() / real.compute()
