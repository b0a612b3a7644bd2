"""Conditions of several parts: their null, what a transformer makes of a grid and of vectors, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from torch import Tensor, nn

from discrete_lit.backbones import FactorisedHead, SequenceLayout, Transformer
from discrete_lit.backbones.blocks import BlockSettings, ContextAttention
from discrete_lit.backbones.condition import Condition, as_condition, plain

PARTS: dict[str, Any] = {"grid_vocab": 3, "context_dim": 5}


def given(labels: Tensor | None = None, rows: int = 4, places: int = 6) -> Condition:
    """Two sequences, of which the second has two valid vectors of four."""
    mask = torch.ones(2, rows, dtype=torch.bool)
    mask[1, 2:] = False
    return Condition(
        labels=torch.tensor([0, 1]) if labels is None else labels,
        grid=torch.randint(3, (2, places)),
        context=torch.randn(2, rows, 5),
        context_mask=mask,
    )


def test_null_parts_are_dropped_together() -> None:
    condition = given()
    dropped = condition.dropped(torch.tensor([True, False]), null_label=2, null_id=3)
    assert dropped.labels.tolist() == [2, 1]
    assert condition.grid is not None and dropped.grid is not None and dropped.context_mask is not None
    assert dropped.grid[0].tolist() == [3] * 6 and torch.equal(dropped.grid[1], condition.grid[1])
    assert dropped.context_mask.tolist() == [[False] * 4, [True, True, False, False]]

    both = condition.with_null(null_label=2, null_id=3)
    assert len(both) == 4
    for name, part in both[2:].parts().items():
        assert torch.equal(part, condition.null(null_label=2, null_id=3).parts()[name])  # type: ignore[arg-type]
    for name, part in condition.parts().items():
        assert torch.equal(both[:2].parts()[name], part)  # type: ignore[arg-type]
    # What stands in front of a sequence keeps its places where the condition is dropped.
    assert both.text_mask is not None and torch.equal(both.text_mask, condition.valid().repeat(2, 1))

    # Vectors without a mask are all valid.
    open_context = Condition(labels=condition.labels, context=condition.context).with_null(null_label=2, null_id=None)
    assert open_context.context_mask is not None and open_context.grid is None
    assert open_context.context_mask.tolist() == [[True] * 4] * 2 + [[False] * 4] * 2


def test_what_is_negative_stands_for_the_null_condition() -> None:
    condition, vectors = given(), torch.randn(2, 4, 5)
    says = torch.tensor([[True, False, False, False], [False] * 4])
    led = replace(condition, negative=vectors, negative_mask=says)
    null, nothing = led.null(null_label=2, null_id=3), condition.null(null_label=2, null_id=3)
    # The first sequence is led away from other vectors beside its own label and grid, the second from nothing.
    assert null.labels.tolist() == [0, 2] and null.context is vectors and null.context_mask is says
    assert null.grid is not None and condition.grid is not None and nothing.grid is not None
    assert torch.equal(null.grid[0], condition.grid[0]) and torch.equal(null.grid[1], nothing.grid[1])
    both = led.with_null(null_label=2, null_id=3)
    assert both.negative is None and torch.equal(both[2:].context, vectors)  # type: ignore[arg-type]
    assert torch.equal(led[1:].negative, vectors[1:])  # type: ignore[arg-type]
    for wrong in ({"negative": vectors}, {"negative": vectors[:, :2], "negative_mask": says[:, :2]}):
        with pytest.raises(ValueError, match="negative"):
            replace(condition, **wrong)


def test_labels_alone_stay_a_tensor() -> None:
    labels = torch.tensor([0, 1])
    assert plain(as_condition(labels)) is labels
    condition = given()
    assert plain(condition) is condition and as_condition(condition) is condition
    doubled = plain(as_condition(labels).with_null(null_label=2, null_id=None))
    assert isinstance(doubled, Tensor) and doubled.tolist() == [0, 1, 2, 2]


def test_parts_that_do_not_fit_each_other_are_refused() -> None:
    labels, context = torch.tensor([0, 1]), torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match="2 labels, its grid is of 3 sequences"):
        Condition(labels=labels, grid=torch.zeros(3, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="give the context too"):
        Condition(labels=labels, context_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be bool of shape \(2, 4\).*got torch.bool \(2, 3\)"):
        Condition(labels=labels, context=context, context_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got torch.int64 \(2, 4\)"):
        Condition(labels=labels, context=context, context_mask=torch.ones(2, 4, dtype=torch.int64))


@torch.no_grad()
def test_cross_attention_is_torchs() -> None:
    ours = ContextAttention(BlockSettings(width=8, heads=2, head_dim=4, mlp_hidden=8, context_dim=5)).eval()
    theirs = nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True).eval()
    for parameter in ours.parameters():
        parameter.normal_()
    theirs.q_proj_weight.copy_(ours.query.weight)
    key, value = ours.key_value.weight.chunk(2)
    theirs.k_proj_weight.copy_(key)
    theirs.v_proj_weight.copy_(value)
    theirs.in_proj_bias.copy_(torch.cat((ours.query.bias, ours.key_value.bias)))
    theirs.out_proj.weight.copy_(ours.out.weight)
    theirs.out_proj.bias.copy_(ours.out.bias)

    x, condition = torch.randn(2, 3, 8), given()
    context, mask = condition.context, condition.context_mask
    assert context is not None and mask is not None
    expected = theirs(x, context, context, key_padding_mask=~mask, need_weights=False)[0]
    torch.testing.assert_close(ours(x, context, mask), expected)
    torch.testing.assert_close(ours(x, ours.keys_and_values(context), mask), expected)
    whole = theirs(x, context, context, need_weights=False)[0]
    torch.testing.assert_close(ours(x, context, None), whole)
    assert not torch.allclose(whole[1], expected[1])

    # Where no vector is valid, or there is none, the learned one is attended to, and is all that is seen.
    alone = theirs(x, ours.null.expand(2, 1, -1), ours.null.expand(2, 1, -1), need_weights=False)[0]
    torch.testing.assert_close(ours(x, context, torch.zeros_like(mask)), alone)
    torch.testing.assert_close(ours(x, context[:, :0], None), alone)
    torch.testing.assert_close(ours(x, context[:, :0], mask[:, :0]), alone)


@pytest.mark.parametrize("switches", [{}, {"norm_first": False}, {"conditioning": "prefix_adaln", "qk_norm": "unit"}])
@torch.no_grad()
def test_cached_logits_are_the_full_ones_given_a_grid_and_vectors(make_backbone, switches) -> None:
    backbone, condition, tokens = make_backbone("causal", **PARTS, **switches), given(), torch.randint(5, (2, 5))
    full = backbone(tokens, condition)
    for cuts in ([0, 1, 2, 3, 4, 5], [3, 4, 5], [5]):
        cache, rows, seen = backbone.new_cache(condition), [], 0
        for end in cuts:
            rows.append(backbone(tokens[:, seen:end], condition, cache))
            seen = end
        torch.testing.assert_close(torch.cat(rows, dim=1), full, rtol=0, atol=1e-5)
    # The cache of the first sequence alone goes on alone.
    cache = backbone.new_cache(condition)
    backbone(tokens[:, :2], condition, cache)
    rest = backbone(tokens[:1, 2:], condition[:1], cache.first_rows(1))
    torch.testing.assert_close(rest, full[:1, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@torch.no_grad()
def test_masked_vectors_and_other_sequences_do_not_matter(make_backbone, attention) -> None:
    backbone, condition = make_backbone(attention, **PARTS), given()
    tokens = torch.randint(5, (2, 5 if attention == "causal" else 6))
    logits = backbone(tokens, condition)
    assert condition.context is not None and condition.context_mask is not None
    context = torch.where(condition.context_mask[..., None], condition.context, 9.0)
    other = Condition(
        labels=condition.labels, grid=condition.grid, context=context, context_mask=condition.context_mask
    )
    torch.testing.assert_close(backbone(tokens, other), logits, rtol=0, atol=1e-5)
    for row in range(2):
        alone = backbone(tokens[row : row + 1], condition[row : row + 1])
        torch.testing.assert_close(alone, logits[row : row + 1], rtol=0, atol=1e-5)
    # What is valid does matter, at every place.
    context[:, 0] += 1
    changed = (backbone(tokens, other) - logits).abs().amax(dim=-1)
    assert bool((changed > 1e-4).all())


def test_a_head_of_sub_tokens_is_not_given_the_vectors(make_backbone) -> None:
    def head(settings: BlockSettings, vocab_size: int) -> FactorisedHead:
        return FactorisedHead(settings, vocab_size, sizes=(2, 3))

    backbone = make_backbone("causal", vocab_size=6, token_embedding="parts", place_head=head, **PARTS)
    hidden = backbone(torch.randint(6, (2, 5)), given())
    ids = torch.randint(6, (2, 6))
    assert backbone.place_head.log_likelihood(hidden, ids).shape == (2, 6)


@torch.no_grad()
def test_the_null_condition_says_nothing(make_backbone) -> None:
    backbone, tokens = make_backbone("bidirectional", **PARTS), torch.randint(5, (2, 6))
    nothing = [given().null(null_label=2, null_id=3) for _ in range(2)]
    torch.testing.assert_close(backbone(tokens, nothing[0]), backbone(tokens, nothing[1]), rtol=0, atol=1e-6)
    assert not torch.allclose(backbone(tokens, given()), backbone(tokens, nothing[0]), atol=1e-3)


@torch.no_grad()
def test_an_id_of_the_grid_is_added_where_its_place_is_predicted(make_backbone) -> None:
    def changed_rows(backbone: Transformer, count: int, place: int, **order: Tensor) -> list[int]:
        """The rows of logits that another id at a place of the grid changes."""
        tokens, labels = torch.randint(5, (2, count)), torch.tensor([0, 1])
        grid = torch.randint(3, (2, 6))
        other = grid.clone()
        other[:, place] = (grid[:, place] + 1) % 3
        one = backbone(tokens, Condition(labels=labels, grid=grid), **order)
        two = backbone(tokens, Condition(labels=labels, grid=other), **order)
        return (one - two).abs().amax(dim=(0, 2)).gt(1e-4).nonzero()[:, 0].tolist()

    causal = make_backbone("causal", grid_vocab=3)
    assert [changed_rows(causal, 5, place) for place in (0, 3, 5)] == [[0, 1, 2, 3, 4, 5], [3, 4, 5], [5]]
    registers = make_backbone("causal", grid_vocab=3, registers=2)
    assert changed_rows(registers, 5, 3) == [3, 4, 5]
    layout = SequenceLayout(5, (6,), num_classes=2, attention="causal", any_order=True)
    any_order = randomise(Transformer(layout, width=16, depth=1, heads=2, grid_vocab=3), 0.3)
    order = torch.tensor([[3, 1, 5, 0, 2, 4]] * 2)
    assert changed_rows(any_order, 5, 5, order=order) == [2, 3, 4, 5]
    scales = SequenceLayout(5, (6,), num_classes=2, attention="block_causal", scales=(1, 2, 3), input_dim=4)
    by_scale = randomise(Transformer(scales, width=16, depth=1, heads=2, grid_vocab=3), 0.3)
    inputs, labels = torch.randn(2, 5, 4), torch.tensor([0, 1])
    grid = torch.zeros(2, 6, dtype=torch.int64)
    other = grid.clone()
    other[:, 1] = 2
    moved = by_scale(inputs, Condition(labels=labels, grid=grid)) - by_scale(
        inputs, Condition(labels=labels, grid=other)
    )
    # The places of a scale see each other, and those before.
    assert moved.abs().amax(dim=(0, 2)).gt(1e-4).tolist() == [False] + [True] * 5
    bidirectional = make_backbone("bidirectional", grid_vocab=3)
    assert changed_rows(bidirectional, 6, 2) == [0, 1, 2, 3, 4, 5]


def test_other_parts_than_it_reads_are_refused_by_name(make_backbone) -> None:
    tokens, condition = torch.zeros(2, 6, dtype=torch.int64), given()
    labels, grid, context = condition.labels, condition.grid, condition.context
    with pytest.raises(ValueError, match="reads no grid of ids beside the label: it was made without grid_vocab"):
        make_backbone("bidirectional")(tokens, Condition(labels=labels, grid=grid))
    with pytest.raises(ValueError, match="attends to no vectors beside the label: it was made without context_dim"):
        make_backbone("bidirectional", grid_vocab=3)(tokens, condition)
    reads_both = make_backbone("bidirectional", **PARTS)
    with pytest.raises(ValueError, match=r"reads a grid of 6 ids in \[0, 3\] for each image, got none"):
        reads_both(tokens, labels)
    with pytest.raises(ValueError, match=r"attends to vectors \(B, M, 5\), the context of a condition, got none"):
        reads_both(tokens, Condition(labels=labels, grid=grid))
    with pytest.raises(ValueError, match=r"got torch.float32 \(2, 4, 3\)"):
        reads_both(tokens, Condition(labels=labels, grid=grid, context=torch.zeros(2, 4, 3)))
    with pytest.raises(ValueError, match=r"got torch.int64 \(2, 2\)"):
        reads_both.new_cache(Condition(labels=labels, grid=torch.zeros(2, 2, dtype=torch.int64), context=context))
    with pytest.raises(ValueError, match="context_dim must be at least 1, got 0"):
        make_backbone("bidirectional", context_dim=0)
    with pytest.raises(ValueError, match="grid_vocab must be at least 1, got 0"):
        make_backbone("bidirectional", grid_vocab=0)


def test_operations_of_attending_are_counted(make_backbone) -> None:
    """Of M vectors: keys and values once for a draw, scores and sums in each pass."""
    without, attending = make_backbone("causal"), make_backbone("causal", context_dim=5)
    layers, width, batch, rows = 2, 16, 3, 4
    once = layers * 2 * batch * (rows + 1) * 5 * 2 * width
    assert attending.cache_flops(batch, rows) == once
    # One element of each sequence: query and output projections, then scores and sums over M + 1 rows.
    each = layers * (2 * 2 * batch * width * width + 2 * 2 * batch * (rows + 1) * width)
    assert attending.flops(batch, 1, 2, rows) - without.flops(batch, 1, 2) == each
    assert attending.flops(batch, 1, 2, 2 * rows) > attending.flops(batch, 1, 2, rows)
