"""Solvers draw data by undoing Gaussian noise: each steps from noise at t = 1 through falling times to data at t = 0.

`Solver.__call__` is the loop, `step` one step of it; a solver differs from another in nothing else. A step from t to s
reads the network at t, once or twice, as an `Estimate` of the data and the noise in x_t:

- `DDPM`: draw x_s from its law given x_t (Ho et al., 2020, algorithm 2), on fewer steps than in training too.
- `DDIM`: the same noise, or some of it anew (Song et al., 2021, eq. 12).
- `Euler`, `Heun`: the probability-flow ODE dx/dt = u(x, t), to first and second order.
- `ConsistencySampler`: jump to the data, and back to less noise (Song et al., "Consistency Models", 2023, algorithm 1).
- `EulerMaruyama`, `HeunMaruyama`: the SDE of the same laws, with fresh noise at every step (SiT, Ma et al., 2024, eq.
  7-10).

Noise comes from outside, so that a sample has its own whatever the batch; nothing in the loop waits for a device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Any, Literal, Self

import torch
from torch import Tensor

from discrete_lit.diffusion.gaussian import Denoise, GaussianPath, Posterior, SteppedPath, shifted

Noise = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a solver: from x_t at `t` to x_s at `s`, with what it may need."""

    t: float
    s: float
    path: GaussianPath
    denoise: Denoise
    noise: Callable[[], Tensor]
    """Makes fresh noise of the shape of x; called once at most."""
    smallest_variance: Tensor | None = None
    """The posterior's variance of this step, or where that is 0 of the one before it; of a path of steps alone."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Hold the times of a solver on a path, and what goes with each step: the same in every draw."""

    path: GaussianPath
    settings: list[object]
    times: list[float]
    smallest_variances: list[Tensor | None]


class Solver(ABC):
    """Solves for data by undoing noise in T steps.

    Args:
        steps: T; of a path of steps at most its own.
        shift: of the times towards the noise, `shift t / (1 + (shift - 1) t)`; 1 is none. Not for a path of steps.
        start: the first time, 1 but for networks that do not know pure noise.
        spacing: which steps of a path of steps are taken: `"even"`, rounded from even distances between the first and
            the last (ADM, DiT, MAR), or `"strided"`, every (T_path // T)-th from the first on (DDIM, LDM).
        offset: added to the strided steps; LDM and Stable Diffusion have 1.
        last: what the last step leads to, on a path of steps: the clean data, or `"first_step"` as in LDM's DDIM, x at
            the first step, which is taken for the data.

    Raises:
        ValueError: a setting out of its range; in use, more steps than the path has.
    """

    def __init__(
        self,
        steps: int,
        *,
        shift: float = 1.0,
        start: float = 1.0,
        spacing: Literal["even", "strided"] = "even",
        offset: int = 0,
        last: Literal["clean", "first_step"] = "clean",
    ) -> None:
        if shift <= 0 or not 0 < start <= 1:
            raise ValueError(f"shift must be above 0 and start in (0, 1], got {shift} and {start}")
        if spacing not in ("even", "strided"):
            raise ValueError(f"spacing must be 'even' or 'strided', got {spacing!r}")
        self.steps = steps
        self._check_steps()
        self.shift = shift
        self.start = start
        self.spacing: Literal["even", "strided"] = spacing
        self.offset = offset
        self.last: Literal["clean", "first_step"] = last
        self._plan: _Plan | None = None

    @property
    def evaluations(self) -> int:
        """The number of evaluations of the network in a draw: here one for each step."""
        return self.steps

    def with_steps(self, steps: int) -> Self:
        """Make the same solver of another number of steps.

        Raises:
            ValueError: fewer steps than it needs.
        """
        made = copy(self)
        made.steps = steps
        made._check_steps()
        return made

    def _check_steps(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def times(self, path: GaussianPath) -> list[float]:
        """List the T + 1 times, from noise to data.

        Raises:
            ValueError: more steps than the path has, or times that it does not have.
        """
        if not isinstance(path, SteppedPath):
            even = [self.start * (1 - number / self.steps) for number in range(self.steps + 1)]
            return [shifted(torch.tensor(t, dtype=torch.float64), self.shift).item() for t in even]
        if self.steps > path.steps:
            raise ValueError(f"steps={self.steps} exceeds the {path.steps} steps that the network was trained on")
        if self.shift != 1 or self.start != 1:
            raise ValueError(
                f"shift={self.shift} and start={self.start} are for paths in continuous time, not of steps"
            )
        if self.spacing == "even":
            taken = even_steps(path.steps, self.steps)
        else:
            taken = [self.offset + number * (path.steps // self.steps) for number in range(self.steps)]
        if taken[-1] >= path.steps:
            raise ValueError(f"steps={self.steps} with offset={self.offset} takes step {taken[-1]} of {path.steps}")
        end = 0.0 if self.last == "clean" else path.time(0)
        return [*(path.time(step) for step in reversed(taken)), end]

    def __call__(self, denoise: Denoise, start: Tensor, *, path: GaussianPath, noise: Noise | None = None) -> Tensor:
        """Draw data.

        Args:
            denoise: from x_t `(B, ...)` and the time t to what the network thinks of it, guided if wanted.
            start: `(B, ...)` noise at the first time: standard normal at t = 1.
            path: that the network was trained on.
            noise: makes the fresh noise of the i-th step, from 0, of the shape of `start`; needed by solvers that add
                any.

        Returns:
            The data `(B, ...)`.

        Raises:
            ValueError: no noise where some is needed.
        """
        x, plan = start, self._planned(path)
        for number, (t, s) in enumerate(pairwise(plan.times)):

            def fresh(number: int = number) -> Tensor:
                if noise is None:
                    raise ValueError(f"{type(self).__name__} adds noise at every step: give noise")
                return noise(number)

            at_hand = Step(
                t=t, s=s, path=path, denoise=denoise, noise=fresh, smallest_variance=plan.smallest_variances[number]
            )
            x = self.step(x, at_hand)
        return x

    @abstractmethod
    def step(self, x: Tensor, step: Step) -> Tensor:
        """Return x_s, given x_t `(B, ...)`."""

    def _planned(self, path: GaussianPath) -> _Plan:
        """Give the plan of the newest path, made once for it, and again where a setting was changed since."""
        settings = [value for name, value in sorted(vars(self).items()) if name != "_plan"]
        plan = self._plan
        if plan is None or plan.path is not path or plan.settings != settings:
            times = self.times(path)
            variances = self._smallest_variances(path, times)
            self._plan = plan = _Plan(path=path, settings=settings, times=times, smallest_variances=variances)
        return plan

    def _smallest_variances(self, path: GaussianPath, times: list[float]) -> list[Tensor | None]:
        if not isinstance(path, SteppedPath):
            return [None] * self.steps
        like = torch.empty((), dtype=torch.float64)
        variances = [Posterior.between(path, t, s, like=like).variance for t, s in pairwise(times)]
        if len(variances) > 1 and variances[-1] == 0:
            variances[-1] = variances[-2]
        return list(variances)


class DDPM(Solver):
    """Draw each x_s from N(mean, variance) given x_t and the estimated data; the last step has no noise.

    Args:
        steps: T.
        variance: of a step: `"learned"` where the network has it, `"smallest"` (the posterior's) or `"largest"` (beta).
        temperature: multiplies the fresh noise (MAR).
        settings: of `Solver`.
    """

    def __init__(
        self,
        steps: int,
        *,
        variance: Literal["learned", "smallest", "largest"] = "learned",
        temperature: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(steps, **settings)
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        self.variance: Literal["learned", "smallest", "largest"] = variance
        self.temperature = temperature

    def step(self, x: Tensor, step: Step) -> Tensor:
        estimate = step.denoise(x, step.t)
        posterior = Posterior.between(step.path, step.t, step.s, like=x)
        mean = posterior.mean(estimate.data, x)
        if step.s == 0:
            return mean
        if self.variance == "learned":
            if estimate.variance is None:
                raise ValueError("variance='learned' needs a network that predicts it: take 'smallest' or 'largest'")
            smallest = posterior.variance if step.smallest_variance is None else step.smallest_variance
            deviation = torch.exp(posterior.log_variance(estimate, smallest=smallest) / 2)
        else:
            wanted = posterior.variance if self.variance == "smallest" else posterior.largest_variance
            deviation = wanted.sqrt().to(x.dtype)
        return mean + self.temperature * deviation * step.noise()


class DDIM(Solver):
    """Keep the estimated noise, or draw a part of it anew (Song et al., "DDIM", 2021, eq. 12 and 16).

    x_s = alpha_s x + sqrt(sigma_s^2 - d^2) eps + d z, where d = `eta` times the deviation of DDPM's posterior. On
    straight lines with eta = 0 it is `Euler`.

    Args:
        steps: T.
        eta: 0 adds no noise, 1 as much as DDPM.
        temperature: multiplies the fresh noise.
        settings: of `Solver`.
    """

    def __init__(self, steps: int, *, eta: float = 0.0, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(steps, **settings)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        self.eta = eta
        self.temperature = temperature

    def step(self, x: Tensor, step: Step) -> Tensor:
        path, estimate = step.path, step.denoise(x, step.t)
        alpha, sigma = (path.at(function, step.s, x) for function in (path.alpha, path.sigma))
        if self.eta == 0:
            return alpha * estimate.data + sigma * estimate.noise
        deviation = self.eta * Posterior.between(path, step.t, step.s, like=x).variance.sqrt()
        kept = (path.at(path.sigma, step.s, deviation) ** 2 - deviation**2).clamp(min=0).sqrt()
        mean = alpha * estimate.data + kept.to(x.dtype) * estimate.noise
        return mean if step.s == 0 else mean + self.temperature * deviation.to(x.dtype) * step.noise()


class Euler(Solver):
    """Follow the velocity of x_t to s: x_s = x_t + (s - t) u(x_t, t)."""

    def step(self, x: Tensor, step: Step) -> Tensor:
        return x + (step.s - step.t) * step.denoise(x, step.t).velocity(step.path, step.t)


class Heun(Solver):
    """Follow the mean of the velocities at t and, where Euler leads to, at s: of second order, two passes a step.

    Args:
        steps: T.
        euler_last: take the last step by Euler, for networks that do not know t = 0 (Karras et al., 2022).
        settings: of `Solver`.
    """

    def __init__(self, steps: int, *, euler_last: bool = False, **settings: Any) -> None:
        super().__init__(steps, **settings)
        self.euler_last = euler_last

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - self.euler_last

    def step(self, x: Tensor, step: Step) -> Tensor:
        first = step.denoise(x, step.t).velocity(step.path, step.t)
        reached = x + (step.s - step.t) * first
        if step.s == 0 and self.euler_last:
            return reached
        second = step.denoise(reached, step.s).velocity(step.path, step.s)
        return x + (step.s - step.t) * (first + second) / 2


class ConsistencySampler(Solver):
    """Jump from noise to the data, add noise of the next time anew, and jump again (Song et al., 2023, algorithm 1).

    x_s = alpha_s f(x_t, t) + sigma_s z, where f, the estimate of the data, is a consistency function: `ConsistencyLoss`
    trains one. One step is one evaluation; more cost more and are nearer to the data.

    Args:
        steps: T; by default the times are 1, 1 - 1/T, ..., before `shift`.
        temperature: multiplies the fresh noise.
        settings: of `Solver`.
    """

    def __init__(self, steps: int = 1, *, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(steps, **settings)
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        self.temperature = temperature

    def step(self, x: Tensor, step: Step) -> Tensor:
        path, data = step.path, step.denoise(x, step.t).data
        if step.s == 0:
            return data
        alpha, sigma = (path.at(function, step.s, x) for function in (path.alpha, path.sigma))
        return alpha * data + self.temperature * sigma * step.noise()


class EulerMaruyama(Solver):
    """Follow the velocity and the score, and add fresh noise (SiT, eq. 7 with w = sigma, its default).

    x_s = x_t - h (u - w score) + sqrt(2 w h) z with h = t - s and w = `strength` sigma(t): laws are the ODE's for any
    w. The last step, from `last_step` to 0, has no noise.

    Args:
        steps: T, the last among them.
        strength: of the noise, > 0.
        last_step: the length of the last step; the others are even above it.
        temperature: multiplies the fresh noise.
        last_drift: of the last step: with the score as in the others (SiT's "Mean"), or the velocity alone
            (BitDance).
        settings: of `Solver`.
    """

    def __init__(
        self,
        steps: int,
        *,
        strength: float = 1.0,
        last_step: float = 0.04,
        temperature: float = 1.0,
        last_drift: Literal["score", "velocity"] = "score",
        **settings: Any,
    ) -> None:
        super().__init__(steps, **settings)
        if strength <= 0 or not 0 < last_step < 1:
            raise ValueError(f"strength must be above 0 and last_step in (0, 1), got {strength} and {last_step}")
        self.strength = strength
        self.last_step = last_step
        self.temperature = temperature
        self.last_drift: Literal["score", "velocity"] = last_drift

    def _check_steps(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, the last among them, got {self.steps}")

    def times(self, path: GaussianPath) -> list[float]:
        if isinstance(path, SteppedPath):
            raise ValueError("EulerMaruyama needs a path in continuous time, this one has steps: use DDPM")
        span, others = self.start - self.last_step, self.steps - 1
        even = [self.start - span * number / others for number in range(self.steps)]
        return [*(shifted(torch.tensor(t, dtype=torch.float64), self.shift).item() for t in even), 0.0]

    def step(self, x: Tensor, step: Step) -> Tensor:
        path, h = step.path, step.t - step.s
        estimate = step.denoise(x, step.t)
        drift = estimate.velocity(path, step.t)
        if step.s == 0 and self.last_drift == "velocity":
            return x - h * drift
        # w score = -strength sigma noise / sigma: no division.
        mean = x - h * (drift + self.strength * estimate.noise)
        if step.s == 0:
            return mean
        spread = sqrt(2 * self.strength * path.number(path.sigma, step.t) * h)
        return mean + self.temperature * spread * step.noise()


class HeunMaruyama(EulerMaruyama):
    """Add the fresh noise of a step first, then follow the drift by Heun's two passes (SiT's SDE "Heun"; EDM's order).

    Of the first order in law as `EulerMaruyama` is, with smaller errors; the last step is the same.

    Args:
        steps: T, the last among them.
        settings: of `EulerMaruyama`.
    """

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - 1

    def step(self, x: Tensor, step: Step) -> Tensor:
        if step.s == 0:
            return super().step(x, step)
        path, h = step.path, step.t - step.s
        spread = sqrt(2 * self.strength * path.number(path.sigma, step.t) * h)
        x = x + self.temperature * spread * step.noise()
        first = self._drift(x, step, step.t)
        return x - h * (first + self._drift(x - h * first, step, step.s)) / 2

    def _drift(self, x: Tensor, step: Step, t: float) -> Tensor:
        estimate = step.denoise(x, t)
        return estimate.velocity(step.path, t) + self.strength * estimate.noise


def even_steps(available: int, wanted: int) -> list[int]:
    """List `wanted` of the steps 0 to `available - 1` at even distances, both ends among them (ADM's respacing)."""
    if wanted == 1:
        return [0]
    stride, steps, exact = (available - 1) / (wanted - 1), [], 0.0
    for _ in range(wanted):
        steps.append(round(exact))
        exact += stride
    return steps
