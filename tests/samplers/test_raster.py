"""Raster sampling follows the law of its backbone exactly, and costs single-token passes."""

from itertools import permutations

import pytest
import torch
from helpers.exact_laws import all_sequences, chi_square_p_value, raster_log_law, sequence_numbers

from discrete_lit.backbones import SequenceLayout
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.samplers import RasterSampler


def draw(backbone, sampler: RasterSampler, label: int, count: int) -> torch.Tensor:
    labels = torch.full((count,), label)
    with torch.no_grad():
        return sampler(backbone, labels, CounterRandom(3, torch.arange(count))).tokens


@pytest.mark.parametrize("label", [0, 1])
def test_law_over_all_64_sequences(make_backbone, label: int) -> None:
    backbone = make_backbone("causal", vocab_size=4, grid=(3,), spread=0.5)
    numbers = sequence_numbers(draw(backbone, RasterSampler(), label, 40_000), 4)
    assert chi_square_p_value(numbers, raster_log_law(backbone, label).exp()) > 1e-3
    assert chi_square_p_value(numbers, raster_log_law(backbone, 1 - label).exp()) < 1e-6


def test_law_with_guidance_temperature_and_top_k(make_backbone) -> None:
    """The filtered conditionals multiplied up by hand, from passes over prefixes without a cache."""
    backbone = make_backbone("causal", vocab_size=4, grid=(3,), spread=0.5)
    sampler = RasterSampler(temperature=1.3, top_k=3, guidance_scale=2.5, guidance_schedule="linear")
    sequences = all_sequences(4, 3)
    law = torch.ones(len(sequences), dtype=torch.float64)
    with torch.no_grad():
        for place in range(3):
            prefix = sequences[:, :place]
            p, q = (
                backbone(prefix, torch.full((len(sequences),), label))[:, -1].double().log_softmax(dim=-1)
                for label in (1, 2)
            )
            scale = 1 + 1.5 * place / 3
            logits = (q + scale * (p - q)) / 1.3
            logits[torch.arange(len(sequences)), logits.argmin(dim=-1)] = -torch.inf
            law *= logits.softmax(dim=-1).gather(1, sequences[:, place : place + 1])[:, 0]
    assert float(law.sum()) == pytest.approx(1)
    numbers = sequence_numbers(draw(backbone, sampler, 1, 40_000), 4)
    assert chi_square_p_value(numbers, law) > 1e-3


@pytest.mark.parametrize(
    ("schedule", "scale", "calls"), [("constant", 1.0, 6), ("constant", 1.5, 12), ("linear", 1.5, 12)]
)
def test_what_it_reports_is_what_it_ran(make_backbone, schedule, scale: float, calls: int) -> None:
    backbone = make_backbone("causal", grid=(2, 3))
    seen: list[tuple[int, ...]] = []
    backbone.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    sampler = RasterSampler(guidance_scale=scale, guidance_schedule=schedule)
    with torch.no_grad():
        output = sampler(backbone, torch.zeros(4, dtype=torch.int64), CounterRandom(0, torch.arange(4)))
    rows = 4 * calls // 6
    assert seen == [(rows, 0)] + [(rows, 1)] * 5
    assert (output.network_calls, output.sequential_passes) == (calls, 6)


def test_greedy(make_backbone) -> None:
    backbone = make_backbone("causal", vocab_size=4, grid=(3,))
    tokens = draw(backbone, RasterSampler(top_k=1), 0, 5)
    assert (tokens == tokens[0]).all()
    with torch.no_grad():
        for place in range(3):
            logits = backbone(tokens[:1, :place], torch.tensor([0]))[0, -1]
            assert int(tokens[0, place]) == int(logits.argmax())


def test_cut_off_is_guided_before_and_conditional_after(make_backbone) -> None:
    """Its tokens up to the cut-off are the guided ones; then the null rows leave the cache."""
    backbone = make_backbone("causal", vocab_size=4, grid=(6,), spread=0.6)
    seen: list[int] = []
    backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    random, labels = CounterRandom(3, torch.arange(300)), torch.ones(300, dtype=torch.int64)
    with torch.no_grad():
        whole = RasterSampler(guidance_scale=4.0)(backbone, labels, random).tokens
        seen.clear()
        output = RasterSampler(guidance_scale=4.0, guidance_interval=(1, 3))(backbone, labels, random)
    assert seen == [600] * 3 + [300] * 3
    assert (output.network_calls, output.sequential_passes) == (9, 6)
    uniforms = random.uniform(Purpose.TOKEN, 6)
    with torch.no_grad():
        for place in range(6):
            p, q = (backbone(output.tokens[:, :place], torch.full((300,), label))[:, -1:] for label in (1, 2))
            logits = q + 4 * (p - q) if place in (1, 2) else p
            assert torch.equal(
                RasterSampler().choose(logits, uniforms[:, place, None])[0], output.tokens[:, place, None]
            )
    assert not torch.equal(whole, output.tokens)


def test_a_given_prefix_is_read_in_one_pass_and_conditioned_on(make_backbone) -> None:
    backbone = make_backbone("causal", vocab_size=3, grid=(4,), spread=0.5)
    known = torch.tensor([2, 0, -1, -1]).expand(12_000, -1)
    seen: list[tuple[int, ...]] = []
    handle = backbone.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    labels = torch.zeros(12_000, dtype=torch.int64)
    with torch.no_grad():
        output = RasterSampler()(backbone, labels, CounterRandom(3, torch.arange(12_000)), known=known)
    handle.remove()
    assert seen == [(12_000, 2), (12_000, 1)] and output.network_calls == 2
    law = raster_log_law(backbone, 0).exp()
    sequences = all_sequences(3, 4)
    law = law * ((sequences[:, 0] == 2) & (sequences[:, 1] == 0))
    assert chi_square_p_value(sequence_numbers(output.tokens, 3), law / law.sum()) > 1e-3


def test_what_is_no_prefix_is_refused(make_backbone) -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    known = torch.tensor([[0, -1, 1, -1, -1, -1], [0, 1, -1, -1, -1, -1]])
    with pytest.raises(ValueError, match=r"known must be the first tokens in the generator's order \(a prefix\)"):
        RasterSampler()(make_backbone("causal"), labels, CounterRandom(0, labels), known=known)


ANY_ORDER = SequenceLayout(3, (3,), num_classes=2, attention="causal", any_order=True)


@torch.no_grad()
def ordered_law(backbone, order: tuple[int, ...]) -> torch.Tensor:
    """`(27,)` for label 0, each factor from its own pass over the tokens before it in the order."""
    sequences, places = all_sequences(3, 3), torch.tensor(order).expand(27, -1)
    in_order, law = sequences.gather(1, places), torch.ones(27, dtype=torch.float64)
    for place in range(3):
        logits = backbone(in_order[:, :place], torch.zeros(27, dtype=torch.int64), order=places)[:, -1].double()
        law *= logits.softmax(dim=-1).gather(1, in_order[:, place : place + 1])[:, 0]
    return law


def test_law_of_a_given_order(make_layout_backbone) -> None:
    backbone = make_layout_backbone(ANY_ORDER, target_positions=True)
    numbers = sequence_numbers(draw(backbone, RasterSampler(order=(2, 0, 1)), 0, 12_000), 3)
    assert chi_square_p_value(numbers, ordered_law(backbone, (2, 0, 1))) > 1e-3
    assert chi_square_p_value(numbers, ordered_law(backbone, (0, 1, 2))) < 1e-6


def test_random_orders_mix_their_laws_and_begin_with_what_is_given(make_layout_backbone) -> None:
    backbone = make_layout_backbone(ANY_ORDER, target_positions=True)
    numbers = sequence_numbers(draw(backbone, RasterSampler(order="random"), 0, 12_000), 3)
    laws = torch.stack([ordered_law(backbone, order) for order in permutations(range(3))])
    assert chi_square_p_value(numbers, laws.mean(dim=0)) > 1e-3
    assert chi_square_p_value(numbers, laws[0]) < 1e-6

    labels, known = torch.zeros(12_000, dtype=torch.int64), torch.tensor([-1, 2, -1]).expand(12_000, -1)
    with torch.no_grad():
        random = CounterRandom(4, torch.arange(12_000))
        output = RasterSampler(order="random")(backbone, labels, random, known=known)
    given = torch.stack([ordered_law(backbone, order) for order in ((1, 0, 2), (1, 2, 0))])
    given = given * (all_sequences(3, 3)[:, 1] == 2)
    law = (given / given.sum(dim=1, keepdim=True)).mean(dim=0)
    assert chi_square_p_value(sequence_numbers(output.tokens, 3), law) > 1e-3
    assert output.network_calls == 2


def test_orders_that_the_generator_does_not_have(make_backbone, make_layout_backbone) -> None:
    for order in ("random", (0, 2, 1, 3, 4, 5)):
        with pytest.raises(ValueError, match="needs a generator of any order"):
            draw(make_backbone("causal"), RasterSampler(order=order), 0, 1)
    with pytest.raises(ValueError, match="order has 2 positions, this generator's sequences have 3"):
        draw(make_layout_backbone(ANY_ORDER), RasterSampler(order=(1, 0)), 0, 1)
    for order in ("spiral", (0, 0, 1), (1, 2)):
        with pytest.raises(ValueError, match="order must"):
            RasterSampler(order=order)
