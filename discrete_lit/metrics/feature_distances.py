"""Distances between two sets of kept features: KID, CMMD, MIND, and the Fréchet distance of each class.

Each is a function of two matrices of features and a metric around it, whose reference is a `FeatureSet`:

    kid = KernelDistance(extractor, FeatureSet.load("reference_features.npz", extractor))
    kid.update(extractor(to_uint8(images)))
    kid.compute()["kernel_distance"]

All are computed in float64, from features that are kept in float16 unless `dtype` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from discrete_lit.metrics.extractors import FeatureSource
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.metrics.kept_features import NO_LABEL, FeatureSet, KeptFeatures, finite
from discrete_lit.metrics.moments import Moments, check_reference

# Kernel values that are held at once: 128 MB.
_VALUES_AT_ONCE = 2**24
KID_SEED = MIND_SEED = 2020
"""The seed of torch-fidelity, whose draws these are."""


def polynomial_mmd(samples: Tensor, reference: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy of KID, without bias, from all pairs (Bińkowski et al. 2018).

    The kernel is (x·y / D + 1)³, and the estimate eq. 4 of the paper with sets of any two sizes: a feature is not
    compared with itself. It may be below 0.

    Args:
        samples: `(n, D)`, n >= 2.
        reference: `(m, D)`, m >= 2.
    """
    dim = samples.shape[1]

    def kernel(products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (products / dim + 1).pow_(3)

    count, others = len(samples), len(reference)
    within = _kernel_sum(samples, samples, kernel) - float((samples.square().sum(1) / dim + 1).pow(3).sum())
    between = _kernel_sum(samples, reference, kernel)
    among = _kernel_sum(reference, reference, kernel) - float((reference.square().sum(1) / dim + 1).pow(3).sum())
    return within / (count * (count - 1)) + among / (others * (others - 1)) - 2 * between / (count * others)


def gaussian_mmd(samples: Tensor, reference: Tensor, *, bandwidth: float = 10.0) -> float:
    """Estimate the squared maximum mean discrepancy with the kernel exp(-|x - y|² / 2σ²), from all pairs.

    As in CMMD's code it is the estimate of least variance, biased, in which a feature is compared with itself too
    (Gretton et al. 2012, eq. 5); never below 0 but for rounding.

    Args:
        samples: `(n, D)`.
        reference: `(m, D)`.
        bandwidth: σ.
    """

    def kernel(products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        squares = rows.square().sum(1)[:, None] + columns.square().sum(1) - 2 * products
        return squares.clamp_(min=0).mul_(-0.5 / bandwidth**2).exp_()

    within, among = (_kernel_sum(each, each, kernel) / len(each) ** 2 for each in (samples, reference))
    return within + among - 2 * _kernel_sum(samples, reference, kernel) / (len(samples) * len(reference))


def _kernel_sum(first: Tensor, second: Tensor, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
    """Sum a kernel over all pairs of rows, a block of them at a time."""
    blocks = first.split(max(1, _VALUES_AT_ONCE // len(second)))
    return sum(float(kernel(rows @ second.T, rows, second).sum()) for rows in blocks)


def sliced_wasserstein(
    samples: Tensor, reference: Tensor, *, projections: int = 1000, most: int = 5000, seed: int = MIND_SEED
) -> float:
    """Compute MIND: the squared sliced Wasserstein-2 distance, times three times the width (Berthet et al. 2026).

        3 D · mean over u of mean over j of (sort(X u)_j - sort(Y u)_j)²,   u uniform on the unit sphere

    Subsets and directions are drawn as by torch-fidelity, whose sizes are equal too.

    Args:
        samples: `(n, D)`.
        reference: `(m, D)`; of the larger set, a random subset is taken.
        projections: directions u.
        most: features of each set at most; the authors find 5,000 enough.
        seed: of subsets and directions.
    """
    random = torch.Generator().manual_seed(seed)
    count, dim = min(len(samples), len(reference), most), samples.shape[1]
    samples, reference = (
        each if len(each) == count else each[torch.randperm(len(each), generator=random)[:count].to(each.device)]
        for each in (samples, reference)
    )
    directions = torch.randn(projections, dim, generator=random).to(samples)
    directions = directions / directions.norm(dim=1, keepdim=True)
    total = 0.0
    for part in directions.split(max(1, _VALUES_AT_ONCE // count)):
        difference = (samples @ part.T).sort(dim=0).values - (reference @ part.T).sort(dim=0).values
        total += float(difference.square().sum())
    return 3 * dim * total / (count * projections)


def frechet_distance_of_features(samples: Tensor, reference: Tensor) -> float:
    """Compute the squared Fréchet distance between two sets of features, fast where they are few.

    With A and B the sets, less their means and over the root of their counts less one, S1 = A'A, S2 = B'B, and
    tr (S1 S2)^1/2 is the sum of the singular values of A B', a matrix of the sets' sizes, whatever the width.

    Args:
        samples: `(n, D)` float64, n >= 2.
        reference: `(m, D)` float64, m >= 2.
    """
    if min(len(samples), len(reference)) > samples.shape[1]:
        first, second = (
            Moments(each.mean(0).cpu(), torch.cov(each.T).cpu().reshape(each.shape[1], -1), count=len(each))
            for each in (samples, reference)
        )
        return frechet_distance(first, second)
    scaled = [(each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (samples, reference)]
    cross = torch.linalg.svdvals(scaled[0] @ scaled[1].T).sum()
    difference = samples.mean(0) - reference.mean(0)
    distance = difference @ difference + scaled[0].square().sum() + scaled[1].square().sum() - 2 * cross
    return max(0.0, float(distance))


class ComparedFeatures(KeptFeatures):
    """Keep features, and the reference that they are compared with, which is never gathered nor saved.

    Args:
        extractor: where the features come from; only read.
        reference: features of it.
        reference_name: what the reference is, for errors.
        dtype: in which features are kept.

    Raises:
        ValueError: a reference of another extractor or width, or one that is not finite.
    """

    def __init__(
        self,
        extractor: FeatureSource,
        reference: FeatureSet,
        *,
        reference_name: str = "reference",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(extractor, dtype=dtype)
        check_reference(extractor, reference, reference_name)
        finite(reference.features, f"reference {reference_name!r}")
        self.reference = reference
        self.is_original = extractor.metric_name == "FID"

    def both(self, least: int = 2) -> tuple[Tensor, Tensor]:
        """Give the features of all ranks and the reference's, both float64 on the device of the metric.

        Raises:
            ValueError: fewer than `least` features in either.
        """
        samples, reference = self.kept().features, self.reference.features
        for what, features in (("samples", samples), ("the reference", reference)):
            if len(features) < least:
                raise ValueError(f"{type(self).__name__} needs at least {least:,} images, {what} are {len(features):,}")
        return samples.double(), reference.to(self.device).double()


class KernelDistance(ComparedFeatures):
    """Measure the kernel distance: KID over Inception's features (Bińkowski et al. 2018).

    `compute` gives `kernel_distance`, the mean of `polynomial_mmd` over random subsets, and `kernel_distance_std`, the
    standard deviation over them (divided by their number). Subsets are drawn as by torch-fidelity. Unbiased: the
    halves of one set are at 0 within their spread, and values at different counts can be compared.

    Args:
        extractor: where the features come from; only read.
        reference: features of it.
        subsets: their number.
        subset_size: of each; None takes all features of both sets once, with a deviation of 0.
        seed: of the draws.
        reference_name: what the reference is, for errors.
        dtype: in which features are kept.

    Raises:
        ValueError: no subset, a size below 2, or what `ComparedFeatures` raises. In `compute`: fewer images than the
            size.
    """

    def __init__(
        self,
        extractor: FeatureSource,
        reference: FeatureSet,
        *,
        subsets: int = 100,
        subset_size: int | None = 1000,
        seed: int = KID_SEED,
        reference_name: str = "reference",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(extractor, reference, reference_name=reference_name, dtype=dtype)
        if subsets < 1 or (subset_size is not None and subset_size < 2):
            raise ValueError(f"subsets={subsets} must be at least 1, subset_size={subset_size} at least 2")
        self.metric_name = "KID" if self.is_original else f"KD-{extractor.name}"
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def compute(self) -> dict[str, Tensor]:
        samples, reference = self.both(self.subset_size or 2)
        if self.subset_size is None:
            values = [polynomial_mmd(samples, reference)]
        else:
            random = np.random.RandomState(self.seed)
            values = [
                polynomial_mmd(*(self._subset(each, random) for each in (samples, reference)))
                for _ in range(self.subsets)
            ]
        found = torch.tensor(values, dtype=torch.float64)
        return {"kernel_distance": found.mean(), "kernel_distance_std": found.std(correction=0)}

    def _subset(self, features: Tensor, random: np.random.RandomState) -> Tensor:
        chosen = random.choice(len(features), self.subset_size, replace=False)
        return features[torch.from_numpy(chosen).to(features.device)]


class GaussianDistance(ComparedFeatures):
    """Measure CMMD over CLIP's features: 1000 times `gaussian_mmd` of unit vectors (Jayasumana et al. 2024).

    Comparable with the paper over `TimmExtractor("vit_large_patch14_clip_quickgelu_336.openai", ..., output="head")`,
    which resizes in PyTorch where the paper does in TensorFlow.

    Args:
        extractor: where the features come from; only read.
        reference: features of it.
        bandwidth: σ.
        scale: of the result; the paper's makes it readable.
        normalize: divide each feature by its norm, as the paper's code does where it embeds images.
        reference_name: what the reference is, for errors.
        dtype: in which features are kept.

    Raises:
        ValueError: what `ComparedFeatures` raises, a bandwidth that is not above 0; in `compute`, fewer than 2 images.
    """

    def __init__(
        self,
        extractor: FeatureSource,
        reference: FeatureSet,
        *,
        bandwidth: float = 10.0,
        scale: float = 1000.0,
        normalize: bool = True,
        reference_name: str = "reference",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(extractor, reference, reference_name=reference_name, dtype=dtype)
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth} must be above 0")
        self.metric_name = f"CMMD-{extractor.name}"
        self.bandwidth, self.scale, self.normalize = bandwidth, scale, normalize

    def compute(self) -> Tensor:
        samples, reference = self.both()
        if self.normalize:
            samples, reference = (each / each.norm(dim=1, keepdim=True) for each in (samples, reference))
        found = self.scale * gaussian_mmd(samples, reference, bandwidth=self.bandwidth)
        return torch.tensor(found, dtype=torch.float64)


class SlicedWasserstein(ComparedFeatures):
    """Measure MIND over Inception's features: `sliced_wasserstein` (Berthet et al. 2026, arXiv:2605.06797).

    Args:
        extractor: where the features come from; only read.
        reference: features of it.
        projections: directions.
        most: features of each set at most.
        seed: of subsets and directions.
        reference_name: what the reference is, for errors.
        dtype: in which features are kept.

    Raises:
        ValueError: no projection, or what `ComparedFeatures` raises, or in `compute` fewer than 2 images.
    """

    def __init__(
        self,
        extractor: FeatureSource,
        reference: FeatureSet,
        *,
        projections: int = 1000,
        most: int = 5000,
        seed: int = MIND_SEED,
        reference_name: str = "reference",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(extractor, reference, reference_name=reference_name, dtype=dtype)
        if projections < 1 or most < 2:
            raise ValueError(f"projections={projections} must be at least 1, most={most} at least 2")
        self.metric_name = "MIND" if self.is_original else f"MIND-{extractor.name}"
        self.projections, self.most, self.seed = projections, most, seed

    def compute(self) -> Tensor:
        samples, reference = self.both()
        found = sliced_wasserstein(samples, reference, projections=self.projections, most=self.most, seed=self.seed)
        return torch.tensor(found, dtype=torch.float64)


class ClassFrechetDistance(ComparedFeatures):
    """Measure the Fréchet distance of each class to the same class of the reference.

    Of few images it is biased upwards, as any: compare it at equal counts only. `compute` gives the mean over the
    classes that have two images or more in both sets, or the distance of each.

    Args:
        extractor: where the features come from; only read.
        reference: features of it, with labels.
        num_classes: K; one more than the largest label of the reference by default.
        per_class: give `(K,)` float64, NaN for a class without a distance, instead of the mean.
        reference_name: what the reference is, for errors.
        dtype: in which features are kept.

    Raises:
        ValueError: a reference without labels, or what `ComparedFeatures` raises; labels missing in `update`; in
            `compute`, a label beyond K or no class with two images in both sets.
    """

    def __init__(
        self,
        extractor: FeatureSource,
        reference: FeatureSet,
        *,
        num_classes: int | None = None,
        per_class: bool = False,
        reference_name: str = "reference",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(extractor, reference, reference_name=reference_name, dtype=dtype)
        if reference.labels is None or not bool((reference.labels != NO_LABEL).any()):
            raise ValueError(f"reference {reference_name!r} has no labels, which a distance of each class needs")
        self.reference_labels = reference.labels
        self.num_classes = num_classes or int(reference.labels.max()) + 1
        self.metric_name = f"class-{extractor.metric_name}"
        self.per_class = per_class

    def update(self, features: Tensor, labels: Tensor | None = None, *, indices: Tensor | None = None) -> None:
        """Add features of a batch with labels; as `KeptFeatures.update`, but labels are needed."""
        if labels is None:
            raise ValueError("a Fréchet distance of each class needs the labels of the images, which are missing")
        super().update(features, labels, indices=indices)

    def compute(self) -> Tensor:
        kept = self.kept()
        assert kept.labels is not None
        labels, wanted = kept.labels, self.reference_labels.to(self.device)
        if len(labels) and int(labels.max()) >= self.num_classes:
            raise ValueError(f"label {int(labels.max())} is none of {self.num_classes} classes")
        reference = self.reference.features.to(self.device)
        found = torch.full((self.num_classes,), torch.nan, dtype=torch.float64)
        for label in range(self.num_classes):
            samples, real = kept.features[labels == label], reference[wanted == label]
            if min(len(samples), len(real)) > 1:
                found[label] = frechet_distance_of_features(samples.double(), real.double())
        if bool(found.isnan().all()):
            raise ValueError("no class has two images or more, labelled, in both sets: none has a Fréchet distance")
        return found if self.per_class else found.nanmean()
