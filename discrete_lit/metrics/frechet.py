"""The Fréchet distance between two sets of features: FID with Inception-v3, FD with any other extractor.

Both sets are taken for Gaussians (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium", NeurIPS 2017, eq. 6). `FeatureMoments` gathers mean and covariance batch by batch, `frechet_distance`
compares two of them, and `compare` gives the distance together with all that a reported one has to say about itself:

    moments = FeatureMoments(extractor)
    for images in batches:
        moments.update(extractor(to_uint8(images)))
    result = compare(extractor, moments.compute(), Moments.load("reference.npz"), "reference.npz")

`FrechetDistance` is the same as a metric with a reference, `FrechetRatio` the mean over several extractors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.wrappers.abstract import WrapperMetric

from discrete_lit.core.distributed import all_reduce_sum
from discrete_lit.core.files import Npz, atomic_write
from discrete_lit.metrics.binned_mean import SumsInFloat64
from discrete_lit.metrics.extractors import SPATIAL, FeatureSource

_LARGEST = 1e100
# The networks that are used have at most 2048 features; the facts beside them are a name and a hash.
_WIDEST, _LONGEST_FACT = 8192, 4096


class Moments:
    """Mean and covariance of a set's features, and what they are of.

    A plain class: torchmetrics takes a dataclass that a metric computes apart.

    Args:
        mean: `(D,)` float64.
        covariance: `(D, D)` float64, unbiased (divided by count - 1). With a factor it may be None and is computed when
            it is asked for.
        factor: `(D, count)` float64, whose product with its transpose is the covariance: it spares a distance the
            eigenvectors of the covariance, and `check` its eigenvalues. See `of_features`.
        count: of the set; None where a file does not say, as in ADM's reference files, like the next two.
        extractor: name of the network.
        weights_sha256: hash of its weights.
        apply_exif: whether the images were turned as their EXIF orientation says.
        image_size: (H, W) of the images.

    Raises:
        ValueError: neither a covariance nor a factor of it.
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor | None,
        *,
        factor: Tensor | None = None,
        count: int | None = None,
        extractor: str | None = None,
        weights_sha256: str | None = None,
        apply_exif: bool | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        if covariance is None and factor is None:
            raise ValueError("moments need a covariance or a factor of it")
        self.mean = mean
        self._covariance = covariance
        self.factor = factor
        self.count = count
        self.extractor = extractor
        self.weights_sha256 = weights_sha256
        self.apply_exif = apply_exif
        self.image_size = image_size
        self._is_covariance = factor is not None

    @staticmethod
    def of_features(features: Tensor, **facts: Any) -> Moments:
        """Make moments of fewer features than their width, which are a factor of their covariance.

        Args:
            features: `(count, D)`, 1 < count <= D.
            **facts: what is known of them, as the constructor takes it.

        Raises:
            ValueError: another number of features.
        """
        count, dim = features.shape
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {count}")
        if count > dim:
            raise ValueError(f"{count:,} features of width {dim:,} are more than make a factor: sum them up")
        features = features.double()
        mean = features.mean(0)
        return Moments(mean, None, factor=(features - mean).T / (count - 1) ** 0.5, count=count, **facts)

    @property
    def covariance(self) -> Tensor:
        if self._covariance is None:
            assert self.factor is not None
            self._covariance = self.factor @ self.factor.T
        return self._covariance

    @property
    def trace(self) -> Tensor:
        """The sum of the variances."""
        return self.covariance.trace() if self.factor is None else self.factor.square().sum()

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def rank(self) -> int:
        """The largest rank that the covariance can have: n samples span at most n - 1 directions."""
        return self.dim if self.count is None else min(self.dim, self.count - 1)

    def save(self, path: str | Path, spatial: Moments | None = None) -> None:
        """Write an npz, whole or not at all: `mu` and `sigma`, as ADM names them, and what is known of the others.

        Args:
            path: of the file.
            spatial: moments of the spatial features of the same images, for sFID: written as `mu_s` and `sigma_s`.
        """
        known = {
            key: np.asarray(value)
            for key in ("count", "extractor", "weights_sha256", "apply_exif", "image_size")
            if (value := getattr(self, key)) is not None
        }
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if spatial is not None:
            arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, **arrays, **known)

    def check(self, what: str) -> None:
        """Refuse what is no mean and covariance of finite features.

        The eigenvalues are looked at once: moments are not changed after they were checked.

        Args:
            what: names the moments in the error.

        Raises:
            ValueError: values that are not finite, or too large for a finite distance; a covariance that is not
                symmetric, has a negative eigenvalue, or more positive ones than its count allows, each by more than
                rounding.
        """
        if self.count is not None and self.count < 2:
            raise ValueError(f"{what}: a covariance needs at least 2 images, its count is {self.count}")
        spread, bound = (self.covariance, _LARGEST) if self.factor is None else (self.factor, _LARGEST**0.5)
        for name, values, largest in (("mean", self.mean, _LARGEST), ("covariance", spread, bound)):
            highest = float(values.abs().max())  # not a number, or infinite, where one is not finite
            if not isfinite(highest):
                raise ValueError(f"{what}: {int((~values.isfinite()).sum()):,} values of its {name} are not finite")
            if highest > largest:
                raise ValueError(f"{what}: its {name} has values beyond {_LARGEST:g}, of which no distance is finite")
        if self._is_covariance:
            return
        rounding = self._rounding()
        asymmetry = float((self.covariance - self.covariance.T).abs().max())
        if asymmetry > rounding:
            raise ValueError(
                f"{what}: its covariance is not symmetric: two values that should agree differ by {asymmetry:.3g}"
            )
        if self.rank == self.dim and not _lowest_is_below(self.covariance, -rounding):
            self._is_covariance = True
            return
        values = torch.linalg.eigvalsh(self.covariance)
        if float(values[0]) < -rounding:
            raise ValueError(
                f"{what}: its covariance has the eigenvalue {float(values[0]):.3g}; a covariance has none below 0"
            )
        beyond = values[: self.dim - self.rank]
        if len(beyond) and float(beyond[-1]) > rounding:
            raise ValueError(
                f"{what}: its covariance has more directions than {self.count:,} images can span, so the count or the "
                "covariance is wrong"
            )
        self._is_covariance = True

    def _rounding(self) -> float:
        """Bound what rounding does: in float32 to the covariance, in float64 to the products that it is made of."""
        return 1e-5 * float(self.covariance.abs().max()) + 1e-12 * self.dim * float(self.mean.abs().max()) ** 2

    @staticmethod
    def load(path: str | Path, extractor: FeatureSource | None = None, *, features: Tensor | None = None) -> Moments:
        """Read moments from an npz: our own, or one with `mu` and `sigma` alone, like ADM's reference batches.

        Args:
            path: the file.
            extractor: whose features the moments must be of, by their width; any by default. Of a `FeatureSpace` of
                spatial features, `mu_s` and `sigma_s` are read.
            features: of the same images, where they are at hand. If they are all of them and no more than D, and have
                the mean of the file, they are taken in place of its covariance.

        Raises:
            ValueError: a file that cannot be read, holds no moments, moments of inconsistent shapes or another width,
                or ones that `check` refuses.
        """
        name = repr(os.fspath(path))
        is_spatial = extractor is not None and extractor.part == SPATIAL
        mu, sigma = ("mu_s", "sigma_s") if is_spatial else ("mu", "sigma")
        with Npz(path) as file:
            if mu not in file.headers or sigma not in file.headers:
                raise ValueError(
                    f"{name} holds {sorted(file.headers)}; a file of {'spatial ' if is_spatial else ''}moments holds "
                    f"{mu!r} (D,) and {sigma!r} (D, D)"
                )
            mean_shape, covariance_shape = file.headers[mu].shape, file.headers[sigma].shape
            if len(mean_shape) != 1 or mean_shape[0] < 1 or covariance_shape != mean_shape * 2:
                raise ValueError(
                    f"{name}: {mu!r} {mean_shape} and {sigma!r} {covariance_shape} are not (D,) and (D, D)"
                )
            if extractor is not None:
                _check_width(extractor, mean_shape[0], name)
            if mean_shape[0] > _WIDEST:
                raise ValueError(f"{name} is of {mean_shape[0]:,} features; at most {_WIDEST:,} are compared")
            facts: dict[str, Any] = {}
            for key, kinds, shape, wanted in (
                ("count", "iu", (), "a whole number"),
                ("extractor", "U", (), "a text"),
                ("weights_sha256", "U", (), "a text"),
                ("apply_exif", "b", (), "true or false"),
                ("image_size", "iu", (2,), "a height and a width"),
            ):
                if key not in file.headers:
                    continue
                header = file.headers[key]
                if header.shape != shape or header.dtype.kind not in kinds:
                    raise ValueError(f"{name}: its {key} is {header.dtype} {header.shape}, it must be {wanted}")
                if header.size > _LONGEST_FACT:
                    raise ValueError(f"{name}: its {key} has {header.size:,} bytes, it must be {wanted}")
                value = file.read(key).tolist()
                facts[key] = tuple(value) if isinstance(value, list) else value
            mean, covariance = _real_numbers(file.read(mu), f"{name}: {mu!r}"), None
            count = int(facts.get("count", 0))
            if features is None or not 1 < len(features) == count <= len(mean) or not _have_mean(features, mean):
                features = None
                covariance = _real_numbers(file.read(sigma), f"{name}: {sigma!r}")
        if is_spatial and "extractor" in facts:
            facts["extractor"] = f"{facts['extractor']}-{SPATIAL}"
        if features is None:
            moments = Moments(mean, covariance, **facts)
        else:
            del facts["count"]
            moments = Moments.of_features(features, **facts)
        moments.check(name)
        return moments


def _have_mean(features: Tensor, mean: Tensor) -> bool:
    """Tell whether features `(n, D)` have a mean `(D,)`, to the rounding of sums; one that is not finite none have."""
    bound = 1e-9 * float(mean.abs().max())
    return torch.allclose(features.double().mean(0), mean, rtol=1e-9, atol=bound)


def _real_numbers(array: np.ndarray, what: str) -> Tensor:
    """Take an array of a file as float64.

    Raises:
        ValueError: an array of another kind.
    """
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{what} is of {array.dtype}, it must be of real numbers")
    return torch.from_numpy(array.astype(np.float64))


def holds_moments(path: str | Path) -> bool:
    """Tell whether a path is an npz file of moments, as opposed to images.

    Raises:
        ValueError: an npz file that cannot be read.
    """
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return False
    with Npz(path) as file:
        return "mu" in file.headers


class FeatureMoments(SumsInFloat64):
    """Sum features up to their `Moments`, over all batches and ranks, in float64.

    Any split into batches or ranks gives the same moments, to the rounding of float64. The sums lie on the CPU until
    `.to(device)`; devices without float64 leave them there.

    Args:
        extractor: where the features come from: gives their width D, and the name in what is saved. Only read: a
            checkpoint of a module that holds the metric does not hold the network.
    """

    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, extractor: FeatureSource) -> None:
        # Summed on the way: gathered, the outer products would take 8 D² bytes of each rank, 32 MB with Inception.
        super().__init__(dist_sync_fn=_summed)
        self.part = extractor.part
        self.extractor_name = extractor.name
        self.weights_sha256 = extractor.weights_sha256
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(extractor.dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(extractor.dim, extractor.dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add features `(B, D)`."""
        check_width(features, len(self.total), self.extractor_name)
        features = features.detach().to(self.total.device).double()
        self.count += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)

    def compute(self) -> Any:
        """The `Moments` so far, of all ranks, on the CPU.

        Raises:
            ValueError: fewer than two samples.
        """
        return self.moments()

    def moments(self) -> Moments:
        """Make moments of the sums as they are; within `compute`, those of all ranks."""
        count = int(self.count)
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {count}")
        mean = self.total / count
        covariance = (self.outer - count * torch.outer(mean, mean)) / (count - 1)
        moments = Moments(
            mean.cpu(),
            covariance.cpu(),
            count=count,
            extractor=self.extractor_name,
            weights_sha256=self.weights_sha256,
        )
        # That of any sums of products; whether they are finite is checked where a distance is computed.
        moments._is_covariance = True
        return moments


def _summed(state: Tensor, group: Any = None) -> list[Tensor]:
    """The sum of a state over ranks, as torchmetrics takes what is gathered: here of one rank that has it all."""
    return [all_reduce_sum(state)]


class FrechetDistance(FeatureMoments):
    """Measure the Fréchet distance of images to a reference, over all batches and ranks: `compute` gives it, float64.

    FID with `InceptionV3`; sFID with its spatial features, `FrechetDistance(inception.space("spatial"), reference)`.
    The reference is no state: it is neither summed over ranks nor saved with a checkpoint.

        self.fid = FrechetDistance(extractor, Moments.load("reference.npz", extractor))     # in a LightningModule
        self.fid.update(extractor(to_uint8(images)))                                        # in validation_step
        self.log("validation/fid", self.fid)

    Args:
        extractor: where the features come from; only read.
        reference: moments of its features.
        reference_name: what the reference is, for errors.

    Raises:
        ValueError: a reference of another extractor or width. In `compute`: fewer than two images, or features that
            are not finite.
    """

    def __init__(self, extractor: FeatureSource, reference: Moments, *, reference_name: str = "reference") -> None:
        super().__init__(extractor)
        check_reference(extractor, reference, reference_name)
        self.metric_name = extractor.metric_name
        self.reference = reference
        self.reference_name = reference_name

    def compute(self) -> Tensor:
        names = ("the samples", f"reference {self.reference_name!r}")
        distance = frechet_distance(self.moments(), self.reference, names=names)
        return torch.tensor(distance, dtype=torch.float64)


def frechet_distance(
    first: Moments, second: Moments, *, names: tuple[str, str] = ("the first moments", "the second moments")
) -> float:
    """Compute the squared Fréchet distance between two Gaussians (Dowson & Landau 1982), in float64.

        |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1 S2)^1/2

    With any factor S1 = F F', S1 S2 has the eigenvalues of F' S2 F: those of a symmetric matrix, real, several times
    faster than the general root, and fewer where S1 has a low rank. F is Cholesky's where S1 has full rank. With a
    factor of S2 too, S2 = G G', they are the eigenvalues of (F' G) (F' G)'.
    Eigenvalues that the sample counts rule out (`Moments.rank`) are rounding noise, whose roots would add up, and are
    left out.

    Args:
        first: moments.
        second: moments of the same width.
        names: of the two, in errors.

    Raises:
        ValueError: moments of different widths, or ones that `Moments.check` refuses: never is their distance 0.
    """
    if first.dim != second.dim:
        raise ValueError(f"moments of width {first.dim} and {second.dim}: they come from different extractors")
    for moments, name in zip((first, second), names, strict=True):
        moments.check(name)
    if torch.equal(first.mean, second.mean) and _same_covariance(first, second):
        return 0.0
    # The one of lower rank gives the smaller problem, with as many eigenvalues as can be there.
    low, high = (first, second) if first.rank <= second.rank else (second, first)
    factor = _factor(low)
    if high.factor is not None:
        between = factor.T @ high.factor
        product = between @ between.T
    else:
        product = factor.T @ high.covariance @ factor
    spectrum = torch.linalg.eigvalsh(product)[-low.rank :]
    cross = spectrum.clamp(min=0).sqrt().sum()
    difference = first.mean - second.mean
    distance = difference @ difference + first.trace + second.trace - 2 * cross
    assert bool(distance.isfinite())
    # Below 0 by rounding alone, as both are covariances.
    return max(0.0, float(distance))


def _same_covariance(first: Moments, second: Moments) -> bool:
    if first.factor is not None and second.factor is not None:
        return torch.equal(first.factor, second.factor)
    return torch.equal(first.covariance, second.covariance)


def _factor(moments: Moments) -> Tensor:
    """A factor of the covariance, F F', of as many columns as it can have directions, or one for each image."""
    if moments.factor is not None:
        return moments.factor
    if moments.rank == moments.dim:
        factor, failed = torch.linalg.cholesky_ex(moments.covariance)
        if not int(failed):
            return factor
    values, vectors = torch.linalg.eigh(moments.covariance)
    kept = slice(moments.dim - moments.rank, None)
    return vectors[:, kept] * values[kept].clamp(min=0).sqrt()


def _lowest_is_below(covariance: Tensor, bound: float) -> bool:
    """Tell whether the lowest eigenvalue may be below a bound: without it Cholesky's factorisation succeeds."""
    shifted = covariance.clone()
    shifted.diagonal().sub_(bound)
    return bool(torch.linalg.cholesky_ex(shifted).info)


@dataclass(frozen=True, kw_only=True)
class FrechetResult:
    """A Fréchet distance and all that is needed to compare it with another."""

    metric: str
    """`FID` for the original Inception weights alone, else `FD-<extractor>`."""
    value: float
    count: int
    """Samples measured."""
    reference: str
    reference_count: int | None
    """None where the reference file does not say."""
    extractor: str
    weights_sha256: str
    protocol: str
    """How pixels became the extractor's input."""
    notes: tuple[str, ...]
    """Limits of the number, in words."""


def compare(extractor: FeatureSource, samples: Moments, reference: Moments, reference_name: str) -> FrechetResult:
    """Compute the Fréchet distance of samples to a reference, with what it says about itself.

    Args:
        extractor: the network whose features both moments are of.
        samples: moments with a known count.
        reference: moments; those from a file without `weights_sha256` are taken to be of this extractor.
        reference_name: what the reference is, for the report.

    Raises:
        ValueError: a reference made by another extractor.
    """
    assert samples.count is not None and samples.weights_sha256 == extractor.weights_sha256
    check_reference(extractor, reference, reference_name)
    notes = []
    for what, moments in (("samples", samples), ("reference", reference)):
        if moments.rank < moments.dim:
            notes.append(
                f"{what}: {moments.count:,} images for {moments.dim:,} features, so the covariance is rank-deficient "
                "and the distance biased upwards: compare it at equal counts only"
            )
    if reference.weights_sha256 is None:
        notes.append(f"the reference file does not say which extractor made it; {extractor.name} is assumed")
    return FrechetResult(
        metric=extractor.metric_name,
        value=frechet_distance(samples, reference, names=("the samples", f"reference {reference_name!r}")),
        count=samples.count,
        reference=reference_name,
        reference_count=reference.count,
        extractor=extractor.name,
        weights_sha256=extractor.weights_sha256,
        protocol=extractor.protocol,
        notes=tuple(notes),
    )


def check_width(features: Tensor, dim: int, extractor: str) -> None:
    """Refuse features that are not `(B, D)` of the width that a measure was made for.

    Raises:
        ValueError: another shape.
    """
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features {tuple(features.shape)} are not (B, {dim}), which {extractor} gives")


def _check_width(extractor: FeatureSource, dim: int, reference: str) -> None:
    if dim != extractor.dim:
        raise ValueError(f"reference {reference} has {dim} features, {extractor.name} gives {extractor.dim}")


class KnownFeatures(Protocol):
    """Says what features are of: `Moments`, or a set of features."""

    extractor: str | None
    weights_sha256: str | None

    @property
    def dim(self) -> int: ...


def check_reference(extractor: FeatureSource, reference: KnownFeatures, reference_name: str) -> None:
    """Refuse a reference whose features are not the extractor's.

    Raises:
        ValueError: features of another width, or of other weights.
    """
    _check_width(extractor, reference.dim, repr(reference_name))
    if reference.weights_sha256 not in (None, extractor.weights_sha256):
        raise ValueError(
            f"reference {reference_name!r} was made by {reference.extractor} with weights {reference.weights_sha256}; "
            f"this is {extractor.name} with weights {extractor.weights_sha256}"
        )


FDR6_DENOMINATORS = {
    "InceptionV3": 1.68,
    "convnextv2_base.fcmae_ft_in22k_in1k@224": 56.87,
    "vit_large_patch14_dinov2.lvd142m@256": 14.19,
    "vit_large_patch16_224.mae@224": 0.04,
    "vit_so400m_patch16_siglip_256.v2_webli@256": 0.60,
    "vit_large_patch14_clip_224.openai@224": 5.60,
}
"""The Fréchet distances between ImageNet's validation and training images at 256 pixels, of FD-Loss (arXiv:2604.28190),
to as many digits as the authors print, by the names of the extractors here: the denominators of FDr6."""


class FrechetRatio(WrapperMetric):
    """Average the Fréchet distances of several extractors, each over that of real validation images (FDr).

        FDr = mean over k of FD_k / FD_k(validation)

    1 is as far from the training images as validation images are. With the six extractors of `FDR6_DENOMINATORS` it is
    FDr6 (FD-Loss, arXiv:2604.28190). `compute` gives `frechet_ratio`, and `frechet_ratio/<name>` of each extractor.

    Args:
        distances: a `FrechetDistance` for each extractor, by any names.
        denominators: FD_k(validation), by the same names.

    Raises:
        ValueError: other names, or a denominator that is not above 0.
    """

    full_state_update = False

    def __init__(self, distances: Mapping[str, FrechetDistance], denominators: Mapping[str, float]) -> None:
        super().__init__()
        if not distances or set(distances) != set(denominators):
            raise ValueError(
                f"distances {sorted(distances)} and denominators {sorted(denominators)} must be of the same"
            )
        if bad := {name: value for name, value in denominators.items() if not value > 0}:
            raise ValueError(f"denominators must be above 0, got {bad}")
        self.names = list(distances)
        # A name of timm has dots, which a module's may not.
        self.members = nn.ModuleList(distances.values())
        self.denominators = [float(denominators[name]) for name in self.names]

    @property
    def distances(self) -> list[FrechetDistance]:
        """The distance of each extractor, in the order of `names`."""
        return cast(list[FrechetDistance], list(self.members))

    def update(self, features: Mapping[str, Tensor]) -> None:
        """Add features `(B, D_k)` of the same images, by the name of each extractor.

        Raises:
            ValueError: names other than those of the distances.
        """
        if set(features) != set(self.names):
            raise ValueError(f"features of {sorted(features)}, the distances are of {sorted(self.names)}")
        for name, distance in zip(self.names, self.distances, strict=True):
            distance.update(features[name])

    def compute(self) -> dict[str, Tensor]:
        ratios = [
            distance.compute() / denominator
            for distance, denominator in zip(self.distances, self.denominators, strict=True)
        ]
        named = {f"frechet_ratio/{name}": ratio for name, ratio in zip(self.names, ratios, strict=True)}
        return {"frechet_ratio": torch.stack(ratios).mean(), **named}

    def reset(self) -> None:
        for distance in self.distances:
            distance.reset()
        super().reset()
