"""The Fréchet distance between two sets of features: FID with Inception-v3, FD with any other extractor.

Both sets are taken for Gaussians (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium", NeurIPS 2017, eq. 6). `FeatureMoments` gathers mean and covariance batch by batch, `frechet_distance`
compares two of them, and `compare` gives the distance together with all that a reported one has to say about itself:

    moments = FeatureMoments(extractor)
    for images in batches:
        moments.update(extractor(to_uint8(images)))
    result = compare(extractor, moments.compute(), Moments.load("reference.npz"), "reference.npz")
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from discrete_lit.core.distributed import all_reduce_sum
from discrete_lit.core.files import Npz, atomic_write
from discrete_lit.metrics.extractors import FeatureExtractor

_LARGEST = 1e100


class Moments:
    """Mean and covariance of a set's features, and what they are of.

    A plain class: torchmetrics takes a dataclass that a metric computes apart.

    Args:
        mean: `(D,)` float64.
        covariance: `(D, D)` float64, unbiased (divided by count - 1).
        count: of the set; None where a file does not say, as in ADM's reference files, like the next two.
        extractor: name of the network.
        weights_sha256: hash of its weights.
        apply_exif: whether the images were turned as their EXIF orientation says.
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        *,
        count: int | None = None,
        extractor: str | None = None,
        weights_sha256: str | None = None,
        apply_exif: bool | None = None,
    ) -> None:
        self.mean = mean
        self.covariance = covariance
        self.count = count
        self.extractor = extractor
        self.weights_sha256 = weights_sha256
        self.apply_exif = apply_exif

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def rank(self) -> int:
        """The largest rank that the covariance can have: n samples span at most n - 1 directions."""
        return self.dim if self.count is None else min(self.dim, self.count - 1)

    def save(self, path: str | Path) -> None:
        """Write an npz, whole or not at all: `mu` and `sigma`, as ADM names them, and what is known of the others."""
        known = {
            key: np.asarray(value)
            for key in ("count", "extractor", "weights_sha256", "apply_exif")
            if (value := getattr(self, key)) is not None
        }
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, mu=self.mean.numpy(), sigma=self.covariance.numpy(), **known)

    def check(self, what: str) -> None:
        """Refuse what is no mean and covariance of finite features.

        Args:
            what: names the moments in the error.

        Raises:
            ValueError: values that are not finite, or too large for a finite distance; a covariance that is not
                symmetric, has a negative eigenvalue, or more positive ones than its count allows, each by more than
                rounding.
        """
        if self.count is not None and self.count < 2:
            raise ValueError(f"{what}: a covariance needs at least 2 images, its count is {self.count}")
        for name, values in (("mean", self.mean), ("covariance", self.covariance)):
            if broken := int((~values.isfinite()).sum()):
                raise ValueError(f"{what}: {broken:,} values of its {name} are not finite")
            if float(values.abs().max()) > _LARGEST:
                raise ValueError(f"{what}: its {name} has values beyond {_LARGEST:g}, of which no distance is finite")
        largest = float(self.covariance.abs().max())
        # What rounding does: in float32 to the covariance, in float64 to the products that it is the difference of.
        rounding = 1e-5 * largest + 1e-12 * self.dim * float(self.mean.abs().max()) ** 2
        asymmetry = float((self.covariance - self.covariance.T).abs().max())
        if asymmetry > rounding:
            raise ValueError(
                f"{what}: its covariance is not symmetric: two values that should agree differ by {asymmetry:.3g}"
            )
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

    @staticmethod
    def load(path: str | Path, extractor: FeatureExtractor | None = None) -> Moments:
        """Read moments from an npz: our own, or one with `mu` and `sigma` alone, like ADM's reference batches.

        Args:
            path: the file.
            extractor: whose features the moments must be of, by their width; any by default.

        Raises:
            ValueError: a file that cannot be read, holds no moments, moments of inconsistent shapes or another width,
                or ones that `check` refuses.
        """
        name = repr(os.fspath(path))
        with Npz(path) as file:
            if "mu" not in file.headers or "sigma" not in file.headers:
                raise ValueError(
                    f"{name} holds {sorted(file.headers)}; a moments file holds 'mu' (D,) and 'sigma' (D, D)"
                )
            mean_shape, covariance_shape = file.headers["mu"].shape, file.headers["sigma"].shape
            if len(mean_shape) != 1 or mean_shape[0] < 1 or covariance_shape != mean_shape * 2:
                raise ValueError(f"{name}: 'mu' {mean_shape} and 'sigma' {covariance_shape} are not (D,) and (D, D)")
            if extractor is not None:
                _check_width(extractor, mean_shape[0], name)
            facts = {}
            for key, kinds, wanted in (
                ("count", "iu", "a whole number"),
                ("extractor", "U", "a text"),
                ("weights_sha256", "U", "a text"),
                ("apply_exif", "b", "true or false"),
            ):
                if key not in file.headers:
                    continue
                header = file.headers[key]
                if header.shape != () or header.dtype.kind not in kinds:
                    raise ValueError(f"{name}: its {key} is {header.dtype} {header.shape}, it must be {wanted}")
                facts[key] = file.read(key).item()
            arrays = {key: file.read(key) for key in ("mu", "sigma")}
        for key, array in arrays.items():
            if array.dtype.kind not in "fiu":
                raise ValueError(f"{name}: {key!r} is of {array.dtype}, it must be of real numbers")
        mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in arrays.values())
        moments = Moments(mean, covariance, **facts)
        moments.check(name)
        return moments


def holds_moments(path: str | Path) -> bool:
    """Tell whether a path is an npz file of moments, as opposed to images.

    Raises:
        ValueError: an npz file that cannot be read.
    """
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return False
    with Npz(path) as file:
        return "mu" in file.headers


class FeatureMoments(Metric):
    """Sum features up to their `Moments`, over all batches and ranks, in float64.

    Any split into batches or ranks gives the same moments, to the rounding of float64. The sums lie on the CPU until
    `.to(device)`; devices without float64 leave them there.

    Args:
        extractor: where the features come from: gives their width D, and the name in what is saved.
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, extractor: FeatureExtractor) -> None:
        # Summed on the way: gathered, the outer products would take 8 D² bytes of each rank, 32 MB with Inception.
        super().__init__(dist_sync_fn=_summed)
        self.extractor_name = extractor.name
        self.weights_sha256 = extractor.weights_sha256
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(extractor.dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(extractor.dim, extractor.dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add features `(B, D)`."""
        features = features.detach().to(self.total.device).double()
        self.count += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)

    def compute(self) -> Moments:
        """The moments so far, of all ranks, on the CPU.

        Raises:
            ValueError: fewer than two samples.
        """
        count = int(self.count)
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {count}")
        mean = self.total / count
        covariance = (self.outer - count * torch.outer(mean, mean)) / (count - 1)
        return Moments(
            mean.cpu(),
            covariance.cpu(),
            count=count,
            extractor=self.extractor_name,
            weights_sha256=self.weights_sha256,
        )


def _summed(state: Tensor, group: Any = None) -> list[Tensor]:
    """The sum of a state over ranks, as torchmetrics takes what is gathered: here of one rank that has it all."""
    return [all_reduce_sum(state)]


def frechet_distance(
    first: Moments, second: Moments, *, names: tuple[str, str] = ("the first moments", "the second moments")
) -> float:
    """Compute the squared Fréchet distance between two Gaussians (Dowson & Landau 1982), in float64.

        |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2

    The symmetric form needs only eigenvalues of symmetric matrices: real, and three times as fast as the general root.
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
    if torch.equal(first.mean, second.mean) and torch.equal(first.covariance, second.covariance):
        return 0.0
    root = _square_root(first.covariance, first.rank)
    # S1^1/2 S2 S1^1/2 is symmetric but for rounding; eigvalsh reads one triangle.
    spectrum = torch.linalg.eigvalsh(root @ second.covariance @ root)
    cross = _largest(spectrum, min(first.rank, second.rank)).sqrt().sum()
    difference = first.mean - second.mean
    distance = difference @ difference + first.covariance.trace() + second.covariance.trace() - 2 * cross
    assert bool(distance.isfinite())
    # Below 0 by rounding alone, as both are covariances.
    return max(0.0, float(distance))


def _square_root(matrix: Tensor, rank: int) -> Tensor:
    """The root of a positive semi-definite `(D, D)` matrix of at most the given rank."""
    values, vectors = torch.linalg.eigh(matrix)
    vectors = vectors[:, len(values) - rank :]
    return vectors * _largest(values, rank).sqrt() @ vectors.T


def _largest(ascending: Tensor, count: int) -> Tensor:
    """The largest eigenvalues of a positive semi-definite matrix, from all of them in ascending order."""
    return ascending[len(ascending) - count :].clamp(min=0)


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


def compare(extractor: FeatureExtractor, samples: Moments, reference: Moments, reference_name: str) -> FrechetResult:
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


def _check_width(extractor: FeatureExtractor, dim: int, reference: str) -> None:
    if dim != extractor.dim:
        raise ValueError(f"reference {reference} has {dim} features, {extractor.name} gives {extractor.dim}")


def check_reference(extractor: FeatureExtractor, reference: Moments, reference_name: str) -> None:
    """Refuse a reference whose features are not the extractor's.

    Raises:
        ValueError: moments of another width, or of other weights.
    """
    _check_width(extractor, reference.dim, repr(reference_name))
    if reference.weights_sha256 not in (None, extractor.weights_sha256):
        raise ValueError(
            f"reference {reference_name!r} was made by {reference.extractor} with weights {reference.weights_sha256}; "
            f"this is {extractor.name} with weights {extractor.weights_sha256}"
        )
