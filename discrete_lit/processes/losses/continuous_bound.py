"""The bound in continuous time, for every process."""

import torch
from torch import Tensor

from discrete_lit.processes.forward import ForwardProcess
from discrete_lit.processes.heads import Head
from discrete_lit.processes.losses.diffusion_loss import DiffusionLoss, gather
from discrete_lit.processes.losses.marginal_gap import marginals, mixture_at_states, mixture_divergence
from discrete_lit.processes.mixture import MixtureProcess
from discrete_lit.processes.noise_level import NoiseLevel


class ContinuousBound(DiffusionLoss):
    """`sigma' sum_y Q(y, x) [s^_y - s_y + s_y log(s_y / s^_y)]`, scores made of the cavity.

    With a = q(. | x_0) and b its mean over the cavity, s_y = a_y / a_x and s^_y = b_y / b_x (Campbell et al., 2022,
    proposition 2, for the reverse rates of the x_0-parametrisation). For mixtures with prior pi it is
    `sigma' pi_x / a_x [KL(a | b) + a_x / b_x - log(a_x / b_x) - 1]`: UDLM's (Schiff et al., 2024, eq. 16) and Duo's for
    the uniform process, GIDD's for a mix (von Rütte et al., 2025, theorem 3.7), `m' / m` times the cross-entropy of
    masked tokens for masks.
    """

    heads = frozenset({"cavity"})
    kind = "bound"

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        cavity = head(logits, states, level)
        if isinstance(process, MixtureProcess):
            at_state, log_ratio = mixture_at_states(cavity, tokens, states, process, level.alpha, level.noise)
            divergence = mixture_divergence(cavity, tokens, process, level.alpha, level.noise)
            weight = level.rate * process.prior_at(states) / at_state
            return weight * (divergence + torch.expm1(log_ratio) - log_ratio)
        true, predicted = marginals(cavity, tokens, process, level.alpha)
        true = true / gather(true, states)[..., None]
        predicted = predicted / gather(predicted, states)[..., None]
        gap = predicted - true + true * (true.log() - predicted.log())
        return level.rate * (process.rates_into(states) * gap).sum(dim=-1)
