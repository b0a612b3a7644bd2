"""Steps along the reverse rates at their start: Euler and tau-leaping."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.processes import Purpose
from discrete_lit.processes.denoiser import Denoiser
from discrete_lit.processes.dense import DenseProcess
from discrete_lit.processes.heads import score_from_cavity
from discrete_lit.processes.reverse import Jumps, euler_weights, jumps_from_weights, reverse_rates
from discrete_lit.samplers.ancestral import AncestralSampler
from discrete_lit.samplers.diffusion import Interval
from discrete_lit.samplers.trajectory import Trajectory


class EulerSampler(AncestralSampler):
    """Jumps with the probability dt times the reverse rate at the step's start, at most 1 (Lou et al., SEDD, 2024).

    A masked token is revealed with probability `dt m'(t) / m(t)`. The last step is the ancestral one.

    Args:
        settings: of `DiffusionSampler` and `Sampler`.
    """

    def reveal(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last:
            return super().reveal(interval, weight)
        return (self._hazard(interval) * weight).clamp(max=1)

    def jumps_from_clean(self, clean: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        if interval.last:
            return super().jumps_from_clean(clean, states, denoiser, interval)
        scores = score_from_cavity(clean.double(), states, denoiser.process, interval.seen)
        return self.jumps_from_scores(scores, states, denoiser, interval)

    def jumps_from_scores(self, scores: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        if interval.last:
            return super().jumps_from_scores(scores, states, denoiser, interval)
        weights = euler_weights(scores.exp(), states, denoiser.process, self._noise(interval))
        return jumps_from_weights(weights, states)

    def _hazard(self, interval: Interval) -> Tensor:
        """`dt m' / m`, `(B, 1)`."""
        return (interval.before.t - interval.after.t) * interval.slope / (1 - interval.before.alpha)

    def _noise(self, interval: Interval) -> Tensor:
        """`dt d sigma / dt`, `(B, 1)`."""
        return (interval.before.t - interval.after.t) * interval.slope / interval.seen.alpha


class TauLeapingSampler(EulerSampler):
    """A Poisson number of jumps of every token, at the reverse rates of the step's start (Campbell et al., 2022).

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

    def reveal(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last:
            return super().reveal(interval, weight)
        return -torch.expm1(-self._hazard(interval) * weight)

    def jumps_from_scores(self, scores: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        if interval.last:
            return super().jumps_from_scores(scores, states, denoiser, interval)
        rates = reverse_rates(scores.exp(), states, denoiser.process).scatter(-1, states[..., None], 0.0)
        return Jumps(-torch.expm1(-self._noise(interval) * rates.sum(dim=-1)), rates.log())

    def land(
        self, trajectory: Trajectory, jumps: Jumps, jumping: Tensor, uniforms: Tensor, interval: Interval
    ) -> tuple[Tensor, Tensor]:
        if interval.last or not isinstance(trajectory.denoiser.process, DenseProcess):
            return super().land(trajectory, jumps, jumping, uniforms, interval)
        states, length = trajectory.states, trajectory.states.shape[1]
        random, number = trajectory.drawing.random, interval.number
        coins = random.uniform(Purpose.CONFIDENCE, length, number)
        counts = poisson(-torch.log1p(-jumps.probability), coins) * jumping
        moved, total = states.clone(), torch.zeros_like(coins)
        for jump in range(int(counts.max()) if counts.numel() else 0):
            if jump > 0:
                uniforms = random.uniform(Purpose.TOKEN, length, number + jump * self.steps)
            here = counts > jump
            ids, log_probability = super().land(trajectory, jumps, here, uniforms, interval)
            moved = torch.where(here, moved + ids - states, moved)
            total = total + log_probability
        return moved.clamp(0, trajectory.denoiser.process.vocab_size - 1), total


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
