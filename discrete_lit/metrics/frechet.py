"""The Fréchet distance between two sets of features: FID with Inception-v3, FD with any other extractor.

Both sets are taken for Gaussians (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium", NeurIPS 2017, eq. 6). `frechet_distance` compares their `Moments`, and
`compare` gives the distance together with all that a reported one has to say about itself:

    moments = FeatureMoments(extractor)
    for images in batches:
        moments.update(extractor(to_uint8(images)))
    result = compare(extractor, moments.compute(), Moments.load("reference.npz"), "reference.npz")

`FrechetDistance` is the same as a metric with a reference, `FrechetRatio` the mean over several extractors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics.wrappers.abstract import WrapperMetric

from discrete_lit.metrics.extractors import FeatureSource
from discrete_lit.metrics.moments import FeatureMoments, Moments, check_reference


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
                f"{what}: {moments.count:,} for {moments.dim:,} features, so the covariance is rank-deficient "
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
