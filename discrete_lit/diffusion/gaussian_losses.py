"""Losses of training on Gaussian noise, the times that it draws, and the bound of -log p.

`DenoisingLoss` is the squared error of flow matching, of DDPM and of whatever else a network predicts, with the
learned variance's term where it has one; `variational_bound` is an upper bound of -log p in nats, of any path.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log, pi
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.diffusion.gaussian import (
    Denoise,
    Estimate,
    GaussianDenoiser,
    GaussianPath,
    Posterior,
    PredictionKind,
    SteppedPath,
    shifted,
)


class TrainingTimes(ABC):
    """A law of the times of training; a function of uniform numbers, so that the sample decides and not the batch."""

    @abstractmethod
    def __call__(self, uniforms: Tensor) -> Tensor:
        """Turn uniform numbers `(B,)` in (0, 1) into times `(B,)` in (0, 1), float64."""


class UniformTimes(TrainingTimes):
    """Times drawn uniformly."""

    def __call__(self, uniforms: Tensor) -> Tensor:
        return uniforms.double()


class LogitNormalTimes(TrainingTimes):
    """Times whose logit is normal, then shifted towards the noise (Esser et al., "Stable Diffusion 3", 2024, 3.1, 5.3).

    With n normal, t = sigmoid(n), then t -> shift t / (1 + (shift - 1) t).

    Args:
        mean: of the logit; above 0 is noisier. A paper whose time runs from noise to data has the opposite sign.
        deviation: of the logit, > 0.
        shift: 1 is none; SD3 uses 3 for larger images.
    """

    def __init__(self, mean: float = 0.0, deviation: float = 1.0, *, shift: float = 1.0) -> None:
        if deviation <= 0 or shift <= 0:
            raise ValueError(f"deviation and shift must be above 0, got {deviation} and {shift}")
        self.mean, self.deviation, self.shift = mean, deviation, shift

    def __call__(self, uniforms: Tensor) -> Tensor:
        t = torch.sigmoid(self.mean + self.deviation * torch.special.ndtri(uniforms.double()))
        return shifted(t, self.shift)


class DenoisingLoss:
    """The mean squared error of a network that reads x_t, and with a learned variance a bound's term beside it.

        t = loss.times(uniforms)
        x_t = loss.path.add_noise(data, noise, t)
        terms = loss(network(x_t, loss.path.network_time(t)), data, noise, x_t=x_t, t=t)  # each (B,)

    Args:
        denoiser: how the network's output is read.
        times: how times are drawn; uniformly by default.
        error_of: what the squared error is of: the network's own prediction, or another that is computed of it, as
            BitDance and JiT take the velocity's of a network that predicts the data.

    Raises:
        ValueError: a learned variance on a path without steps.
    """

    def __init__(
        self,
        denoiser: GaussianDenoiser,
        *,
        times: TrainingTimes | None = None,
        error_of: PredictionKind | None = None,
    ) -> None:
        if denoiser.learned_variance and not isinstance(denoiser.path, SteppedPath):
            raise ValueError("a learned variance is of the steps of a SteppedPath")
        self.denoiser = denoiser
        self.path = denoiser.path
        self._times = times or UniformTimes()
        self.error_of: PredictionKind = error_of or denoiser.prediction

    def times(self, uniforms: Tensor) -> Tensor:
        """Turn uniform numbers `(B,)` into times `(B,)` of the path."""
        return self.path.training_times(self._times(uniforms))

    def __call__(self, output: Tensor, data: Tensor, noise: Tensor, *, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return the terms of each sample, `(B,)` each: `error`, and with a learned variance `bound`, in bits.

        The bound's term is that of the sample's step, the mean over dimensions, with the mean held fixed: it trains the
        variance alone (Nichol & Dhariwal, 2021, eq. 16). The loss is the sum of the terms.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        denoiser = self.denoiser
        prediction = output.chunk(2, dim=denoiser.channels(x_t))[0] if denoiser.learned_variance else output
        if self.error_of == denoiser.prediction:
            difference = prediction - denoiser.target(data, noise, t)
        else:
            difference = self._as(denoiser(output, x_t, t, clipped=False), t) - self._as(
                _true(denoiser, data, x_t, t), t
            )
        terms = {"error": _mean(difference**2)}
        if denoiser.learned_variance:
            assert isinstance(self.path, SteppedPath)
            channels = denoiser.channels(x_t)
            frozen = torch.cat((prediction.detach(), output.chunk(2, dim=channels)[1]), dim=channels)
            terms["bound"] = _mean(
                step_bound(denoiser(frozen, x_t, t, clipped=False), data, x_t=x_t, t=t, path=self.path)
            ) / log(2)
        return terms

    def _as(self, estimate: Estimate, t: Tensor) -> Tensor:
        path = self.path
        if self.error_of in ("noise", "data"):
            return estimate.noise if self.error_of == "noise" else estimate.data
        if self.error_of == "velocity":
            return estimate.velocity(path, t)
        alpha, sigma = path.at(path.alpha, t, estimate.data), path.at(path.sigma, t, estimate.data)
        return alpha * estimate.noise - sigma * estimate.data


def _true(denoiser: GaussianDenoiser, data: Tensor, x_t: Tensor, t: Tensor) -> Estimate:
    """The truth, read of x_t as a prediction of the data is: with the same lower bound of sigma."""
    return Estimate(data=data, noise=denoiser.noise_from_data(data, x_t, t))


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)


# --- The bound of -log p ---


def step_bound(estimate: Estimate, data: Tensor, *, x_t: Tensor, t: Tensor, path: SteppedPath) -> Tensor:
    """Return a step's term of the variational bound, in nats for each entry `(B, ...)` (DDPM, eq. 5).

    Behind the first step it is the divergence of the model's law of x_s from the posterior's; at the first it is -log p
    of the data, which are taken as multiples of 2 / 255 in [-1, 1] (ADM's code does the same with latents).

    Args:
        estimate: at x_t, with a learned variance.
        data: x `(B, ...)`.
        x_t: the noisy data.
        t: `(B,)`, times of steps.
        path: T steps.
    """
    s = t - 1 / path.steps
    posterior = Posterior.between(path, t, s, like=data)
    # The posterior at the first step has no variance: the next one's stands for it.
    later = t.clamp(min=min(2, path.steps) / path.steps)
    smallest = Posterior.between(path, later, later - 1 / path.steps, like=data).variance
    log_variance = posterior.log_variance(estimate, smallest=smallest)
    mean = posterior.mean(estimate.data, x_t)
    apart = (posterior.mean(data, x_t) - mean) ** 2 * torch.exp(-log_variance)
    true = smallest.log().to(log_variance.dtype)
    divergence = (-1 + log_variance - true + torch.exp(true - log_variance) + apart) / 2
    first = (t * path.steps < 1.5).reshape(t.shape + (1,) * (data.ndim - t.ndim))
    return torch.where(first, -discretized_log_likelihood(data, mean, log_variance / 2), divergence)


def discretized_log_likelihood(data: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Return log p of data in [-1, 1] in 256 levels, under a normal law in float32 or better; the ends take the tails.

    The law's distribution function is approximated by tanh, as in the code of Nichol & Dhariwal (2021).
    """

    def below(x: Tensor) -> Tensor:
        return (1 + torch.tanh((2 / pi) ** 0.5 * (x + 0.044715 * x**3))) / 2

    centred, inverse = data - mean, torch.exp(-log_deviation)
    up, down = below(inverse * (centred + 1 / 255)), below(inverse * (centred - 1 / 255))
    smallest = 1e-12
    inside = (up - down).clamp(min=smallest).log()
    ends = torch.where(data > 0.999, (1 - down).clamp(min=smallest).log(), inside)
    return torch.where(data < -0.999, up.clamp(min=smallest).log(), ends)


def variational_bound(
    denoise: Denoise,
    data: Tensor,
    *,
    path: GaussianPath,
    times: Sequence[float],
    noise: Callable[[int], Tensor],
    variance: Literal["smallest", "largest", "learned"] = "largest",
) -> Tensor:
    """Estimate an upper bound of -log p(x) in nats, with one draw of the noise at each time (DDPM, eq. 5).

    The model starts from a standard normal law at the first time and steps down through the others; at the last one,
    which must be above 0, x given x_t is normal with the estimate of the data as its mean and a deviation of
    sigma / alpha. The bound is of the density of continuous data.

    Args:
        denoise: estimates the data at a time.
        data: x `(B, ...)`.
        path: of the noise.
        times: falling, from the noise to just above 0.
        noise: makes the noise `(B, ...)` of the draw at the i-th time.
        variance: of a step of the model: the posterior's, which is the best for data that x_t gives away; that of x_t
            given x_s, the best for data with a density, which are as unsure as the noise where there is little of it;
            or the learned one.

    Returns:
        `(B,)` float64.

    Raises:
        ValueError: times that do not fall, or end at 0.
    """
    if any(later >= earlier for earlier, later in pairwise(times)) or not times or times[-1] <= 0:
        raise ValueError(f"times must fall and stay above 0, got {list(times)}")
    alpha, sigma = (path.number(function, times[0]) for function in (path.alpha, path.sigma))
    total = _sum(((alpha * data.double()) ** 2 + sigma**2 - 1) / 2 - log(sigma))
    for number, t in enumerate(times):
        x_t = path.add_noise(data, noise(number), t)
        estimate = denoise(x_t, t)
        if number + 1 == len(times):
            spread = path.number(path.sigma, t) / path.number(path.alpha, t)
            miss = (data - estimate.data).double() / spread
            return total + _sum(miss**2 / 2 + log(spread * (2 * pi) ** 0.5))
        posterior = Posterior.between(path, t, times[number + 1], like=data)
        true = float(posterior.variance)
        apart = (posterior.mean(data, x_t) - posterior.mean(estimate.data, x_t)).double() ** 2
        if variance == "learned":
            model = posterior.log_variance(estimate, smallest=posterior.variance).double().exp()
        else:
            model = posterior.variance if variance == "smallest" else posterior.largest_variance
        total = total + _sum((apart + true) / model - 1 + torch.log(model / true)) / 2
    raise AssertionError


def _sum(values: Tensor) -> Tensor:
    return values.double().flatten(1).sum(dim=1)
