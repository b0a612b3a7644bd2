"""The law of every step-by-step sampler, enumerated from its own transitions, and its draws held against that law."""

from itertools import product

import pytest
import torch
from helpers.enumerated_steps import (
    HEADS,
    PROCESSES,
    FiniteNoise,
    OncePerState,
    draw_numbers,
    enumerated_law,
    transitions,
)
from helpers.exact_laws import chi_square_p_value
from helpers.exact_oracle import reference_law

from discrete_lit.diffusion import LinearSchedule, SquareSchedule
from discrete_lit.diffusion.parameterization import LeaveOneOutHead, ScoreHead
from discrete_lit.samplers import (
    AncestralSampler,
    DiffusionSampler,
    EulerSampler,
    FirstHittingSampler,
    RandomOrderSampler,
    TauLeapingSampler,
)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("process", "divergences"),
    [
        ("absorbing", [0.1211186343, 0.0429003963, 0.0137099330, 0.0040314574]),
        ("uniform", [0.1211186343, 0.0759639493, 0.0296032343, 0.0090398821]),
    ],
)
def test_divergence_of_the_ancestral_law(process: str, head: str, divergences: list[float]) -> None:
    """Published values at T = 1, 2, 4, 8 with alpha = 1 - i / T."""
    chain = PROCESSES[process]
    backbone, law = OncePerState(chain, HEADS[head](chain)), reference_law()
    for steps, expected in zip((1, 2, 4, 8), divergences, strict=True):
        drawn = enumerated_law(AncestralSampler(steps=steps), backbone, LinearSchedule())
        # Scores begin at alpha = 1e-8: at 0 they would tell nothing.
        tolerance = 1e-7 if head == "score" and process == "uniform" else 2e-10
        assert float((law * (law / drawn).log()).sum()) == pytest.approx(expected, abs=tolerance)


def test_distance_of_the_ancestral_law() -> None:
    backbone = OncePerState(PROCESSES["absorbing"], LeaveOneOutHead())
    for steps, expected in zip((1, 2, 4, 8), (0.1984933943, 0.1095566801, 0.0574585563, 0.0294592445), strict=True):
        drawn = enumerated_law(AncestralSampler(steps=steps), backbone, LinearSchedule())
        assert float((drawn - reference_law()).abs().sum() / 2) == pytest.approx(expected, abs=2e-10)


@pytest.mark.parametrize("process", PROCESSES)
def test_analytic_and_ancestral_transitions_are_the_same(process: str) -> None:
    """Steps made of scores and steps made of clean ids, for every head."""
    chain, schedule = PROCESSES[process], FiniteNoise()
    reference = transitions(AncestralSampler(steps=4), OncePerState(chain, LeaveOneOutHead()), schedule)
    for head, law in product(HEADS.values(), ("clean", "score", "transition")):
        other = transitions(AncestralSampler(steps=4, guidance_law=law), OncePerState(chain, head(chain)), schedule)
        for number, (one, two) in enumerate(zip(reference, other, strict=True)):
            reachable = ~one.isnan()
            torch.testing.assert_close(one[reachable], two[reachable], atol=1e-9, rtol=0, msg=f"{law} step {number}")


@pytest.mark.parametrize(
    ("process", "sampler", "head"),
    [
        ("absorbing", AncestralSampler, "cavity"),
        ("uniform", AncestralSampler, "posterior"),
        ("hybrid", AncestralSampler, "score"),
        ("gaussian", AncestralSampler, "cavity"),
        ("absorbing", EulerSampler, "score"),
        ("uniform", EulerSampler, "cavity"),
        ("gaussian", EulerSampler, "posterior"),
        ("absorbing", TauLeapingSampler, "posterior"),
        ("uniform", TauLeapingSampler, "score"),
    ],
)
def test_draws_follow_the_enumerated_law(process: str, sampler: type[DiffusionSampler], head: str) -> None:
    chain, schedule = PROCESSES[process], FiniteNoise() if process == "gaussian" else SquareSchedule()
    made = sampler(steps=3, guidance_law="score" if head == "score" else "clean")
    backbone = OncePerState(chain, HEADS[head](chain))
    numbers = draw_numbers(made, backbone, schedule)
    assert chi_square_p_value(numbers, enumerated_law(made, backbone, schedule)) > 1e-4
    assert chi_square_p_value(numbers, reference_law()) < 1e-6  # it is the T-step law, not the model's


@pytest.mark.parametrize("sampler", [FirstHittingSampler(), RandomOrderSampler(steps=3)])
def test_one_token_at_a_time_follows_the_model(sampler) -> None:
    backbone = OncePerState(PROCESSES["absorbing"], ScoreHead(), timed=False)
    assert chi_square_p_value(draw_numbers(sampler, backbone, SquareSchedule()), reference_law()) > 1e-4


@pytest.mark.parametrize("head", ["cavity", "score"])
@pytest.mark.parametrize("process", ["uniform", "hybrid", "gaussian"])
def test_short_steps_are_the_same_for_all(process: str, head: str) -> None:
    """Euler and tau-leaping differ from the exact step by dt squared: 16 times less at a quarter of the length."""
    chain, law = PROCESSES[process], "score" if head == "score" else "clean"
    backbone = OncePerState(chain, HEADS[head](chain))

    def half_way(sampler, steps: int):
        made = sampler(steps=steps, guidance_law=law)
        return transitions(made, backbone, FiniteNoise(), only=steps // 2)[0]

    for sampler in (EulerSampler, TauLeapingSampler):
        coarse, fine = (
            float((half_way(sampler, steps) - half_way(AncestralSampler, steps)).abs().max()) for steps in (100, 400)
        )
        assert 0 < coarse < 0.01
        assert 10 < coarse / fine < 22


def test_euler_by_hand() -> None:
    """m = 1 - (1 - t)^2 at t = 0.75: m' / m = 0.5 / 0.9375; of m = t, dt m' / m is the exact probability."""
    for sampler, expected in ((EulerSampler, 0.25 * 0.5 / 0.9375), (TauLeapingSampler, 0.12483)):
        backbone = OncePerState(PROCESSES["absorbing"], HEADS["cavity"](None))
        law = transitions(sampler(steps=4), backbone, SquareSchedule(), only=1)[0]
        assert 1 - float(law[-1, 0, -1]) == pytest.approx(expected, abs=2e-5)  # of the sequence of masks
        euler = transitions(EulerSampler(steps=4), backbone, LinearSchedule())
        exact = transitions(AncestralSampler(steps=4), backbone, LinearSchedule())
        for one, other in zip(euler, exact, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
