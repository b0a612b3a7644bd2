"""Autoregressive generators of bits that are drawn together: blocks, their order and mask, perturbed inputs, bounds."""

from typing import Any

import pytest
import torch

from discrete_lit.backbones import BinaryFlowHead, MaskedBitHead, SequenceLayout, Transformer
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.solvers import EulerMaruyama
from discrete_lit.generators.autoregressive import block_order
from discrete_lit.samplers import BinaryFlowSampler


def flow(block_size: int = 1, **settings: Any) -> dict[str, Any]:
    solver = EulerMaruyama(3, last_step=0.05, last_drift="velocity")
    given: dict[str, Any] = {"width": 16, "depth": 2, "modulations": 1, "block_size": block_size, **settings}
    return {
        "token_embedding": "bits_mlp",
        "hidden_positions": True,
        "place_head": lambda block, size: BinaryFlowHead(block, size, solver=solver, **given),
    }


def bit_generator(make_generator: Any, block_size: int = 1, *, backbone: Any = None, **arguments: Any) -> Any:
    given: dict[str, Any] = {"vocab_size": 8, "token_shape": (4, 4), "spread": 0.2, **arguments}
    switches = {**flow(block_size), **(backbone or {})}
    return make_generator(
        "autoregressive", block_size=block_size, sampler=BinaryFlowSampler(), backbone=switches, **given
    )


def test_squares_of_the_grid() -> None:
    assert block_order((2, 4), 4) == (0, 1, 4, 5, 2, 3, 6, 7)
    assert block_order((4, 2), 4) == (0, 1, 2, 3, 4, 5, 6, 7)
    assert block_order((2, 2), 1) == (0, 1, 2, 3)


@pytest.mark.parametrize("slots", [1, 3])
def test_who_sees_whom(slots: int) -> None:
    """Elements before the last one of the class see those before; that, the queries and each block of tokens see all of
    their own block and of those before."""
    layout = SequenceLayout(8, (2, 4), num_classes=2, attention="causal", block_size=4)
    backbone = Transformer(layout, width=16, depth=1, heads=2, class_slots=slots, **flow(4))
    elements = slots + 3 + 4  # the last block is never read
    block = [*range(slots - 1), *[slots] * 4, *[slots + 1] * 4]
    expected = [[block[other] <= block[own] for other in range(elements)] for own in range(elements)]
    assert backbone.mask is not None and backbone.mask.tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("order", ["raster", "blocks", (5, 0, 1, 4, 2, 3, 6, 7, 15, 8, 9, 10, 11, 12, 13, 14)])
@pytest.mark.parametrize("switches", [{}, {"class_slots": 3, "positions": "rope_2d", "rotary_offset": 1.5}])
def test_a_block_is_predicted_from_the_blocks_before_it(make_generator, order: Any, switches: Any) -> None:
    generator = bit_generator(make_generator, 4, order=order, backbone=switches)
    tokens = torch.randint(8, (1, 4, 4))
    sequence, orders = generator.to_sequence(tokens), generator._fixed_orders(1)
    assert torch.equal(generator.to_grid(sequence), tokens)
    if order == "blocks":
        assert torch.equal(sequence[0, :4], tokens[0, :2, :2].flatten())
    labels = torch.tensor([1])
    rows = generator.backbone(sequence[:, :-4], labels, order=orders)
    assert rows.shape == (1, 16, 16)
    for position in range(12):
        other = sequence[:, :-4].clone()
        other[:, position] = 7 - other[:, position]
        changed = (generator.backbone(other, labels, order=orders) - rows).abs().amax(dim=-1)[0] > 1e-6
        assert changed.view(4, 4).any(dim=1).tolist() == [block > position // 4 for block in range(4)]
        assert changed.view(4, 4).all(dim=1).tolist() == [block > position // 4 for block in range(4)]
    # Prefixes and caches give the same rows.
    for length in (0, 4, 8):
        prefix = generator.backbone(sequence[:, :length], labels, order=orders)
        torch.testing.assert_close(prefix, rows[:, : length + 4], rtol=1e-4, atol=1e-5)
    cache, backbone = generator.backbone.new_cache(labels), generator.backbone
    parts = [backbone(sequence[:, first:end], labels, cache, orders) for first, end in ((0, 4), (4, 8), (8, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), rows, rtol=1e-4, atol=1e-5)


def test_incomplete_blocks_are_refused(make_generator) -> None:
    backbone = bit_generator(make_generator, 4).backbone
    labels = torch.tensor([0])
    with pytest.raises(ValueError, match="reads whole blocks of 4 tokens"):
        backbone(torch.zeros(1, 3, dtype=torch.int64), labels)
    cache = backbone.new_cache(labels)
    backbone(torch.zeros(1, 0, dtype=torch.int64), labels, cache)
    with pytest.raises(ValueError, match=r"one at a time behind the first pass with a cache, got 8 tokens"):
        backbone(torch.zeros(1, 8, dtype=torch.int64), labels, cache)


@pytest.mark.parametrize(("size", "order"), [(1, "raster"), (4, "raster"), (4, "blocks"), (2, "raster")])
def test_every_parameter_is_trained(make_generator, assert_all_trained, size: int, order: str) -> None:
    generator = bit_generator(make_generator, size, order=order, perturb_rate=0.1, spread=0.4)
    assert_all_trained(generator)


def test_a_new_head_keeps_its_own_first_weights(make_generator) -> None:
    head = bit_generator(make_generator, spread=None).backbone.place_head
    network = head.flow.network
    assert not bool(network.output.weight.any()) and not bool(network.modulations[0].weight.any())
    assert float(network.input_projection.weight.detach().std()) > 0.1


def test_each_bit_of_the_input_flips_with_a_probability_of_its_own(make_generator) -> None:
    """u < rate v, so rate / 2 in all; what is predicted stays, and so does all in eval mode."""
    generator = bit_generator(make_generator, perturb_rate=0.6, token_shape=(16, 16)).train()
    tokens, random = torch.randint(8, (40, 256)), CounterRandom(0, torch.arange(40))
    read = generator._perturbed(tokens, random)
    flipped = ((read ^ tokens)[..., None] >> torch.arange(3)) & 1
    rates = flipped.double().mean(dim=(0, 1))
    assert bool(((rates - 0.3).abs() < 0.02).all())
    u, v = random.uniform(Purpose.EXPOSURE, 2 * 256 * 3).view(40, 2, 256, 3).unbind(dim=1)
    assert torch.equal(flipped.bool(), u < 0.6 * v)
    assert torch.equal(generator.eval()._perturbed(tokens, random), tokens)


def test_only_the_input_is_perturbed(make_generator, monkeypatch) -> None:
    generator = bit_generator(make_generator, 4, perturb_rate=1.0, order="blocks").train()
    tokens, labels = torch.randint(8, (3, 4, 4)), torch.tensor([0, 1, 0])
    seen: dict[str, torch.Tensor] = {}
    head, backbone = generator.backbone.place_head, generator.backbone
    losses, forward = head.losses, backbone.forward
    monkeypatch.setattr(head, "losses", lambda hidden, ids, random: seen.update(ids=ids) or losses(hidden, ids, random))
    monkeypatch.setattr(
        backbone, "forward", lambda read, *given, **named: seen.update(read=read) or forward(read, *given, **named)
    )
    generator.loss(tokens, labels)
    sequences = generator.to_sequence(tokens)
    assert torch.equal(seen["ids"], sequences) and seen["read"].shape == (3, 12)
    assert not torch.equal(seen["read"], sequences[:, :12])


@torch.no_grad()
def test_the_likelihood_is_a_bound_that_belongs_to_the_sample(make_generator) -> None:
    generator = bit_generator(make_generator, 2)
    tokens, labels, indices = torch.randint(8, (5, 4, 4)), torch.arange(5) % 3, torch.arange(5) + 7
    whole = generator.log_likelihood(tokens, labels, indices=indices)
    assert whole.kind == "bound" and whole.nats.dtype == torch.float64
    rows = torch.tensor([4, 2])
    some = generator.log_likelihood(tokens[rows], labels[rows], indices=indices[rows])
    torch.testing.assert_close(some.nats, whole.nats[rows], rtol=1e-4, atol=1e-4)
    # The loss of validation is that, in nats a token.
    dropped = labels == 2
    loss, _ = generator.loss(tokens, labels.masked_fill(dropped, 0), CounterRandom(0, indices), dropped=dropped)
    assert float(loss) == pytest.approx(-float(whole.nats.mean()) / 16, rel=1e-4)


@torch.no_grad()
def test_samples_are_grids_of_ids(make_generator) -> None:
    for order in ("raster", "blocks"):
        generator = bit_generator(make_generator, 4, order=order)
        drawn = generator.sample(torch.tensor([0, 1, 2]))
        assert drawn.shape == (3, 4, 4) and 0 <= int(drawn.min()) and int(drawn.max()) < 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 3}, r"block_size=3 must divide the 16 tokens of an image, a grid of \(4, 4\)"),
        ({"block_size": 0}, "block_size=0 must divide"),
        ({"block_size": 2, "order": "blocks"}, r"order='blocks' needs a block_size that is a square.*block_size=2"),
        ({"block_size": 8, "order": "blocks"}, "order='blocks' needs a block_size that is a square"),
        ({"perturb_rate": 1.5}, r"perturb_rate must lie in \[0, 1\], got 1.5"),
        ({"order": "spiral"}, "order must be 'raster', 'blocks', 'random', 'random_annealed' or a permutation"),
        ({"vocab_size": 12}, "power of 2, the tokenizer's is 12"),
    ],
)
def test_wrong_settings_are_refused(make_generator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bit_generator(make_generator, **{"perturb_rate": 0.1, **arguments})


def test_a_tokenizer_without_bits_is_refused(make_generator) -> None:
    with pytest.raises(
        ValueError, match=r"perturb_rate=0.1 needs a vocabulary that is a power of 2, the tokenizer's is 12"
    ):
        make_generator("autoregressive", vocab_size=12, perturb_rate=0.1)
    with pytest.raises(ValueError, match="token_embedding='bits_mlp' needs a vocabulary that is a power of 2"):
        make_generator("autoregressive", vocab_size=12, backbone={"token_embedding": "bits_mlp"})


def test_heads_of_other_blocks_are_refused(make_generator) -> None:
    with pytest.raises(ValueError, match=r"predicts 4 positions at a time.*has BinaryFlowHead\(block_size=2\)"):
        bit_generator(make_generator, 4, backbone=flow(2))
    with pytest.raises(ValueError, match=r"has MaskedBitHead\(block_size=1\): set block_size of both alike"):
        bit_generator(
            make_generator,
            4,
            backbone={
                "hidden_positions": False,
                "place_head": lambda block, size: MaskedBitHead(block, size, width=12, depth=1),
            },
        )
    with pytest.raises(ValueError, match="the backbone has logits of each position"):
        make_generator("autoregressive", vocab_size=8, token_shape=(4,), block_size=2)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"class_slots": 0}, "class_slots=0 must be at least 1"),
        ({"class_slots": 2, "conditioning": "added"}, "class_slots=2 must be at least 1, and more than one need"),
        ({"visible_start": 2}, "hidden_positions are added to what a place_head reads, without visible_start"),
        ({"visible_start": 2, "hidden_positions": False, "class_slots": 2}, "visible_start=2 needs a causal sequence"),
        ({"rotary_offset": 1.5}, "rotary_offset=1.5 is of positions='rope_2d', got 'learned'"),
    ],
)
def test_switches_that_do_not_go_together(make_generator, switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bit_generator(make_generator, backbone=switches)
    with pytest.raises(ValueError, match="hidden_positions are added to what a place_head reads"):
        make_generator("autoregressive", backbone={"hidden_positions": True})
