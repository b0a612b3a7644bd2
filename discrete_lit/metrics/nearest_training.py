"""The nearest training image of each sample, in feature space: does a generator repeat what it was trained on?

A sample that is nearer to a training image than new real images are is a sign of memorisation. So the distances of
samples are read beside those of held-out real images to the same training images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from discrete_lit.metrics.extractors import FeatureSource
from discrete_lit.metrics.feature_distances import ComparedFeatures
from discrete_lit.metrics.kept_features import FeatureSet, finite
from discrete_lit.metrics.moments import check_reference

# Distances that are held at once: 256 MB.
_DISTANCES_AT_ONCE = 2**25


class Nearest(NamedTuple):
    """The nearest of a set to each of some features."""

    distances: Tensor
    """`(n,)` float64."""
    indices: Tensor
    """`(n,)` int64, which of the set."""


def nearest_features(features: Tensor, training: Tensor, *, leave_out_itself: bool = False) -> Nearest:
    """Find the nearest of training features `(m, D)` to each of features `(n, D)`, by Euclidean distance.

    The nearest is found by products in float64, and its distance computed from the difference: a copy is at 0.

    Args:
        features: float64.
        training: float64.
        leave_out_itself: the features are the training features, and each is compared with the others.
    """
    squares = training.square().sum(1)
    chosen = []
    rows_at_once = max(1, _DISTANCES_AT_ONCE // len(training))
    for start in range(0, len(features), rows_at_once):
        rows = features[start : start + rows_at_once]
        # |x|² is the same for all, and left out.
        distances = squares - 2 * rows @ training.T
        if leave_out_itself:
            own = torch.arange(len(rows), device=rows.device)
            distances[own, own + start] = torch.inf
        chosen.append(distances.argmin(1))
    indices = torch.cat(chosen)
    blocks = zip(features.split(rows_at_once), indices.split(rows_at_once), strict=True)
    return Nearest(torch.cat([(rows - training[near]).norm(dim=1) for rows, near in blocks]), indices)


class NearestTraining(ComparedFeatures):
    """Measure how near samples lie to training images, beside held-out real images. `compute` gives, float64:

    - `nearest_distance_ratio`: the median distance of samples to the nearest training image, over that of held-out
      images; 1 as far as new images, 0 copies; NaN where held-out images are copies themselves.
    - `nearer_than_held_out`: the probability that a sample lies nearer to its nearest training image than a held-out
      image to its own, in [0, 1], ties by half: the statistic of Mann and Whitney that Meehan et al. 2020 test (C_T,
      without cells). 0.5 without memorisation.
    - `authenticity`: the fraction of samples that are further from their nearest training image than this is from its
      own nearest training image (Alaa et al. 2022); of new real images a little below a half.

    Args:
        extractor: where the features come from; only read.
        training: features of the training images, at least 2.
        held_out: features of real images that are not among them.
        dtype: in which features are kept and compared; a copy is one in this precision.

    Raises:
        ValueError: features of another extractor or width, or ones that are not finite, or too few of them.
    """

    def __init__(
        self,
        extractor: FeatureSource,
        training: FeatureSet,
        *,
        held_out: FeatureSet,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(extractor, training, reference_name="training", dtype=dtype)
        check_reference(extractor, held_out, "held_out")
        finite(held_out.features, "held_out")
        if len(training) < 2 or len(held_out) < 1:
            raise ValueError(f"training needs 2 images, held_out 1; they have {len(training)} and {len(held_out)}")
        self.held_out = held_out

    def compute(self) -> dict[str, Tensor]:
        samples = self.kept().features.double()
        if not len(samples):
            raise ValueError("the nearest training images of no sample were asked for")
        training, held_out = (
            finite(each.features.to(self.device, self.feature_dtype)).double()
            for each in (self.reference, self.held_out)
        )
        near, real = nearest_features(samples, training), nearest_features(held_out, training)
        among = nearest_features(training, training, leave_out_itself=True)
        median = real.distances.median()
        ratio = near.distances.median() / median if bool(median > 0) else torch.tensor(torch.nan, dtype=torch.float64)
        return {
            "nearest_distance_ratio": ratio,
            "nearer_than_held_out": _probability_below(near.distances, real.distances),
            "authenticity": (near.distances > among.distances[near.indices]).double().mean(),
        }


def _probability_below(first: Tensor, second: Tensor) -> Tensor:
    """The probability that a number of the first set is below one of the second, ties by half."""
    ordered = second.sort().values
    not_above, below = (torch.searchsorted(ordered, first, right=right) for right in (True, False))
    above = len(second) - (not_above + below).double() / 2
    return (above / len(second)).mean()
