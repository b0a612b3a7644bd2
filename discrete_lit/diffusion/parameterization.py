"""Parameterizations: the meaning of a network's output, and how one meaning is converted into another.

The literature calls three things "the prediction" of a network that sees x_t. Here each is a *kind* of head:

- `posterior`: `p(x_0 | x_t)` of a token given all of x_t. Plain cross-entropy learns it: discrete flow matching (Gat et
  al., 2024), tauLDR (Campbell et al., 2022).
- `leave_one_out`: `p(x_0 | the other tokens of x_t)`, the leave-one-out posterior. It is the x_0-parameterization of
  D3PM (Austin et al., 2021), and MDLM's SUBS (Sahoo et al., 2024), MD4 and UDLM use it too: all put it in the place of
  x_0 in `q(x_s | x_t, x_0)`. The posterior is proportional to it times `q(x_t | x_0)`, so the two agree where the token
  is masked.
- `score`: the concrete score `p_t(y) / p_t(x)` for each state y of the token, by SEDD (Lou et al., 2024).

Log-probabilities are `(B, N, K)`. Log-scores are `(B, N, S)`, over all S states, and 0 at the token's own state x.

`Denoiser` puts a head together with the process and the schedule that the network was trained for.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.core.modules import at_least_float32
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.processes import ForwardProcess
from discrete_lit.diffusion.schedules import MaskSchedule

HeadKind = Literal["posterior", "leave_one_out", "score"]


class Head(ABC):
    """Turns a backbone's logits into a prediction of one kind."""

    kind: HeadKind
    mask_output: bool = False
    """Whether the backbone has a logit for the mask id too."""

    @abstractmethod
    def __call__(self, logits: Tensor, states: Tensor, level: NoiseLevel) -> Tensor:
        """Return log-probabilities `(B, N, K)` or log-scores `(B, N, S)`, in float32, or float64 if the logits are.

        Args:
            logits: `(B, N, K)`, or `(B, N, K + 1)` with that of the mask.
            states: x_t, `(B, N)` int64.
            level: the noise in x_t.
        """

    def check(self, process: ForwardProcess) -> None:  # noqa: B027
        """Refuse a process that the head is not for.

        Raises:
            ValueError: the two cannot be used together.
        """


class PosteriorHead(Head):
    """Predicts log-probabilities of the clean id given all of x_t: discrete flow matching, tauLDR."""

    kind = "posterior"

    def __call__(self, logits: Tensor, states: Tensor, level: NoiseLevel) -> Tensor:
        return at_least_float32(logits).log_softmax(dim=-1)


class LeaveOneOutHead(Head):
    """Predicts log-probabilities of the clean id given the other tokens of x_t: D3PM, MDLM (SUBS), MD4, UDLM, GIDD."""

    kind = "leave_one_out"

    def __call__(self, logits: Tensor, states: Tensor, level: NoiseLevel) -> Tensor:
        return at_least_float32(logits).log_softmax(dim=-1)


class ScoreHead(Head):
    """Predicts log-scores, log p_t(y) / p_t(x), and sets the one of the token's own state to 0: SEDD.

    Args:
        scale_by_noise: subtract log(exp(sigma) - 1) + log K from the logits, which then vary less from level to level
            (SEDD's `scale_by_sigma` for absorbing processes). It is for processes with a mask: scores of other noise
            approach 1 as it grows, and float32 logits that have to undo the scale are too coarse for that.
        mask_output: whether the logits have one of the mask, which a process with a mask needs.
    """

    kind = "score"

    def __init__(self, *, scale_by_noise: bool = True, mask_output: bool = True) -> None:
        self.scale_by_noise = scale_by_noise
        self.mask_output = mask_output

    def __call__(self, logits: Tensor, states: Tensor, level: NoiseLevel) -> Tensor:
        scores = at_least_float32(logits)
        if self.scale_by_noise:
            ids = scores.shape[-1] - int(self.mask_output)
            offset = level.odds.log() - math.log(ids)
            scores = scores + offset[..., None].to(scores.dtype)
        return scores.scatter(-1, states[..., None], 0.0)

    def check(self, process: ForwardProcess) -> None:
        if not process.homogeneous:
            raise ValueError(
                f"{type(self).__name__} is for noise whose rates do not change, those of {type(process).__name__} do: "
                "use LeaveOneOutHead"
            )
        if self.mask_output != process.masks:
            raise ValueError(
                f"scores are of all states: mask_output of {type(self).__name__} must be {process.masks} for "
                f"{type(process).__name__}, got {self.mask_output}"
            )
        if self.scale_by_noise and not process.masks:
            raise ValueError(
                f"scale_by_noise of {type(self).__name__} must be False for {type(process).__name__}, got True: only "
                "the scores of masked tokens grow with the odds of no noise"
            )


TimeInput = Literal["none", "time", "unit_time", "total_noise"]
# DiT's and D3PM's sinusoids tell times from 0 to 1000 apart.
_TIME_SCALE = 1000.0


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """All there is to know of a network that undoes noise, beside the network itself."""

    process: ForwardProcess
    """The noise that it undoes."""
    schedule: MaskSchedule
    """The schedule of its training, whose times samplers step through."""
    head: Head
    """The meaning of its output."""
    time_input: TimeInput
    """The time that it is told: none, 1000 t, t itself (GIDD), or sigma (SEDD, whose schedules keep sigma finite)."""

    def __post_init__(self) -> None:
        self.head.check(self.process)

    def network_time(self, level: NoiseLevel) -> Tensor | None:
        """Return the backbone's `time (B,)`, `(1,)` of a level of all, float64, or None.

        Sigma never exceeds that of the schedule's end.
        """
        if self.time_input == "none":
            return None
        if self.time_input == "unit_time":
            return level.t[:, 0]
        if self.time_input == "time":
            return (level.t * _TIME_SCALE)[:, 0]
        most = NoiseLevel.at(self.schedule, torch.ones_like(level.t)).sigma
        return torch.minimum(level.sigma, most)[:, 0]

    def level_of_masks(self, masked: Tensor) -> NoiseLevel:
        """Return the level at which the expected fraction of masked tokens is that of `masked (B, N)`, bool."""
        fraction = masked.double().mean(dim=1, keepdim=True)
        ends = self.schedule.mask_probability(torch.linspace(0, 1, 2, dtype=torch.float64, device=masked.device))
        return NoiseLevel.at(self.schedule, self.schedule.inverse(fraction.clamp(ends[0], ends[1])))


# Conversions. Each takes the prediction, x_t `(B, N)`, the process, and the level of x_t.


def posterior_from_leave_one_out(
    leave_one_out: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
) -> Tensor:
    """Return log p(x_0 | x_t) by Bayes' rule: the leave-one-out posterior times q(x_t | x_0), normalised."""
    likelihood = process.likelihood(states, level.alpha, level.noise)[..., : process.vocab_size]
    return (leave_one_out + likelihood.log().to(leave_one_out.dtype)).log_softmax(dim=-1)


def leave_one_out_from_posterior(
    posterior: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
) -> Tensor:
    """Return log p(x_0 | the other tokens of x_t): the posterior divided by q(x_t | x_0), normalised.

    At a token that cannot have come from another id, such as an unmasked token of an absorbing process, the posterior
    does not determine it, and is returned as it is.
    """
    likelihood = process.likelihood(states, level.alpha, level.noise)[..., : process.vocab_size]
    divided = posterior - torch.where(likelihood > 0, likelihood.log(), 0.0).to(posterior.dtype)
    return divided.log_softmax(dim=-1)


def score_from_leave_one_out(
    leave_one_out: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
) -> Tensor:
    """Return log-scores log b_y / b_x, where b is q(x_t | x_0) averaged over the leave-one-out posterior of x_0."""
    marginal = process.marginal(leave_one_out.exp(), level.alpha, level.noise).log()
    return marginal - marginal.gather(-1, states[..., None])


def leave_one_out_from_score(score: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel) -> Tensor:
    """Return the log-probabilities of clean ids whose noisy marginal has these log-scores.

    Scores that no distribution has can give an id a negative probability: it becomes 0. Where no id is left, the ids'
    own scores are normalised instead. At an unmasked token of an absorbing process the scores say nothing.
    """
    noisy = score.double().softmax(dim=-1)
    clean = positive_weights(process.pull(noisy, level.alpha)[..., : process.vocab_size], score)
    return (clean / clean.sum(dim=-1, keepdim=True)).log().to(score.dtype)


def positive_weights(weights: Tensor, score: Tensor) -> Tensor:
    """Set negative weights `(..., K)` to 0; where none is left, return the softmax of the log-scores `(..., S)`."""
    weights = weights.clamp(min=0)
    lost = weights.sum(dim=-1, keepdim=True) == 0
    return torch.where(lost, score[..., : weights.shape[-1]].softmax(dim=-1).to(weights.dtype), weights)
