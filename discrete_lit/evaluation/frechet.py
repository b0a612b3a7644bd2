"""The Fréchet distance between two sets of features, and what a reported one has to say about itself."""

from dataclasses import dataclass

import torch
from torch import Tensor

from discrete_lit.evaluation.features import FeatureExtractor
from discrete_lit.evaluation.moments import Moments


def frechet_distance(first: Moments, second: Moments) -> float:
    """The squared Fréchet distance between two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6), in float64.

        |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2

    The symmetric form needs only eigenvalues of symmetric matrices: real, and three times as fast as the general root.
    Eigenvalues that the sample counts rule out (`Moments.rank`) are rounding noise, whose roots would add up, and are
    left out.

    Raises:
        ValueError: moments of different widths.
    """
    if first.dim != second.dim:
        raise ValueError(f"moments of width {first.dim} and {second.dim}: they come from different extractors")
    if torch.equal(first.mean, second.mean) and torch.equal(first.covariance, second.covariance):
        return 0.0
    root = _square_root(first.covariance, first.rank)
    # S1^1/2 S2 S1^1/2 is symmetric but for rounding; eigvalsh reads one triangle.
    spectrum = torch.linalg.eigvalsh(root @ second.covariance @ root)
    cross = _largest(spectrum, min(first.rank, second.rank)).sqrt().sum()
    difference = first.mean - second.mean
    distance = difference @ difference + first.covariance.trace() + second.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


def _square_root(matrix: Tensor, rank: int) -> Tensor:
    """The root of a positive semi-definite `(D, D)` matrix of at most the given rank."""
    values, vectors = torch.linalg.eigh(matrix)
    vectors = vectors[:, len(values) - rank :]
    return vectors * _largest(values, rank).sqrt() @ vectors.T


def _largest(ascending: Tensor, count: int) -> Tensor:
    """The largest eigenvalues of a positive semi-definite matrix, from all of them in ascending order."""
    return ascending[len(ascending) - count :].clamp(min=0)


def check_reference(extractor: FeatureExtractor, reference: Moments, reference_name: str) -> None:
    """Refuse a reference whose features are not the extractor's.

    Raises:
        ValueError: moments of another width, or of other weights.
    """
    if reference.dim != extractor.dim:
        raise ValueError(
            f"reference {reference_name!r} has {reference.dim} features, {extractor.name} gives {extractor.dim}"
        )
    if reference.weights_sha256 not in (None, extractor.weights_sha256):
        raise ValueError(
            f"reference {reference_name!r} was made by {reference.extractor} with weights {reference.weights_sha256}; "
            f"this is {extractor.name} with weights {extractor.weights_sha256}"
        )


@dataclass(frozen=True)
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
    """What limits the number, in words."""


def compare(extractor: FeatureExtractor, samples: Moments, reference: Moments, reference_name: str) -> FrechetResult:
    """The Fréchet distance of samples to a reference, with what it says about itself.

    Args:
        extractor: whose features both moments hold.
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
        value=frechet_distance(samples, reference),
        count=samples.count,
        reference=reference_name,
        reference_count=reference.count,
        extractor=extractor.name,
        weights_sha256=extractor.weights_sha256,
        protocol=extractor.protocol,
        notes=tuple(notes),
    )
