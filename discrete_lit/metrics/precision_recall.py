"""Precision and recall of samples, and their diversity within a class.

Precision and recall are the improved ones (Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing
Generative Models", NeurIPS 2019): `Manifold` is what a set of features covers, `precision_and_recall` compares two.
`ClassSpread` measures how far the images of a class lie apart, `within_class_diversity` compares that with real images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

# Distances that are held at once: 256 MB.
_DISTANCES_AT_ONCE = 2**25


class Manifold:
    """The manifold of a set of features: a ball around each, up to its k-th nearest neighbour in the set (eq. 1).

    Distances come from matrix products in float64, which are fast but round: near the border of a ball, where rounding
    could decide, they are computed again from the differences. So the border belongs to its ball, as in eq. 1, and a
    ball of radius 0, around an image that is k + 1 times or more in the set, holds this image.

    Args:
        features: `(n, D)`, finite, n > k.
        neighbours: k, >= 1; 3 in the paper and in ADM's evaluator.
        device: where distances are computed, with float64; the CPU by default.

    Raises:
        ValueError: too few features, values that are not finite, or k below 1.
    """

    def __init__(self, features: Tensor, neighbours: int = 3, *, device: torch.device | str = "cpu") -> None:
        if neighbours < 1 or len(features) <= neighbours:
            raise ValueError(
                f"neighbours must be at least 1 and below the number of features, got {neighbours} and {len(features)}"
            )
        self.features = _finite(features.to(device).double())
        self.neighbours = neighbours
        # Distances do not change, but products round less the nearer the features lie to 0.
        self._middle = self.features.mean(0)
        self._centres, self._centre_of, repeats = self.features.unique(dim=0, return_inverse=True, return_counts=True)
        # Of one image repeated, no more copies count than there are nearest neighbours.
        copies = self._centres.repeat_interleave(repeats.clamp(max=neighbours + 1), dim=0)
        radii = [self._squared_radii_of(rows, copies) for rows in _blocks(self._centres, copies)]
        self._squared_radii = torch.cat(radii)

    @property
    def radii(self) -> Tensor:
        """Radius of the ball of each feature, `(n,)`."""
        return self._squared_radii.sqrt()[self._centre_of]

    def fraction_covered(self, features: Tensor) -> float:
        """Compute the fraction of features `(m, D)` that lie in at least one ball, in [0, 1].

        Raises:
            ValueError: values that are not finite.
        """
        features = _finite(features.to(self.features.device).double())
        points, repeats = features.unique(dim=0, return_counts=True)
        covered = []
        for rows in _blocks(points, self._centres):
            squares, rounding = self._squared_distances(rows, self._centres)
            _refine(squares, rows, self._centres, (squares - self._squared_radii).abs() <= rounding)
            covered.append((squares <= self._squared_radii).any(dim=1))
        return float((torch.cat(covered) * repeats).sum()) / len(features)

    def _squared_radii_of(self, rows: Tensor, copies: Tensor) -> Tensor:
        squares, rounding = self._squared_distances(rows, copies)
        # A feature is its own nearest, at distance 0.
        nearest = squares.kthvalue(self.neighbours + 1, dim=1, keepdim=True).values
        # Whatever is among the nearest by exact distances lies within two roundings of them.
        _refine(squares, rows, copies, squares <= nearest + 2 * rounding)
        return squares.kthvalue(self.neighbours + 1, dim=1).values

    def _squared_distances(self, first: Tensor, second: Tensor) -> tuple[Tensor, float]:
        """Compute squared distances of features `(b, D)` and `(n, D)`, `(b, n)`, and the most that they may be off."""
        # That is of sums of D products, and of the subtraction of the middle before them.
        largest = max(float(features.square().sum(1).max()) for features in (first, second))
        rounding = 8 * (first.shape[1] + 8) * torch.finfo(torch.float64).eps * largest
        first, second = first - self._middle, second - self._middle
        squares = first.square().sum(1)[:, None] + second.square().sum(1)
        return squares.addmm_(first, second.T, alpha=-2), rounding


def _blocks(rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, _DISTANCES_AT_ONCE // len(columns)))


def _refine(squares: Tensor, first: Tensor, second: Tensor, where: Tensor) -> None:
    """Replace squared distances of features `(b, D)` and `(n, D)`, where asked, by those of their differences."""
    for pairs in where.nonzero().split(max(1, _DISTANCES_AT_ONCE // 8 // first.shape[1])):
        row, column = pairs.unbind(1)
        squares[row, column] = (first[row] - second[column]).square().sum(1)


def _finite(features: Tensor) -> Tensor:
    if not bool(features.isfinite().all()):
        raise ValueError("features that are not finite have no distances")
    return features


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
        """The spread of each class, `(K,)` float64; NaN for a class with fewer than two images.

        A difference that is within the rounding of its two terms is 0: one image repeated has no spread.
        """
        centre = self.total.square().sum(1) / self.count
        difference = self.squares - centre
        rounding = 4 * torch.finfo(torch.float64).eps * self.count.sqrt() * self.squares
        spread = 2 / (self.count - 1) * torch.where(difference > rounding, difference, 0.0)
        return torch.where(self.count > 1, spread, torch.nan)


def within_class_diversity(samples: ClassSpread, real: ClassSpread) -> Tensor:
    """Compute the spread of each class's samples as a ratio to that of its real images, `(K,)` float64.

    1 is as varied as real images, 0 the same image every time. Noise also spreads: read it beside the Fréchet distance.
    NaN for a class with fewer than two images in either set, or whose real images do not differ at all.
    """
    spread = real.compute()
    # torchmetrics makes a scalar of a single class.
    return torch.where(spread > 0, samples.compute() / spread, torch.nan).reshape(-1)
