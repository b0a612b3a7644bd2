"""Improved VQ-Diffusion's inference: its laws where they can be written down, and what it costs."""

import pytest
import torch
from helpers.diffusion_cases import PROCESSES as SMALL_PROCESSES
from helpers.diffusion_cases import make_model
from helpers.enumerated_steps import OncePerState, draw_numbers
from helpers.exact_laws import chi_square_p_value
from helpers.exact_oracle import VOCAB_SIZE, reference_law

from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import AbsorbingProcess, MaskAndReplaceProcess, SquareSchedule
from discrete_lit.diffusion.parameterization import LeaveOneOutHead, PosteriorHead
from discrete_lit.samplers import PuritySampler

PROCESSES = {
    "absorbing": (AbsorbingProcess(VOCAB_SIZE), LeaveOneOutHead()),
    "mask_and_replace": (MaskAndReplaceProcess(VOCAB_SIZE, first=(0.8, 0.1), last=(0.02, 0.9)), PosteriorHead()),
}


@pytest.mark.parametrize("choice", ["purity", "uniform"])
def test_one_token_at_a_time_follows_the_model(choice: str) -> None:
    """In whatever order: the true conditionals of masks are those of one law."""
    backbone = OncePerState(PROCESSES["absorbing"][0], LeaveOneOutHead(), timed=False)
    numbers = draw_numbers(PuritySampler(steps=3, choice=choice), backbone, SquareSchedule())
    assert chi_square_p_value(numbers, reference_law()) > 1e-4


@torch.no_grad()
def draw(process: str, count: int = 20_000, **settings):
    chain, head = PROCESSES[process]
    weights = torch.randn(VOCAB_SIZE**3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    backbone = OncePerState(chain, head, (2 * weights).softmax(dim=0).expand(2, -1))
    labels, random = torch.zeros(count, dtype=torch.int64), CounterRandom(2, torch.arange(count))
    sampler = PuritySampler(**settings)
    return sampler(backbone, labels, random, denoiser=backbone.denoiser(SquareSchedule()), trace=True), backbone


def first_prediction(backbone: OncePerState) -> torch.Tensor:
    """`(N, K)`: what the network makes of masks alone."""
    masks = torch.full((1, 3), backbone.layout.mask_id)
    alpha = torch.full((1, 1), 1e-8, dtype=torch.float64)
    return backbone.logits_at(masks, torch.zeros(1, dtype=torch.int64), alpha)[0].softmax(dim=-1)


@pytest.mark.parametrize("process", PROCESSES)
def test_places_are_chosen_by_their_purity_and_ids_by_a_power(process: str) -> None:
    output, backbone = draw(process, steps=3, purity_weight=1.5)
    law = first_prediction(backbone)
    purity = law.amax(dim=-1)
    first = output.trace[0]
    assert (first.changed.sum(dim=1) == 1).all()
    place = first.changed.int().argmax(dim=1)
    assert chi_square_p_value(place, purity / purity.sum()) > 1e-4
    power = 1 + 1.5 * purity / purity.max()
    for number in range(3):
        ids = first.tokens[place == number, number]
        sharp = law[number] ** power[number]
        assert chi_square_p_value(ids, sharp / sharp.sum()) > 1e-4
        assert chi_square_p_value(ids, law[number]) < 1e-4


@pytest.mark.parametrize(("steps", "shape"), [(2, [1, 2]), (3, [1, 1, 1]), (7, [1, 1, 1]), (1, [3])])
def test_as_many_tokens_in_each_step(steps: int, shape: list[int]) -> None:
    output, _ = draw("mask_and_replace", count=50, steps=steps)
    assert [int(step.changed[0].sum()) for step in output.trace] == shape
    assert output.sequential_passes == len(shape)
    assert (output.tokens < VOCAB_SIZE).all()


@pytest.mark.parametrize("steps", [4, 10])
@torch.no_grad()
def test_known_tokens_are_kept(steps: int) -> None:
    """And each sequence has its own number of tokens to a step."""
    backbone, denoiser = make_model(SMALL_PROCESSES["absorbing"])
    known = torch.full((9, 6), -1)
    known[:, 2], known[4:, 5] = 3, 1
    labels, random = torch.zeros(9, dtype=torch.int64), CounterRandom(0, torch.arange(9))
    drawn = PuritySampler(steps)(backbone, labels, random, denoiser=denoiser, known=known).tokens
    assert (drawn[:, 2] == 3).all() and (drawn[4:, 5] == 1).all() and (drawn < 5).all()


def test_what_is_refused() -> None:
    for settings, message in (
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"choice": "best"}, "choice must be 'purity' or 'uniform', got 'best'"),
        ({"purity_weight": -1.0}, "purity_weight must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PuritySampler(**settings)
    backbone, denoiser = make_model(SMALL_PROCESSES["uniform"])
    with pytest.raises(ValueError, match="PuritySampler unmasks tokens, UniformProcess has no mask"):
        PuritySampler()(
            backbone, torch.zeros(1, dtype=torch.int64), CounterRandom(0, torch.arange(1)), denoiser=denoiser
        )
