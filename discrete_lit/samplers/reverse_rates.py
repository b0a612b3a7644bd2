"""Steps along the rates of the reverse chain, held at their values at t: Euler steps and tau-leaping.

A step of the time grid is then no exact law, but the error falls with its length. `scores_of_clean` gives the scores
that rates are made of.
"""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
from discrete_lit.core.synchronisation import refuse_recording
from discrete_lit.diffusion.dense_processes import DenseProcess
from discrete_lit.diffusion.parameterization import Denoiser, score_from_leave_one_out
from discrete_lit.diffusion.reverse import Jumps, euler_weights, jumps_from_weights, reverse_rates
from discrete_lit.samplers.diffusion import DiffusionSampler, Interval, NoisyTokens
from discrete_lit.samplers.diffusion_guidance import Prediction


def jumps_along_rates(self: DiffusionSampler, clean: Tensor, prediction: Prediction, interval: Interval) -> Jumps:
    """Step along the rates of log-probabilities `(B, N, K)` of the clean ids; the last step is the ancestral one."""
    if interval.last:
        return DiffusionSampler.jumps_from_clean(self, clean, prediction, interval)
    return self.jumps_from_scores(scores_of_clean(clean, prediction), prediction, interval)


class EulerSampler(DiffusionSampler):
    """Jump with the probability dt times the reverse rate at t, at most 1 (Lou et al., SEDD, 2024).

    A masked token is unmasked with probability `dt m'(t) / m(t)`. The last step is the ancestral one.

    Args:
        settings: of `DiffusionSampler` and `Sampler`.
    """

    def unmask_probability(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last:
            return super().unmask_probability(interval, weight)
        return (unmasking_hazard(interval) * weight).clamp(max=1)

    jumps_from_clean = jumps_along_rates

    def jumps_from_scores(self, scores: Tensor, prediction: Prediction, interval: Interval) -> Jumps:
        if interval.last:
            return super().jumps_from_scores(scores, prediction, interval)
        x_t, process = prediction.x_t, prediction.denoiser.process
        weights = euler_weights(
            scores.exp(), x_t, process, noise_of_step(interval, prediction), alpha=prediction.level.alpha
        )
        return jumps_from_weights(weights, x_t)


class TauLeapingSampler(DiffusionSampler):
    """Make a Poisson number of jumps with every token, at the reverse rates at t (Campbell et al., 2022).

    Of ids in an order (the dense processes: grey levels) all jumps of a step add up, and what leaves the range is put
    to its end. Ids that have none cannot be added: there the last of the jumps counts, so that a token moves with
    probability `1 - exp(-dt rate)`. The last step is the ancestral one.

    Args:
        settings: of `DiffusionSampler` and `Sampler`.

    Raises:
        ValueError: in use, an order of ids with a schedule that ends in pure noise, where rates are infinite.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.guidance_law == "transition":
            raise ValueError("TauLeapingSampler steps along rates, not laws: guidance_law must be 'clean' or 'score'")

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        ends = denoiser.schedule.mask_probability(torch.ones(1))
        if isinstance(denoiser.process, DenseProcess) and float(ends) == 1:
            raise ValueError(
                f"TauLeapingSampler cannot begin where rates are infinite: {type(denoiser.schedule).__name__} leaves "
                f"nothing of a token at t = 1; train with a schedule of finite noise, or use AncestralSampler"
            )

    def unmask_probability(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last:
            return super().unmask_probability(interval, weight)
        return -torch.expm1(-unmasking_hazard(interval) * weight)

    jumps_from_clean = jumps_along_rates

    def jumps_from_scores(self, scores: Tensor, prediction: Prediction, interval: Interval) -> Jumps:
        if interval.last:
            return super().jumps_from_scores(scores, prediction, interval)
        x_t, process = prediction.x_t, prediction.denoiser.process
        rates = reverse_rates(scores.exp(), x_t, process, prediction.level.alpha).scatter(-1, x_t[..., None], 0.0)
        return Jumps(-torch.expm1(-noise_of_step(interval, prediction) * rates.sum(dim=-1)), rates.log())

    def draw_targets(self, x: NoisyTokens, jumps: Jumps, jumping: Tensor, number: int) -> tuple[Tensor, Tensor]:
        last = number == self.steps - 1
        if last or not isinstance(x.denoiser.process, DenseProcess):
            return super().draw_targets(x, jumps, jumping, number)
        refuse_recording("TauLeapingSampler waits to be told how often the ids of an order jump in each step")
        uniforms = x.random.uniform(Purpose.CONFIDENCE, x.length, number)
        counts = poisson(-torch.log1p(-jumps.probability), uniforms) * jumping
        moved, total = x.tokens.clone(), torch.zeros_like(uniforms)
        # Nothing bounds the jumps of a token: the host waits, also on a GPU, for how many rounds of them there are.
        for jump in range(int(counts.max()) if counts.numel() else 0):
            here = counts > jump
            ids, log_probability = super().draw_targets(x, jumps, here, number + jump * self.steps)
            moved = torch.where(here, moved + ids - x.tokens, moved)
            total = torch.where(here, total + log_probability, total)
        return moved.clamp(0, x.denoiser.process.vocab_size - 1), total


def unmasking_hazard(interval: Interval) -> Tensor:
    """`dt m'(t) / m(t)`, `(1, 1)`: the rate of unmasking at t times the length of the step."""
    return interval.dt * interval.slope / (1 - interval.alpha_t)


def noise_of_step(interval: Interval, prediction: Prediction) -> Tensor:
    """`dt d sigma / dt`, `(1, 1)`: the noise of a step, with sigma's slope at t."""
    return interval.dt * interval.slope / prediction.level.alpha


def scores_of_clean(clean: Tensor, prediction: Prediction) -> Tensor:
    """Log-scores `(B, N, S)` in float64 from log-probabilities `(B, N, K)` of the clean ids."""
    return score_from_leave_one_out(clean.double(), prediction.x_t, prediction.denoiser.process, prediction.level)


def poisson(mean: Tensor, uniforms: Tensor) -> Tensor:
    """Poisson counts, int64, by inversion: 0 where the uniform number is at least 1 - exp(-mean).

    Args:
        mean: float64 >= 0, finite.
        uniforms: float64 in (0, 1).
    """
    term = torch.exp(-mean)
    above, count = 1 - term, torch.zeros_like(mean, dtype=torch.int64)
    while True:
        more = uniforms < above
        if not bool(more.any()):
            return count
        count = count + more
        term = term * mean / count.clamp(min=1)
        above = torch.where(more, above - term, 0.0)
