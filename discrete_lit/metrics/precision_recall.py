"""Precision and recall, density and coverage of samples, and their diversity within a class.

Precision and recall are the improved ones (Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing
Generative Models", NeurIPS 2019): `Manifold` is what a set of features covers, `precision_and_recall` compares two.
`density_and_coverage` counts in the same balls what a single outlier does not move (Naeem et al., "Reliable Fidelity
and Diversity Metrics for Generative Models", ICML 2020). `ClassSpread` measures how far the images of a class lie
apart, `within_class_diversity` compares that with real images. `PrecisionRecall`, `DensityCoverage` and
`WithinClassDiversity` are the metrics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from discrete_lit.metrics.binned_mean import SumsInFloat64
from discrete_lit.metrics.extractors import FeatureSource
from discrete_lit.metrics.feature_distances import ComparedFeatures
from discrete_lit.metrics.kept_features import FeatureSet

# Distances that are held at once: 256 MB.
_DISTANCES_AT_ONCE = 2**25
# Differences of features: 1 MB, so that they stay in a processor's cache.
_DIFFERENCES_AT_ONCE = 2**17


class Manifold:
    """The manifold of a set of features: a ball around each, up to its k-th nearest neighbour in the set (eq. 1).

    Distances come from matrix products in float64, which are fast but round: near the border of a ball, where rounding
    could decide, they are computed again from the differences. So the border belongs to its ball, as in eq. 1, and a
    ball of radius 0, around an image that is k + 1 times or more in the set, holds this image.

    Args:
        features: `(n, D)`, finite, n > k.
        neighbours: k, >= 1; 3 in the paper and in ADM's evaluator.
        squared_radii: of the balls, which the manifold of the same features had before, `(n,)` float64; computed by
            default.
        device: where distances are computed, with float64; the CPU by default.

    Raises:
        ValueError: too few features, values that are not finite, or k below 1; or other radii than these features can
            have.
    """

    def __init__(
        self,
        features: Tensor,
        neighbours: int = 3,
        *,
        squared_radii: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if neighbours < 1 or len(features) <= neighbours:
            raise ValueError(
                f"neighbours must be at least 1 and below the number of features, got {neighbours} and {len(features)}"
            )
        self.features = _finite(features.to(device).double())
        self.neighbours = neighbours
        # Distances do not change, but products round less the nearer the features lie to 0.
        self._middle = self.features.mean(0)
        self._centres, self._centre_of, repeats = self.features.unique(dim=0, return_inverse=True, return_counts=True)
        if squared_radii is not None:
            self._squared_radii = self._taken_radii(squared_radii.to(device))
            return
        # Of one image repeated, no more copies count than there are nearest neighbours.
        copies = self._centres.repeat_interleave(repeats.clamp(max=neighbours + 1), dim=0)
        radii = [self._squared_radii_of(rows, copies) for rows in _blocks(self._centres, copies)]
        self._squared_radii = torch.cat(radii)

    @property
    def radii(self) -> Tensor:
        """Radius of the ball of each feature, `(n,)`."""
        return self.squared_radii.sqrt()

    @property
    def squared_radii(self) -> Tensor:
        """Its square, which another manifold of these features takes."""
        return self._squared_radii[self._centre_of]

    def fraction_covered(self, features: Tensor) -> float:
        """Compute the fraction of features `(m, D)` that lie in at least one ball, in [0, 1].

        Raises:
            ValueError: values that are not finite.
        """
        features = _finite(features.to(self.features.device).double())
        points, repeats = features.unique(dim=0, return_counts=True)
        covered = [self._covers(rows).any(dim=1) for rows in _blocks(points, self._centres)]
        return float((torch.cat(covered) * repeats).sum()) / len(features)

    def ball_counts(self, features: Tensor) -> Tensor:
        """Count the features `(m, D)` that lie in the ball of each feature of the set, `(n,)` int64.

        Raises:
            ValueError: values that are not finite.
        """
        features = _finite(features.to(self.features.device).double())
        points, repeats = features.unique(dim=0, return_counts=True)
        counts = torch.zeros(len(self._centres), dtype=torch.float64, device=points.device)
        for rows, copies in zip(_blocks(points, self._centres), _blocks(repeats, self._centres), strict=True):
            counts += copies.double() @ self._covers(rows).double()
        return counts.long()[self._centre_of]

    def holds(self, rows: Tensor, squared_radii: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which balls of other features hold the features of the set, and which balls of the set hold the others.

        Args:
            rows: other features without repeats, `(b, D)` float64.
            squared_radii: of their balls, `(b,)`.

        Returns:
            Both bool `(b, n)`, over the n features of the set without their repeats.
        """
        squares, rounding = self._squared_distances(rows, self._centres)
        own, others = self._squared_radii, squared_radii[:, None]
        at_border = ((squares - own).abs() <= rounding).logical_or_((squares - others).abs() <= rounding)
        _refine(squares, rows, self._centres, at_border)
        return squares <= others, squares <= own

    def share_of(self, chosen: Tensor) -> float:
        """Give the fraction of the features, in [0, 1], that some of them are, chosen without their repeats."""
        return float(chosen[self._centre_of].double().mean())

    def _covers(self, rows: Tensor) -> Tensor:
        """Tell which balls, of the features without their repeats, hold each of some features: bool `(b, centres)`."""
        squares, rounding = self._squared_distances(rows, self._centres)
        _refine(squares, rows, self._centres, (squares - self._squared_radii).abs() <= rounding)
        return squares <= self._squared_radii

    def _taken_radii(self, squared: Tensor) -> Tensor:
        """Give radii of every feature to the features without their repeats."""
        shape, count = tuple(squared.shape), len(self.features)
        if (
            shape != (count,)
            or squared.dtype != torch.float64
            or not bool((squared >= 0).logical_and(squared < torch.inf).all())
        ):
            raise ValueError(
                f"the squared radii of {count:,} features are float64 ({count:,},) from 0, got {squared.dtype} {shape}"
            )
        own = squared.new_empty(len(self._centres)).index_copy_(0, self._centre_of, squared)
        if not torch.equal(own[self._centre_of], squared):
            raise ValueError("the radii are of other features: copies of one feature have several")
        return own

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
    for pairs in where.nonzero().split(max(1, _DIFFERENCES_AT_ONCE // first.shape[1])):
        row, column = pairs.unbind(1)
        differences = first.index_select(0, row) - second.index_select(0, column)
        squares[row, column] = differences.square_().sum(1)


def _finite(features: Tensor) -> Tensor:
    if not bool(features.isfinite().all()):
        raise ValueError("features that are not finite have no distances")
    return features


def precision_and_recall(samples: Tensor, reference: Manifold) -> tuple[float, float]:
    """Compute precision and recall of samples `(m, D)`, both in [0, 1] and with the reference's k (eq. 2).

    Precision is the fraction of the samples that the reference covers, recall the fraction of the reference that the
    samples cover. The distances between the two sets are computed once for both.

    Raises:
        ValueError: not more samples than k.
    """
    covering = Manifold(samples, reference.neighbours, device=reference.features.device)
    covered, covers = [], torch.zeros(len(reference._centres), dtype=torch.bool, device=covering.features.device)
    blocks = (_blocks(of_samples, reference._centres) for of_samples in (covering._centres, covering._squared_radii))
    for rows, radii in zip(*blocks, strict=True):
        of_rows, of_columns = reference.holds(rows, radii)
        covered.append(of_columns.any(dim=1))
        covers |= of_rows.any(dim=0)
    return covering.share_of(torch.cat(covered)), reference.share_of(covers)


def density_and_coverage(samples: Tensor, reference: Manifold) -> tuple[float, float]:
    """Compute density and coverage of samples `(m, D)`, with the reference's k (Naeem et al. 2020, eq. 4 and 5).

    Density is the mean over samples of the number of reference balls that hold one, over k: 1 where samples are as
    dense as the reference, and above it where they crowd at its dense places. Coverage is the fraction of the
    reference balls that hold a sample, in [0, 1]. The border belongs to its ball, as for precision; the authors' code
    leaves it out.

    Raises:
        ValueError: values that are not finite.
    """
    counts = reference.ball_counts(samples)
    density = float(counts.sum()) / (reference.neighbours * len(samples))
    return density, float((counts > 0).double().mean())


class PrecisionRecall(ComparedFeatures):
    """Measure precision and recall: `compute` gives them, `precision` and `recall`, float64 in [0, 1].

    Args:
        extractor: where the features come from; only read.
        reference: features of it; 10,000 of them in ADM's evaluator.
        neighbours: k, 3 in the paper and in ADM's evaluator.
        reference_name: what the reference is, for errors.
        dtype: in which features are kept.

    Raises:
        ValueError: what `ComparedFeatures` raises, k below 1, or not more than k images in either set.
    """

    def __init__(
        self,
        extractor: FeatureSource,
        reference: FeatureSet,
        *,
        neighbours: int = 3,
        reference_name: str = "reference",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(extractor, reference, reference_name=reference_name, dtype=dtype)
        if neighbours < 1:
            raise ValueError(f"neighbours={neighbours} must be at least 1")
        self.neighbours = neighbours
        self._manifold: Manifold | None = None

    def manifolds(self) -> tuple[Tensor, Manifold]:
        """Give the features of all ranks and the reference's manifold, which is computed once for a device."""
        samples, reference = self.both(self.neighbours + 1)
        if self._manifold is None or self._manifold.features.device != samples.device:
            self._manifold = Manifold(reference, self.neighbours, device=samples.device)
        return samples, self._manifold

    def compute(self) -> dict[str, Tensor]:
        return _named(("precision", "recall"), precision_and_recall(*self.manifolds()))


class DensityCoverage(PrecisionRecall):
    """Measure density and coverage: `compute` gives them, `density` at least 0 and `coverage` in [0, 1], float64.

    Args:
        extractor: where the features come from; only read.
        reference: features of it.
        neighbours: k, 5 in the paper.
        reference_name: what the reference is, for errors.
        dtype: in which features are kept.

    Raises:
        ValueError: what `PrecisionRecall` raises.
    """

    def __init__(
        self,
        extractor: FeatureSource,
        reference: FeatureSet,
        *,
        neighbours: int = 5,
        reference_name: str = "reference",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(extractor, reference, neighbours=neighbours, reference_name=reference_name, dtype=dtype)

    def compute(self) -> dict[str, Tensor]:
        return _named(("density", "coverage"), density_and_coverage(*self.manifolds()))


def _named(names: tuple[str, str], values: tuple[float, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in zip(names, values, strict=True)}


class ClassSpread(SumsInFloat64):
    """Measure the mean squared distance between two images of a class in feature space, over all batches and ranks.

    For class c with n images x_i it is the mean over all pairs i ≠ j of |x_i - x_j|², which equals
    2 / (n - 1) * (sum |x_i|² - |sum x_i|² / n): no pair has to be formed. The sums are float64 and lie on the CPU until
    `.to(device)`.

    Args:
        num_classes: K.
        dim: D, width of the features.
    """

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
        """The `spread` of each class, of all ranks."""
        return self.spread()

    def spread(self) -> Tensor:
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


class WithinClassDiversity(ClassSpread):
    """Measure the spread of the images of a class as a ratio to that of real images: `within_class_diversity`.

    `compute` gives the mean over the classes that have a ratio, float64, or the ratio of each.

    Args:
        extractor: where the features come from; only read.
        reference: `(K,)`, what `ClassSpread.compute` gave of real images.
        per_class: give `(K,)` float64, NaN for a class without a ratio, instead of the mean.

    Raises:
        ValueError: in `update`, labels that are missing or beyond K; in `compute`, no class with a ratio.
    """

    def __init__(self, extractor: FeatureSource, reference: Tensor, *, per_class: bool = False) -> None:
        reference = reference.double().reshape(-1)
        super().__init__(len(reference), extractor.dim)
        self.part = extractor.part
        self.reference = reference
        self.per_class = per_class

    def update(self, features: Tensor, labels: Tensor | None = None) -> None:
        """Add features `(B, D)` of images with labels `(B,)` in [0, K); images with label -1 are left out."""
        if labels is None:
            raise ValueError("the diversity within a class needs the labels of the images, which are missing")
        if len(labels) and int(labels.max()) >= len(self.reference):
            raise ValueError(f"label {int(labels.max())} is none of {len(self.reference)} classes")
        known = labels >= 0
        super().update(features[known.to(features.device)], labels[known])

    def compute(self) -> Tensor:
        reference = self.reference.to(self.total.device)
        ratios = torch.where(reference > 0, self.spread() / reference, torch.nan)
        if bool(ratios.isnan().all()):
            raise ValueError("no class has two images that differ in both sets: none has a diversity")
        return ratios if self.per_class else ratios.nanmean()
