"""The likelihood of clean sequences under a denoiser: an ELBO without a cut-off, and the exact value by enumeration.

- `likelihood_bound`: an unbiased estimate of the ELBO. Where noise only masks, it is a mean over the number of masked
  tokens, or over their fraction, which needs no schedule and no epsilon (RADD's k-DCE and lambda-DCE; Ou et al., 2024).
  For other noise it is an integral over the training schedule, and the terms of its two ends are added: the divergence
  from the prior at t = 1, and the reconstruction at t = 0 if the schedule's m(0) is not 0.
- `enumerated_log_likelihood`: exact, for masks and short sequences.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.losses import ContinuousBound, DiffusionLoss, MaskedCrossEntropy, ScoreEntropy, gather
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
"""Maps noisy states `(B, N)` and their level to logits."""


def likelihood_bound(
    network: Network,
    denoiser: Denoiser,
    tokens: Tensor,
    random: CounterRandom,
    samples: int,
    variable: Literal["mask_count", "mask_ratio"] = "mask_count",
) -> tuple[Tensor, Tensor]:
    """Return an unbiased estimate of the ELBO, a lower bound of log p, with its standard error.

    Where noise only masks, scores are normalised first: a model of scores s then has the clean distribution s / sum s,
    whose bound is never below that of the scores. If the training schedule starts at m(0) > 0, the reconstruction term
    is drawn once, and its own error is left out of the standard error.

    Args:
        network: the backbone for these sequences' labels.
        denoiser: the meaning of its output.
        tokens: clean, `(B, N)` int64.
        random: one stream for each sequence.
        samples: number of evaluations of the network, at levels that are spread evenly.
        variable: the variable that the mean is over where noise only masks.

    Returns:
        Nats `(B,)` and the standard error of each, computed as for independent levels (nan for one sample); float64.
    """
    process, schedule = denoiser.process, denoiser.schedule
    absorbing = is_absorbing(process)
    loss: DiffusionLoss = MaskedCrossEntropy(variable) if absorbing else ContinuousBound()
    if denoiser.head.kind == "score" and not absorbing:
        loss = ScoreEntropy()
    shift = random.uniform(Purpose.LIKELIHOOD, 1)
    costs = []
    for evaluation in range(samples):
        uniforms = ((shift + evaluation / samples) % 1).clamp(2.0**-53, 1 - 2.0**-53)
        weight = torch.ones_like(uniforms)
        if not (absorbing and variable == "mask_count"):
            # A token changes at a small m with probability m, and then costs 1 / m: a mean over uniform t has infinite
            # variance. With t = u^2 and u uniform, its weight 2 u makes the variance finite.
            uniforms, weight = uniforms**2, 2 * uniforms
        level = loss.level(schedule, uniforms, tokens.shape[1])
        states = loss.corrupt(
            process, tokens, level, random.uniform(Purpose.LIKELIHOOD, tokens.shape[1], step=evaluation + 1)
        )
        logits, head = network(states, level), denoiser.head
        if not isinstance(loss, ScoreEntropy):
            logits, head = clean_log_probabilities(denoiser, logits, states, level), LeaveOneOutHead()
        cost = loss(logits, tokens, head=head, states=states, process=process, level=level)
        costs.append(weight[:, 0] * cost.double().sum(dim=1))
    drawn = torch.stack(costs)
    mean, error = drawn.mean(dim=0), drawn.std(dim=0) / samples**0.5 if samples > 1 else drawn[0] * torch.nan
    if not absorbing:
        mean = mean + _ends(network, denoiser, tokens, random, samples)
    return -mean, error


def _ends(network: Network, denoiser: Denoiser, tokens: Tensor, random: CounterRandom, samples: int) -> Tensor:
    """Return the cost `(B,)` of the schedule's two ends: the prior term, and the reconstruction if m(0) > 0."""
    process, schedule = denoiser.process, denoiser.schedule
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device=tokens.device).expand(2, len(tokens))[..., None]
    cost = process.prior_divergence(tokens, schedule.alpha(ends[1])).sum(dim=1)
    if schedule.ends()[0] == 0:
        return cost
    level = NoiseLevel.at(schedule, ends[0])
    uniforms = random.uniform(Purpose.LIKELIHOOD, tokens.shape[1], step=samples + 1)
    states = process.corrupt(tokens, level.alpha, uniforms, level.noise)
    leave_one_out = clean_log_probabilities(denoiser, network(states, level), states, level)
    posterior = posterior_from_leave_one_out(leave_one_out, states, process, level)
    return cost - gather(posterior, tokens).double().sum(dim=1)


# Enumeration makes 2^N passes.
LONGEST_ENUMERATED = 12


def enumerated_log_likelihood(network: Network, denoiser: Denoiser, tokens: Tensor) -> Tensor:
    """Return the exact log p of unmasking one token after another in a random order, `(B,)` float64 nats.

    Let f(S) be the probability that the set S is unmasked first, with the ids that it has in the sequence. f of the
    empty set is 1, and `f(S) = sum over i in S of f(S - i) p(x_i | S - i) / (N - |S| + 1)`: one pass of the network for
    each set. A network that is told the time is told the one at which the expected number of masks is the set's.

    Args:
        network: as for `likelihood_bound`.
        denoiser: one of an absorbing process.
        tokens: `(B, N)` int64, N at most 12.

    Raises:
        ValueError: the process is another, or the sequences are too long.
    """
    process, length = denoiser.process, tokens.shape[1]
    if not is_absorbing(process):
        raise ValueError(
            f"enumeration is for models that unmask tokens, of AbsorbingProcess, got {type(process).__name__}"
        )
    if length > LONGEST_ENUMERATED:
        raise ValueError(f"enumeration takes 2^N passes, for at most {LONGEST_ENUMERATED} tokens, got {length}")
    assert process.mask_id is not None
    positions = torch.arange(length, device=tokens.device)
    # log f of every set, numbered by its bits.
    reached = tokens.new_full((2**length, len(tokens)), -torch.inf, dtype=torch.float64)
    reached[0] = 0
    for unmasked in range(2**length - 1):
        masked = ((unmasked >> positions) & 1 == 0).expand_as(tokens)
        states = tokens.masked_fill(masked, process.mask_id)
        level = denoiser.level_of_masks(masked)
        log_p = clean_log_probabilities(denoiser, network(states, level), states, level).double()
        gained = gather(log_p, tokens) - torch.log(masked.sum(dim=1, keepdim=True).double())
        for position in range(length):
            if not unmasked >> position & 1:
                after = unmasked | 1 << position
                reached[after] = torch.logaddexp(reached[after], reached[unmasked] + gained[:, position])
    return reached[-1]


def clean_log_probabilities(denoiser: Denoiser, logits: Tensor, states: Tensor, level: NoiseLevel) -> Tensor:
    """Return the leave-one-out log-probabilities `(B, N, K)` of a network's output, whatever its head.

    They mean nothing at unmasked tokens of an absorbing process.
    """
    head, process = denoiser.head, denoiser.process
    if is_absorbing(process):
        return LeaveOneOutHead()(logits[..., : process.vocab_size], states, level)
    prediction = head(logits, states, level)
    if head.kind == "score":
        return leave_one_out_from_score(prediction, states, process, level)
    return leave_one_out_from_posterior(prediction, states, process, level) if head.kind == "posterior" else prediction
