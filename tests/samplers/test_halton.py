"""Samplers whose order does not depend on what is drawn: random order and Halton."""

from itertools import pairwise

import pytest
import torch
from helpers.exact_laws import all_sequences, chi_square_p_value, order_log_laws, sequence_numbers

from discrete_lit.backbones import SequenceLayout
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import LinearSchedule
from discrete_lit.samplers import HaltonSampler, RandomOrderSampler
from discrete_lit.samplers.halton import halton_order, radical_inverse


@torch.no_grad()
def draw(backbone, sampler, label: int, count: int, **arguments):
    labels = torch.full((count,), label)
    return sampler(backbone, labels, CounterRandom(3, torch.arange(count)), **arguments)


def test_random_order_one_token_a_step_has_the_order_averaged_law(make_backbone) -> None:
    backbone = make_backbone("bidirectional", vocab_size=3, grid=(3,), spread=0.5)
    numbers = sequence_numbers(draw(backbone, RandomOrderSampler(steps=3), 1, 12_000).tokens, 3)
    laws = order_log_laws(backbone, label=1).exp()
    assert chi_square_p_value(numbers, laws.mean(dim=0)) > 1e-3
    assert chi_square_p_value(numbers, laws[0]) < 1e-6


def test_known_tokens_are_conditioned_on(make_backbone) -> None:
    """With the middle token given, the law is the mixture over the two orders of the others."""
    backbone = make_backbone("bidirectional", vocab_size=3, grid=(3,), spread=0.5)
    known = torch.tensor([-1, 2, -1])
    tokens = draw(backbone, RandomOrderSampler(steps=3), 0, 12_000, known=known.expand(12_000, -1)).tokens
    assert (tokens[:, 1] == 2).all()
    sequences, law = all_sequences(3, 3), torch.zeros(27, dtype=torch.float64)
    for order in ((0, 2), (2, 0)):
        visible, term = known.where(known >= 0, 3).repeat(27, 1), (sequences[:, 1] == 2).double()
        for place in order:
            with torch.no_grad():
                p = backbone(visible, torch.zeros(27, dtype=torch.int64))[:, place].double().softmax(dim=-1)
            term = term * p.gather(1, sequences[:, place : place + 1])[:, 0]
            visible[:, place] = sequences[:, place]
        law += term / 2
    assert float(law.sum()) == pytest.approx(1)
    assert chi_square_p_value(sequence_numbers(tokens, 3), law) > 1e-3


def test_random_orders_differ_and_counts_are_the_schedules(make_backbone) -> None:
    sampler = RandomOrderSampler(steps=3, mask_schedule=LinearSchedule())
    trace = draw(make_backbone("bidirectional"), sampler, 0, 200, trace=True).trace
    assert [step.changed.sum(dim=1).unique().tolist() for step in trace] == [[2], [2], [2]]
    first = trace[0].changed.double().mean(dim=0)
    assert (first - 1 / 3).abs().max() < 0.12  # every place is as likely among the first two


def test_halton_fills_its_order(make_backbone) -> None:
    sampler, order = HaltonSampler(steps=4), halton_order(4, 4)
    backbone = make_backbone("bidirectional", grid=(4, 4))
    known = [0, *sampler.unmasked_counts(16)]
    assert known == [0, 2, 5, 8, 16]
    trace = draw(backbone, sampler, 0, 5, trace=True).trace
    for (begin, end), step in zip(pairwise(known), trace, strict=True):
        expected = torch.zeros(16, dtype=torch.bool)
        expected[order[begin:end]] = True
        assert torch.equal(step.changed, expected.expand(5, -1))


def test_halton_law_one_token_a_step(make_backbone) -> None:
    """With T = N the law is that of one order exactly, and the rolled one is the mixture of its rolls."""
    backbone = make_backbone("bidirectional", vocab_size=3, grid=(1, 3), spread=0.6)
    laws = order_log_laws(backbone, label=0).exp()  # of the orders in lexicographic turn
    assert halton_order(1, 3).tolist() == [1, 2, 0]
    numbers = sequence_numbers(draw(backbone, HaltonSampler(steps=3), 0, 12_000).tokens, 3)
    assert chi_square_p_value(numbers, laws[3]) > 1e-3
    assert chi_square_p_value(numbers, laws[0]) < 1e-6
    numbers = sequence_numbers(draw(backbone, HaltonSampler(steps=3, roll=True), 0, 12_000).tokens, 3)
    assert chi_square_p_value(numbers, laws[[0, 3, 4]].mean(dim=0)) > 1e-3


def test_the_older_variant_draws_again_what_it_drew(make_backbone) -> None:
    """Greedy, so that what a step writes is what the net says of the sequence before it."""
    backbone = make_backbone("bidirectional", grid=(4, 4), spread=0.8)
    order, labels = halton_order(4, 4), torch.zeros(1, dtype=torch.int64)
    older = draw(backbone, HaltonSampler(steps=4, variant="older", top_k=1), 0, 1, trace=True).trace
    before, rewritten = torch.full((1, 16), 5), 0
    for known, step in zip(HaltonSampler(steps=4).unmasked_counts(16), older, strict=True):
        with torch.no_grad():
            best = backbone(before, labels).argmax(dim=-1)
        expected = before.clone()
        expected[:, order[:known]] = best[:, order[:known]]
        assert torch.equal(step.tokens, expected)
        rewritten += int((step.changed & (before != 5)).sum())
        before = step.tokens
    assert rewritten > 0


def test_a_step_without_new_places_is_not_computed(make_backbone) -> None:
    """Two places of the first row are to be drawn, and one of the second."""
    known = torch.zeros(2, 16, dtype=torch.int64)
    known[0, :2], known[1, 5] = -1, -1
    output = draw(make_backbone("bidirectional", grid=(4, 4)), HaltonSampler(steps=6), 0, 2, known=known, trace=True)
    assert output.network_calls == 2
    assert [step.changed.sum(dim=1).tolist() for step in output.trace] == [[1, 1], [1, 0]]


def test_radical_inverse() -> None:
    numbers = torch.tensor([1, 2, 3, 4, 9999])
    assert radical_inverse(2, numbers)[:4].tolist() == [1 / 2, 1 / 4, 3 / 4, 1 / 8]
    assert radical_inverse(3, numbers)[:4].tolist() == [1 / 3, 2 / 3, 1 / 9, 4 / 9]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (5, 3), (64, 64)])
def test_the_order_holds_every_place_once(rows: int, columns: int) -> None:
    order = halton_order(rows, columns)
    assert torch.equal(order.sort().values, torch.arange(rows * columns))


def test_halton_needs_a_grid(make_backbone, make_layout_backbone) -> None:
    bits = SequenceLayout(4, (2, 2), num_classes=2, attention="bidirectional", mask_token=True, sub_tokens=2)
    for backbone in (make_backbone("bidirectional", grid=(6,)), make_layout_backbone(bits)):
        with pytest.raises(ValueError, match="needs a grid of rows and columns with one id at a position"):
            draw(backbone, HaltonSampler(steps=2), 0, 1)
    with pytest.raises(ValueError, match="variant must be 'newer' or 'older', got 'old'"):
        HaltonSampler(variant="old")


def test_the_order_of_a_grid_that_is_not_square() -> None:
    """By hand: point n mirrors the digits of n in base 2 down, in base 3 across."""
    assert halton_order(2, 3).tolist() == [4, 2, 3, 1, 5, 0]
    assert halton_order(3, 2).tolist() == [2, 1, 4, 0, 3, 5]
