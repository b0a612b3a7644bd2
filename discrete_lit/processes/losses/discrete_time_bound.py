"""The bound of a chain of T steps, and D3PM's training loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from discrete_lit.processes.forward import ForwardProcess
from discrete_lit.processes.heads import Head
from discrete_lit.processes.losses.diffusion_loss import DiffusionLoss, LossKind, gather
from discrete_lit.processes.losses.marginal_gap import marginals, mixture_at_states, mixture_divergence
from discrete_lit.processes.mixture import MixtureProcess
from discrete_lit.processes.noise_level import NoiseLevel
from discrete_lit.processes.reverse import is_absorbing
from discrete_lit.processes.schedules import MaskSchedule


@dataclass(frozen=True)
class StepLevel(NoiseLevel):
    """The level at the noisy end of a step."""

    alpha_before: Tensor
    """alpha_s at its clean end."""
    noise_before: Tensor
    """1 - alpha_s."""


class DiscreteTimeBound(DiffusionLoss):
    """`T KL(q(x_s | x_t, x_0) | p(x_s | x_t))` for s = t - 1/T and t uniform in 1/T, ..., 1.

    p(x_s | x_t) is the x_0-parametrisation, proportional to q(x_t | x_s) times the mean of q(x_s | x_0) over the cavity
    (Austin et al., "D3PM", 2021, eq. 4). The step from 1/T goes to the data, whatever the schedule's m(0): it is the
    paper's reconstruction term. For masks it is MD4's `T (alpha_s - alpha_t) / (1 - alpha_t)` cross-entropy (Shi et
    al., 2024, eq. 4).

    Args:
        steps: T >= 1.

    Raises:
        ValueError: fewer than one step.
    """

    heads = frozenset({"cavity"})
    kind: LossKind = "bound"

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"steps of {type(self).__name__} must be at least 1, got {steps}")
        self.steps = steps

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> StepLevel:
        step = (uniforms.double() * self.steps).floor().clamp(max=self.steps - 1)
        end, start = NoiseLevel.at(schedule, (step + 1) / self.steps), step / self.steps
        alpha = torch.where(step == 0, 1.0, schedule.alpha(start))
        noise = torch.where(step == 0, 0.0, schedule.mask_probability(start))
        return StepLevel(end.t, end.alpha, end.noise, end.rate, alpha, noise)

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        return "not a bound" if is_absorbing(process) and schedule.ends()[1] < 1 else self.kind

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        return self.steps * self._divergence(head(logits, states, level), tokens, states, process, level)

    def _divergence(
        self, cavity: Tensor, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        """With marginals a of the data and b of the cavity: the mean of log(a_s / b_s) under q(x_s | x_t, x_0), less
        log(a_t / b_t) of x_t."""
        assert isinstance(level, StepLevel), "a level of this loss"
        before, ratio = level.alpha_before, level.alpha / level.alpha_before
        if isinstance(process, MixtureProcess):
            a_before, log_before = mixture_at_states(cavity, tokens, states, process, before, level.noise_before)
            a_state, log_ratio = mixture_at_states(cavity, tokens, states, process, level.alpha, level.noise)
            divergence = mixture_divergence(cavity, tokens, process, before, level.noise_before)
            jump = (level.noise - level.noise_before) / before * process.prior_at(states)
            return (ratio * a_before * log_before + jump * divergence) / a_state - log_ratio
        true, predicted = marginals(cavity, tokens, process, before)
        weights = true * process.likelihood(states, ratio)
        posterior = weights / weights.sum(dim=-1, keepdim=True)
        a_state, b_state = (gather(process.push(of, ratio), states) for of in (true, predicted))
        return (posterior * (true.log() - predicted.log())).sum(dim=-1) - (a_state / b_state).log()


class HybridBound(DiscreteTimeBound):
    """D3PM's training loss: the bound, and a share of the cross-entropy of x_0 given x_t (Austin et al., 2021, eq. 5).

    The value is T (KL + lambda CE): the paper's lambda weighs the cross-entropy against one step's KL, as their code
    does, and both stand here on the scale of the bound, the sum of T steps. The cross-entropy is of all tokens (of the
    masked ones where noise only masks); it pulls the head from the cavity towards the posterior.

    Args:
        steps: T >= 1.
        cross_entropy_weight: lambda >= 0; the paper's 0.001 of images, 0.01 of text8.

    Raises:
        ValueError: a setting out of its range.
    """

    kind = "not a bound"

    def __init__(self, steps: int, cross_entropy_weight: float = 0.001) -> None:
        super().__init__(steps)
        if cross_entropy_weight < 0:
            raise ValueError(f"cross_entropy_weight must be >= 0, got {cross_entropy_weight}")
        self.cross_entropy_weight = cross_entropy_weight

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        return self.kind

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        cavity = head(logits, states, level)
        divergence = self._divergence(cavity, tokens, states, process, level)
        return self.steps * (divergence - self.cross_entropy_weight * gather(cavity, tokens).double())
