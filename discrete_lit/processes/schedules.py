"""Mask schedules: the probability m(t) that a token is masked at time t, from m(0) = 0 (clean) to m(1) = 1.

Published forms use MaskGIT's decoding ratio r = 1 - t: its mask ratio gamma(r) is m(1 - r) here (Chang et al.,
"MaskGIT", CVPR 2022, section 3.3). All arithmetic is float64, in forms that do not cancel near t = 0, nor alpha = 1 - m
near t = 1.
"""

from abc import ABC, abstractmethod
from math import pi

import torch
from torch import Tensor


class MaskSchedule(ABC):
    """m(t) with its derivative and inverse; arguments are tensors in [0, 1] of any shape, results float64."""

    @abstractmethod
    def mask_probability(self, t: Tensor) -> Tensor:
        """m(t), rising to 1, from 0 unless the schedule says otherwise."""

    @abstractmethod
    def derivative(self, t: Tensor) -> Tensor:
        """m'(t)."""

    @abstractmethod
    def inverse(self, m: Tensor) -> Tensor:
        """The t with m(t) = m."""

    def alpha(self, t: Tensor) -> Tensor:
        """1 - m(t), the probability that noise has left a token alone."""
        return 1 - self.mask_probability(t)

    def rate(self, t: Tensor) -> Tensor:
        """d sigma / dt = m'(t) / alpha(t), the speed of the total noise sigma = -log alpha; infinite where m is 1."""
        return self.derivative(t) / self.alpha(t)

    def ends(self) -> tuple[float, float]:
        """m(0) and m(1); where they are not 0 and 1, what a loss averages over t may be no bound."""
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return float(self.mask_probability(ends)[0]), 1 - float(self.alpha(ends)[1])


class CosineSchedule(MaskSchedule):
    """m = sin(pi t / 2), which is MaskGIT's gamma(r) = cos(pi r / 2) and MD4's cosine (Shi et al., 2024)."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return torch.sin(t.double() * pi / 2)

    def derivative(self, t: Tensor) -> Tensor:
        return torch.cos(t.double() * pi / 2) * pi / 2

    def inverse(self, m: Tensor) -> Tensor:
        return torch.asin(m.double()) * 2 / pi

    def alpha(self, t: Tensor) -> Tensor:
        return 2 * torch.sin((1 - t.double()) * pi / 4) ** 2


class ArccosSchedule(MaskSchedule):
    """m = arccos(1 - t) * 2 / pi, gamma(r) = arccos(r) * 2 / pi.

    Processors differ in the last bit of asin(sqrt(1 / 2)) and of sin(pi / 4): m(1) and the inverse of 1 are set to 1.
    """

    def mask_probability(self, t: Tensor) -> Tensor:
        return torch.where(t == 1, 1, (torch.asin(torch.sqrt(t.double() / 2)) * 4 / pi).clamp(max=1))

    def derivative(self, t: Tensor) -> Tensor:
        return 2 / pi / torch.sqrt(t.double() * (2 - t.double()))

    def inverse(self, m: Tensor) -> Tensor:
        return torch.where(m == 1, 1, (2 * torch.sin(m.double() * pi / 4) ** 2).clamp(max=1))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.asin(1 - t.double()) * 2 / pi


class LinearSchedule(MaskSchedule):
    """m = t, gamma(r) = 1 - r; of absorbing D3PM the schedule that it calls mutual information, or "jsd": beta_t = 1 /
    (T - t + 1) (Austin et al., 2021)."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return t.double()

    def derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def inverse(self, m: Tensor) -> Tensor:
        return m.double()


class SquareSchedule(MaskSchedule):
    """gamma(r) = 1 - r^2, so m = 1 - (1 - t)^2."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return t.double() * (2 - t.double())

    def derivative(self, t: Tensor) -> Tensor:
        return 2 * (1 - t.double())

    def inverse(self, m: Tensor) -> Tensor:
        return m.double() / (1 + torch.sqrt(1 - m.double()))

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t.double()) ** 2


class TruncatedNormalSchedule(MaskSchedule):
    """Quantiles of a normal distribution cut to [lowest, 1]: mask ratios to train with, whose m(0) is `lowest`.

    MAR's by default (Li et al., "Autoregressive Image Generation without Vector Quantization", 2024).

    Args:
        mean: of the normal distribution before the cut.
        deviation: its standard deviation, > 0.
        lowest: in [0, 1).

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, mean: float = 1.0, deviation: float = 0.25, lowest: float = 0.7) -> None:
        if deviation <= 0:
            raise ValueError(f"deviation must be > 0, got {deviation}")
        if not 0 <= lowest < 1:
            raise ValueError(f"lowest must lie in [0, 1), got {lowest}")
        self.mean = mean
        self.deviation = deviation
        self.lowest = lowest
        ends = torch.tensor([lowest, 1.0], dtype=torch.float64)
        below, above = torch.special.ndtr((ends - mean) / deviation).tolist()
        if above <= below:
            raise ValueError(f"mean={mean} lies too many deviations of {deviation} from [{lowest}, 1]")
        self._below, self._mass = below, above - below

    def mask_probability(self, t: Tensor) -> Tensor:
        score = torch.special.ndtri(self._below + self._mass * t.double())
        return (self.mean + self.deviation * score).clamp(self.lowest, 1)

    def derivative(self, t: Tensor) -> Tensor:
        score = (self.mask_probability(t) - self.mean) / self.deviation
        density = torch.exp(-(score**2) / 2) / (2 * pi) ** 0.5
        return self.deviation * self._mass / density

    def inverse(self, m: Tensor) -> Tensor:
        score = (m.double() - self.mean) / self.deviation
        return (torch.special.ndtr(score) - self._below) / self._mass
