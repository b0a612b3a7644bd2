"""Consistency models: a network that leads from any point of a path to its data in one evaluation.

The probability-flow ODE leads from each x_t to one x_0, and the consistency function f(x_t, t) = x_0 is the same all
along the way (Song et al., "Consistency Models", 2023, section 3). f(x_t, t) is pulled to f(x_s, s), which is held
fixed, at a neighbouring time t - s = 1 / N, and f(x_0, 0) = x_0 by construction. Where x_s comes from is the choice:

- Distillation (algorithm 2): a trained model leads x_t = alpha(t) x + sigma(t) eps one step of its ODE back to x_s.
- Training (algorithm 3): x_s = alpha(s) x + sigma(s) eps has the noise of x_t. No teacher is needed, and there is a
  bias that vanishes with 1 / N (theorem 2).

N doubles in training, and the distance is Pseudo-Huber, as in Song and Dhariwal, "Improved Techniques for Training
Consistency Models", 2024, sections 3.3 and 3.4.

f is the estimate of the data that a `GaussianDenoiser` reads of an output, and f(x, 0) = x whatever the network says.
On straight lines it is x_t - t u of the velocity u, and (alpha x_t - sigma v) / (alpha^2 + sigma^2) of v. At t = 1
these are x_1 - u and -v: of u, what a network misses of the noise stays in the image. `ConsistencySampler` draws by f.

The times lie at even distances, so N decides on fine detail. On straight lines a direction in which the data have the
deviation 0.02 keeps 58% of it with N = 40 in training and 88% with N = 160 (the product of Cov(x_s, x_t) / Var(x_t)
over the steps), in distillation by Heun 64% and 96%; a direction with 0.2 keeps 94% and 98%, or 99% and all.
"""

from collections.abc import Callable
from math import floor, log2, sqrt
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.diffusion.gaussian import Estimate, GaussianDenoiser, GaussianPath, SteppedPath

Predict = Callable[[Tensor, Tensor], Tensor]
"""From x_t `(B, ...)` and times `(B,)` to a network's output."""
Teacher = Callable[[Tensor, Tensor], Estimate]
"""From x_t `(B, ...)` and times `(B,)` to what a trained model thinks of it, guided if wanted."""


class ConsistencyLoss:
    """Cost how far f moves between neighbouring points of a path (Song et al., 2023, eq. 7 and 10, theta- = theta).

    Args:
        denoiser: of a prediction of v or of the velocity, on a path in continuous time.
        intervals: N, into which the times are cut when training ends, and in validation.
        first_intervals: N of the first steps; it doubles at even distances over `doubling_steps` (Song and Dhariwal,
            2024, section 3.4).
        doubling_steps: training steps until N is `intervals`.
        huber: c of the distance sqrt(|a - b|^2 + c^2) - c, over the root of the number of dimensions, > 0.
        distance_of: the data that both points lead to, or the network's prediction, which is this difference over
            |df / d prediction|, sigma / (alpha^2 + sigma^2) of v: small where there is little noise, so that the data
            hardly teach what is predicted there, on which every later time is built.
        solver: of a teacher's ODE: one evaluation of the teacher in a step, or two, for second order (the paper's).

    Raises:
        ValueError: a setting out of its range; a prediction or a path without f(x_0, 0) = x_0.
    """

    def __init__(
        self,
        denoiser: GaussianDenoiser,
        *,
        intervals: int = 160,
        first_intervals: int = 10,
        doubling_steps: int = 100_000,
        huber: float = 0.00054,
        distance_of: Literal["data", "prediction"] = "data",
        solver: Literal["euler", "heun"] = "heun",
    ) -> None:
        if not 1 <= first_intervals <= intervals:
            raise ValueError(
                f"1 <= first_intervals <= intervals must hold, got {first_intervals} and intervals={intervals}"
            )
        if doubling_steps < 0 or huber <= 0:
            raise ValueError(
                f"doubling_steps must be at least 0 and huber above 0, got {doubling_steps} and huber={huber}"
            )
        if distance_of not in ("data", "prediction"):
            raise ValueError(f"distance_of must be 'data' or 'prediction', got {distance_of!r}")
        if solver not in ("euler", "heun"):
            raise ValueError(f"solver must be 'euler' or 'heun', got {solver!r}")
        if isinstance(denoiser.path, SteppedPath):
            raise ValueError("a consistency function needs a path in continuous time, this one has steps")
        if denoiser.prediction not in ("v", "velocity") or denoiser.learned_variance:
            raise ValueError(
                "a consistency function is read of a prediction of 'v' or 'velocity' without a variance: at t = 0 it "
                f"must be the data themselves; got {denoiser.prediction!r}"
            )
        self.denoiser = denoiser
        self.intervals = intervals
        self.first_intervals = first_intervals
        self.doubling_steps = doubling_steps
        self.huber = huber
        self.distance_of: Literal["data", "prediction"] = distance_of
        self.solver: Literal["euler", "heun"] = solver

    def intervals_at(self, step: int | None) -> int:
        """Return N at a training step, from 0; None stands for the end of training."""
        if step is None or step >= self.doubling_steps:
            return self.intervals
        # N is reached with one doubling more than fit whole, as in the paper: each lasts as long.
        each = floor(self.doubling_steps / (floor(log2(self.intervals / self.first_intervals)) + 1))
        return min(self.first_intervals * 2 ** (step // max(each, 1)), self.intervals)

    def __call__(
        self,
        predict: Predict,
        data: Tensor,
        noise: Tensor,
        *,
        t: Tensor,
        step: int | None = None,
        teacher: Teacher | None = None,
    ) -> Tensor:
        """Return the loss of each sample, `(B,)`: the distance of f at neighbouring times, times N.

        Args:
            predict: the network, given everything else that it reads.
            data: x `(B, ...)`.
            noise: eps, the same shape.
            t: `(B,)` in (0, 1], rounded up to the next of the N times.
            step: of training, which decides N; None in validation.
            teacher: what f is distilled from; without one f is trained on data alone.
        """
        count = self.intervals_at(step)
        later = torch.ceil(t.double() * count).clamp(1, count)
        t, s = later / count, (later - 1) / count
        path = self.denoiser.path
        x_t = path.add_noise(data, noise, t)
        student = self.function(predict, x_t, t)
        with torch.no_grad():
            x_s = path.add_noise(data, noise, s) if teacher is None else ode_step(teacher, path, x_t, t, s, self.solver)
            target = self.function(predict, x_s, s)
        difference = (student - target).flatten(1)
        if self.distance_of == "prediction":
            difference = difference / self.slope(x_t, t).flatten(1)
        c = self.huber * sqrt(difference.shape[1])
        return count * (torch.sqrt((difference**2).sum(dim=1) + c**2) - c)

    def slope(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return |df / d prediction| of every number, `(B, ...)`, for t > 0."""
        zeros = torch.zeros_like(x_t)
        ends = (self.denoiser(zeros + value, x_t, t, clipped=False).data for value in (0, 1))
        return torch.sub(*ends).abs()

    def function(self, predict: Predict, x_t: Tensor, t: Tensor) -> Tensor:
        """Return f(x_t, t), `(B, ...)`, float32 or better."""
        output = predict(x_t, t)
        return self.denoiser(output.to(torch.promote_types(output.dtype, torch.float32)), x_t, t, clipped=False).data


def ode_step(
    teacher: Teacher, path: GaussianPath, x_t: Tensor, t: Tensor, s: Tensor, solver: Literal["euler", "heun"]
) -> Tensor:
    """Follow a teacher's probability-flow ODE from t to s < t (Song et al., 2023, eq. 6).

    To s = 0 it leads by the teacher's estimate of the data: where sigma has an infinite slope there, the velocity has
    one too. On straight lines that is Euler's step.

    Args:
        teacher: the model.
        path: of its noise.
        x_t: `(B, ...)`.
        t: `(B,)` in (0, 1], of each sample.
        s: `(B,)` in [0, 1).
        solver: Euler's or Heun's.

    Returns:
        x_s, `(B, ...)`.
    """
    each = (-1, *(1,) * (x_t.ndim - 1))
    length, last = (s - t).to(x_t.dtype).view(each), (s == 0).view(each)
    first = teacher(x_t, t)
    velocity = first.velocity(path, t)
    if solver == "heun":
        # A time above 0 for the rows that lead to 0, which do not look at the second evaluation.
        there = torch.where(s == 0, t, s)
        velocity = (velocity + teacher(x_t + length * velocity, there).velocity(path, there)) / 2
    return torch.where(last, first.data, x_t + length * velocity)
