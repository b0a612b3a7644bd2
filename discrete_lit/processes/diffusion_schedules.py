"""Schedules of discrete diffusion, by their names in the literature; some leave m short of 0 or 1.

Two curves are called "cosine": sin(pi t / 2) is `CosineSchedule`, MaskGIT's and MD4's, and its mirror image
1 - cos(pi t / 2) is `MDLMCosineSchedule`.
"""

from abc import abstractmethod
from math import log, pi, sin

import torch
from torch import Tensor

from discrete_lit.processes.schedules import MaskSchedule


class ShortSchedule(MaskSchedule):
    """m = (1 - epsilon) f(t) with f from 0 to 1, so that the total noise -log(1 - m) stays finite.

    Args:
        epsilon: what is left of the data at t = 1, in [0, 1).

    Raises:
        ValueError: an epsilon out of its range.
    """

    def __init__(self, epsilon: float = 1e-3) -> None:
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon of {type(self).__name__} must lie in [0, 1), got {epsilon}")
        self.epsilon = epsilon

    @abstractmethod
    def _shape(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(t), 1 - f(t) and f'(t)."""

    @abstractmethod
    def _shape_inverse(self, value: Tensor) -> Tensor:
        """The t with f(t) = value."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return (1 - self.epsilon) * self._shape(t.double())[0]

    def alpha(self, t: Tensor) -> Tensor:
        return self.epsilon + (1 - self.epsilon) * self._shape(t.double())[1]

    def derivative(self, t: Tensor) -> Tensor:
        return (1 - self.epsilon) * self._shape(t.double())[2]

    def inverse(self, m: Tensor) -> Tensor:
        return self._shape_inverse((m.double() / (1 - self.epsilon)).clamp(max=1))


class LogLinearSchedule(ShortSchedule):
    """sigma = -log(1 - (1 - epsilon) t), so m = (1 - epsilon) t (Lou et al., "SEDD", 2024).

    Args:
        epsilon: what is left of the data at t = 1, in [0, 1).
    """

    def _shape(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return t, 1 - t, torch.ones_like(t)

    def _shape_inverse(self, value: Tensor) -> Tensor:
        return value


class LogSinSchedule(ShortSchedule):
    """sigma = -log(1 - (1 - epsilon) sin(pi t / 2)), so m = (1 - epsilon) sin(pi t / 2).

    "Discrete Diffusion for Image Generation" trains with a "log-sin" schedule that it does not define, and SEDD's code
    has none. This is our reading, by analogy with SEDD's log-linear one, whose t becomes a sine; but for epsilon it is
    `CosineSchedule`, MaskGIT's. Cross-entropies have the weight m' / m = (pi / 2) cot(pi t / 2), free of epsilon.

    Args:
        epsilon: what is left of the data at t = 1, in [0, 1).
    """

    def _shape(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle = t * pi / 2
        return torch.sin(angle), 2 * torch.sin((1 - t) * pi / 4) ** 2, torch.cos(angle) * pi / 2

    def _shape_inverse(self, value: Tensor) -> Tensor:
        return torch.asin(value) * 2 / pi


class CosineSquaredSchedule(ShortSchedule):
    """alpha = cos(pi t / 2)^2 but for epsilon, so m = (1 - epsilon) sin(pi t / 2)^2 (Nichol & Dhariwal, 2021; MDLM).

    Args:
        epsilon: what is left of the data at t = 1, in [0, 1).
    """

    def _shape(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle = t * pi / 2
        return torch.sin(angle) ** 2, torch.sin((1 - t) * pi / 2) ** 2, torch.sin(t * pi) * pi / 2

    def _shape_inverse(self, value: Tensor) -> Tensor:
        return torch.asin(torch.sqrt(value)) * 2 / pi


class MDLMCosineSchedule(ShortSchedule):
    """What MDLM calls cosine: alpha = cos(pi t / 2) but for epsilon, so m = (1 - epsilon) (1 - cos(pi t / 2)).

    (Sahoo et al., "Simple and Effective Masked Diffusion Language Models", 2024.)

    Args:
        epsilon: what is left of the data at t = 1, in [0, 1).
    """

    def _shape(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle = t * pi / 2
        return 2 * torch.sin(angle / 2) ** 2, torch.sin((1 - t) * pi / 2), torch.sin(angle) * pi / 2

    def _shape_inverse(self, value: Tensor) -> Tensor:
        return torch.asin(torch.sqrt(value / 2)) * 4 / pi


class GeometricSchedule(MaskSchedule):
    """sigma = sigma_min^(1 - t) sigma_max^t (Lou et al., "SEDD", 2024, whose numbers are the defaults).

    m(0) is not 0 but 1 - exp(-sigma_min).

    Args:
        sigma_min: total noise at t = 0, > 0.
        sigma_max: at t = 1, above `sigma_min` and at most 700: beyond that no float64 tells exp(-sigma) from 0.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, sigma_min: float = 1e-5, sigma_max: float = 20.0) -> None:
        if not 0 < sigma_min < sigma_max <= 700:
            raise ValueError(f"0 < sigma_min < sigma_max <= 700 must hold, got {sigma_min} and {sigma_max}")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self._growth = log(sigma_max / sigma_min)

    def mask_probability(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._total_noise(t))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._total_noise(t))

    def rate(self, t: Tensor) -> Tensor:
        return self._growth * self._total_noise(t)

    def derivative(self, t: Tensor) -> Tensor:
        return self.rate(t) * self.alpha(t)

    def inverse(self, m: Tensor) -> Tensor:
        # Of an m that float64 does not tell from 1, the end.
        return (torch.log(-torch.log1p(-m.double()) / self.sigma_min) / self._growth).clamp(0, 1)

    def _total_noise(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._growth * t.double())


class D3PMCosineSchedule(MaskSchedule):
    """D3PM's cosine: alpha = f(t) / f(0) with f = cos((t + s) / (1 + s) pi / 2), not squared (Austin et al., 2021).

    Their beta_t = 1 - f(t) / f(t - 1/T) multiply up to this quotient.

    Args:
        offset: s, > 0.

    Raises:
        ValueError: an offset that is not positive.
    """

    def __init__(self, offset: float = 0.008) -> None:
        if offset <= 0:
            raise ValueError(f"offset of D3PMCosineSchedule must be > 0, got {offset}")
        self.offset = offset
        self._speed = pi / 2 / (1 + offset)
        self._first = sin(self._speed)  # f(0), as cos(offset * speed) = sin(pi / 2 - offset * speed)

    def mask_probability(self, t: Tensor) -> Tensor:
        # cos a - cos b = 2 sin((b + a) / 2) sin((b - a) / 2).
        middle, half = self._speed * (self.offset + t.double() / 2), self._speed * t.double() / 2
        return 2 * torch.sin(middle) * torch.sin(half) / self._first

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(self._speed * (1 - t.double())) / self._first

    def derivative(self, t: Tensor) -> Tensor:
        return self._speed * torch.sin(self._speed * (t.double() + self.offset)) / self._first

    def inverse(self, m: Tensor) -> Tensor:
        # The angle from a = f^-1(f(0)) to b, cos b = cos a - d, by differences that do not cancel where d is small.
        drop = self._first * m.double()
        cos_a, sin_a = self._first, sin(self._speed * self.offset)
        cos_b = cos_a - drop
        sin_b = torch.sqrt(1 - cos_b**2)
        rise = drop * (cos_a + cos_b) / (sin_a + sin_b)  # sin b - sin a
        return torch.atan2(rise * cos_a + drop * sin_a, cos_a * cos_b + sin_a * sin_b) / self._speed


class TruncatedSchedule(MaskSchedule):
    """Another schedule squeezed into [lowest, highest], as MD4 squeezes its own by 1e-4 at both ends.

    What is left out of [0, 1] makes averages over t smaller than the bound that they stand for: with 1,024 tokens and
    `lowest = 1e-3`, 64% of what single masked tokens contribute.

    Args:
        schedule: from 0 to 1.
        lowest: m(0).
        highest: m(1).

    Raises:
        ValueError: ends out of [0, 1] or in the wrong order.
    """

    def __init__(self, schedule: MaskSchedule, lowest: float = 1e-4, highest: float = 1 - 1e-4) -> None:
        if not 0 <= lowest < highest <= 1:
            raise ValueError(f"0 <= lowest < highest <= 1 must hold, got {lowest} and {highest}")
        self.schedule = schedule
        self.lowest = lowest
        self.highest = highest

    def mask_probability(self, t: Tensor) -> Tensor:
        return self.lowest + (self.highest - self.lowest) * self.schedule.mask_probability(t)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.highest + (self.highest - self.lowest) * self.schedule.alpha(t)

    def derivative(self, t: Tensor) -> Tensor:
        return (self.highest - self.lowest) * self.schedule.derivative(t)

    def inverse(self, m: Tensor) -> Tensor:
        return self.schedule.inverse(((m.double() - self.lowest) / (self.highest - self.lowest)).clamp(0, 1))
