"""The spread of a figure over the runs of one row, such as three training seeds, and what it says of a difference.

`Spread` is the mean and the standard deviation of one figure over runs. `compare_means` says whether two rows differ by
more than their runs do, by Welch's t-test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, pi, sqrt
from typing import Any

import numpy as np

CONFIDENCE = 0.95
"""The level of the interval that a difference of means must leave to lie beyond the spread."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of one figure over the runs of a row.

    Args:
        values: the figure of each run, at least one.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        assert self.values, "a spread is of one run or more"

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def standard_deviation(self) -> float | None:
        """Sample standard deviation (over n - 1); None of one run, and where a value is not finite."""
        if len(self.values) < 2 or not all(map(isfinite, self.values)):
            return None
        return sqrt(sum((value - self.mean) ** 2 for value in self.values) / (len(self.values) - 1))

    def to_dict(self) -> dict[str, Any]:
        """Give the mean, the standard deviation and every value as plain data."""
        return {"mean": self.mean, "standard_deviation": self.standard_deviation, "values": list(self.values)}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two means and the one that the spread over runs explains."""

    value: float
    """Mean of the second row minus mean of the first."""
    margin: float
    """Half the width of the 95% confidence interval around it."""

    @property
    def within(self) -> bool:
        """Whether no difference at all lies in the interval, so that the runs settle nothing."""
        return abs(self.value) <= self.margin


def compare_means(first: Spread, second: Spread) -> Difference | None:
    """Compare the means of two rows by Welch's t-test, which does not suppose that both spread alike.

    The margin is t · √(s₁²/n₁ + s₂²/n₂), with t the two-sided 95% point of Student's distribution at the degrees of
    freedom of Welch and Satterthwaite (Welch, 1947, "The generalization of 'Student's' problem when several different
    population variances are involved", Biometrika 34). The runs count as independent: where run i of both rows shares
    something, as its tokenizer, the margin is rather too wide. It is one of a single comparison.

    Returns:
        None where a row has one run alone, or a value that is not finite.
    """
    deviations = first.standard_deviation, second.standard_deviation
    if deviations[0] is None or deviations[1] is None:
        return None
    parts = [
        float(deviation or 0) ** 2 / len(row.values) for deviation, row in zip(deviations, (first, second), strict=True)
    ]
    variance = sum(parts)
    value = second.mean - first.mean
    if variance == 0:
        return Difference(value=value, margin=0.0)
    freedom = variance**2 / sum(
        part**2 / (len(row.values) - 1) for part, row in zip(parts, (first, second), strict=True)
    )
    # Not below that of the smaller row, but for rounding.
    return Difference(value=value, margin=student_quantile(max(freedom, 1.0)) * sqrt(variance))


def pairs_within(differences: Sequence[tuple[str, str, Mapping[str, Difference]]]) -> list[str]:
    """Say of each figure, in a line, which pairs of rows lie within the spread: for more pairs than one reads.

    Args:
        differences: of each pair of rows, their names and the difference of each figure.
    """
    within: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for first, second, figures in differences:
        for figure, difference in figures.items():
            counts[figure] = counts.get(figure, 0) + 1
            pairs = within.setdefault(figure, [])
            if difference.within:
                pairs.append(f"{first} and {second}")
    return [
        f"{figure}: within the spread: {'; '.join(pairs) or 'none'} ({len(pairs)} of {counts[figure]} pairs)"
        for figure, pairs in within.items()
    ]


def student_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Compute the t for which |T| <= t has probability `confidence`, T of Student's distribution.

    With t = √ν tan θ the density of |T| becomes cos^(ν-1) θ, up to a constant, on [0, π/2]: it is summed there.

    Args:
        freedom: ν >= 1, the degrees of freedom; any real number.
        confidence: in (0, 1).
    """
    assert freedom >= 1 and 0 < confidence < 1
    angles = np.linspace(0, pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    cumulative = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    angle = np.interp(confidence * cumulative[-1], cumulative, angles)
    return sqrt(freedom) * float(np.tan(angle))


def spread_of(values: Sequence[float | None]) -> Spread | None:
    """Gather the known values of one figure; None where there is none."""
    known = tuple(value for value in values if value is not None)
    return Spread(known) if known else None
