"""The transformer over segments: on a cache and without, packed and alone, tables and heads of a modality's own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from helpers.segment_layouts import random_layout, text_segment
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.blocks import QueryKeyNorms
from discrete_lit.backbones.segment_sequence import SegmentPart, SegmentSequence, assemble, coordinates_of, pack
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.backbones.segments import Segment, SegmentLayout


def network(layout: SegmentLayout, **switches: Any) -> SegmentTransformer:
    made = SegmentTransformer(layout, **{"width": 24, "depth": 2, "heads": 2, **switches})
    return randomise(made, 0.3).double().eval()


def sequence_of(made: SegmentTransformer, count: int = 4) -> SegmentSequence:
    """Sequences with each segment of the layout once, texts of different lengths first."""
    text, *others = made.layout.segments
    ids = torch.tensor(text.allowed_ids)[torch.randint(len(text.allowed_ids), (count, text.positions))]
    parts = [SegmentPart(segment=text.name, content=ids, lengths=torch.arange(count) % (text.positions + 1))]
    for segment in others:
        if segment.ids:
            content = torch.tensor(segment.ids)[torch.randint(len(segment.ids), (count, segment.positions))]
        else:
            content = torch.randn(count, segment.positions, segment.input_dim or 0)
        parts.append(
            SegmentPart(segment=segment.name, content=content, times=None if segment.ids else torch.rand(count))
        )
    return assemble(made.grammar, parts)


def roomy(seed: int) -> SegmentLayout:
    layout = random_layout(seed)
    if layout.interleaved:
        layout = replace(layout, most_elements=2 + sum(segment.elements for segment in layout.segments))
    return layout


def columns(sequence: SegmentSequence, here: slice) -> SegmentSequence:
    return SegmentSequence(
        ids=sequence.ids[:, here],
        states=sequence.states[:, here],
        sample=sequence.sample[:, here],
        vectors={name: vectors[:, here] for name, vectors in sequence.vectors.items()},
        times=None if sequence.times is None else sequence.times[:, here],
    )


@pytest.mark.parametrize("seed", range(12))
def test_packed_samples_do_not_see_each_other(seed: int) -> None:
    made = network(roomy(seed), width=24, head_dim=12)
    sequence = sequence_of(made)
    packed = pack(sequence, 2 * made.layout.length, padding=made.grammar.done)
    assert len(packed) < len(sequence)
    alone, together = made(sequence), made(packed)
    for sample in range(len(sequence)):
        torch.testing.assert_close(together[packed.sample == sample], alone[sequence.sample == sample])


@pytest.mark.parametrize("seed", range(12))
def test_the_cache_gives_what_a_pass_over_everything_does(seed: int) -> None:
    """Rows of different lengths, read in pieces that end where no island does, some of them waiting in between."""
    made = network(roomy(seed), head_dim=12)
    sequence = sequence_of(made)
    whole, lengths = made(sequence), sequence.lengths()
    cache = made.new_cache(len(sequence), 3 * made.layout.length)
    done = torch.zeros_like(lengths)
    while bool((done < lengths).any()):
        # Up to the end of the island that begins here, else one or two elements.
        states = sequence.states.gather(1, done.clamp(max=sequence.ids.shape[1] - 1)[:, None])[:, 0]
        count = int((made.grammar.ahead_of[states] + 1).max())
        ready = (made.grammar.ahead_of[states] + 1 == count) & (done + count <= lengths)
        number = (done[:, None] + torch.arange(count)).clamp(max=sequence.ids.shape[1] - 1)
        rows = torch.arange(len(done))[:, None]
        piece = sequence.taken(rows, number, valid=torch.ones_like(number, dtype=torch.bool), padding=made.grammar.done)
        hidden = made(piece, cache)
        _, then = coordinates_of(made.grammar, piece.states, origin=cache.origin)
        torch.testing.assert_close(hidden[ready], whole[rows, number][ready])
        cache.advance(ready * count, then, reach=int((done + ready * count).max()))
        done = done + ready * count


def test_an_even_cache_gives_what_a_pass_over_everything_does() -> None:
    made = network(SegmentLayout(segments=(text_segment(), Segment(name="image", shape=(2, 2), ids=(7, 8)))))
    text = SegmentPart(segment="text", content=torch.randint(3, 7, (3, 4)), lengths=torch.full((3,), 4))
    sequence = assemble(made.grammar, [text, SegmentPart(segment="image", content=torch.randint(7, 9, (3, 4)))])
    whole, cache, at = made(sequence), made.new_cache(3, 10), 0
    for count in (3, 1, 2, 1, 3):
        piece = columns(sequence, slice(at, at + count))
        torch.testing.assert_close(made(piece, cache), whole[:, at : at + count])
        cache.advance(count, coordinates_of(made.grammar, piece.states, origin=cache.origin)[1])
        at += count
    assert cache.even and cache.reach == 10 == sequence.ids.shape[1]
    with pytest.raises(ValueError, match="holds 10 positions, 11 were asked for"):
        made(columns(sequence, slice(0, 1)), cache)


def image_layout(**changes: Any) -> SegmentLayout:
    image = Segment(name="image", shape=(2, 2), ids=(9, 7, 8), begin_ids=(10,), end_ids=(11,))
    return SegmentLayout(segments=(text_segment(), image), interleaved=True, most_elements=20, **changes)


def test_a_modality_may_have_a_table_and_a_head_of_its_own() -> None:
    """Janus: a short table and an aligner of two layers, and a head of two layers over the image's codes alone."""
    made = network(image_layout(), own_embeddings={"image": 4}, own_heads={"image": 6}, aligner_layers=2)
    own, head = made.own_embeddings["image"], made.own_heads["image"]
    sequence = sequence_of(made, 2)
    embedded = made._embed(sequence)
    codes = torch.tensor([1, 2, 0])  # of the ids 7, 8 and 9
    inside = (made.grammar.segment_of[sequence.states] == 1) & (made.grammar.place_of[sequence.states] >= 0)
    table: Any = own
    rows = table.table.weight[codes[sequence.ids[inside] - 7]]
    first, second = table.aligner[0], table.aligner[2]
    torch.testing.assert_close(embedded[inside], second(F.gelu(first(rows))))
    torch.testing.assert_close(embedded[~inside], made.table.weight[sequence.ids[~inside]])
    hidden = torch.randn(3, 24, dtype=torch.float64)
    of_image = made.grammar.sets.index((1, (7, 8, 9)))
    expected = head.output(F.gelu(head.expand(hidden)))[:, codes]  # type: ignore[operator]
    torch.testing.assert_close(made.logits(hidden, of_image), expected)
    states = torch.tensor([int(made.grammar.place_of.argmax())] * 3)
    everything = made.logits_in(states, hidden)
    torch.testing.assert_close(everything[:, 7:10], expected)
    assert (everything[:, :7] == -torch.inf).all()


def test_all_ids_share_a_table_and_a_softmax_by_default() -> None:
    made = network(image_layout(), tied=True)
    hidden = torch.randn(2, 24, dtype=torch.float64)
    torch.testing.assert_close(made.logits(hidden), hidden @ made.table.weight.T)
    of_image = made.grammar.sets.index((1, (7, 8, 9)))
    torch.testing.assert_close(made.logits(hidden, of_image), made.logits(hidden)[:, 7:10])


def test_chameleons_norm_has_gains_and_offsets_of_each_head() -> None:
    norms = randomise(QueryKeyNorms(3, 8, kind="layer_per_head", epsilon=1e-5), 0.5).double()
    query, key = torch.randn(2, 2, 3, 5, 8, dtype=torch.float64)
    gains, offsets = norms.gains.view(2, 3, 8), norms.offsets.view(2, 3, 8)
    for number, (found, given) in enumerate(zip(norms(query, key), (query, key), strict=True)):
        for head in range(3):
            expected = F.layer_norm(given[:, head], (8,), gains[number, head], offsets[number, head], 1e-5)
            torch.testing.assert_close(found[:, head], expected)


def test_heads_that_share_keys_and_values_are_heads_with_equal_ones() -> None:
    """Also of a cache, which holds the shared heads alone."""
    layout = image_layout()
    shared = network(layout, heads=4, head_dim=6, key_value_heads=2, qk_norm="layer_per_head")
    made = network(layout, heads=4, head_dim=6, qk_norm="layer_per_head")
    weights = shared.state_dict()
    for name, value in weights.items():
        counts = [24, 12] if "norms" in name else [24, 12, 12]
        if "query_key_value" in name or "norms" in name:
            query, *others = value.split(counts)
            others = [each.unflatten(0, (2, 6)).repeat_interleave(2, dim=0).flatten(0, 1) for each in others]
            weights[name] = torch.cat((query, *others))
    made.load_state_dict(weights)
    sequence = sequence_of(shared, 2)
    expected = made(sequence)
    torch.testing.assert_close(shared(sequence), expected)
    cache = shared.new_cache(2, 20)
    assert cache.layer(0).append(*torch.zeros(2, 2, 2, 1, 6).double())[0].shape[1] == 2
    with pytest.raises(ValueError, match="key_value_heads=3 must divide the 4 heads"):
        network(layout, heads=4, head_dim=6, key_value_heads=3)
    with pytest.raises(ValueError, match="norms over a head alone"):
        network(layout, heads=4, head_dim=6, key_value_heads=2, qk_norm="unit")


def test_norms_of_what_branches_give() -> None:
    made = network(image_layout(), norm_outputs=True, depth=1)
    sequence = sequence_of(made, 2)
    x = made._embed(sequence)
    coordinates, _ = made._places(sequence, None)
    block: Any = made.blocks[0]
    rotary = made.rotary_table[coordinates].flatten(2, 3)[:, None]
    x = x + block.attention_norm(block.attention(x, rotary, None, True, None))
    x = x + block.mlp_norm(block.mlp(x))
    torch.testing.assert_close(made(sequence), made.final_norm(x))


def test_ids_with_a_table_and_a_head_of_their_own_have_no_row_in_the_common_one() -> None:
    """Where they stand behind all others, as Janus's images do."""
    image = Segment(name="image", shape=(2, 2), ids=(11, 12, 13), begin_ids=(9,), end_ids=(10,))
    layout = SegmentLayout(segments=(text_segment(), image), interleaved=True, most_elements=20)
    made = network(layout, own_embeddings={"image": 4}, own_heads={"image": 6})
    assert layout.vocab_size == 14 and made.table.num_embeddings == 11 == made.shared_ids
    sequence = sequence_of(made, 3)
    hidden = made(sequence)[:, 0]
    inside = torch.full((3,), int((made.grammar.place_of == 1).nonzero()[-1]))
    logits = made.logits_in(inside, hidden)
    assert logits.shape == (3, 14) and (logits[:, :11] == -torch.inf).all() and logits[:, 11:].isfinite().all()
    outside = made.logits_in(torch.ones_like(inside), hidden)
    torch.testing.assert_close(outside[:, :11], made.logits(hidden))
    assert (outside[:, 11:] == -torch.inf).all()


def test_gradients_reach_every_parameter() -> None:
    island = Segment(name="island", shape=(3,), input_dim=2, attention="bidirectional", begin_ids=(12,), end_ids=(13,))
    layout = SegmentLayout(segments=(*image_layout().segments, island))
    made = SegmentTransformer(layout, width=16, depth=2, heads=2, own_embeddings={"image": 4}, own_heads={"image": 6})
    randomise(made, 0.3).train()
    hidden = made(sequence_of(made))
    total: Tensor = made.predict_vectors(hidden, segment="island").square().sum()
    for number in range(len(made.grammar.sets)):
        total = total + made.logits(hidden, number).logsumexp(dim=-1).sum()
    total.backward()
    assert [name for name, value in made.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_activation_checkpointing_changes_nothing() -> None:
    made = network(image_layout())
    sequence = sequence_of(made)
    expected = made(sequence)
    made.activation_checkpointing = True
    made.train()
    torch.testing.assert_close(made(sequence), expected)


@pytest.mark.parametrize(
    "switches, message",
    [
        ({"width": 25}, "heads divide the width"),
        ({"own_heads": {"audio": 4}}, "own_heads=.*modalities of ids, which are image, text"),
        ({"own_embeddings": {"image": 0}}, "widths of at least 1"),
        ({"head_dim": 7}, "head width divisible by 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(image_layout(), **switches)


def test_positions_follow_the_module_into_half_precision() -> None:
    made: nn.Module = network(image_layout()).to(torch.bfloat16)
    assert made.rotary_table.dtype == torch.float32


def test_parallel_branches_read_one_norm_and_a_share_of_a_head_is_turned() -> None:
    """Phi's block, and its rotation of the first half of a head; biases everywhere, those of the logits too."""
    made = network(image_layout(), parallel=True, bias=True, norm="layer", mlp="gelu_tanh", rotary_share=0.5, depth=1)
    sequence = sequence_of(made, 2)
    x = made._embed(sequence)
    coordinates, _ = made._places(sequence, None)
    rotary = made.rotary_table[coordinates].flatten(2, 3)[:, None]
    assert rotary.shape[-2] == 6 and (rotary[..., 3:, :] == torch.tensor([1.0, 0.0])).all()
    assert (rotary[:, :, 1:, :3, 1] != 0).all()
    block: Any = made.blocks[0]
    normed = block.attention_norm(x)
    x = x + block.attention(normed, rotary, None, True, None) + block.mlp(normed)
    hidden = made(sequence)
    torch.testing.assert_close(hidden, made.final_norm(x))
    logits = made.logits(hidden)
    torch.testing.assert_close(logits, F.linear(hidden, made.head.weight, made.head_bias))
    for number, (_, ids) in enumerate(made.grammar.sets):
        torch.testing.assert_close(made.logits(hidden, number), logits[..., list(ids)])
    for share in (0.0, 1.5, 0.2):
        with pytest.raises(ValueError, match="must turn a whole number of the 6 pairs"):
            network(image_layout(), rotary_share=share)
    with pytest.raises(ValueError, match="parallel goes with neither norm_outputs"):
        network(image_layout(), parallel=True, norm_outputs=True)
