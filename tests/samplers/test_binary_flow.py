"""BitDance's sampler: teacher forcing and cached sampling agree; guidance, known blocks, what draws depend on, cost."""

from typing import Any

import pytest
import torch
from helpers.every_sampler import bit_backbone
from torch import Tensor

from discrete_lit.backbones import MaskedBitHead, SequenceLayout
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.solvers import EulerMaruyama
from discrete_lit.samplers import BinaryFlowSampler, RasterSampler

SIZES = (1, 2, 3)
LABELS = torch.tensor([0, 1, 1, 0, 2])


@torch.no_grad()
def draw(backbone: Any, sampler: Any, labels: Tensor = LABELS, seed: int = 0, **arguments: Any) -> Any:
    return sampler(backbone, labels, CounterRandom(seed, torch.arange(len(labels))), **arguments)


@torch.no_grad()
def one_by_one(backbone: Any, labels: Tensor, scales: list[float], *, own: bool = False) -> Tensor:
    """Ids `(B, N)` from whole passes over what is drawn so far, one for the labels and one for none: no cache."""
    layout, head = backbone.layout, backbone.place_head
    p, batch = layout.block_size, len(labels)
    draws = head.flow.solver.steps + 1
    random = CounterRandom(0, torch.arange(batch))
    tokens = null_tokens = torch.zeros(batch, 0, dtype=torch.int64)
    for block, scale in enumerate(scales):
        hidden = backbone(tokens, labels)[:, -p:]
        unguided = backbone(null_tokens, torch.full_like(labels, layout.null_label))[:, -p:]

        def noise(step: int, half: int = 0, block: int = block) -> Tensor:
            numbers = random.normal(Purpose.LATENT_NOISE, 2 * p * head.bits, block * draws + step).float()
            return numbers.view(batch, 2, p, head.bits)[:, half]

        rows = hidden if scale == 1 else torch.cat((hidden, unguided))
        ids = head.ids(head.sample(rows, noise(0), noise=lambda n, f=noise: f(n + 1), guidance_scale=scale))
        null_ids = ids
        if own and scale == 1:
            null_ids = head.ids(head.sample(unguided, noise(0, 1), noise=lambda n, f=noise: f(n + 1, 1)))
        tokens, null_tokens = torch.cat((tokens, ids), dim=1), torch.cat((null_tokens, null_ids), dim=1)
    return tokens


@pytest.mark.parametrize("size", SIZES)
def test_cached_sampling_is_teacher_forcing(size: int) -> None:
    """Guided linearly over the blocks, from scale 1 on."""
    backbone = bit_backbone(size, spread=0.5)
    blocks = 6 // size
    scales = [1 + 2.0 * block / blocks for block in range(blocks)]
    found = draw(backbone, BinaryFlowSampler(guidance_scale=3.0)).tokens
    assert torch.equal(found, one_by_one(backbone, LABELS, scales))
    assert torch.equal(draw(backbone, BinaryFlowSampler()).tokens, one_by_one(backbone, LABELS, [1.0] * blocks))
    assert not torch.equal(found, draw(backbone, BinaryFlowSampler()).tokens)


@pytest.mark.parametrize("size", SIZES)
def test_null_rows_may_begin_with_their_own_ids(size: int) -> None:
    """As in BitDance's code: of the first block, which is drawn at scale 1."""
    backbone = bit_backbone(size, spread=0.5)
    blocks = 6 // size
    scales = [1 + 4.0 * block / blocks for block in range(blocks)]
    own = draw(backbone, BinaryFlowSampler(guidance_scale=5.0, null_rows="own")).tokens
    assert torch.equal(own, one_by_one(backbone, LABELS, scales, own=True))
    shared = draw(backbone, BinaryFlowSampler(guidance_scale=5.0)).tokens
    assert torch.equal(own[:, :size], shared[:, :size]) and not torch.equal(own, shared)


@pytest.mark.parametrize("size", SIZES)
def test_neither_the_batch_nor_its_order_changes_a_draw(size: int) -> None:
    backbone, sampler = bit_backbone(size), BinaryFlowSampler(guidance_scale=2.0, null_rows="own")
    whole = draw(backbone, sampler).tokens
    rows = torch.tensor([3, 1])
    with torch.no_grad():
        some = sampler(backbone, LABELS[rows], CounterRandom(0, rows)).tokens
    assert torch.equal(some, whole[rows])
    assert not torch.equal(draw(backbone, sampler, seed=1).tokens, whole)


def test_known_blocks_stay_and_the_rest_follows_them() -> None:
    backbone, sampler = bit_backbone(3), BinaryFlowSampler(guidance_scale=2.0)
    drawn = draw(backbone, sampler).tokens
    known = torch.cat((drawn[:, :3], torch.full_like(drawn[:, 3:], -1)), dim=1)
    assert torch.equal(draw(backbone, sampler, known=known).tokens, drawn)
    other = known.clone()
    other[:, :3] = 7 - other[:, :3]
    changed = draw(backbone, sampler, known=other).tokens
    assert torch.equal(changed[:, :3], other[:, :3]) and not torch.equal(changed[:, 3:], drawn[:, 3:])
    with pytest.raises(ValueError, match="known tokens must be whole blocks of 3"):
        draw(backbone, sampler, known=torch.cat((drawn[:, :2], torch.full_like(drawn[:, 2:], -1)), dim=1))
    with pytest.raises(ValueError, match="known must be the first tokens"):
        draw(backbone, sampler, known=known.flip(1))


def test_what_a_draw_costs() -> None:
    """Passes of the backbone over blocks, and of the head at each step of its solver; a guided one has both halves."""
    backbone = bit_backbone(2)
    plain, guided = draw(backbone, BinaryFlowSampler()), draw(backbone, BinaryFlowSampler(guidance_scale=2.0))
    assert (plain.network_calls, plain.sequential_passes) == (3, 3)
    assert (guided.network_calls, guided.sequential_passes) == (6, 3)
    steps = backbone.place_head.flow.solver.steps
    passes = [backbone.flops(1, 0, 0), backbone.flops(1, 2, 3), backbone.flops(1, 2, 5)]
    assert plain.flops == sum(passes) + 3 * steps * backbone.head_flops(1, 0) + backbone.cache_flops(1)
    head = backbone.place_head
    # Of one step: two linear layers of the input and output, the blocks of two positions, and what the time makes.
    width, hidden, b, p = 16, 24, head.bits, 2
    products = p * (2 * b * width + 2 * (4 * width**2 + 3 * width * hidden) + 8 * width**2) + 256 * width + width**2
    attention = 2 * 2 * p * p * width
    assert backbone.head_flops(1, 0) == 2 * (products + attention)


def test_another_solver_and_its_steps() -> None:
    backbone = bit_backbone(1)
    sampler = BinaryFlowSampler(EulerMaruyama(2, last_step=0.05, last_drift="velocity"))
    few = draw(backbone, sampler)
    usual = draw(backbone, BinaryFlowSampler())
    assert usual.flops - few.flops == 6 * 2 * backbone.head_flops(1, 0)


def test_a_trace_has_each_block() -> None:
    output = draw(bit_backbone(3), BinaryFlowSampler(), trace=True)
    assert [step.changed.sum(dim=1).tolist() for step in output.trace] == [[3] * 5, [3] * 5]
    assert torch.equal(output.trace[-1].tokens, output.tokens) and bool(output.trace[0].confidence.isnan().all())


def test_a_broken_network_is_named() -> None:
    backbone = bit_backbone(1)
    backbone.place_head.flow.network.output.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="what the head predicts of block 0 is NaN"):
        draw(backbone, BinaryFlowSampler())


def test_wrong_settings_and_heads_are_refused(make_layout_backbone) -> None:
    with pytest.raises(ValueError, match="null_rows must be 'shared' or 'own', got 'both'"):
        BinaryFlowSampler(null_rows="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"RasterSampler draws ids by their probabilities.*has a BinaryFlowHead"):
        draw(bit_backbone(1), RasterSampler())
    layout = SequenceLayout(8, (2, 3), num_classes=2, attention="causal")
    bar = make_layout_backbone(
        layout, token_embedding="bits", place_head=lambda block, size: MaskedBitHead(block, size, width=12, depth=1)
    )
    with pytest.raises(ValueError, match="a generator with a BinaryFlowHead, this one has a MaskedBitHead"):
        draw(bar, BinaryFlowSampler())
    with pytest.raises(ValueError, match="this one has no place_head"):
        draw(make_layout_backbone(layout), BinaryFlowSampler())
