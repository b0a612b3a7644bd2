"""Correctors keep the law of a noisy level, and bring few steps nearer to the model's."""

import pytest
import torch
from helpers.enumerated_steps import HEADS, PROCESSES, OncePerState, context_of, draw_numbers
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers
from helpers.exact_oracle import LENGTH, VOCAB_SIZE, noisy_law, reference_law

from discrete_lit.diffusion import LinearSchedule
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import LeaveOneOutHead
from discrete_lit.samplers import AncestralSampler, PredictorCorrectorSampler
from discrete_lit.samplers.diffusion import NoisyTokens
from discrete_lit.samplers.diffusion_guidance import Prediction


@pytest.mark.parametrize("process", PROCESSES)
def test_gibbs_keeps_the_noisy_law(process: str) -> None:
    """One token of three at random, drawn again: from p_s comes p_s. Draws from p_s, corrected four times."""
    chain, schedule, rows = PROCESSES[process], LinearSchedule(), 40_000
    backbone = OncePerState(chain, HEADS["cavity"](chain))
    sampler = PredictorCorrectorSampler(corrector="gibbs", steps=2)
    context = context_of(backbone, rows, schedule)
    interval = sampler.intervals(schedule, context)[0]  # ends at alpha = 0.5
    law = noisy_law(reference_law(), chain, 0.5)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.multinomial(law, rows, replacement=True, generator=generator)
    x = NoisyTokens(context, context.denoiser, level=interval.t)
    x.tokens = all_sequences(chain.states, LENGTH)[numbers]
    for number in range(4):
        sampler.gibbs(x, interval.s, 10 + number, 1.0)
    after = sequence_numbers(x.tokens, chain.states)
    assert (after != numbers).double().mean() > 0.5
    assert chi_square_p_value(after, law) > 1e-4


@pytest.mark.parametrize("process", PROCESSES)
def test_gibbs_matrix_keeps_the_noisy_law(process: str) -> None:
    """The same without draws, from the network's conditionals as the sampler takes them."""
    chain = PROCESSES[process]
    backbone, schedule = OncePerState(chain, HEADS["posterior"](chain)), LinearSchedule()
    alpha = torch.full((1, 1), 0.5, dtype=torch.float64)
    states = all_sequences(chain.states, LENGTH)
    law, total = noisy_law(reference_law(), chain, 0.5), torch.zeros(len(states), dtype=torch.float64)
    level = NoiseLevel.at(schedule, alpha.expand(len(states), 1))
    labels = torch.zeros(len(states), dtype=torch.int64)
    for place in range(LENGTH):
        seen = states.clone()
        if process == "absorbing":
            seen[:, place] = VOCAB_SIZE
        output = backbone.head(backbone.logits_at(seen, labels, level.alpha), seen, level)
        clean = Prediction(
            denoiser=backbone.denoiser(schedule), x_t=seen, level=level, outputs=(output,), scale=1.0
        ).clean()
        where_to = chain.marginal(clean.exp(), level.alpha)[:, place]  # (S^N, S)
        others = states.repeat_interleave(chain.states, dim=0)
        others[:, place] = torch.arange(chain.states).repeat(len(states))
        reached = sequence_numbers(others, chain.states)
        total.index_add_(0, reached, (law[:, None] * where_to).flatten() / LENGTH)
    torch.testing.assert_close(total, law, atol=1e-12, rtol=0)


@pytest.mark.parametrize("process", PROCESSES)
def test_forward_and_reverse_rates_keep_the_noisy_law(process: str) -> None:
    """What they move in and out of every sequence of states is the same."""
    chain, noise = PROCESSES[process], 1e-6
    backbone, schedule = OncePerState(chain, HEADS["cavity"](chain)), LinearSchedule()
    sampler = PredictorCorrectorSampler(corrector="forward_backward", corrector_noise=noise, steps=2)
    states = all_sequences(chain.states, LENGTH)
    law, labels = noisy_law(reference_law(), chain, 0.5), torch.zeros(len(states), dtype=torch.int64)
    alpha = torch.full((len(states), 1), 0.5, dtype=torch.float64)
    level = NoiseLevel.at(schedule, alpha)
    output = backbone.head(backbone.logits_at(states, labels, alpha), states, level)
    jumps = sampler.rate_jumps(
        Prediction(denoiser=backbone.denoiser(schedule), x_t=states, level=level, outputs=(output,), scale=1.0)
    )
    change = torch.zeros_like(law)
    for place in range(LENGTH):
        moved = law[:, None] * jumps.distribution(states, chain.states)[:, place]
        others = states.repeat_interleave(chain.states, dim=0)
        others[:, place] = torch.arange(chain.states).repeat(len(states))
        change.index_add_(0, sequence_numbers(others, chain.states), moved.flatten())
        change -= law
    assert float(change.abs().max()) < 1e-4 * noise
    assert float(jumps.probability.min()) > 0.1 * noise


def test_masking_corrector_draws_keep_the_noisy_law() -> None:
    """The forward-backward step of masks, whose reveals need no rates: 25 short steps from p_s."""
    chain, schedule, rows = PROCESSES["absorbing"], LinearSchedule(), 20_000
    backbone = OncePerState(chain, LeaveOneOutHead(), timed=False)
    sampler = PredictorCorrectorSampler(corrector_noise=0.02, steps=2)
    context = context_of(backbone, rows, schedule)
    interval = sampler.intervals(schedule, context)[0]
    law = noisy_law(reference_law(), chain, 0.5)
    numbers = torch.multinomial(law, rows, replacement=True, generator=torch.Generator().manual_seed(1))
    x = NoisyTokens(context, context.denoiser, level=interval.t)
    x.tokens = all_sequences(chain.states, LENGTH)[numbers]
    for number in range(25):
        sampler.forward_backward(x, interval.s, number, 1.0)
    after = sequence_numbers(x.tokens, chain.states)
    assert (after != numbers).double().mean() > 0.3
    assert chi_square_p_value(after, law) > 1e-4


def test_correctors_bring_few_steps_nearer_to_the_law() -> None:
    chain = PROCESSES["absorbing"]
    backbone, law = OncePerState(chain, LeaveOneOutHead(), timed=False), reference_law()

    def distance(sampler) -> float:
        numbers = draw_numbers(sampler, backbone, LinearSchedule(), 20_000)
        return float((torch.bincount(numbers, minlength=64) / 20_000 - law).abs().sum() / 2)

    plain = distance(AncestralSampler(steps=2))
    assert distance(PredictorCorrectorSampler(corrector="gibbs", corrector_steps=15, steps=2)) < 0.8 * plain
