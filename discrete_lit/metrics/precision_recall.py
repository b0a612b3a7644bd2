"""Improved precision and recall (Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative
Models", NeurIPS 2019).

Do the samples of a class differ from each other?
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Distances that are held at once: 256 MB.
_DISTANCES_AT_ONCE = 2**25


class Manifold:
    """What a set of features covers: a ball around each that reaches to its k-th nearest neighbour in the set (eq. 1).

    Distances are computed in float64: at equal features the error of float32 can exceed the radius of a ball.

    Args:
        features: `(n, D)`, n > k.
        neighbours: k, >= 1; 3 in the paper and in ADM's evaluator.
        device: where distances are computed, with float64; the CPU by default.

    Raises:
        ValueError: too few features, or k below 1.
    """

    def __init__(self, features: Tensor, neighbours: int = 3, device: torch.device | str = "cpu") -> None:
        if neighbours < 1 or len(features) <= neighbours:
            raise ValueError(
                f"neighbours must be at least 1 and below the number of features, got {neighbours} and {len(features)}"
            )
        self.features = features.to(device).double()
        self.neighbours = neighbours
        # A feature is its own nearest, at distance 0.
        radii = [distances.kthvalue(neighbours + 1, dim=1).values for distances in self._distances(self.features)]
        self.radii = torch.cat(radii)  # (n,)

    def share_covered(self, features: Tensor) -> float:
        """The share of features `(m, D)` that lie in at least one ball, in [0, 1] (eq. 2)."""
        features = features.to(self.features.device).double()
        covered = [(distances <= self.radii).any(dim=1) for distances in self._distances(features)]
        return float(torch.cat(covered).double().mean())

    def _distances(self, features: Tensor) -> Iterator[Tensor]:
        """Blocks `(b, n)` of the distances of features `(m, D)` to this set's."""
        for rows in features.split(max(1, _DISTANCES_AT_ONCE // len(self.features))):
            yield torch.cdist(rows, self.features)


def precision_and_recall(samples: Tensor, reference: Manifold) -> tuple[float, float]:
    """Precision, the share of samples `(m, D)` that the reference covers, and recall, the share of the reference that
    the samples cover, both in [0, 1] and with the reference's k.

    Raises:
        ValueError: not more samples than k.
    """
    covering = Manifold(samples, reference.neighbours, reference.features.device)
    return reference.share_covered(samples), covering.share_covered(reference.features)


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
