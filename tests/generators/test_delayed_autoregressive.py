"""Delayed codes: the pattern, an exact likelihood, sampling with a cache, prefixes, and what is refused."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from discrete_lit.backbones import FactorisedHead, Transformer
from discrete_lit.backbones.delay_pattern import DelayPattern
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.generators import Autoregressive, DelayedAutoregressive
from discrete_lit.samplers import DelaySampler, RasterSampler
from discrete_lit.samplers.categorical import draw_filtered
from discrete_lit.tokenizers import TokenGrid

POSITIONS = ("learned", "sinusoidal", "rope_1d")


def generator_of(
    frames: int = 5, books: int = 3, *, vocab: int = 6, positions: str = "learned", **settings: Any
) -> DelayedAutoregressive:
    torch.manual_seed(0)
    backbone = partial(Transformer, width=16, depth=2, heads=2, positions=positions, conditioning="added")
    made = DelayedAutoregressive(
        TokenGrid(vocab, (frames, books)), 8, num_classes=2, backbone=backbone, label_dropout=0.1, **settings
    )
    with torch.no_grad():
        for parameter in made.backbone.parameters():
            parameter.normal_(std=0.4)
    return made.eval()


def test_the_pattern_of_the_docstring() -> None:
    """Book, frame of each place, as the table in `delay_pattern` has them."""
    codes = torch.arange(4)[:, None] + 10 * torch.arange(3)  # frame + 10 book
    laid = DelayPattern(4, (0, 1, 2)).lay_out(codes[None])[0]
    assert laid.T.tolist() == [[0, 1, 2, 3, -1, -1], [-1, 10, 11, 12, 13, -1], [-1, -1, 20, 21, 22, 23]]


@pytest.mark.parametrize("delays", [(0, 1, 2), (0, 0, 0), (1, 0, 3)])
def test_codes_come_back(delays: tuple[int, ...]) -> None:
    pattern, codes = DelayPattern(5, delays), torch.randint(9, (2, 5, 3))
    laid = pattern.lay_out(codes)
    assert torch.equal(pattern.codes(laid), codes) and laid.shape == (2, 5 + max(delays), 3)
    assert torch.equal(laid[0] >= 0, pattern.present()) and pattern.present().sum() == 15


@pytest.mark.parametrize("delays", [(1, 2), (), (0, -1)])
def test_patterns_that_are_none(delays: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a delay pattern needs frames"):
        DelayPattern(4, delays)


@pytest.mark.parametrize("delays", [(0, 1), (0, 0)])
def test_the_likelihood_sums_to_one(delays: tuple[int, ...]) -> None:
    generator = generator_of(2, 2, vocab=3, delays=delays)
    every = torch.tensor(list(product(range(3), repeat=4))).view(-1, 2, 2)
    found = generator.log_likelihood(every, torch.zeros(len(every), dtype=torch.int64))
    assert found.kind == "exact" and found.nats.exp().sum() == pytest.approx(1.0, abs=1e-6)
    # The loss is that of a code.
    loss, _ = generator.loss(every[:5], torch.zeros(5, dtype=torch.int64))
    assert loss.item() == pytest.approx(-found.nats[:5].mean().item() / 4, rel=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_cached_sampling_draws_what_whole_passes_say(positions: str, guidance_scale: float) -> None:
    """Each code is the inverse transform of its law at its uniform number, the law computed without a cache."""
    generator, labels = generator_of(positions=positions), torch.tensor([0, 1])
    random, books, pattern = CounterRandom(3, torch.arange(2)), generator.books, generator.pattern
    output = generator.draw(labels, random, DelaySampler(guidance_scale=guidance_scale))
    steps = pattern.positions
    assert output.sequential_passes == steps == 7 and output.network_calls == steps * (1 + (guidance_scale != 1))
    uniforms = random.uniform(Purpose.TOKEN, steps * books)
    sequence = generator.to_sequence(output.tokens)
    read = sequence.masked_fill(sequence < 0, generator.backbone.layout.mask_id)[:, :-books]
    given = generator.backbone(read, labels).log_softmax(-1)
    null = generator.backbone(read, torch.full_like(labels, 2)).log_softmax(-1)
    drawn, _ = draw_filtered(null + guidance_scale * (given - null), uniforms, None, None)
    assert torch.equal(torch.where(sequence < 0, -1, drawn), sequence)


def test_samples_follow_the_model() -> None:
    generator = generator_of(2, 2, vocab=2)
    every = torch.tensor(list(product(range(2), repeat=4))).view(-1, 2, 2)
    law = generator.log_likelihood(every, torch.zeros(16, dtype=torch.int64)).nats.exp()
    drawn = generator.sample(torch.zeros(4000, dtype=torch.int64), seed=1).flatten(1)
    counts = torch.bincount((drawn * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16)
    # Chi-squared of 15 degrees of freedom: 37.7 is passed once in a thousand.
    assert ((counts - 4000 * law).square() / (4000 * law)).sum() < 37.7


def test_a_prefix_is_continued() -> None:
    generator, labels = generator_of(), torch.tensor([0, 1])
    known = torch.full((2, 5, 3), -1)
    known[:, :2] = torch.randint(6, (2, 2, 3), generator=torch.Generator().manual_seed(1))
    random = CounterRandom(0, torch.arange(2))
    output = generator.draw(labels, random, known=known)
    assert torch.equal(output.tokens[:, :2], known[:, :2]) and output.tokens.min() >= 0
    assert output.sequential_passes == 7 - 2  # the first positions are read in one pass
    # What is drawn does depend on the prefix.
    other = known.clone()
    other[:, :2] = (known[:, :2] + 1) % 6
    assert not torch.equal(generator.draw(labels, random, known=other).tokens[:, 2:], output.tokens[:, 2:])
    everything = generator.draw(labels, random, known=output.tokens).tokens
    assert torch.equal(everything, output.tokens)


@pytest.mark.parametrize("hole", [(slice(None), 0, 1), (slice(None), 0)])
def test_known_codes_that_are_no_prefix(hole: Any) -> None:
    known = torch.full((1, 5, 3), -1)
    known[:, :3] = 2
    known[hole] = -1
    with pytest.raises(ValueError, match="known must be all codes of the first frames"):
        generator_of().sample(torch.zeros(1, dtype=torch.int64), known=known)


def test_later_codes_do_not_change_earlier_logits() -> None:
    generator = generator_of()
    tokens = torch.randint(6, (1, 5, 3), generator=torch.Generator().manual_seed(2))
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % 6

    def logits(codes: Tensor) -> Tensor:
        sequence = generator.to_sequence(codes)
        return generator.backbone(sequence.masked_fill(sequence < 0, 6)[:, :-3], torch.zeros(1, dtype=torch.int64))

    # Frame 3 of book 0 stands at position 3, and is read from position 4 on.
    assert torch.allclose(logits(tokens)[:, : 4 * 3], logits(other)[:, : 4 * 3], atol=1e-6)
    assert not torch.allclose(logits(tokens)[:, 4 * 3 :], logits(other)[:, 4 * 3 :], atol=1e-3)


def test_codes_one_after_another_are_the_stack_of_rq_transformer() -> None:
    """The same codec serves RQ-Transformer: T positions, whose codes come in turn."""
    backbone = partial(
        Transformer,
        width=16,
        depth=1,
        heads=2,
        token_embedding="parts",
        place_head=partial(FactorisedHead, sizes=[6] * 3, depth=1),
    )
    generator = Autoregressive(TokenGrid(6, (5, 3)), 8, num_classes=2, stacked_codes=True, backbone=backbone).eval()
    assert generator.sample(torch.tensor([0, 1])).shape == (2, 5, 3)


def test_samplers_and_tokens_of_another_kind() -> None:
    generator = generator_of()
    with pytest.raises(ValueError, match="that are delayed: DelaySampler draws them"):
        generator.sample(torch.zeros(1, dtype=torch.int64), RasterSampler())
    with pytest.raises(ValueError, match="DelayedAutoregressive needs a DelaySampler, got a RasterSampler"):
        generator_of(sampler=RasterSampler())
    with pytest.raises(ValueError, match=r"delays=.0, 1. must have one number for each of the 3 books"):
        generator_of(delays=(0, 1))
    plain = Autoregressive(
        TokenGrid(6, (5,)), 8, num_classes=2, backbone=partial(Transformer, width=16, depth=1, heads=2)
    )
    with pytest.raises(ValueError, match="this generator has none"):
        plain.sample(torch.zeros(1, dtype=torch.int64), DelaySampler())
    with pytest.raises(ValueError, match=r"models codes \(frames, books\)"):
        DelayedAutoregressive(TokenGrid(6, (5,)), 8, num_classes=1, backbone=plain.backbone)


def test_fixed_positions_keep_their_precision() -> None:
    generator = generator_of(positions="sinusoidal")
    table = generator.backbone.positions.waves.clone()
    generator.backbone.half()
    assert generator.backbone.positions.waves.dtype == torch.float32
    assert torch.equal(generator.backbone.positions.waves, table)
    assert not any("waves" in name for name in generator.state_dict())
