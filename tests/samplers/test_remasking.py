"""ReMDM: what its strategies mask and unmask, and the theorem that remasking keeps the marginals q(z_t | x)."""

from typing import Any

import pytest
import torch
from helpers.enumerated_steps import PROCESSES, OncePerState, context_of, draw_numbers, predict
from helpers.exact_laws import chi_square_p_value, sequence_numbers

from discrete_lit.diffusion import LeaveOneOutHead, LinearSchedule, MaskSchedule, SquareSchedule
from discrete_lit.samplers import RemaskingSampler
from discrete_lit.samplers.categorical import within_nucleus
from discrete_lit.samplers.diffusion import NoisyTokens
from discrete_lit.samplers.remasking import corrector_speed

# Strategies that keep the marginals at every level; the loop's steps begin where its phases do.
KEEPS: list[dict[str, Any]] = [
    {"strategy": "cap", "eta": 0.3},
    {"strategy": "rescale", "eta": 0.6},
    {"strategy": "loop", "eta": 0.4, "loop": (0.25, 0.75), "loop_alpha": 0.6},
]
LAW = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def of_one_token() -> OncePerState:
    """The exact model of a sequence of one token: it predicts `LAW` where the token is masked."""
    return OncePerState(PROCESSES["absorbing"], LeaveOneOutHead(), LAW.expand(2, -1), length=1, timed=False)


def laws(sampler: RemaskingSampler, schedule: MaskSchedule) -> list[tuple[float, torch.Tensor]]:
    """The law `(S,)` of one token after each step from a mask, by the sampler's own probabilities, and alpha there."""
    backbone = of_one_token()
    process, context = backbone.process, context_of(backbone, 5, schedule)
    assert context.denoiser is not None
    law, found = torch.eye(5, dtype=torch.float64)[-1], []
    for interval in sampler.intervals(schedule, context):
        x = NoisyTokens(context, context.denoiser, level=interval.t)
        x.tokens = torch.arange(5)[:, None]  # each state
        x.log_probability = torch.cat((LAW, LAW[:1]))[:, None].log()
        jumps = sampler.jumps(predict(backbone, context.denoiser, x.tokens, interval), interval)
        remasked = sampler.remask_probability(x, interval)[..., None]
        step = jumps.distribution(x.tokens, process.states) * (1 - remasked)
        step[..., -1:] += remasked
        law = law @ step[:, 0]
        found.append((float(interval.alpha_s), law))
    return found


@pytest.mark.parametrize("settings", KEEPS)
@pytest.mark.parametrize("schedule", [LinearSchedule(), SquareSchedule()])
def test_an_exact_predictor_keeps_the_marginals(settings: dict[str, Any], schedule: MaskSchedule) -> None:
    """After every step a token is an id x with the probability alpha p(x), and masked otherwise (theorem 3.1)."""
    found = laws(RemaskingSampler(steps=8, **settings), schedule)
    for alpha, law in found:
        expected = torch.cat((alpha * LAW, torch.tensor([1 - alpha], dtype=torch.float64)))
        torch.testing.assert_close(law, expected, rtol=0, atol=1e-12)
    assert found[-1][0] == 1


def test_steps_forward_keep_the_marginals_while_there_are_masks_enough() -> None:
    """sigma = (alpha_s - alpha_t) / alpha_t is at most (1 - alpha_s) / alpha_t up to alpha_t = 1 - 2 / T."""
    found = laws(RemaskingSampler("forward_backward", steps=8), LinearSchedule())
    for alpha, law in found[:-1]:
        assert float(law[-1]) == pytest.approx(1 - alpha, abs=1e-12)
    torch.testing.assert_close(found[-1][1][:-1], LAW)


@pytest.mark.parametrize("strategy", ["conf", "flow_matching"])
def test_others_lead_to_the_law_of_one_token(strategy: Any) -> None:
    """`conf` masks again more than it unmasks for it; either ends with the exact law."""
    found = laws(RemaskingSampler(strategy, steps=8), LinearSchedule())
    torch.testing.assert_close(found[-1][1][:-1], LAW)
    if strategy == "conf":
        assert all(float(law[-1]) > 1 - alpha + 1e-3 for alpha, law in found[1:-1])


@pytest.mark.parametrize("settings", [*KEEPS, {"strategy": "forward_backward"}, {"strategy": "flow_matching"}])
def test_what_is_drawn_follows_the_enumerated_law(settings: dict[str, Any]) -> None:
    sampler = RemaskingSampler(steps=8, **settings)
    numbers = draw_numbers(sampler, of_one_token(), LinearSchedule(), 20_000)
    assert chi_square_p_value(numbers, LAW) > 1e-4
    # And before the end: draws of two tokens that nothing connects, half way.
    backbone = OncePerState(
        PROCESSES["absorbing"], LeaveOneOutHead(), torch.outer(LAW, LAW).flatten().expand(2, -1), length=2, timed=False
    )
    context = context_of(backbone, 20_000, LinearSchedule())
    assert context.denoiser is not None
    intervals = sampler.intervals(LinearSchedule(), context)
    x = NoisyTokens(context, context.denoiser, level=intervals[0].t, steps=len(intervals))
    middle = len(intervals) // 2
    for interval in intervals[:middle]:
        sampler.step(x, interval, 1.0)
    _, law = laws(sampler, LinearSchedule())[middle - 1]
    assert chi_square_p_value(sequence_numbers(x.tokens, 5), torch.outer(law, law).flatten()) > 1e-4


def test_the_flow_matching_corrector() -> None:
    """Its steps are as long as they can be: where one is short, the larger of the two probabilities is near 1."""
    sampler = RemaskingSampler("flow_matching", steps=6)
    context = context_of(of_one_token(), 1, LinearSchedule())
    *short, last = sampler.intervals(LinearSchedule(), context)
    assert last.last and float(last.t.t) <= 1 / 6 and float(sampler.sigma(last)) == 0
    assert float(corrector_speed(torch.tensor(0.5))) == pytest.approx(1 + 10 * 0.25**0.25)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert (
        float(sampler.unmask_probability(short[0], one)) == pytest.approx(1 / 6) and float(sampler.sigma(short[0])) == 0
    )
    for interval in short[1:]:
        t, dt = float(interval.t.t), float(interval.dt)
        speed = 1 + 10 * (t * (1 - t)) ** 0.25
        assert dt == pytest.approx(min(1 / 6, 1 / (speed / t + (speed - 1) / (1 - t))))
        unmask, sigma = float(sampler.unmask_probability(interval, one)), float(sampler.sigma(interval))
        assert unmask == pytest.approx(speed * dt / t) and sigma == pytest.approx((speed - 1) * dt / (1 - t))
        assert dt == pytest.approx(1 / 6) or unmask + sigma == pytest.approx(1)


def test_a_step_of_a_loop_is_of_the_phase_that_it_begins_in() -> None:
    """5 steps, the loop from 0.3 to 0.7 of them: the second begins at 0.2, and goes beyond the level of the loop."""
    sampler = RemaskingSampler("loop", eta=0.1, steps=5, loop=(0.3, 0.7), loop_alpha=0.6)
    intervals = sampler.intervals(LinearSchedule(), context_of(of_one_token(), 1, LinearSchedule()))
    alphas = [(float(each.alpha_t), float(each.alpha_s)) for each in intervals]
    expected = [(0, 0.4), (0.4, 0.8), (0.6, 0.6), (0.6, 0.6), (1 - 0.4 * 0.2 / 0.3, 1)]
    assert [value for pair in alphas for value in pair] == pytest.approx([value for pair in expected for value in pair])
    assert [float(sampler.sigma(each)) for each in intervals] == pytest.approx([0, 0, 0.1, 0.1, 0])


def test_the_id_that_crosses_a_nucleus_is_left_out() -> None:
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.95, 0.05, 0.0, 0.0]]).log()
    found = within_nucleus(weights, 0.75).exp()
    torch.testing.assert_close(found, torch.tensor([[4 / 7, 3 / 7, 0, 0], [1.0, 0, 0, 0]]))
    sampler = RemaskingSampler("conf", nucleus=0.75, steps=4)
    numbers = draw_numbers(sampler, of_one_token(), LinearSchedule(), 20_000)
    assert chi_square_p_value(numbers, torch.tensor([0, 0, 3 / 7, 4 / 7], dtype=torch.float64)) > 1e-4
