"""Precision and recall of samples, and their diversity within a class.

Precision and recall are the improved ones (Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing
Generative Models", NeurIPS 2019): `Manifold` is what a set of features covers, `precision_and_recall` compares two.
`ClassSpread` measures how far the images of a class lie apart, `within_class_diversity` compares that with real images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchmetrics import Metric

# Distances that are held at once: 256 MB.
_DISTANCES_AT_ONCE = 2**25


class Manifold:
    """The manifold of a set of features: a ball around each, up to its k-th nearest neighbour in the set (eq. 1).

    Distances are computed in float64: at equal features the error of float32 can exceed the radius of a ball.

    Args:
        features: `(n, D)`, n > k.
        neighbours: k, >= 1; 3 in the paper and in ADM's evaluator.
        device: where distances are computed, with float64; the CPU by default.

    Raises:
        ValueError: too few features, or k below 1.
    """

    def __init__(self, features: Tensor, neighbours: int = 3, *, device: torch.device | str = "cpu") -> None:
        if neighbours < 1 or len(features) <= neighbours:
            raise ValueError(
                f"neighbours must be at least 1 and below the number of features, got {neighbours} and {len(features)}"
            )
        self.features = features.to(device).double()
        self.neighbours = neighbours
        # A feature is its own nearest, at distance 0.
        radii = [distances.kthvalue(neighbours + 1, dim=1).values for distances in self._distances(self.features)]
        self.radii = torch.cat(radii)  # (n,)

    def fraction_covered(self, features: Tensor) -> float:
        """Compute the fraction of features `(m, D)` that lie in at least one ball, in [0, 1]."""
        features = features.to(self.features.device).double()
        covered = [(distances <= self.radii).any(dim=1) for distances in self._distances(features)]
        return float(torch.cat(covered).double().mean())

    def _distances(self, features: Tensor) -> Iterator[Tensor]:
        """Compute the distances of features `(m, D)` to this set's, in blocks `(b, n)`."""
        for rows in features.split(max(1, _DISTANCES_AT_ONCE // len(self.features))):
            yield torch.cdist(rows, self.features)


def precision_and_recall(samples: Tensor, reference: Manifold) -> tuple[float, float]:
    """Compute precision and recall of samples `(m, D)`, both in [0, 1] and with the reference's k (eq. 2).

    Precision is the fraction of the samples that the reference covers, recall the fraction of the reference that the
    samples cover.

    Raises:
        ValueError: not more samples than k.
    """
    covering = Manifold(samples, reference.neighbours, device=reference.features.device)
    return reference.fraction_covered(samples), covering.fraction_covered(reference.features)


class ClassSpread(Metric):
    """Measure the mean squared distance between two images of a class in feature space, over all batches and ranks.

    For class c with n images x_i it is the mean over all pairs i ≠ j of |x_i - x_j|², which equals
    2 / (n - 1) * (sum |x_i|² - |sum x_i|² / n): no pair has to be formed. The sums are float64 and lie on the CPU until
    `.to(device)`.

    Args:
        num_classes: K.
        dim: D, width of the features.
    """

    full_state_update = False
    count: Tensor
    """`(K,)`, images of each class so far."""
    total: Tensor
    squares: Tensor

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.add_state("count", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_classes, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add features `(B, D)` of images with labels `(B,)` in [0, K)."""
        features, labels = features.to(self.total.device).double(), labels.to(self.total.device)
        self.count.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self.total.index_add_(0, labels, features)
        self.squares.index_add_(0, labels, features.square().sum(1))

    def compute(self) -> Tensor:
        """The spread of each class, `(K,)` float64; NaN for a class with fewer than two images."""
        spread = 2 / (self.count - 1) * (self.squares - self.total.square().sum(1) / self.count)
        return torch.where(self.count > 1, spread.clamp(min=0), torch.nan)


def within_class_diversity(samples: ClassSpread, real: ClassSpread) -> Tensor:
    """Compute the spread of each class's samples as a ratio to that of its real images, `(K,)` float64.

    1 is as varied as real images, 0 the same image every time. Noise also spreads: read it beside the Fréchet distance.
    NaN for a class with fewer than two images in either set.
    """
    # torchmetrics makes a scalar of a single class.
    return (samples.compute() / real.compute()).reshape(-1)
