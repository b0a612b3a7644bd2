"""The likelihood of clean sequences under a denoiser: an ELBO without a cut-off, and the exact value by enumeration.

- `likelihood_bound`: an unbiased estimate of the ELBO. Where noise only masks, it is a mean over the number of masked
  tokens, or over their fraction, which needs no schedule and no epsilon (RADD's k-DCE and lambda-DCE; Ou et al., 2024).
  For other noise it is an integral over the total noise between the two ends of the training schedule, whose terms are
  added: the divergence from the prior at t = 1, and the reconstruction at t = 0 if the schedule's m(0) is not 0.
  Of a model of T steps (VQ-Diffusion) it is a mean over these.
- `enumerated_log_likelihood`: exact, for masks and short sequences.
"""

from collections.abc import Callable
from dataclasses import replace
from math import log
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.divergences import gather
from discrete_lit.diffusion.losses import (
    ContinuousBound,
    DiffusionLoss,
    DiscreteTimeBound,
    MaskedCrossEntropy,
    ScoreEntropy,
)
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import (
    Denoiser,
    LeaveOneOutHead,
    leave_one_out_from_posterior,
    leave_one_out_from_score,
    posterior_from_leave_one_out,
)
from discrete_lit.diffusion.processes import ForwardProcess, ends_in_masks, is_absorbing
from discrete_lit.diffusion.schedules import MaskSchedule

Network = Callable[[Tensor, NoiseLevel], Tensor]
"""Maps noisy states `(B, N)` and their level to logits."""
Variable = Literal["mask_count", "mask_ratio"]
"""The variable that the bound of a process that only masks is a mean over."""
Estimate = tuple[Tensor, Tensor]
"""A number for each sequence, `(B,)` float64, and a second one beside it: its variance, or its standard error."""


def likelihood_bound(
    network: Network,
    denoiser: Denoiser,
    tokens: Tensor,
    random: CounterRandom,
    samples: int,
    variable: Variable = "mask_count",
    steps: int | None = None,
) -> Estimate:
    """Return an unbiased estimate of the ELBO, a lower bound of log p, with its standard error.

    Where noise only masks, scores are normalised first: a model of scores s then has the clean distribution s / sum s,
    whose bound is never below that of the scores.

    The estimate is above or below the ELBO by chance, and the ELBO is below log p: it is a bound in expectation. Its
    variance is finite however wrong the network is, see `_integral`. Where noise does more than mask, a clean id to
    which the network gives less than 1e-100 counts as if it gave it that much.

    Args:
        network: the backbone for these sequences' labels.
        denoiser: the meaning of its output.
        tokens: clean, `(B, N)` int64.
        random: one stream for each sequence.
        samples: number of evaluations of the network, at levels that are spread evenly. If the training schedule starts
            at m(0) > 0, a quarter of this number, but at least 2, are added for the reconstruction.
        variable: the variable that the mean is over where noise only masks.
        steps: T, of a model that is one of T steps; None for the limit of many steps.

    Returns:
        Nats `(B,)` and the standard error of each (nan for one sample); float64. The error is computed as for
        independent levels, so it is too large where the cost depends on the level more than on what noise does.
    """
    if steps is not None:
        means = [
            _mean_over_steps(network, denoiser, tokens, random, samples, steps),
            _whole_prior_term(denoiser, tokens),
        ]
    elif is_absorbing(denoiser.process):
        means = [_mean_over_masks(network, denoiser, tokens, random, samples, variable)]
    else:
        means = [_integral(network, denoiser, tokens, random, samples), _prior_term(denoiser, tokens)]
        if denoiser.schedule.ends()[0] > 0:
            means.append(_reconstruction(network, denoiser, tokens, random, samples))
    costs, variances = (torch.stack(parts).sum(dim=0) for parts in zip(*means, strict=True))
    return -costs, variances.sqrt()


def _mean_over_masks(
    network: Network, denoiser: Denoiser, tokens: Tensor, random: CounterRandom, samples: int, variable: Variable
) -> Estimate:
    """Estimate the bound of a process that only masks."""
    process, length = denoiser.process, tokens.shape[1]
    loss, head = MaskedCrossEntropy(variable), LeaveOneOutHead()
    costs = []
    for evaluation, uniforms in enumerate(_spread(random, samples)):
        weight = torch.ones_like(uniforms)
        if variable == "mask_ratio":
            # A token is masked at a small m with probability m, and then costs 1 / m: a mean over uniform m has
            # infinite variance. With m = u^2 and u uniform, its weight 2 u makes the variance finite.
            uniforms, weight = uniforms**2, 2 * uniforms
        level = loss.level(denoiser.schedule, uniforms, length)
        draws = random.uniform(Purpose.LIKELIHOOD, length, step=evaluation + 1)
        states = loss.corrupt(process, tokens, level, draws)
        logits = clean_log_probabilities(denoiser, network(states, level), states, level)
        cost = loss(logits, tokens, head=head, states=states, process=process, level=level)
        costs.append(weight[:, 0] * cost.sum(dim=1))
    return _mean(costs)


def _mean_over_steps(
    network: Network, denoiser: Denoiser, tokens: Tensor, random: CounterRandom, samples: int, steps: int
) -> Estimate:
    """Estimate the bound of T steps, the prior term left out: T times the mean cost of a step."""
    process, length = denoiser.process, tokens.shape[1]
    loss, head, costs = DiscreteTimeBound(steps), LeaveOneOutHead(), list[Tensor]()
    for evaluation, uniforms in enumerate(_spread(random, samples)):
        level = loss.level(denoiser.schedule, uniforms, length)
        draws = random.uniform(Purpose.LIKELIHOOD, length, step=evaluation + 1)
        states = loss.corrupt(process, tokens, level, draws)
        logits = clean_log_probabilities(denoiser, network(states, level), states, level)
        cost = loss(logits, tokens, head=head, states=states, process=process, level=level)
        costs.append(cost.sum(dim=1))
    return _mean(costs)


def _whole_prior_term(denoiser: Denoiser, tokens: Tensor) -> Estimate:
    """Return the divergence from the prior of what is left of the tokens at t = 1."""
    end = denoiser.schedule.alpha(torch.ones(len(tokens), 1, dtype=torch.float64, device=tokens.device))
    cost = denoiser.process.prior_divergence(tokens, end).sum(dim=1)
    return cost, torch.zeros_like(cost)


def _integral(network: Network, denoiser: Denoiser, tokens: Tensor, random: CounterRandom, samples: int) -> Estimate:
    """Estimate the integral of the bound over the total noise sigma, of a process that does more than mask.

    Two things make the variance of a plain mean over t large, and both are drawn for. Levels come from `spread_noise`.
    And at little noise a token is replaced with the small probability m, and then costs about 1 / m. So in a third of
    the evaluations one token is replaced for certain, token i with the probability m_i / S, S the sum of all m_i. Of
    what other tokens cost there nothing is counted. What replaced tokens cost is counted in all evaluations, with the
    weight of the balance heuristic (Veach & Guibas, "Optimally Combining Sampling Techniques", 1995): with n plain
    evaluations, k others and M replaced tokens it is 1 / (n + k M / S), which makes up for the 1 / m.
    """
    process, schedule, length = denoiser.process, denoiser.schedule, tokens.shape[1]
    loss: DiffusionLoss = ScoreEntropy() if denoiser.head.kind == "score" else ContinuousBound()
    # A variance takes two of each.
    others = samples // 3 if samples >= 6 else 0
    plain = samples - others
    uniforms = [*_spread(random, plain), *_spread(random, others, number=1)]
    costs = []
    for evaluation, level in enumerate(spread_noise(process, schedule, uniform) for uniform in uniforms):
        draws = random.uniform(Purpose.LIKELIHOOD, length + 1, step=evaluation + 1)
        draws, choice = draws[:, :length], draws[:, length:]
        chances = process.replaced(tokens, level.alpha, level.noise)
        total = chances.sum(dim=1, keepdim=True)
        if evaluation >= plain:
            below = chances.cumsum(dim=1) <= choice * total
            chosen = below.sum(dim=1, keepdim=True).clamp(max=length - 1)
            draws = draws.scatter(1, chosen, draws.gather(1, chosen) * chances.gather(1, chosen))
        states = process.replace(tokens, level.alpha, draws, level.noise)
        logits, head = network(states, level), denoiser.head
        if not isinstance(loss, ScoreEntropy):
            logits, head = clean_log_probabilities(denoiser, logits, states, level), LeaveOneOutHead()
        cost = loss(logits, tokens, head=head, states=states, process=process, level=level)
        replaced = draws < chances
        number = replaced.sum(dim=1)
        weight = torch.where(number > 0, 1 / (plain + others * number / total[:, 0]), 0.0)
        kept = (cost * ~replaced).sum(dim=1) / plain if evaluation < plain else 0.0
        costs.append(kept + weight * (cost * replaced).sum(dim=1))
    (mean, variance), *rest = [_mean(part) for part in (costs[:plain], costs[plain:]) if part]
    mean, variance = plain * mean, plain**2 * variance
    for mean_of_others, variance_of_others in rest:
        mean, variance = mean + others * mean_of_others, variance + others**2 * variance_of_others
    return mean, variance


def _prior_term(denoiser: Denoiser, tokens: Tensor) -> Estimate:
    """Return the divergence from the prior of what is left of the tokens where `_integral` ends.

    It is 0 for noise that ends in masks by a schedule that goes all the way: what the integral leaves out of it is
    nothing that float64 could tell, while other noise may forget the tokens more slowly than the schedule.
    """
    if denoiser.schedule.ends()[1] == 1 and ends_in_masks(denoiser.process):
        cost = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        return cost, cost
    end = NoiseLevel.of(denoiser.schedule, _ends(denoiser.schedule)[1].to(tokens.device).expand(len(tokens), 1))
    cost = denoiser.process.prior_divergence(tokens, end.alpha).sum(dim=1)
    return cost, torch.zeros_like(cost)


def _reconstruction(
    network: Network, denoiser: Denoiser, tokens: Tensor, random: CounterRandom, samples: int
) -> Estimate:
    """Estimate the cost of telling the clean tokens from those at t = 0, if m(0) > 0."""
    process, costs = denoiser.process, []
    level = NoiseLevel.at(denoiser.schedule, torch.zeros(len(tokens), 1, dtype=torch.float64, device=tokens.device))
    for repeat in range(max(2, -(-samples // 4)) if samples > 1 else 1):
        uniforms = random.uniform(Purpose.LIKELIHOOD, tokens.shape[1], step=samples + repeat + 1)
        states = process.corrupt(tokens, level.alpha, uniforms, level.noise)
        leave_one_out = clean_log_probabilities(denoiser, network(states, level), states, level)
        posterior = posterior_from_leave_one_out(leave_one_out, states, process, level)
        costs.append(-gather(posterior, tokens).double().sum(dim=1))
    return _mean(costs)


def _spread(random: CounterRandom, count: int, number: int = 0) -> list[Tensor]:
    """Draw `count` uniform numbers `(B, 1)` for each sequence, one in each part of (0, 1) of this size."""
    shift = random.uniform(Purpose.LIKELIHOOD, number + 1)[:, number:]
    return [((shift + part / count) % 1).clamp(2.0**-53, 1 - 2.0**-53) for part in range(count)]


def _mean(costs: list[Tensor]) -> Estimate:
    """Return the mean of some draws of each sequence's cost, and its variance (nan for one draw)."""
    drawn = torch.stack(costs)
    variance = drawn.var(dim=0) / len(costs) if len(costs) > 1 else drawn[0] * torch.nan
    return drawn.mean(dim=0), variance


# The least and the most total noise that an integral goes through. Less changes nothing even where the network gives a
# clean id a probability of 1e-100, and of alpha = exp(-sigma) with more noise float64 has no digits.
_LEAST_NOISE, _MOST_NOISE = 1e-104, 700.0
# The part of the levels whose odds sigma / (1 + sigma) are uniform; of the others, the part with sigma below 1, and the
# scales of log sigma below and above.
_SHORT, _LOW_PART, _LOW_SCALE, _HIGH_SCALE = 0.3, 0.7, 15.0, 2.0


def spread_noise(process: ForwardProcess, schedule: MaskSchedule, uniforms: Tensor) -> NoiseLevel:
    """Draw levels for the integral of a cost over the total noise sigma, with finite variance.

    Let a network give the clean id a probability p that is far too small. A token that is still clean then costs about
    1 / sigma for each unit of noise, from sigma = p on: every power of ten counts the same, and with levels that are
    uniform in t, or in its root, the second moment of the estimate grows with a power of 1 / p. At the other end, a
    process that mixes slowly costs something until sigma is the inverse of its smallest rate.

    So the levels are of two kinds, with sigma in units in which a token is replaced about once. For good networks,
    sigma / (1 + sigma) is uniform: log sigma has a logistic law. For others the density of log sigma falls as its
    inverse square on both sides, slower than every exponential, and the second moment grows as -log p times the square
    of the mean.

    Args:
        process: gives the unit.
        schedule: gives the ends, and the time of each level.
        uniforms: `(B, 1)` float64 in (0, 1), which decide the draw.

    Returns:
        Levels whose `rate` is the slope of sigma in the uniform number: the mean of a loss over the levels is its
        integral over sigma.
    """
    unit = log(process.speed)
    low, high = _ends(schedule).log().to(uniforms.device) + unit
    is_short = uniforms < _SHORT
    first = torch.sigmoid(low)
    short_mass = torch.sigmoid(high) - first
    # What is above a level, and what is below, with all digits of both.
    part = uniforms / _SHORT
    short = (first + part * short_mass).log() - (torch.sigmoid(-high) + (1 - part) * short_mass).log()
    long_first, long_last = _long_share(low), _long_share(high)
    long_mass = long_last - long_first
    share = long_first + (uniforms - _SHORT) / (1 - _SHORT) * long_mass
    above = _HIGH_SCALE * ((1 - _LOW_PART) / (1 - share) - 1)
    long = torch.where(share < _LOW_PART, _LOW_SCALE * (1 - _LOW_PART / share), above)
    log_sigma = torch.where(is_short, short, long).clamp(low, high)
    below = log_sigma < 0
    scale, side = torch.where(below, _LOW_SCALE, _HIGH_SCALE), torch.where(below, _LOW_PART, 1 - _LOW_PART)
    density = _SHORT / short_mass * torch.sigmoid(log_sigma) * torch.sigmoid(-log_sigma)
    density = density + (1 - _SHORT) / long_mass * side / scale / (1 + log_sigma.abs() / scale) ** 2
    sigma = (log_sigma - unit).exp()
    return replace(NoiseLevel.of(schedule, sigma), rate=sigma / density)


def _long_share(log_sigma: Tensor) -> Tensor:
    """Return the share of the levels with a long tail that have less noise, if noise has no ends."""
    below = _LOW_PART / (1 - log_sigma.clamp(max=0) / _LOW_SCALE)
    above = 1 - (1 - _LOW_PART) / (1 + log_sigma.clamp(min=0) / _HIGH_SCALE)
    return torch.where(log_sigma < 0, below, above)


def _ends(schedule: MaskSchedule) -> Tensor:
    """Return the total noise between which there is something to integrate, `(2,)`."""
    ends = NoiseLevel.at(schedule, torch.tensor([0.0, 1.0], dtype=torch.float64)).sigma
    return ends.clamp(_LEAST_NOISE, _MOST_NOISE)


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
