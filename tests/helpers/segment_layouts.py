"""Layouts of segments for tests, random ones among them, and a text tokenizer of whole words."""

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from discrete_lit.backbones.segments import Segment, SegmentLayout


class Words(nn.Module):
    """Ids of whole words: padding 0, begin 1, end 2, then the words."""

    pad_id, begin_id, end_id = 0, 1, 2

    def __init__(self, words: tuple[str, ...]) -> None:
        super().__init__()
        self.words = tuple(words)
        self.vocab_size = 3 + len(self.words)

    def encode(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        rows = [[1, *self.ids(text), 2] for text in texts]
        longest = max(map(len, rows))
        if longest > length:
            raise ValueError(f"a text has {longest} ids, the length is {length}")
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return ids, torch.tensor([len(row) for row in rows])

    def ids(self, text: str) -> list[int]:
        return [3 + self.words.index(word) for word in text.split()]

    def decode(self, ids: Tensor) -> list[str]:
        return [" ".join(self.words[id - 3] for id in row if id >= 3) for row in ids.tolist()]


def text_segment(words: int = 4, length: int = 5, **changes: Any) -> Segment:
    """A text of ids 3, 4, ... with padding 0, begin 1 and end 2."""
    settings: dict[str, Any] = {
        "name": "text",
        "shape": (length,),
        "ids": range(3 + words),
        "variable": True,
        "allowed": tuple(range(3, 3 + words)),
        "begin_ids": (1,),
        "end_ids": (2,),
        **changes,
    }
    return Segment(**settings)


def random_layout(seed: int) -> SegmentLayout:
    """Make a layout at random: in a fixed order or interleaved, grids of one to three axes, ids, masked or not, or
    vectors."""
    draw = random.Random(seed)
    words = draw.randint(1, 4)
    text = text_segment(words, draw.randint(1, 5), end_ids=tuple([2, 0][: draw.randint(1, 2)]))
    segments, free = [text], 3 + words
    for number in range(draw.randint(1, 3)):
        shape = tuple(draw.randint(1, 3) for _ in range(draw.randint(1, 3)))
        vectors = draw.random() < 0.4
        codes = list(range(free, free + draw.randint(2, 5)))
        draw.shuffle(codes)
        after = free + len(codes)
        begin = tuple(range(after, after + draw.randint(1, 3)))
        end = tuple(range(after + 3, after + 3 + draw.randint(0, 2)))
        free = after + 6
        masked = not vectors and draw.random() < 0.3
        rows = len(shape) > 1 and not vectors and not masked and draw.random() < 0.5
        segments.append(
            Segment(
                name=f"image{number}",
                shape=shape,
                ids=() if vectors else tuple(codes),
                input_dim=draw.randint(1, 3) if vectors else None,
                attention="bidirectional" if masked or (vectors and draw.random() < 0.5) else "causal",
                begin_ids=begin,
                end_ids=end,
                row_end_id=free - 1 if rows else None,
                mask_id=free - 1 if masked else None,
            )
        )
    interleaved = draw.random() < 0.6
    if not interleaved:
        segments = [replace(each, ends_inside=each.mask_id is not None and seed % 2 == 0) for each in segments]
    longest = max(segment.elements for segment in segments)
    return SegmentLayout(
        segments=tuple(segments),
        interleaved=interleaved,
        most_elements=2 + len(text.end_ids) + draw.randint(0, 2 * longest) if interleaved else None,
        positions=draw.choice(["sequence", "island", "axial"]),
    )
