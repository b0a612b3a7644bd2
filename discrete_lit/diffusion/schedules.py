"""Noise schedules m(t): the probability that noise has replaced a token by time t, rising from 0 to 1.

With alpha = 1 - m, noise gives `q(x_t | x_0) = alpha x_0 + (1 - alpha) noise` (`processes.py`): where noise masks,
m(t) is the mask ratio. Losses draw their times from a schedule (`losses.py`), samplers step along one. By paper:

- MaskGIT (Chang et al., 2022): `CosineSchedule`, `LinearSchedule`, `SquareSchedule`; `ArccosSchedule` is that of
  MaskBit, TiTok and Halton-MaskGIT. MaskGIT writes them with the decoding ratio r = 1 - t: its gamma(r) is m(1 - r).
- MAR (Li et al., 2024): `TruncatedNormalSchedule`.
- D3PM (Austin et al., 2021): `LinearSchedule` of absorbing D3PM, `D3PMCosineSchedule` of uniform D3PM.
- SEDD (Lou et al., 2024): `LogLinearSchedule`, `GeometricSchedule`.
- MDLM (Sahoo et al., 2024): `LogLinearSchedule`, `MDLMCosineSchedule`, `CosineSquaredSchedule`.
- MD4 (Shi et al., 2024): `LinearSchedule`, `CosineSchedule` and `PowerSchedule`, which its code squeezes by
  `TruncatedSchedule`; its samplers go along them in another time, `WarpedSchedule`.
- GIDD (von Rütte et al., 2025): `GIDDSchedule`, beside its process in `gidd.py`.

Two curves are called "cosine": MaskGIT's and MD4's sin(pi t / 2), and MDLM's 1 - cos(pi t / 2), its mirror image.

All arithmetic is float64, in forms that do not cancel near t = 0, nor alpha near t = 1. What a schedule makes of the
times of a batch is a `NoiseLevel` (`noise_level.py`).
"""

from abc import ABC, abstractmethod
from math import log, pi, sin

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.synchronisation import on_device


class MaskSchedule(ABC):
    """A schedule m(t) with its derivative and inverse.

    All methods take a tensor in [0, 1] of any shape and return float64 of this shape. A schedule of one's own defines
    the three abstract methods, and `alpha` and `rate` too if 1 - m would lose digits where m is next to 1.
    """

    @abstractmethod
    def mask_probability(self, t: Tensor) -> Tensor:
        """Return m(t); it rises from 0 to 1 unless the schedule says otherwise."""

    @abstractmethod
    def derivative(self, t: Tensor) -> Tensor:
        """Return m'(t)."""

    @abstractmethod
    def inverse(self, m: Tensor) -> Tensor:
        """Return the t with m(t) = m."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha(t) = 1 - m(t), the probability that noise has left a token alone."""
        return 1 - self.mask_probability(t)

    def rate(self, t: Tensor) -> Tensor:
        """Return sigma'(t) = m'(t) / alpha(t), of the total noise sigma = -log alpha; infinite where m is 1."""
        return self.derivative(t) / self.alpha(t)

    def ends(self) -> tuple[float, float]:
        """Return m(0) and m(1); where they are not 0 and 1, the mean of a loss over t may be no bound."""
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return float(self.mask_probability(ends)[0]), 1 - float(self.alpha(ends)[1])


def _joined(t: Tensor, early: Tensor, late: Tensor) -> tuple[Tensor, Tensor]:
    """Return m and alpha, of a formula for m that is right early in time, and one for alpha that is right late.

    So neither cancels, and the ends 0 and 1 are exact: a processor's sin(pi / 2) may be next to 1.
    """
    is_early = t < 0.5
    return torch.where(is_early, early, 1 - late), torch.where(is_early, 1 - early, late)


class CosineSchedule(MaskSchedule):
    """The cosine of MaskGIT, gamma(r) = cos(pi r / 2), and of MD4 (Shi et al., 2024): m = sin(pi t / 2)."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return self._both(t.double())[0]

    def derivative(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t.double()) * pi / 2) * pi / 2

    def inverse(self, m: Tensor) -> Tensor:
        return torch.where(m == 1, 1, torch.asin(m.double()) * 2 / pi)

    def alpha(self, t: Tensor) -> Tensor:
        return self._both(t.double())[1]

    def _both(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _joined(t, torch.sin(t * pi / 2), 2 * torch.sin((1 - t) * pi / 4) ** 2)


class ArccosSchedule(MaskSchedule):
    """The arccos of MaskBit, TiTok and Halton-MaskGIT, gamma(r) = arccos(r) 2 / pi: m = arccos(1 - t) 2 / pi."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return self._both(t.double())[0]

    def derivative(self, t: Tensor) -> Tensor:
        return 2 / pi / torch.sqrt(t.double() * (2 - t.double()))

    def inverse(self, m: Tensor) -> Tensor:
        return torch.where(m == 1, 1, (2 * torch.sin(m.double() * pi / 4) ** 2).clamp(max=1))

    def alpha(self, t: Tensor) -> Tensor:
        return self._both(t.double())[1]

    def _both(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _joined(t, torch.asin(torch.sqrt(t / 2)) * 4 / pi, torch.asin(1 - t) * 2 / pi)


class LinearSchedule(MaskSchedule):
    """The linear schedule m = t, gamma(r) = 1 - r.

    Absorbing D3PM reaches it by beta_t = 1 / (T - t + 1), and calls it mutual information, or "jsd" (Austin et al.,
    2021).
    """

    def mask_probability(self, t: Tensor) -> Tensor:
        return t.double()

    def derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def inverse(self, m: Tensor) -> Tensor:
        return m.double()


class SquareSchedule(MaskSchedule):
    """The square schedule of MaskGIT, gamma(r) = 1 - r^2: m = 1 - (1 - t)^2."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return t.double() * (2 - t.double())

    def derivative(self, t: Tensor) -> Tensor:
        return 2 * (1 - t.double())

    def inverse(self, m: Tensor) -> Tensor:
        return m.double() / (1 + torch.sqrt(1 - m.double()))

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t.double()) ** 2


class PowerSchedule(MaskSchedule):
    """The polynomial schedules of MD4, alpha = 1 - t^k (Shi et al., 2024, figure 2): m = t^k.

    Args:
        exponent: k > 0.

    Raises:
        ValueError: the exponent is not positive.
    """

    def __init__(self, exponent: float) -> None:
        if exponent <= 0:
            raise ValueError(f"exponent of PowerSchedule must be > 0, got {exponent}")
        self.exponent = exponent

    def mask_probability(self, t: Tensor) -> Tensor:
        return t.double() ** self.exponent

    def derivative(self, t: Tensor) -> Tensor:
        return self.exponent * t.double() ** (self.exponent - 1)

    def inverse(self, m: Tensor) -> Tensor:
        return m.double() ** (1 / self.exponent)

    def alpha(self, t: Tensor) -> Tensor:
        return -torch.expm1(self.exponent * torch.log(t.double()))


class TruncatedNormalSchedule(MaskSchedule):
    """The training mask ratios of MAR: m(t) is the t-quantile of a normal distribution cut to [lowest, 1].

    The defaults are MAR's (Li et al., "Autoregressive Image Generation without Vector Quantization", 2024).

    Args:
        mean: mean of the normal distribution before the cut.
        deviation: its standard deviation, > 0.
        lowest: m(0), in [0, 1).

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(self, *, mean: float = 1.0, deviation: float = 0.25, lowest: float = 0.7) -> None:
        if deviation <= 0:
            raise ValueError(f"deviation must be > 0, got {deviation}")
        if not 0 <= lowest < 1:
            raise ValueError(f"lowest must lie in [0, 1), got {lowest}")
        self.mean = mean
        self.deviation = deviation
        self.lowest = lowest
        self._first, self._last = (lowest - mean) / deviation, (1 - mean) / deviation
        self._width = (1 - lowest) / deviation
        if not -_FARTHEST < self._last or not self._first < _FARTHEST:
            raise ValueError(f"mean={mean} lies too many deviations of {deviation} from [{lowest}, 1]")
        first, width = torch.tensor([[self._first], [self._width]], dtype=torch.float64)
        self._log_mass = float(_log_normal_mass(first, width))

    def mask_probability(self, t: Tensor) -> Tensor:
        above_lowest, below_one = self._from_ends(t)
        return torch.where(t <= 0.5, self.lowest + above_lowest, 1 - below_one)

    def alpha(self, t: Tensor) -> Tensor:
        above_lowest, below_one = self._from_ends(t)
        return torch.where(t <= 0.5, 1 - self.lowest - above_lowest, below_one)

    def derivative(self, t: Tensor) -> Tensor:
        above_lowest, below_one = (part / self.deviation for part in self._from_ends(t))
        score = torch.where(t <= 0.5, self._first + above_lowest, self._last - below_one)
        return self.deviation * torch.exp(self._log_mass - _log_density(score))

    def inverse(self, m: Tensor) -> Tensor:
        above = ((m.double() - self.lowest) / self.deviation).clamp(0, self._width)
        first = torch.full_like(above, self._first)
        share = torch.exp(_log_normal_mass(first, above) - self._log_mass).clamp(max=1)
        return torch.where(above == self._width, 1, share)

    def _from_ends(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return m - m(0), which is right in the first half of time, and 1 - m, which is right in the second."""
        t = t.double()
        first, last = torch.full_like(t, self._first), torch.full_like(t, -self._last)
        early = _normal_distance(first, t.clamp(max=0.5).log() + self._log_mass)
        late = _normal_distance(last, (1 - t).clamp(max=0.5).log() + self._log_mass)
        return self.deviation * early.clamp(max=self._width), self.deviation * late.clamp(max=self._width)


# More deviations than this away, float64 has no density of a normal distribution.
_FARTHEST = 37.0


def _gauss_legendre() -> Tensor:
    """Return the nodes and weights of the quadrature on [0, 1], `(2, 24)`."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(24))
    return torch.stack(((nodes + 1) / 2, weights / 2))


def _log_density(score: Tensor) -> Tensor:
    """Return the logarithm of the standard normal density."""
    return -(score**2) / 2 - log(2 * pi) / 2


def _log_normal_mass(start: Tensor, width: Tensor) -> Tensor:
    """Return log(Phi(z + w) - Phi(z)) with all digits, of `start` z and `width` w >= 0 of one shape; -inf at w = 0."""
    # Where the density hardly changes: by quadrature, in which nothing cancels.
    nodes, weights = on_device(_gauss_legendre, device=width.device)
    places = width[..., None] * nodes
    near = (torch.exp(-start[..., None] * places - places**2 / 2) * weights).sum(dim=-1) * width
    # Beyond: on the falling side by the scaled complementary error function, on the rising one by Phi itself.
    falls = torch.exp(-start * width - width**2 / 2)
    tails = torch.special.erfcx(start.clamp(min=0) / 2**0.5), torch.special.erfcx((start + width).clamp(min=0) / 2**0.5)
    falling = (pi / 2) ** 0.5 * (tails[0] - falls * tails[1])
    lower, upper = torch.special.log_ndtr(start), torch.special.log_ndtr(start + width)
    rising = upper + torch.log(-torch.expm1(lower - upper))
    is_near = start.abs() * width + width**2 / 2 < 3
    scaled = torch.where(is_near, near, falling).log() + _log_density(start)
    return torch.where(is_near | (start >= 0), scaled, rising)


def _normal_distance(start: Tensor, log_mass: Tensor) -> Tensor:
    """Return the w with Phi(z + w) - Phi(z) = exp(log_mass), of `start` z; for masses up to half of what is above z."""
    # Next to z the density is an exponential. Where it falls, this is good enough up to half of what is above z.
    steepness = start.abs().clamp(min=1e-9)
    share = log_mass - _log_density(start) + steepness.log()  # of what is above, in logarithms
    near = torch.where(start < 0, F.softplus(share), -torch.log1p(-share.exp())) / steepness
    # Where it rises, Phi(z + w) is known. Its logarithm is concave: Newton's steps from below never go too far.
    level = torch.logaddexp(torch.special.log_ndtr(start), log_mass)
    end = -torch.sqrt(-2 * level)
    for _ in range(6):
        reached = torch.special.log_ndtr(end)
        end = end + (level - reached) * torch.exp(reached - _log_density(end))
    width = torch.where((start < 0) & (near > 0.05), end - start, near)
    for _ in range(4):  # Newton's steps in log w
        gap = _log_normal_mass(start, width) - log_mass
        slope = torch.exp(_log_density(start + width) - log_mass) * width
        width = torch.where(width > 0, width * torch.exp(-gap / slope), width)
    return width


class ClippedSchedule(MaskSchedule):
    """A curve f(t) from 0 to 1, clipped so that the total noise stays finite: m = (1 - epsilon) f(t).

    The code of SEDD and of MDLM calls epsilon `eps`.

    Args:
        epsilon: alpha(1), the probability that a token outlasts all noise, in [0, 1); 0 clips nothing.

    Raises:
        ValueError: epsilon is out of its range.
    """

    def __init__(self, epsilon: float = 1e-3) -> None:
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon of {type(self).__name__} must lie in [0, 1), got {epsilon}")
        self.epsilon = epsilon

    @abstractmethod
    def _curve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return f(t), 1 - f(t) and f'(t)."""

    @abstractmethod
    def _curve_inverse(self, value: Tensor) -> Tensor:
        """Return the t with f(t) = value."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return (1 - self.epsilon) * _joined(t, *self._curve(t.double())[:2])[0]

    def alpha(self, t: Tensor) -> Tensor:
        left = _joined(t, *self._curve(t.double())[:2])[1]
        return left + self.epsilon * (1 - left)

    def derivative(self, t: Tensor) -> Tensor:
        return (1 - self.epsilon) * self._curve(t.double())[2]

    def inverse(self, m: Tensor) -> Tensor:
        value = (m.double() / (1 - self.epsilon)).clamp(max=1)
        return torch.where(value == 1, 1, self._curve_inverse(value))


class LogLinearSchedule(ClippedSchedule):
    """The log-linear schedule of SEDD and MDLM, sigma = -log(1 - (1 - epsilon) t): m = (1 - epsilon) t.

    Args:
        epsilon: alpha(1), the probability that a token outlasts all noise, in [0, 1).
    """

    def _curve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return t, 1 - t, torch.ones_like(t)

    def _curve_inverse(self, value: Tensor) -> Tensor:
        return value


class LogSinSchedule(ClippedSchedule):
    """The "log-sin" schedule, sigma = -log(1 - (1 - epsilon) sin(pi t / 2)): m = (1 - epsilon) sin(pi t / 2).

    "Discrete Diffusion for Image Generation" trains with a "log-sin" schedule that it does not define, and SEDD's code
    has none. This is our reading: SEDD's log-linear schedule with a sine in the place of t. But for epsilon it is
    MaskGIT's `CosineSchedule`. The weight of a cross-entropy, m' / m = (pi / 2) cot(pi t / 2), is free of epsilon.

    Args:
        epsilon: alpha(1), the probability that a token outlasts all noise, in [0, 1).
    """

    def _curve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle = t * pi / 2
        return torch.sin(angle), 2 * torch.sin((1 - t) * pi / 4) ** 2, torch.sin((1 - t) * pi / 2) * pi / 2

    def _curve_inverse(self, value: Tensor) -> Tensor:
        return torch.asin(value) * 2 / pi


class CosineSquaredSchedule(ClippedSchedule):
    """The cosine of Nichol & Dhariwal (2021), MDLM's "cosine squared": m = (1 - epsilon) sin(pi t / 2)^2.

    With epsilon = 0, alpha is cos(pi t / 2)^2.

    Args:
        epsilon: alpha(1), the probability that a token outlasts all noise, in [0, 1).
    """

    def _curve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle = t * pi / 2
        left = torch.sin((1 - t) * pi / 2)  # cos(angle)
        return torch.sin(angle) ** 2, left**2, torch.sin(angle) * left * pi

    def _curve_inverse(self, value: Tensor) -> Tensor:
        return torch.asin(torch.sqrt(value)) * 2 / pi


class MDLMCosineSchedule(ClippedSchedule):
    """The "cosine" of MDLM: m = (1 - epsilon) (1 - cos(pi t / 2)); with epsilon = 0, alpha is cos(pi t / 2).

    (Sahoo et al., "Simple and Effective Masked Diffusion Language Models", 2024.) MaskGIT's is `CosineSchedule`.

    Args:
        epsilon: alpha(1), the probability that a token outlasts all noise, in [0, 1).
    """

    def _curve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle = t * pi / 2
        return 2 * torch.sin(angle / 2) ** 2, torch.sin((1 - t) * pi / 2), torch.sin(angle) * pi / 2

    def _curve_inverse(self, value: Tensor) -> Tensor:
        return torch.asin(torch.sqrt(value / 2)) * 4 / pi


class GeometricSchedule(MaskSchedule):
    """The geometric schedule of SEDD, sigma = sigma_min^(1 - t) sigma_max^t: m = 1 - exp(-sigma).

    The defaults are SEDD's (Lou et al., 2024). m(0) is not 0 but 1 - exp(-sigma_min).

    Args:
        sigma_min: total noise at t = 0, > 0.
        sigma_max: total noise at t = 1, above `sigma_min`, at most 700: beyond, float64 cannot tell alpha from 0.

    Raises:
        ValueError: a setting is out of its range.
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
        # An m that float64 cannot tell from 1 belongs to t = 1.
        return (torch.log(-torch.log1p(-m.double()) / self.sigma_min) / self._growth).clamp(0, 1)

    def _total_noise(self, t: Tensor) -> Tensor:
        return torch.where(t == 1, self.sigma_max, self.sigma_min * torch.exp(self._growth * t.double()))


class D3PMCosineSchedule(MaskSchedule):
    """The cosine of D3PM, not squared: alpha = f(t) / f(0) with f = cos((t + s) / (1 + s) pi / 2).

    (Austin et al., 2021.) D3PM's steps beta_t = 1 - f(t) / f(t - 1/T) multiply up to this quotient.

    Args:
        offset: s, > 0.

    Raises:
        ValueError: the offset is not positive.
    """

    def __init__(self, offset: float = 0.008) -> None:
        if offset <= 0:
            raise ValueError(f"offset of D3PMCosineSchedule must be > 0, got {offset}")
        self.offset = offset
        self._speed = pi / 2 / (1 + offset)
        self._first = sin(self._speed)  # f(0), as cos(offset * speed) = sin(pi / 2 - offset * speed)

    def mask_probability(self, t: Tensor) -> Tensor:
        return self._both(t.double())[0]

    def alpha(self, t: Tensor) -> Tensor:
        return self._both(t.double())[1]

    def _both(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # cos a - cos b = 2 sin((b + a) / 2) sin((b - a) / 2).
        middle, half = self._speed * (self.offset + t / 2), self._speed * t / 2
        early = 2 * torch.sin(middle) * torch.sin(half) / self._first
        return _joined(t, early, torch.sin(self._speed * (1 - t)) / self._first)

    def derivative(self, t: Tensor) -> Tensor:
        return self._speed * torch.sin(self._speed * (t.double() + self.offset)) / self._first

    def inverse(self, m: Tensor) -> Tensor:
        # The angle from a = f^-1(f(0)) to b, cos b = cos a - d, by differences that do not cancel where d is small.
        drop = self._first * m.double()
        cos_a, sin_a = self._first, sin(self._speed * self.offset)
        cos_b = cos_a - drop
        sin_b = torch.sqrt(1 - cos_b**2)
        rise = drop * (cos_a + cos_b) / (sin_a + sin_b)  # sin b - sin a
        t = torch.atan2(rise * cos_a + drop * sin_a, cos_a * cos_b + sin_a * sin_b) / self._speed
        return torch.where(m == 1, 1, t.clamp(max=1))


class TruncatedSchedule(MaskSchedule):
    """Another schedule squeezed into [lowest, highest], as MD4's code squeezes its own by 1e-4 at both ends.

    The mean of a loss over t then misses what the cut ends of [0, 1] contribute, and is smaller than the bound: with
    1,024 tokens and `lowest = 1e-3` it misses 64% of what single masked tokens contribute.

    Args:
        schedule: the schedule to squeeze, from 0 to 1.
        lowest: m(0).
        highest: m(1).

    Raises:
        ValueError: the ends are out of [0, 1] or in the wrong order.
    """

    def __init__(self, schedule: MaskSchedule, *, lowest: float = 1e-4, highest: float = 1 - 1e-4) -> None:
        if not 0 <= lowest < highest <= 1:
            raise ValueError(f"0 <= lowest < highest <= 1 must hold, got {lowest} and {highest}")
        self.schedule = schedule
        self.lowest = lowest
        self.highest = highest

    def mask_probability(self, t: Tensor) -> Tensor:
        return self._both(t)[0]

    def alpha(self, t: Tensor) -> Tensor:
        return self._both(t)[1]

    def _both(self, t: Tensor) -> tuple[Tensor, Tensor]:
        span = self.highest - self.lowest
        early = self.lowest + span * self.schedule.mask_probability(t)
        return _joined(t, early, 1 - self.highest + span * self.schedule.alpha(t))

    def derivative(self, t: Tensor) -> Tensor:
        return (self.highest - self.lowest) * self.schedule.derivative(t)

    def inverse(self, m: Tensor) -> Tensor:
        return self.schedule.inverse(((m.double() - self.lowest) / (self.highest - self.lowest)).clamp(0, 1))


class WarpedSchedule(MaskSchedule):
    """Another schedule in another time, m(t) = m_1(m_2(t)).

    As the `grid` of a sampler it puts the steps of a model that was trained with m_1 at the times m_2(i / T), as MD4's
    code does with the cosine (Shi et al., 2024).

    Args:
        schedule: m_1.
        times: m_2, whose values are the times of the first.
    """

    def __init__(self, schedule: MaskSchedule, times: MaskSchedule) -> None:
        self.schedule = schedule
        self.times = times

    def mask_probability(self, t: Tensor) -> Tensor:
        return self.schedule.mask_probability(self.times.mask_probability(t))

    def derivative(self, t: Tensor) -> Tensor:
        return self.schedule.derivative(self.times.mask_probability(t)) * self.times.derivative(t)

    def inverse(self, m: Tensor) -> Tensor:
        return self.times.inverse(self.schedule.inverse(m))

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(self.times.mask_probability(t))
