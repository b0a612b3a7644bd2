"""Likelihoods of the exact denoiser: bounds whose mean is known to the last digit, and enumeration."""

import math

import pytest
import torch
from helpers.exact_laws import all_sequences
from helpers.exact_oracle import ExactBackbone, noisy_law, reference_law
from scipy.special import exp1

from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import (
    AbsorbingProcess,
    CosineSchedule,
    DiscretizedGaussianProcess,
    ForwardProcess,
    GeometricSchedule,
    HybridProcess,
    LeaveOneOutHead,
    LinearSchedule,
    LogLinearSchedule,
    LogSinSchedule,
    MaskSchedule,
    NoiseLevel,
    PosteriorHead,
    ScoreHead,
    UniformProcess,
)
from discrete_lit.diffusion import likelihood as module
from discrete_lit.diffusion.likelihood import enumerated_log_likelihood, likelihood_bound
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.diffusion.processes import is_absorbing

CLEAN = all_sequences(4, 3)
SURPRISE = -reference_law().log()


def network_of(backbone: ExactBackbone):
    def network(states: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        labels = torch.zeros(len(states), dtype=torch.int64)
        # Where all is noise, or so little that alpha has no digit of it, scores would be 0.
        return backbone.logits_at(states, labels, level.alpha.clamp(1e-12, 1 - 1e-13))

    return network


def estimates(backbone: ExactBackbone, schedule: MaskSchedule, draws: int = 100, samples: int = 4, **arguments):
    """Means over many draws of each of the 64 sequences, with the errors of these means and what was claimed."""
    tokens = CLEAN.repeat(draws, 1)
    random = CounterRandom(0, torch.arange(len(tokens)))
    nats, error = likelihood_bound(
        network_of(backbone), backbone.denoiser(schedule), tokens, random, samples, **arguments
    )
    nats, error = nats.view(draws, 64), error.view(draws, 64)
    return nats.mean(dim=0), nats.std(dim=0) / draws**0.5, (error**2).mean(dim=0).sqrt() / draws**0.5


@pytest.mark.parametrize("variable", ["mask_count", "mask_ratio"])
@pytest.mark.parametrize(
    "head",
    [LeaveOneOutHead(), PosteriorHead(), ScoreHead(scale_by_noise=False), ScoreHead(scale_by_noise=True)],
    ids=range(4),
)
def test_masks_need_no_cut_off(head, variable) -> None:
    """Also with a schedule that stops at 0.9 the estimate is of -log p itself."""
    backbone = ExactBackbone(AbsorbingProcess(4), head)
    mean, error, claimed = estimates(backbone, LogSinSchedule(0.1), variable=variable)
    assert (((mean + SURPRISE) / error).abs() < 4.5).all()
    # Spread levels do better than the error of independent ones says.
    assert float((error / claimed).mean()) < 1.1


@pytest.mark.parametrize(
    ("process", "schedule"),
    [
        (UniformProcess(4), LogLinearSchedule(0.2)),
        (HybridProcess(4, 0.6), LogLinearSchedule(0.2)),
        (DiscretizedGaussianProcess(4, 0.5), GeometricSchedule(0.05, 3.0)),
        (UniformProcess(4), GeometricSchedule(0.3, 2.0)),
    ],
    ids=["uniform", "hybrid", "gaussian", "cut"],
)
@pytest.mark.parametrize("kind", ["leave_one_out", "posterior", "score"])
def test_other_noise_pays_for_both_ends(process, schedule: MaskSchedule, kind: str) -> None:
    """The mean is -log p and sum of q(x_T | x_0) log(p_T / pi), wherever the schedule starts and ends.

    Where it starts above 0 the tokens are reconstructed apart from one another, which costs a little more: the mean
    lies above by what the others know of each.
    """
    head = {
        "leave_one_out": LeaveOneOutHead(),
        "posterior": PosteriorHead(),
        "score": ScoreHead(scale_by_noise=False, mask_output=process.masks),
    }[kind]
    mean, error, claimed = estimates(ExactBackbone(process, head), schedule)
    alpha = float(schedule.alpha(torch.tensor(1.0)))
    noisy = all_sequences(process.states, 3)
    kernel = process.matrix(torch.tensor(alpha, dtype=torch.float64))[:4]
    chances = torch.stack([kernel[CLEAN[:, n]][:, noisy[:, n]] for n in range(3)]).prod(dim=0)
    ratio = noisy_law(reference_law(), process, alpha).log() - process.prior()[noisy].log().sum(dim=1)
    gap = -mean - SURPRISE - chances @ ratio
    on_average = float(reference_law() @ gap)
    noise = float((reference_law() ** 2 @ error**2).sqrt())
    if schedule.ends()[0] == 0:
        assert abs(on_average) < 4.5 * noise < 0.4
    else:
        assert -4.5 * noise < on_average < 0.15
    assert 0.3 < float((error / claimed).median()) < 1.5


@pytest.mark.parametrize("head", [LeaveOneOutHead(), PosteriorHead(), ScoreHead(scale_by_noise=True)], ids=range(3))
def test_enumeration_is_exact(head) -> None:
    backbone = ExactBackbone(AbsorbingProcess(4), head)
    found = enumerated_log_likelihood(network_of(backbone), backbone.denoiser(LogSinSchedule()), CLEAN)
    torch.testing.assert_close(found, -SURPRISE, rtol=0, atol=1e-10)


def test_the_estimate_of_a_sequence_does_not_depend_on_its_batch() -> None:
    backbone = ExactBackbone(UniformProcess(4), LeaveOneOutHead())
    network, denoiser = network_of(backbone), backbone.denoiser(LogLinearSchedule())
    whole, _ = likelihood_bound(network, denoiser, CLEAN, CounterRandom(5, torch.arange(64)), 3)
    part, error = likelihood_bound(network, denoiser, CLEAN[7:9], CounterRandom(5, torch.arange(7, 9)), 3)
    torch.testing.assert_close(part, whole[7:9], rtol=1e-12, atol=0)
    assert error.shape == (2,) and (error > 0).all()


def test_levels_are_spread_over_the_samples() -> None:
    """One level in each n-th part for each sequence, and over sequences every level."""
    seen = []
    process, schedule = UniformProcess(4), LogLinearSchedule()
    backbone = ExactBackbone(process, LeaveOneOutHead())
    network, random = network_of(backbone), CounterRandom(0, torch.arange(64))

    def watched(states: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        seen.append(level.sigma[:, 0])
        return network(states, level)

    likelihood_bound(watched, backbone.denoiser(schedule), CLEAN, random, 12)
    uniforms = [*module._spread(random, 8), *module._spread(random, 4, number=1)]
    levels = [module.spread_noise(process, schedule, uniform).sigma[:, 0] for uniform in uniforms]
    torch.testing.assert_close(torch.stack(seen), torch.stack(levels))
    for count, part in ((8, uniforms[:8]), (4, uniforms[8:])):
        parts = (torch.cat(part, dim=1) * count).long()
        assert torch.equal(parts.sort(dim=1).values, torch.arange(count).expand(64, count))
        assert math.isclose(float(torch.cat(part).mean()), 0.5, abs_tol=0.02)


MIDPOINTS = (torch.arange(200_000, dtype=torch.float64)[:, None] + 0.5) / 200_000
NOISES = {
    "uniform": (UniformProcess(8), LinearSchedule()),
    "cut": (UniformProcess(8), GeometricSchedule()),
    "hybrid": (HybridProcess(8, 0.6), LogLinearSchedule()),
    "gaussian": (DiscretizedGaussianProcess(8, 0.3), LinearSchedule()),
    "slow gaussian": (DiscretizedGaussianProcess(8, 0.02), CosineSchedule()),
}


@pytest.mark.parametrize("name", NOISES)
def test_levels_of_noise_average_to_an_integral_over_it(name: str) -> None:
    process, schedule = NOISES[name]
    level = module.spread_noise(process, schedule, MIDPOINTS)
    low, high = (float(end) for end in NoiseLevel.at(schedule, torch.tensor([[0.0], [1.0]]).double()).sigma)
    assert low <= float(level.sigma.min()) and float(level.sigma.max()) <= high
    rates = {"little": 1e9, "most": 1.0, "much": 0.05}
    for rate in rates.values():
        expected = math.exp(-rate * low) - math.exp(-rate * high)  # of rate exp(-rate sigma)
        found = float((level.rate * rate * torch.exp(-rate * level.sigma)).mean())
        assert found == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(level.alpha, torch.exp(-level.sigma), rtol=1e-9, atol=0)
    inner = (level.noise > 1e-3) & (level.noise < 0.999)
    torch.testing.assert_close(schedule.mask_probability(level.t)[inner], level.noise[inner], rtol=1e-9, atol=0)


@pytest.mark.parametrize("nats", [3, 15, 60, 200])
def test_second_moments_grow_with_the_nats_not_with_the_odds(nats: float) -> None:
    """Of a token that is still clean, which costs 1 / (sigma + p): the old one was exp(nats / 2)."""
    level = module.spread_noise(UniformProcess(8), LinearSchedule(), MIDPOINTS)
    costs = level.rate / (level.sigma + math.exp(-nats)) * torch.exp(-level.sigma)
    assert float(costs.mean()) == pytest.approx(exp1(math.exp(-nats)) * math.exp(math.exp(-nats)), rel=1e-3)
    assert float((costs**2).mean() / costs.mean() ** 2) < 4 + nats / 10


def constant_estimates(process: ForwardProcess, schedule: MaskSchedule, nats: float, **arguments):
    """Estimates and claimed errors `(400,)` of one sequence for a network that sees nothing, and what they estimate."""
    law = torch.linspace(1, 2, process.vocab_size, dtype=torch.float64)
    law[0] = 0
    law = law / law.sum() * -math.expm1(-nats)
    law[0] = math.exp(-nats)
    tokens = torch.tensor([0, 3, 0, 0, 7, 0, 0, 0] * 2).expand(400, -1)
    denoiser = Denoiser(process=process, schedule=schedule, head=LeaveOneOutHead(), time_input="none")
    found, error = likelihood_bound(
        lambda states, level: law.log().expand(*states.shape, -1),
        denoiser,
        tokens,
        CounterRandom(0, torch.arange(400)),
        16,
        **arguments,
    )
    expected = law.log()[tokens[0]].sum()
    if not is_absorbing(process):
        # What noise leaves of the data at t = 1 is known too.
        alpha = schedule.alpha(torch.ones(1)).clamp(min=1e-300)
        true, predicted = process.marginals(tokens[0], law.expand(16, -1), alpha.expand(16))
        expected = expected - (true * (predicted / process.prior()).log()).sum()
    return found, error, float(expected)


@pytest.mark.parametrize("nats", [0.7, 3.0, 15.0, 92.0], ids=["good", "fair", "bad", "very bad"])
@pytest.mark.parametrize("name", NOISES)
def test_two_standard_errors_cover_the_bound_however_wrong_the_network(name: str, nats: float) -> None:
    process, schedule = NOISES[name]
    found, error, expected = constant_estimates(process, schedule, nats)
    covered = ((found - expected).abs() < 1.96 * error).double().mean()
    assert covered > 0.91
    assert abs(float(found.mean()) - expected) < 4.5 * float(found.std()) / 20
    # As many too high as too low, and an error that is of use.
    assert 0.3 < float((found > expected).double().mean()) < 0.7
    assert float((error**2).mean().sqrt()) < 0.8 * abs(expected) + 1


@pytest.mark.parametrize("variable", ["mask_count", "mask_ratio"])
@pytest.mark.parametrize("nats", [0.7, 15.0])
def test_two_standard_errors_cover_the_bound_of_masks(variable, nats: float) -> None:
    found, error, expected = constant_estimates(AbsorbingProcess(8), LinearSchedule(), nats, variable=variable)
    assert float(((found - expected).abs() < 1.96 * error).double().mean()) > 0.91
    assert abs(float(found.mean()) - expected) < 4.5 * float(found.std()) / 20
