"""What a network's output means, and how one meaning becomes another.

Three distributions over K ids, or ratios of such, are called "the prediction" in the literature:

- `posterior`, p(x_0 | x_t) of a token, which plain cross-entropy learns (discrete flow matching, tauLDR);
- `cavity`, p(x_0 | the other tokens of x_t): what D3PM's and MDLM's parametrisations plug into the forward process. The
  posterior is proportional to the cavity times q(x_t | x_0), so both agree where the token is masked;
- `score`, p_t(y) / p_t(x) for each state y of the token (SEDD).

Log-probabilities are `(B, N, K)`, log-scores `(B, N, S)` over all states, 0 at the token's own.

What there is to know of a network that was trained to undo noise, beside the network itself.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.diffusion.processes import ForwardProcess
from discrete_lit.diffusion.schedules import MaskSchedule, NoiseLevel

HeadKind = Literal["posterior", "cavity", "score"]


class Head(ABC):
    """Makes a prediction of a backbone's logits."""

    kind: HeadKind
    mask_output: bool = False
    """Whether the backbone has a logit of the mask id too."""

    @abstractmethod
    def __call__(self, logits: Tensor, states: Tensor, level: NoiseLevel) -> Tensor:
        """Log-probabilities `(B, N, K)` or log-scores `(B, N, S)`, float32 or, of float64 logits, float64.

        Args:
            logits: `(B, N, K)`, or `(B, N, K + 1)` with the mask's.
            states: `(B, N)`, x_t.
            level: of x_t.
        """


def at_least_float32(logits: Tensor) -> Tensor:
    """What normalises in half precision loses the rare ids."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class PosteriorHead(Head):
    """Log-probabilities of the clean id given all of x_t."""

    kind = "posterior"

    def __call__(self, logits: Tensor, states: Tensor, level: NoiseLevel) -> Tensor:
        return at_least_float32(logits).log_softmax(dim=-1)


class LeaveOneOutHead(Head):
    """Log-probabilities of the clean id given the other tokens of x_t."""

    kind = "cavity"

    def __call__(self, logits: Tensor, states: Tensor, level: NoiseLevel) -> Tensor:
        return at_least_float32(logits).log_softmax(dim=-1)


class ScoreHead(Head):
    """Log-scores (Lou et al., "SEDD", 2024), the one of the token itself set to 0.

    Args:
        scale_by_noise: subtract log(exp(sigma) - 1) + log K from the logits, which then vary less (SEDD's
            `scale_by_sigma`, of absorbing processes).
        mask_output: whether the logits have the mask's, which a process with a mask needs.
    """

    kind = "score"

    def __init__(self, scale_by_noise: bool = True, mask_output: bool = True) -> None:
        self.scale_by_noise = scale_by_noise
        self.mask_output = mask_output

    def __call__(self, logits: Tensor, states: Tensor, level: NoiseLevel) -> Tensor:
        scores = at_least_float32(logits)
        if self.scale_by_noise:
            ids = scores.shape[-1] - int(self.mask_output)
            offset = level.odds.log() - math.log(ids)
            scores = scores + offset[..., None].to(scores.dtype)
        return scores.scatter(-1, states[..., None], 0.0)


def posterior_from_leave_one_out(cavity: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel) -> Tensor:
    """log p(x_0 | x_t) of the log-probabilities given the other tokens: times q(x_t | x_0), normalised."""
    likelihood = process.likelihood(states, level.alpha)[..., : process.vocab_size]
    return (cavity + likelihood.log().to(cavity.dtype)).log_softmax(dim=-1)


def leave_one_out_from_posterior(
    posterior: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
) -> Tensor:
    """The inverse; at a token that cannot have come from elsewhere the cavity is not known, and the posterior given."""
    likelihood = process.likelihood(states, level.alpha)[..., : process.vocab_size]
    divided = posterior - torch.where(likelihood > 0, likelihood.log(), 0.0).to(posterior.dtype)
    return divided.log_softmax(dim=-1)


def score_from_leave_one_out(cavity: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel) -> Tensor:
    """Log-scores: q_t(y | x_0) averaged over the cavity, over that of the token itself."""
    marginal = process.marginal(cavity.exp(), level.alpha).log()
    return marginal - marginal.gather(-1, states[..., None])


def leave_one_out_from_score(score: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel) -> Tensor:
    """The distribution over ids whose noisy marginal has these scores; what a score that none has makes negative is 0.

    At a token that cannot have come from elsewhere, an unmasked one of an absorbing process, scores say nothing. Where
    they leave no id anything, that of the ids' own scores is given.
    """
    noisy = score.double().softmax(dim=-1)
    clean = positive_weights(process.pull(noisy, level.alpha)[..., : process.vocab_size], score)
    return (clean / clean.sum(dim=-1, keepdim=True)).log().to(score.dtype)


def positive_weights(weights: Tensor, score: Tensor) -> Tensor:
    """Weights `(..., K)` without negative ones; where nothing is left of them, the law of the log-scores `(..., S)`."""
    weights = weights.clamp(min=0)
    lost = weights.sum(dim=-1, keepdim=True) == 0
    return torch.where(lost, score[..., : weights.shape[-1]].softmax(dim=-1).to(weights.dtype), weights)


TimeInput = Literal["none", "time", "total_noise"]


# DiT's and D3PM's sinusoids tell times from 0 to 1000 apart.
_TIME_SCALE = 1000.0


@dataclass(frozen=True)
class Denoiser:
    """Process, schedule and head of a generator's backbone."""

    process: ForwardProcess
    schedule: MaskSchedule
    """Of training; samplers go through its times."""
    head: Head
    time_input: TimeInput
    """What the backbone is told: nothing, 1000 t, or sigma (SEDD, whose schedules keep it finite)."""

    def network_time(self, level: NoiseLevel) -> Tensor | None:
        """`(B,)`, the backbone's `time`; never more noise than the schedule ends with."""
        if self.time_input == "none":
            return None
        if self.time_input == "time":
            return (level.t * _TIME_SCALE)[:, 0].float()
        most = NoiseLevel.at(self.schedule, torch.ones_like(level.t)).sigma
        return torch.minimum(level.sigma, most)[:, 0].float()

    def level_of_masks(self, masked: Tensor) -> NoiseLevel:
        """The level at which so many tokens are masked on average; `masked (B, N)` bool."""
        share = masked.double().mean(dim=1, keepdim=True)
        ends = self.schedule.mask_probability(share.new_tensor([0.0, 1.0]))
        return NoiseLevel.at(self.schedule, self.schedule.inverse(share.clamp(ends[0], ends[1])))
