"""The exact reverse step of every token: D3PM's and MDLM's ancestral sampler, SEDD's analytic one (Tweedie)."""

import torch
from torch import Tensor

from discrete_lit.processes.denoiser import Denoiser
from discrete_lit.processes.heads import positive_weights
from discrete_lit.processes.reverse import (
    Jumps,
    analytic_weights,
    denoise_weights,
    jumps_from_clean,
    jumps_from_weights,
    unmask_probability,
)
from discrete_lit.samplers.diffusion import DiffusionSampler, Interval


class AncestralSampler(DiffusionSampler):
    """Draws each token from its exact law one level cleaner, given all others as they are.

    `sum over x_0 of q(x_s | x_t, x_0) p(x_0 | x_t)` (Austin et al., D3PM, 2021, eq. 4; Sahoo et al., MDLM, 2024, eq. 6;
    Schiff et al., UDLM, 2024), which in terms of scores is SEDD's analytic step (Lou et al., 2024, eq. 19). What it
    misses is that tokens of one step are drawn apart: the law approaches the model's with the number of steps.

    Args:
        settings: of `DiffusionSampler` and `Sampler`.
    """

    def reveal(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last:
            return torch.ones_like(weight)
        return (unmask_probability(interval.after.alpha, interval.before.alpha) * weight).clamp(max=1)

    def jumps_from_clean(self, clean: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        return jumps_from_clean(clean, states, denoiser.process, interval.after.alpha, interval.before.alpha)

    def jumps_from_scores(self, scores: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        process, ratio = denoiser.process, interval.seen.alpha / interval.after.alpha
        # What multiplies all weights of a token does not matter, but infinite ones do.
        score = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        if not interval.last:
            return jumps_from_weights(analytic_weights(score, states, process, ratio), states)
        ids = positive_weights(denoise_weights(score, states, process, ratio), scores)
        return jumps_from_weights(process.widen(ids), states)
