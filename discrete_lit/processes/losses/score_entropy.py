"""Denoising score entropy (Lou, Meng & Ermon, "Discrete Diffusion Modeling by Estimating the Ratios of the Data
Distribution", 2024)."""

import torch
from torch import Tensor

from discrete_lit.processes.forward import ForwardProcess
from discrete_lit.processes.heads import Head
from discrete_lit.processes.losses.diffusion_loss import DiffusionLoss, gather
from discrete_lit.processes.mixture import MixtureProcess
from discrete_lit.processes.noise_level import NoiseLevel


class ScoreEntropy(DiffusionLoss):
    """`sigma' sum_{y != x} Q(y, x) [s_y - r_y log s_y + r_y (log r_y - 1)]` with `r_y = q(y | x_0) / q(x | x_0)`.

    (Eq. 9 with the constant K(r) of eq. 5, so that it is 0 where s = r; its minimiser is p_t(y) / p_t(x).) Scores need
    not be those of a law: whatever they are, it bounds -log p of the chain with the rates that they give.
    """

    heads = frozenset({"score"})
    kind = "bound"

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        scores = head(logits, states, level)
        if isinstance(process, MixtureProcess):
            return level.rate * self._of_mixture(scores, tokens, states, process, level)
        scores = scores.double()
        ratios = process.ratios(tokens, states, level.alpha).clamp(min=0)
        terms = scores.exp() - ratios * (scores + 1) + torch.xlogy(ratios, ratios)
        return level.rate * (process.rates_into(states) * terms).sum(dim=-1)

    def _of_mixture(
        self, scores: Tensor, tokens: Tensor, states: Tensor, process: MixtureProcess, level: NoiseLevel
    ) -> Tensor:
        """`pi_x / a_x sum_{y != x} [e_y - a_y log e_y + a_y (log a_y - 1)]` with a = q(. | x_0) and e_y = a_x s_y.

        But for x_0 the ids have one a_y, so a sum of scores and one of their logarithms are all that is as wide as K.
        """
        prior, share = process.prior_at(states), process.id_share
        is_clean, is_mask = states == tokens, states == process.vocab_size
        at_state = level.noise * prior + torch.where(is_clean, level.alpha, 0.0)  # a_x
        of_clean = level.alpha + level.noise * share  # a of x_0
        # Less than the log-odds, scores are of the size of 1: exp(sigma) - 1 never leaves the logarithm.
        scaled = scores + at_state.log()[..., None].to(scores.dtype)
        total = scaled.scatter(-1, states[..., None], -torch.inf).exp().sum(dim=-1).double()
        log_at_state = at_state.log()

        def cost(weight: Tensor, log_score: Tensor, count: Tensor | int = 1) -> Tensor:
            """-a (log e - log a + 1) of `count` states with one a, whose log-scores sum to `log_score`."""
            return torch.xlogy(weight, weight) * count - weight * (log_score + count * (log_at_state + 1))

        at_clean = gather(scores, tokens).double()
        result = total + torch.where(is_clean, 0.0, cost(of_clean, at_clean))
        if process.masks:
            at_mask = scores[..., process.vocab_size].double()
            result = result + torch.where(is_mask, 0.0, cost(level.noise * process.mask_share, at_mask))
        if share > 0:
            # Its own score is 0, so of the ids only x_0's has to be taken out.
            others = scores[..., : process.vocab_size].sum(dim=-1).double() - at_clean
            count = process.vocab_size - 1 - (~is_clean & ~is_mask).double()
            result = result + cost(level.noise * share, others, count)
        return prior / at_state * result
