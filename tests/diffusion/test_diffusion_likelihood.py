"""Likelihoods of the exact denoiser: bounds whose mean is known to the last digit, and enumeration."""

import math

import pytest
import torch
from helpers.exact_laws import all_sequences
from helpers.exact_oracle import ExactBackbone, noisy_law, reference_law

from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import (
    AbsorbingProcess,
    DiscretizedGaussianProcess,
    GeometricSchedule,
    HybridProcess,
    LeaveOneOutHead,
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

CLEAN = all_sequences(4, 3)
SURPRISE = -reference_law().log()


def network_of(backbone: ExactBackbone):
    def network(states: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        labels = torch.zeros(len(states), dtype=torch.int64)
        return backbone.logits_at(states, labels, level.alpha.clamp(min=1e-12))  # where all is noise scores are 0

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
        return  # the error of the reconstruction is left out
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


def test_levels_are_spread_over_the_samples(monkeypatch) -> None:
    """One level in each n-th part for each sequence, and over sequences every level."""
    seen = []
    backbone = ExactBackbone(UniformProcess(4), LeaveOneOutHead())
    network = network_of(backbone)
    monkeypatch.setattr(module, "_ends", lambda *_: torch.zeros(64))

    def watched(states: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        seen.append(level.t[:, 0])
        return network(states, level)

    likelihood_bound(watched, backbone.denoiser(LogLinearSchedule()), CLEAN, CounterRandom(0, torch.arange(64)), 5)
    times = torch.stack(seen)
    assert torch.equal((times.sqrt() * 5).long().sort(dim=0).values, torch.arange(5)[:, None].expand(5, 64))
    assert math.isclose(float(times.sqrt().mean()), 0.5, abs_tol=0.02)
