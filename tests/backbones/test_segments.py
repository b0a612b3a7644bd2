"""Layouts of segments, their grammar, and batches that are put together and packed."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from helpers.segment_layouts import random_layout, text_segment
from torch import Tensor

from discrete_lit.backbones.segment_grammar import SegmentGrammar
from discrete_lit.backbones.segment_sequence import (
    SegmentPart,
    SegmentSequence,
    assemble,
    coordinates_of,
    pack,
    seen_by,
)
from discrete_lit.backbones.segments import Segment, SegmentLayout

IMAGE: dict[str, Any] = {
    "name": "image",
    "shape": (2, 3),
    "ids": (9, 7, 8),
    "begin_ids": (10, 4, 11),
    "end_ids": (12,),
    "row_end_id": 13,
}
# What stands in a layout of a text of up to 5 of the ids 3 to 6 and this image.
ROWS = [9, 7, 8, 13, 9, 9, 9, 13]


def layout(**changes: Any) -> SegmentLayout:
    return SegmentLayout(segments=(text_segment(), Segment(**IMAGE)), **changes)


def interleaved(most_elements: int = 30, **changes: Any) -> SegmentLayout:
    return layout(interleaved=True, most_elements=most_elements, **changes)


def rows_of(*rows: list[int]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])


# --- The grammar ---


@pytest.mark.parametrize(
    "made, ids",
    [
        (layout(), [1, 3, 3, 6, 2, 10, 4, 11, *ROWS, 12]),
        (layout(), [1, 2, 10, 4, 11, *ROWS, 12]),
        (layout(), [1, 3, 4, 5, 6, 3, 2, 10, 4, 11, *ROWS, 12]),
        (interleaved(), [1, 2]),
        (interleaved(), [1, 10, 4, 11, *ROWS, 12, 5, 5, 2]),
        (interleaved(), [1, 3, 10, 4, 11, *ROWS, 12, 10, 4, 11, *ROWS, 12, 2]),
    ],
)
def test_sequences_of_a_layout_are_read(made: SegmentLayout, ids: list[int]) -> None:
    grammar = SegmentGrammar(made)
    states = grammar.read(*rows_of(ids))
    assert int(grammar.advance(states[0, -1], torch.tensor(ids[-1]))) == grammar.done


@pytest.mark.parametrize(
    "made, ids, message",
    [
        (layout(), [1, 3, 4, 5, 6, 3, 3, 2], "id 3 may not stand at element 6 .* may stand 2$"),
        (
            layout(),
            [1, 7, 2],
            "id 7 may not stand at element 1 .*at position 0 of 'text' may stand 2, 3, 4, 5 and 1 mo",
        ),
        (layout(), [1, 2, 10, 4, 11, 9, 7, 8, 9], "id 9 may not stand at element 8 .*may stand 13"),
        (
            layout(),
            [1, 2, 10, 4, 11, *ROWS],
            "sequence 0 ends after 13 elements, before its end: .*'image' may stand 12",
        ),
        (interleaved(), [1, 10, 4, 11, 9, 7, 2], "id 2 may not stand at element 6"),
        (interleaved(14), [1, 3, 10], "id 10 may not stand at element 2"),
        (interleaved(), [1, 99], "id 99 may not stand"),
        (interleaved(), [1, 3], "before its end"),
    ],
)
def test_what_is_no_sequence_is_told_with_its_place(made: SegmentLayout, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentGrammar(made).read(*rows_of(ids))


def test_an_image_begins_only_where_enough_elements_are_left() -> None:
    """Chameleon's rule: begin, 11 elements, end and the end of the text need 13."""
    grammar = SegmentGrammar(interleaved())
    state = grammar.read(*rows_of([1, 3, 2]))[0, 1].expand(2)
    may = grammar.allowed(state, torch.tensor([12, 13]))
    assert may[:, 10].tolist() == [False, True]
    assert may[:, 3:7].all()
    assert grammar.allowed(state[:1], torch.tensor([1]))[0].nonzero().tolist() == [[2]]


@pytest.mark.parametrize("seed", range(40))
def test_every_way_through_a_random_grammar_ends_in_time(seed: int) -> None:
    grammar = SegmentGrammar(random_layout(seed))
    length = grammar.layout.length
    state, ids = torch.full((20,), grammar.start), []
    for number in range(length + 1):
        remaining = torch.full((20,), length - number)
        may = grammar.allowed(state, remaining)
        open = (state != grammar.done) & ~grammar.is_vector[state]
        assert may[open].any(dim=1).all()
        drawn = torch.where(open, (may.double() + 1e-12).multinomial(1)[:, 0], 0)
        ids.append(drawn.where(state != grammar.done, -1))
        state = grammar.advance(state, drawn)
    assert (state == grammar.done).all()
    made = torch.stack(ids, dim=1)
    grammar.read(made.clamp(min=0), (made >= 0).sum(dim=1))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shape": ()}, "one to 3 axes"),
        ({"ids": ()}, "ids, or the input_dim of vectors"),
        ({"input_dim": 3}, "ids, or the input_dim of vectors"),
        ({"ids": (7, 7)}, "the same for two codes"),
        ({"allowed": (7, 99)}, "allows ids that are not its own"),
        ({"attention": "both"}, "causal, bidirectional or block_causal"),
        ({"attention": "block_causal", "row_end_id": None, "scales": (1, 4)}, "add up to its 6 positions"),
        ({"attention": "bidirectional", "row_end_id": None}, "cannot be predicted one after another"),
        ({"attention": "bidirectional", "loss_weight": 0}, "neither ends of rows"),
        ({"mask_id": 14, "row_end_id": None}, "and attention='bidirectional'"),
        ({"mask_id": 7, "row_end_id": None, "attention": "bidirectional"}, "needs other ids than this one"),
        ({"variable": True}, "is variable"),
        ({"shape": (6,)}, "a grid of rows"),
        ({"ends_inside": True}, "ends_inside=true needs ids and attention='bidirectional'"),
    ],
)
def test_segments_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segment(**{**IMAGE, **changes})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SegmentLayout(segments=()), "segments of different names"),
        (lambda: SegmentLayout(segments=(Segment(**{**IMAGE, "begin_ids": ()}),)), "is the first and needs begin_ids"),
        (lambda: layout(most_elements=9), "most_elements is of an interleaved layout"),
        (lambda: interleaved(1), "most_elements of at least 2"),
        (lambda: layout(positions="polar"), "positions must be"),
        (
            lambda: SegmentLayout(segments=(text_segment(), text_segment(name="more")), interleaved=True),
            "has a fixed length and begins by an id of its own",
        ),
        (
            lambda: SegmentLayout(
                segments=(text_segment(allowed=(3, 10), ids=range(11)), Segment(**IMAGE)),
                interleaved=True,
                most_elements=30,
            ),
            r"ids \[10\] begin a segment",
        ),
        (
            lambda: SegmentLayout(segments=(text_segment(), Segment(**{**IMAGE, "begin_ids": (), "first": True}))),
            "'image' is the first and needs begin_ids",
        ),
        (
            lambda: SegmentLayout(
                segments=(text_segment(), Segment(**{**IMAGE, "first": True})), interleaved=True, most_elements=30
            ),
            "first and ends_inside are of segments in a fixed order",
        ),
        (lambda: layout()["audio"], "no segment is named 'audio', there are text, image"),
        (lambda: text_segment(allowed=(2, 3)), "ends by the id 2, which may also stand in it"),
    ],
)
def test_layouts_that_no_sequence_can_be_made_of_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- Several kinds of sequences, and islands with their ends ---


def drawn_and_described() -> SegmentLayout:
    """Show-o's: a text and an image from masks; or an image that is given, and a text."""
    island: dict[str, Any] = {"row_end_id": None, "attention": "bidirectional", "ends_inside": True, "end_ids": (12,)}
    given: dict[str, Any] = {"name": "given", "modality": "image", "loss_weight": 0}
    return SegmentLayout(
        segments=(
            text_segment(),
            Segment(**{**IMAGE, **island, "begin_ids": (10,), "mask_id": 14}),
            Segment(**{**IMAGE, **island, **given, "begin_ids": (15, 10), "first": True}),
            text_segment(name="caption", modality="text"),
        )
    )


def test_a_layout_has_several_kinds_of_sequences() -> None:
    made = SegmentGrammar(drawn_and_described())
    pixels = [7, 8, 9, 9, 9, 7]
    rows = [[1, 3, 2, 10, *pixels, 12], [15, 10, *pixels, 12, 1, 5, 4, 2], [1, 2, 10, *pixels, 12]]
    ids, lengths = rows_of(*rows)
    states = made.read(ids, lengths)
    names = [made.layout.segments[number].name for number in made.segment_of[states[:, 0]].tolist()]
    assert names == ["text", "given", "text"]
    assert made.layout.length == 16  # an image with its ends and its task, and a text of five
    text = SegmentPart(segment="caption", content=torch.tensor([[5, 4]]), lengths=torch.tensor([2]))
    given = SegmentPart(segment="given", content=torch.tensor([pixels]))
    assert assemble(made, [given, text]).ids[0].tolist() == rows[1]
    with pytest.raises(ValueError, match="text, image, or given, caption in this order, got caption"):
        assemble(made, [text])
    # Behind the end of a kind is nothing.
    with pytest.raises(ValueError, match="the sequence is over"):
        made.read(*rows_of([*rows[2], 15]))


def test_an_island_with_its_ends_sees_itself_whole() -> None:
    made = SegmentGrammar(drawn_and_described())
    for name, elements in (("image", 8), ("given", 9)):
        ahead = made.ahead_of[made.states_of(name)].tolist()
        assert ahead == list(range(elements - 1, -1, -1))
    begin = int(made.states_of("image")[0])
    assert made.islands[begin] == 8 and sum(made.islands) == 8  # what is given is not drawn


# --- Batches ---


def parts(count: int = 3, *, image_first: Tensor | None = None) -> list[SegmentPart]:
    lengths = torch.arange(count) % 4
    text = SegmentPart(segment="text", content=torch.randint(3, 7, (count, 5)), lengths=lengths)
    content = torch.randint(7, 10, (count, 6))
    if image_first is None:
        return [text, SegmentPart(segment="image", content=content)]
    return [
        SegmentPart(segment="image", content=content, present=image_first),
        text,
        SegmentPart(segment="image", content=content, present=~image_first),
    ]


@pytest.mark.parametrize("made", [layout(), interleaved()], ids=["fixed", "interleaved"])
def test_assembled_sequences_are_those_that_the_grammar_reads(made: SegmentLayout) -> None:
    grammar = SegmentGrammar(made)
    image_first = torch.tensor([True, False, True, False, False]) if made.interleaved else None
    sequence = assemble(grammar, parts(5, image_first=image_first))
    assert torch.equal(sequence.states, grammar.read(sequence.ids, sequence.lengths()))
    # Row 1: a text of one id, then the image, with what stands around it.
    here = sequence.ids[1, : int(sequence.lengths()[1])].tolist()
    images = [*here[-9:-1]] if not made.interleaved else [*here[-10:-2]]
    assert [images[3], images[7]] == [13, 13]
    assert here[0] == 1 and (here[3:6] if not made.interleaved else here[2:5]) == [10, 4, 11]


def test_a_prompt_ends_where_the_image_is_to_begin() -> None:
    grammar = SegmentGrammar(interleaved())
    sequence = assemble(grammar, parts(3)[:1], begun="image")
    last = sequence.lengths() - 1
    assert (sequence.ids.gather(1, last[:, None]) == 10).all()
    then = grammar.advance(sequence.states.gather(1, last[:, None])[:, 0], torch.full((3,), 10))
    assert (grammar.segment_of[then] == 1).all()


@pytest.mark.parametrize(
    "given, message",
    [
        ([SegmentPart(segment="image", content=torch.zeros(2, 6).long())], "in this order, got image"),
        (
            [SegmentPart(segment="text", content=torch.zeros(2, 6).long(), lengths=torch.ones(2).long())],
            r"ids \(2, 5\)",
        ),
        ([SegmentPart(segment="text", content=torch.zeros(2, 5).long())], r"needs lengths \(2,\)"),
    ],
)
def test_parts_that_are_not_the_layouts_are_refused(given: list[SegmentPart], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(SegmentGrammar(layout()), given)


# --- Packing, masks and positions ---


def mixed_layout() -> SegmentLayout:
    """Text, an island of vectors, and vectors in scales, anywhere in the text."""
    island = Segment(name="island", shape=(2, 2), input_dim=2, attention="bidirectional", begin_ids=(7,), end_ids=(8,))
    scales = Segment(
        name="scales", shape=(5,), input_dim=2, attention="block_causal", scales=(1, 4), begin_ids=(9,), end_ids=()
    )
    return SegmentLayout(segments=(text_segment(), island, scales), interleaved=True, most_elements=24)


def mixed_sequence(grammar: SegmentGrammar, count: int = 6) -> SegmentSequence:
    text = SegmentPart(segment="text", content=torch.randint(3, 7, (count, 5)), lengths=torch.randint(0, 6, (count,)))
    some = torch.rand(count) < 0.7
    island = SegmentPart(segment="island", content=torch.randn(count, 4, 2), present=some)
    scales = SegmentPart(segment="scales", content=torch.randn(count, 5, 2), present=~some | (torch.rand(count) < 0.5))
    return assemble(grammar, [island, text, scales])


def test_the_mask_of_packed_rows_is_that_of_the_definition() -> None:
    """q sees k if both are of one sample, and k stands before q or in q's island, or at most in q's scale."""
    grammar = SegmentGrammar(mixed_layout())
    sequence = pack(mixed_sequence(grammar), 40, padding=grammar.done)
    assert len(sequence) < 6  # several samples to a row
    number = torch.arange(40).expand_as(sequence.ids)
    mask = seen_by(sequence.first(), number + grammar.ahead_of[sequence.states], elements=40)[:, 0]
    sample, segment, place = sequence.sample, grammar.segment_of[sequence.states], grammar.place_of[sequence.states]
    for row, q, k in product(range(len(sequence)), range(40), range(40)):
        if sample[row, q] < 0:
            continue
        inside = all(place[row, each] >= 0 and grammar.is_vector[sequence.states[row, each]] for each in (q, k))
        # Each sample has a segment once at most: two vectors of one segment stand in one island.
        together = inside and segment[row, q] == segment[row, k]
        if together and segment[row, q] == 2:
            together = (place[row, q] > 0) == (place[row, k] > 0)
        expected = bool(sample[row, q] == sample[row, k]) and (k <= q or bool(together))
        assert bool(mask[row, q, k]) == expected, (row, q, k)


def test_packed_samples_keep_their_elements_and_positions() -> None:
    grammar = SegmentGrammar(replace(mixed_layout(), positions="axial"))
    sequence = mixed_sequence(grammar)
    packed = pack(sequence, 30, padding=grammar.done)
    alone, _ = coordinates_of(grammar, sequence.states)
    together, _ = coordinates_of(grammar, packed.states, first=packed.first())
    for sample in range(len(sequence)):
        there, here = packed.sample == sample, sequence.sample == sample
        assert torch.equal(packed.ids[there], sequence.ids[here])
        assert torch.equal(together[there], alone[here])
        for name in sequence.vectors:
            assert torch.equal(packed.vectors[name][there], sequence.vectors[name][here])
    with pytest.raises(ValueError, match="rows of 5 cannot hold it"):
        pack(sequence, 5, padding=grammar.done)


def test_axial_positions_count_along_each_axis_from_where_the_grid_begins() -> None:
    grammar = SegmentGrammar(layout(positions="axial"))
    ids = [1, 3, 2, 10, 4, 11, *ROWS, 12]
    coordinates, then = coordinates_of(grammar, grammar.read(*rows_of(ids)))
    image = [[6, 6], [6, 7], [6, 8], [6, 9], [7, 6], [7, 7], [7, 8], [7, 9]]
    assert coordinates[0].tolist() == [*([n, n] for n in range(6)), *image, [10, 10]]
    assert int(then[0, -1]) == 11
