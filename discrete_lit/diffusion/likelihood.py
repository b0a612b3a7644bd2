"""How likely clean sequences are under a denoiser: bounds without a cut-off, and enumeration.

Where noise only masks, the bound is a mean over how many tokens are masked (or over the share that is), which needs no
schedule and no epsilon. Else it is an integral over the training schedule, with what its two ends leave out: the
prior's divergence at t = 1, and the reconstruction from m(0) if that is not 0.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.losses import ContinuousBound, DiffusionLoss, MaskedCrossEntropy, ScoreEntropy
from discrete_lit.diffusion.parameterization import (
    Denoiser,
    LeaveOneOutHead,
    leave_one_out_from_posterior,
    leave_one_out_from_score,
    posterior_from_leave_one_out,
)
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.diffusion.schedules import NoiseLevel

Network = Callable[[Tensor, NoiseLevel], Tensor]
"""Noisy states `(B, N)` and their level to logits."""


# 2^N passes.
LONGEST_ENUMERATED = 12


def likelihood_bound(
    network: Network,
    denoiser: Denoiser,
    tokens: Tensor,
    random: CounterRandom,
    samples: int,
    variable: Literal["mask_count", "mask_ratio"] = "mask_count",
) -> tuple[Tensor, Tensor]:
    """An unbiased estimate of a bound from below of log p, with its standard error.

    Scores are normalised where noise only masks: a model of scores s has there the clean distribution s / sum s, whose
    bound is never below that of the scores. Where the training schedule starts at m(0) > 0, the reconstruction is
    drawn once, and its own error left out.

    Args:
        network: the backbone for these sequences' labels.
        denoiser: what its output means.
        tokens: clean `(B, N)` int64.
        random: one stream for each sequence.
        samples: evaluations of the network, of levels that are spread evenly.
        variable: what the mean is over where noise only masks.

    Returns:
        Nats `(B,)` and the standard error of each, as of independent levels (nan for one sample), float64.
    """
    process, schedule = denoiser.process, denoiser.schedule
    absorbing = is_absorbing(process)
    loss: DiffusionLoss = MaskedCrossEntropy(variable) if absorbing else ContinuousBound()
    if denoiser.head.kind == "score" and not absorbing:
        loss = ScoreEntropy()
    shift = random.uniform(Purpose.LIKELIHOOD, 1)
    costs = []
    for evaluation in range(samples):
        share = ((shift + evaluation / samples) % 1).clamp(2.0**-53, 1 - 2.0**-53)
        weight = torch.ones_like(share)
        if not (absorbing and variable == "mask_count"):
            # A change at a small m has the probability m and the cost 1 / m: the variance of a mean over t is infinite,
            # that of one over the root of t is not.
            share, weight = share**2, 2 * share
        level = loss.level(schedule, share, tokens.shape[1])
        uniforms = random.uniform(Purpose.LIKELIHOOD, tokens.shape[1], step=evaluation + 1)
        states = loss.corrupt(process, tokens, level, uniforms)
        logits = network(states, level)
        head = denoiser.head
        if not isinstance(loss, ScoreEntropy):
            logits, head = clean_log_probabilities(denoiser, logits, states, level), LeaveOneOutHead()
        cost = loss(logits, head, tokens, states, process, level).double().sum(dim=1)
        costs.append(weight[:, 0] * cost)
    drawn = torch.stack(costs)
    mean, error = drawn.mean(dim=0), drawn.std(dim=0) / samples**0.5 if samples > 1 else drawn[0] * torch.nan
    if not absorbing:
        mean = mean + _ends(network, denoiser, tokens, random, samples)
    return -mean, error


def clean_log_probabilities(denoiser: Denoiser, logits: Tensor, states: Tensor, level: NoiseLevel) -> Tensor:
    """The cavity `(B, N, K)` of a network's output; of no meaning for tokens that an absorbing process has left."""
    head, process = denoiser.head, denoiser.process
    if is_absorbing(process):
        return LeaveOneOutHead()(logits[..., : process.vocab_size], states, level)
    prediction = head(logits, states, level)
    if head.kind == "score":
        return leave_one_out_from_score(prediction, states, process, level)
    return leave_one_out_from_posterior(prediction, states, process, level) if head.kind == "posterior" else prediction


def enumerated_log_likelihood(network: Network, denoiser: Denoiser, tokens: Tensor) -> Tensor:
    """log p of the law of revealing one token after the other in a random order, exactly; `(B,)` float64 nats.

    With f(S) the probability to have revealed the set S as it is in the sequence, f of the empty set is 1 and
    `f(S) = sum over i in S of f(S - i) p(x_i | S - i) / (N - |S| + 1)`: one pass of the network for each set.
    A network that is told the time is told the one at which so many tokens are masked.

    Args:
        network: as for `likelihood_bound`.
        denoiser: of an absorbing process.
        tokens: `(B, N)`, N at most 12.

    Raises:
        ValueError: another process, or sequences that are too long.
    """
    process, length = denoiser.process, tokens.shape[1]
    if not is_absorbing(process):
        raise ValueError(
            f"enumeration is for models that reveal masked tokens, of AbsorbingProcess, got {type(process).__name__}"
        )
    if length > LONGEST_ENUMERATED:
        raise ValueError(f"enumeration takes 2^N passes, for at most {LONGEST_ENUMERATED} tokens, got {length}")
    assert process.mask_id is not None
    places = torch.arange(length, device=tokens.device)
    reached = tokens.new_full((2**length, len(tokens)), -torch.inf, dtype=torch.float64)
    reached[0] = 0
    for revealed in range(2**length - 1):
        masked = ((revealed >> places) & 1 == 0).expand_as(tokens)
        states = tokens.masked_fill(masked, process.mask_id)
        level = denoiser.level_of_masks(masked)
        chances = clean_log_probabilities(denoiser, network(states, level), states, level).double()
        gained = chances.gather(-1, tokens[..., None])[..., 0] - torch.log(masked.sum(dim=1, keepdim=True).double())
        for place in range(length):
            if not revealed >> place & 1:
                after = revealed | 1 << place
                reached[after] = torch.logaddexp(reached[after], reached[revealed] + gained[:, place])
    return reached[-1]


def _ends(network: Network, denoiser: Denoiser, tokens: Tensor, random: CounterRandom, samples: int) -> Tensor:
    """`(B,)`: what a schedule's two ends cost."""
    process, schedule = denoiser.process, denoiser.schedule
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device=tokens.device).expand(2, len(tokens))[..., None]
    cost = process.prior_divergence(tokens, schedule.alpha(ends[1])).sum(dim=1)
    if schedule.ends()[0] == 0:
        return cost
    level = NoiseLevel.at(schedule, ends[0])
    uniforms = random.uniform(Purpose.LIKELIHOOD, tokens.shape[1], step=samples + 1)
    states = process.corrupt(tokens, level.alpha, uniforms)
    cavity = clean_log_probabilities(denoiser, network(states, level), states, level)
    posterior = posterior_from_leave_one_out(cavity, states, process, level)
    return cost - posterior.gather(-1, tokens[..., None])[..., 0].double().sum(dim=1)
