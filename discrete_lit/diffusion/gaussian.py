"""Gaussian diffusion and flow matching: how noise is added to vectors, and what a network's output says about it.

A path mixes data x and noise eps ~ N(0, I), from `t = 0` (clean) to `t = 1` (noise):

    x_t = alpha(t) x + sigma(t) eps,        velocity u_t = alpha'(t) x + sigma'(t) eps

- `RectifiedPath`: flow matching on straight lines (Lipman et al., 2023; Liu et al., "Rectified Flow", 2023; SiT).
- `TrigonometricPath`: the same variance at every time, on a quarter circle (SiT's GVP; Salimans & Ho, 2022).
- `LinearRatePath`: the variance-preserving SDE (Song et al., "Score-Based Generative Modeling", 2021).
- `SteppedPath`: the T steps of DDPM (Ho et al., 2020) and of its betas: linear, scaled linear (LDM), cosine (Nichol &
  Dhariwal, 2021). DiT, LDM, MAR and HART are trained on it.

`GaussianDenoiser` reads a network's output: as the noise, the data, v (Salimans & Ho, 2022) or the velocity, each an
affine map of every other given x_t, with the learned-range variance of Nichol & Dhariwal where the network has it.
What training minimises stands in `gaussian_losses.py`, what draws in `solvers.py`.

Authors differ in the direction of time: DDPM counts steps from 0 to T - 1, which are `t = (k + 1) / T` here; SiT and
BitDance run from noise at 0 to data at 1, so that their t is `1 - t` here and their velocity is minus ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import pi
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# Operations are counted on tensors without data, which cannot be looked at.
from torch._subclasses.fake_tensor import FakeTensor

PredictionKind = Literal["noise", "data", "v", "velocity"]
Times = Tensor | float
Denoise = Callable[[Tensor, float], "Estimate"]
# Far more than the times of a solver, and than one in a training that takes floats for its times should fill.
_MOST_KEPT = 2**14


class GaussianPath(ABC):
    """A path x_t = alpha(t) x + sigma(t) eps between data and noise.

    The four methods of t take float64 in [0, 1] of any shape and return float64 of this shape.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha(t), which falls from 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return sigma(t), which rises from 0."""

    @abstractmethod
    def alpha_slope(self, t: Tensor) -> Tensor:
        """Return alpha'(t)."""

    @abstractmethod
    def sigma_slope(self, t: Tensor) -> Tensor:
        """Return sigma'(t)."""

    def network_time(self, t: Tensor) -> Tensor:
        """Return the time in the units that networks on this path read; here t itself."""
        return t

    def training_times(self, uniforms: Tensor) -> Tensor:
        """Turn uniform numbers in (0, 1) into uniform times of training."""
        return uniforms

    def add_noise(self, data: Tensor, noise: Tensor, t: Times) -> Tensor:
        """Return x_t.

        Args:
            data: x `(B, ...)`.
            noise: eps, the same shape.
            t: one time for all, or `(B,)`.
        """
        return self.at(self.alpha, t, data) * data + self.at(self.sigma, t, data) * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Times) -> Tensor:
        """Return u_t = dx_t / dt; arguments as for `add_noise`."""
        return self.at(self.alpha_slope, t, data) * data + self.at(self.sigma_slope, t, data) * noise

    def number(self, function: Callable[[Tensor], Tensor], t: float) -> float:
        """Compute a function of one time, on the host."""
        return self._at_number(function, t).item()

    def kept(self, key: Hashable, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Give numbers of the host that `compute` made when they were first asked for, float64: a solver asks for those
        of its times again in every draw."""
        known: dict[Hashable, list[float]] = vars(self).setdefault("_kept", {})
        if key not in known:
            made = list(compute())
            if any(isinstance(value, FakeTensor) for value in made):
                return made
            if len(known) >= _MOST_KEPT:
                known.clear()
            known[key] = [value.item() for value in made]
        return [torch.tensor(value, dtype=torch.float64) for value in known[key]]

    def at(self, function: Callable[[Tensor], Tensor], t: Times, like: Tensor) -> Tensor:
        """Compute a function of t in float64, and shape it to be multiplied with `like (B, ...)` in its precision."""
        value = _shaped(function, t, like.ndim) if isinstance(t, Tensor) else self._at_number(function, t)
        return value.to(like.dtype)

    def _at_number(
        self, function: Callable[[Tensor], Tensor], t: float
    ) -> Tensor:  # on the host: no device is waited for
        return self.kept((function.__name__, t), lambda: [function(torch.tensor(t, dtype=torch.float64))])[0]


def _shaped(function: Callable[[Tensor], Tensor], t: Times, dimensions: int) -> Tensor:
    """A function of t in float64: of a number on the host, of `(B,)` as `(B, 1, …)`."""
    if not isinstance(t, Tensor):
        return function(torch.tensor(t, dtype=torch.float64))
    return function(t.double()).reshape(t.shape + (1,) * (dimensions - t.ndim))


class RectifiedPath(GaussianPath):
    """Straight lines: alpha = 1 - t, sigma = t, and a velocity eps - x that does not depend on t."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_slope(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_slope(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class TrigonometricPath(GaussianPath):
    """A quarter circle: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * pi / 2)

    def alpha_slope(self, t: Tensor) -> Tensor:
        return -torch.sin(t * pi / 2) * pi / 2

    def sigma_slope(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * pi / 2) * pi / 2


class LinearRatePath(GaussianPath):
    """The variance-preserving SDE with beta(t) = start + (end - start) t (Song et al., 2021, eq. 32-33).

    alpha = exp(-1/2 integral of beta), sigma^2 = 1 - alpha^2.

    Args:
        start: beta at t = 0.
        end: beta at t = 1.

    Raises:
        ValueError: rates that are not 0 < start < end.
    """

    def __init__(self, start: float = 0.1, end: float = 20.0) -> None:
        if not 0 < start < end:
            raise ValueError(f"0 < start < end must hold, got {start} and {end}")
        self.start, self.end = start, end

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._integral(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def alpha_slope(self, t: Tensor) -> Tensor:
        return -self._rate(t) * self.alpha(t) / 2

    def sigma_slope(self, t: Tensor) -> Tensor:  # infinite at 0
        return self._rate(t) * self.alpha(t) ** 2 / (2 * self.sigma(t))

    def _rate(self, t: Tensor) -> Tensor:
        return self.start + (self.end - self.start) * t

    def _integral(self, t: Tensor) -> Tensor:
        return self.start * t + (self.end - self.start) * t**2 / 2


class SteppedPath(GaussianPath):
    """The T steps of DDPM: step k from 0 stands at t = (k + 1) / T, and t = 0 is clean.

    Other times than these belong to no step and are refused; slopes do not exist, so that `velocity` is no prediction
    on this path.

    Args:
        betas: of the T steps, in (0, 1); `linear_betas`, `scaled_linear_betas` and `cosine_betas` make them.

    Raises:
        ValueError: betas out of (0, 1), or none; in use, a time between two steps.
    """

    def __init__(self, betas: Sequence[float]) -> None:
        values = np.asarray(betas, dtype=np.float64)
        wrong = values[~((values > 0) & (values < 1))]
        if values.ndim != 1 or not len(values) or len(wrong):
            raise ValueError(
                "betas must be numbers in (0, 1), one for each step, got "
                + (f"{len(wrong)} of {values.size} outside, such as {wrong[0]:.4g}" if len(wrong) else f"{betas!r:.60}")
            )
        self.steps = len(values)
        # As float64 products in turn, which is how the published tables were made.
        self.squared_alphas = torch.from_numpy(np.append(1.0, np.cumprod(1.0 - values)))
        self._on_devices = {torch.device("cpu"): self.squared_alphas}

    def alpha(self, t: Tensor) -> Tensor:
        return self._squared(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._squared(t)).sqrt()

    def alpha_slope(self, t: Tensor) -> Tensor:
        raise ValueError("a path of steps has no slopes: its networks predict the noise, the data or v")

    sigma_slope = alpha_slope

    def network_time(self, t: Tensor) -> Tensor:
        """Return the step k, counted from 0, as published networks read it."""
        return t * self.steps - 1

    def training_times(self, uniforms: Tensor) -> Tensor:
        return (torch.floor(uniforms.double() * self.steps).clamp(max=self.steps - 1) + 1) / self.steps

    def time(self, step: int) -> float:
        """Return the time of step k, counted from 0; -1 is clean."""
        return (step + 1) / self.steps

    def _squared(self, t: Tensor) -> Tensor:
        exact = t * self.steps
        step = exact.round()
        if t.device.type == "cpu" and not isinstance(t, FakeTensor) and bool((exact - step).abs().max() > 1e-6):
            raise ValueError(
                f"this path has {self.steps} steps, at multiples of 1 / {self.steps}, got t = {t.tolist()}"
            )
        if t.device not in self._on_devices:
            self._on_devices[t.device] = self.squared_alphas.to(t.device)
        return self._on_devices[t.device][step.long()]


class ScheduledPath(SteppedPath):
    """The T steps of DDPM with one of the known schedules, named in a configuration.

    Args:
        schedule: of the betas: `"linear"` (DDPM, DiT), `"scaled_linear"` (LDM, Stable Diffusion) or `"cosine"` (Nichol
            & Dhariwal, MAR).
        steps: T.
        start: the first beta of a linear one, by default as published; of T = 1,000 steps, as for `linear_betas`.
        end: the last one.

    Raises:
        ValueError: an unknown schedule, ends of the cosine, or betas out of (0, 1).
    """

    def __init__(
        self,
        schedule: Literal["linear", "scaled_linear", "cosine"] = "linear",
        *,
        steps: int = 1000,
        start: float | None = None,
        end: float | None = None,
    ) -> None:
        makers = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "cosine": cosine_betas}
        if schedule not in makers:
            raise ValueError(f"schedule must be one of {', '.join(makers)}, got {schedule!r}")
        ends = {name: value for name, value in (("start", start), ("end", end)) if value is not None}
        if schedule == "cosine" and ends:
            raise ValueError(f"a cosine schedule has no start and end, got {ends}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        try:
            super().__init__(makers[schedule](steps, **ends))
        except ValueError as error:
            raise ValueError(
                f"a {schedule} schedule of steps={steps}, ends {ends or 'as published'}: {error}"
            ) from None
        self.schedule, self.start, self.end = schedule, start, end


def linear_betas(steps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> list[float]:
    """List the betas of DDPM and DiT, which rise linearly; scaled by 1000 / T for other numbers of steps."""
    scale = 1000 / steps
    return np.linspace(scale * start, scale * end, steps, dtype=np.float64).tolist()


def scaled_linear_betas(steps: int = 1000, *, start: float = 0.0015, end: float = 0.0195) -> list[float]:
    """List the betas of LDM and Stable Diffusion, whose square roots rise linearly."""
    return (np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2).tolist()


def cosine_betas(steps: int = 1000, *, largest: float = 0.999, offset: float = 0.008) -> list[float]:
    """List the betas of Nichol & Dhariwal (2021, eq. 17): alpha^2 is cos^2(pi/2 (t + offset) / (1 + offset))."""

    def squared_alpha(t: float) -> float:
        return float(np.cos((t + offset) / (1 + offset) * pi / 2) ** 2)

    return [min(1 - squared_alpha((k + 1) / steps) / squared_alpha(k / steps), largest) for k in range(steps)]


def shifted(t: Tensor, shift: float) -> Tensor:
    """Shift times towards the noise: `shift t / (1 + (shift - 1) t)`; keeps 0 and 1."""
    return shift * t / (1 + (shift - 1) * t)


# --- What a network's output says ---


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The data and the noise that x_t is made of, as a network thinks: `x_t = alpha data + sigma noise`."""

    data: Tensor
    """The expected x, `(B, ...)`."""
    noise: Tensor
    """The expected eps, the same shape."""
    variance: Tensor | None = None
    """Where the network has it: of a step's log variance, the place between the smallest, -1, and the largest, 1."""

    def velocity(self, path: GaussianPath, t: Times) -> Tensor:
        """Return the expected dx_t / dt."""
        return path.velocity(self.data, self.noise, t)

    def score(self, path: GaussianPath, t: Times) -> Tensor:
        """Return the gradient of log p(x_t), -noise / sigma."""
        return -self.noise / path.at(path.sigma, t, self.noise)


class GaussianDenoiser:
    """Reads a network's output at x_t as an `Estimate`.

    With `velocity`, u = alpha' x + sigma' eps; with `v`, v = alpha eps - sigma x, which on a variance-preserving path
    of constant speed is the velocity up to a factor. Guidance acts on outputs: being affine, it is the same on all.

    Args:
        path: of the noise.
        prediction: what the output is.
        learned_variance: the output has twice the channels, along the second dimension of images `(B, C, H, W)` and the
            last of vectors `(B, D)`: the prediction first, then the variance (Nichol & Dhariwal, 2021, eq. 15).
        clip: the largest absolute value of the data, where it is known to be bounded.
        smallest_sigma: sigma is taken as at least this where the data's estimate is divided by it (BitDance's 0.05).
    """

    def __init__(
        self,
        path: GaussianPath,
        *,
        prediction: PredictionKind = "noise",
        learned_variance: bool = False,
        clip: float | None = None,
        smallest_sigma: float = 0.0,
    ) -> None:
        if prediction not in ("noise", "data", "v", "velocity"):
            raise ValueError(f"prediction must be 'noise', 'data', 'v' or 'velocity', got {prediction!r}")
        if prediction == "velocity" and isinstance(path, SteppedPath):
            raise ValueError("a path of steps has no velocity: its networks predict 'noise', 'data' or 'v'")
        self.path = path
        self.prediction: PredictionKind = prediction
        self.learned_variance = learned_variance
        self.clip = clip
        self.smallest_sigma = smallest_sigma

    def __call__(self, output: Tensor, x_t: Tensor, t: Times, *, clipped: bool = True) -> Estimate:
        """Read `output`, which the network made of `x_t (B, ...)` at the time `t`, one or `(B,)`."""
        variance = None
        if self.learned_variance:
            output, variance = output.chunk(2, dim=self.channels(x_t))
        data, noise = self._split(output, x_t, t)
        if self.clip is not None and clipped:
            data = data.clamp(-self.clip, self.clip)
            noise = self.noise_from_data(data, x_t, t)
        return Estimate(data=data, noise=noise, variance=variance)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        """Guide outputs `(B, ...)`: `uncond + scale (cond - uncond)` of the prediction; the variance is the first.

        So do DiT and MAR; `scale` is a number, or broadcasts with the outputs.
        """
        if not self.learned_variance:
            return _guided(conditional, unconditional, scale)
        channels = self.channels(conditional)
        predicted, variance = conditional.chunk(2, dim=channels)
        return torch.cat((_guided(predicted, unconditional.chunk(2, dim=channels)[0], scale), variance), dim=channels)

    @staticmethod
    def channels(x: Tensor) -> int:
        """Return the dimension of the channels: the second of images, the last of vectors."""
        return 1 if x.ndim > 3 else -1

    def target(self, data: Tensor, noise: Tensor, t: Times) -> Tensor:
        """Return what the network should predict, `(B, ...)`."""
        path = self.path
        if self.prediction == "noise":
            return noise
        if self.prediction == "data":
            return data
        if self.prediction == "velocity":
            return path.velocity(data, noise, t)
        return path.at(path.alpha, t, data) * noise - path.at(path.sigma, t, data) * data

    def _split(self, output: Tensor, x_t: Tensor, t: Times) -> tuple[Tensor, Tensor]:
        path = self.path
        alpha, sigma = path.at(path.alpha, t, x_t), path.at(path.sigma, t, x_t)
        if self.prediction == "noise":
            return (x_t - sigma * output) / alpha, output
        if self.prediction == "data":
            return output, self.noise_from_data(output, x_t, t)
        if self.prediction == "velocity":
            alpha_slope, sigma_slope = path.at(path.alpha_slope, t, x_t), path.at(path.sigma_slope, t, x_t)
            determinant = alpha * sigma_slope - sigma * alpha_slope
            data = (sigma_slope * x_t - sigma * output) / determinant
            return data, (alpha * output - alpha_slope * x_t) / determinant
        power = alpha**2 + sigma**2
        return (alpha * x_t - sigma * output) / power, (sigma * x_t + alpha * output) / power

    def noise_from_data(self, data: Tensor, x_t: Tensor, t: Times) -> Tensor:
        """Return the noise in `x_t` if `data` is what it was added to; arguments `(B, ...)`, and times."""
        path = self.path
        alpha, sigma = path.at(path.alpha, t, x_t), path.at(path.sigma, t, x_t)
        if not self.smallest_sigma:
            return (x_t - alpha * data) / sigma
        # The same, written so that on straight lines the velocity is (x_t - x) over the bounded sigma.
        return data + (x_t - (alpha + sigma) * data) / sigma.clamp(min=self.smallest_sigma)


def _guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    weight = scale.to(conditional.dtype) if isinstance(scale, Tensor) else scale
    return torch.lerp(unconditional, conditional, weight)


# --- One step backwards ---


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """The law of x_s given x_t and the data, s < t: N(data_weight x + state_weight x_t, variance) (DDPM, eq. 6-7)."""

    data_weight: Tensor
    state_weight: Tensor
    variance: Tensor
    largest_variance: Tensor
    """The variance of x_t given x_s, beta in DDPM: that of x_s given x_t alone if the data were standard normal."""

    @classmethod
    def between(cls, path: GaussianPath, t: Times, s: Times, *, like: Tensor) -> "Posterior":
        """Compute the law at s given t, in float64; each weight is shaped to be multiplied with `like (B, ...)`."""

        def compute() -> tuple[Tensor, ...]:
            alpha_t, alpha_s = (_shaped(path.alpha, time, like.ndim) for time in (t, s))
            sigma_t, sigma_s = (_shaped(path.sigma, time, like.ndim) for time in (t, s))
            ratio = alpha_t / alpha_s
            added = sigma_t**2 - (ratio * sigma_s) ** 2
            data_weight, state_weight = alpha_s * added / sigma_t**2, ratio * sigma_s**2 / sigma_t**2
            return data_weight, state_weight, added * sigma_s**2 / sigma_t**2, added

        numbers = isinstance(t, float | int) and isinstance(s, float | int)
        weights = path.kept(("posterior", t, s), compute) if numbers else compute()
        return cls(**dict(zip(("data_weight", "state_weight", "variance", "largest_variance"), weights, strict=True)))

    def mean(self, data: Tensor, x_t: Tensor) -> Tensor:
        """Return the mean `(B, ...)`."""
        return self.data_weight.to(x_t.dtype) * data + self.state_weight.to(x_t.dtype) * x_t

    def log_variance(self, estimate: Estimate, *, smallest: Tensor) -> Tensor:
        """Return the learned log variance, between that of the posterior and the largest (Nichol & Dhariwal, eq. 15).

        Args:
            estimate: of a network that has the variance.
            smallest: the posterior's variance where it is not 0, else that of the step before.
        """
        assert estimate.variance is not None
        place = (estimate.variance + 1) / 2
        low, high = smallest.log().to(place.dtype), self.largest_variance.log().to(place.dtype)
        return place * high + (1 - place) * low
