"""Mean and covariance of a set's features: of all its images, or read from a file.

`FeatureMoments` gathers them batch by batch, `Moments` are what comes out, is saved, read and checked.
"""

from __future__ import annotations

import os
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

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


def _lowest_is_below(covariance: Tensor, bound: float) -> bool:
    """Tell whether the lowest eigenvalue may be below a bound: without it Cholesky's factorisation succeeds."""
    shifted = covariance.clone()
    shifted.diagonal().sub_(bound)
    return bool(torch.linalg.cholesky_ex(shifted).info)


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
