"""RandAR's parallel decoding: one token a step is the exact law, and what a step knows is what the paper says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from discrete_lit.samplers import RandARSampler, RasterSampler

INSTRUCTED: dict[str, Any] = {"positions": "rope_2d", "start_rotation": "zero", "position_instructions": True}
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.fixture
def generator(make_generator) -> Any:
    return make_generator(
        "autoregressive", vocab_size=5, token_shape=(2, 3), spread=0.6, order="random", backbone=INSTRUCTED
    )


def test_one_token_at_a_step_is_the_raster_sampler(generator) -> None:
    guidance: Any = {"guidance_scale": 2.0, "guidance_schedule": "linear"}
    for order in ("random", "raster", (3, 1, 5, 0, 4, 2)):
        expected = generator.sample(LABELS, RasterSampler(order=order, **guidance))
        assert torch.equal(generator.sample(LABELS, RandARSampler(order=order, **guidance)), expected)
    other = RandARSampler(order="raster", guidance_start=2.0, guidance_scale=2.0)
    constant = RasterSampler(guidance_scale=2.0)
    assert torch.equal(generator.sample(LABELS, other), generator.sample(LABELS, constant))


def test_tokens_of_a_step_do_not_see_one_another(generator) -> None:
    """The most probable ids of each step, from whole passes in which the tokens of the step are not there."""
    sampler = RandARSampler(4, order="raster", top_k=1)
    sizes, first = list[int](), 0
    while first < 6:
        sizes.append(sampler.step_size(first, 6))
        first += sizes[-1]
    assert sizes == [1, 1, 2, 2]
    drawn = generator.sample(LABELS, sampler).flatten(1)
    with torch.no_grad():
        first = 0
        for size in sizes:
            cache = generator.backbone.new_cache(LABELS)
            cache.ahead = size - 1
            logits = generator.backbone(drawn[:, :first], LABELS, cache)[:, -size:]
            assert torch.equal(logits.argmax(dim=-1), drawn[:, first : first + size])
            # The first of them is that of a plain pass.
            plain = generator.backbone(drawn[:, :first], LABELS)[:, -1]
            torch.testing.assert_close(logits[:, 0], plain)
            first += size


def test_known_tokens_come_first(generator) -> None:
    known = torch.full((4, 2, 3), -1)
    known[:, 1, 2], known[:, 0, 1] = 3, 1
    drawn = generator.sample(LABELS, RandARSampler(2), known=known)
    assert bool((drawn[:, 1, 2] == 3).all() and (drawn[:, 0, 1] == 1).all()) and len(drawn.unique()) > 2


def test_a_pass_reads_what_the_cache_does_not_hold(generator) -> None:
    """Row i is the same whether the tokens come at once, one after another, or some by some, in any order."""
    backbone, tokens = generator.backbone, torch.randint(5, (4, 5))
    order = torch.stack([torch.randperm(6) for _ in range(4)])
    with torch.no_grad():
        whole = backbone(tokens, LABELS, order=order)
        cache, rows, read = backbone.new_cache(LABELS), list[Tensor](), 0
        for end in (1, 2, 5):
            rows.append(backbone(tokens[:, read:end], LABELS, cache, order))
            read = end
    torch.testing.assert_close(torch.cat(rows, dim=1), whole)
    assert whole.shape == (4, 6, 5) and cache.filled == backbone.elements


def test_settings_that_do_not_fit(generator, make_generator) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        RandARSampler(0)
    with pytest.raises(ValueError, match=r"guidance_start=2\.0 is of the schedule 'linear', got 'constant'"):
        RandARSampler(guidance_start=2.0, guidance_schedule="constant")
    plain = make_generator("autoregressive", token_shape=(2, 3), order="random")
    with pytest.raises(ValueError, match="needs a Transformer with position_instructions=true"):
        plain.sample(LABELS, RandARSampler())
    for switches in ({"positions": "learned"}, {"target_positions": True}, {"grid_vocab": 3}, {"visible_start": 2}):
        with pytest.raises(ValueError, match="position_instructions=true needs a causal sequence of single positions"):
            make_generator("autoregressive", token_shape=(2, 3), backbone={**INSTRUCTED, **switches})
    with pytest.raises(ValueError, match="'random', 'random_annealed' or a permutation"):
        make_generator("autoregressive", token_shape=(2, 3), order="any")
