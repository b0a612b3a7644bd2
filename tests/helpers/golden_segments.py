"""Masks and rotary positions of sequences with islands, for the golden case of Transfusion, which has no weights.

The reference numbers islands by (type, offset, length). Ours begin with an element that stands before all, which it has
not.
"""

from dataclasses import replace

import torch

from discrete_lit.backbones.segment_grammar import SegmentGrammar
from discrete_lit.backbones.segment_sequence import coordinates_of, seen_by
from discrete_lit.backbones.segments import Segment, SegmentLayout
from helpers.golden import Case, Tensors

TOLERANCE = 0.0
NO_PLACE = {"transfusion_mask": {"ordered(_index)?": "our islands are given in their order"}}


def _layout(length: int, islands: list[tuple[int, int, int]]) -> SegmentLayout:
    """Text with islands `(offset, length, type)` in it."""
    segments, at = [], 0
    for offset, count, kind in [*islands, (length, 0, -1)]:
        if offset > at:
            segments.append(Segment(name=f"text at {at}", modality="text", shape=(offset - at,), ids=(1,)))
        if count:
            name = f"island at {offset}"
            island = Segment(name=name, modality=str(kind), shape=(count,), input_dim=1, attention="bidirectional")
            segments.append(island)
        at = offset + count
    segments[0] = replace(segments[0], begin_ids=(0,))
    return SegmentLayout(segments=tuple(segments), positions="island")


def transfusion_mask(case: Case) -> Tensors:
    length, kinds = case.constructor["seq_len"], case.constructor["num_modalities"]
    masks, positions, inside = [], [], []
    for given in case.constructor["modalities"]:
        layout = _layout(length, sorted((offset, count, kind) for kind, offset, count in given if count))
        grammar = SegmentGrammar(layout)
        states = torch.arange(length + 1)[None]  # in a fixed order without variable segments, one after another
        last = states + grammar.ahead_of[states]
        masks.append(seen_by(torch.zeros_like(last), last, elements=length + 1)[0, 0, 1:, 1:])
        positions.append(coordinates_of(grammar, states)[0][0, 1:, 0] - 1)
        of_row = torch.zeros(kinds, len(given), length, dtype=torch.int64)
        for number, (kind, offset, count) in enumerate(given):
            if count:
                segment = layout.number(f"island at {offset}")
                of_row[kind, number] = (grammar.segment_of == segment)[states[0, 1:]] & grammar.is_vector[states[0, 1:]]
        inside.append(of_row)
    mask = torch.stack(masks).long()
    return {
        "mask_flex": mask,
        "mask_naive": mask,
        "rotary_positions": torch.stack(positions),
        "is_modality": torch.stack(inside),
    }


OUTPUTS = {"transfusion_mask": transfusion_mask}
