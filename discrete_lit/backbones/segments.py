"""Sequences of segments: text and images, of ids or of vectors, one after another in one sequence.

A `Segment` says what one of them is made of: its modality, its grid, its ids in the vocabulary that all share, what
stands before, within and behind it, and which of its positions see which. A `SegmentLayout` puts them in order: each
once (a prompt, then an image), or as the sequence itself has them, text with images anywhere (Chameleon). Which id may
follow which is then fixed: `SegmentGrammar` reads it off the layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

PositionCount = Literal["sequence", "island", "axial"]
_MOST_AXES = 3


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One piece of a sequence, of one modality.

    Attributes:
        name: of the segment; no two of a layout have one name.
        shape: its grid, of one to three axes, in raster order; of text `(L,)`, the most ids that it has.
        ids: id of each of its codes in the vocabulary that all segments share, a range or one after another
            (Chameleon's image codes stand there in an order of their own); empty for vectors.
        input_dim: width of the vectors at its positions; None for ids.
        modality: `"text"` or `"image"`, say; as `name` by default.
        variable: whether it may be shorter than its shape; then its end is chosen.
        loss_weight: of its ids, or of its vectors, in the loss; 0 for what is only given.
        attention: which of its own positions see which: each those before it; all each other (an island); or each
            those of its scale and of the scales before.
        scales: positions of each scale in turn, of `"block_causal"` attention.
        codes: K, of vectors in scales that predict ids, each where it stands (VAR): the vectors of a scale are what the
            scales before it add up to. The first scale is one id, which what stands before the segment predicts, and
            has no position in it; None for vectors that predict no ids.
        allowed: codes' ids that may stand in it; all of `ids` by default. Of text it leaves out what pads it.
        begin_ids: stand before it. Where the sequence chooses what follows, the first of them is the choice.
        end_ids: stand behind it; the first of them is how a variable segment ends.
        row_end_id: stands behind every row of a grid (Emu3).
        mask_id: stands for an id that is not known yet, of `"bidirectional"` attention: each is then predicted at its
            own position, several at once (Show-o); None for ids that are predicted one after another.
        ends_inside: whether what stands before and behind it belongs to the island, of ids with `"bidirectional"`
            attention: all of these elements see each other, and are drawn together (Show-o's published models).
        first: whether a sequence may begin with it, and end in front of it: a layout in a fixed order then has several
            kinds of sequences, as Show-o has one to draw and one to describe an image.

    Raises:
        ValueError: attributes that do not fit together.
    """

    name: str
    shape: tuple[int, ...]
    ids: Sequence[int] = ()
    input_dim: int | None = None
    modality: str = ""
    variable: bool = False
    loss_weight: float = 1.0
    attention: Literal["causal", "bidirectional", "block_causal"] = "causal"
    scales: tuple[int, ...] = ()
    codes: int | None = None
    allowed: tuple[int, ...] | None = None
    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    row_end_id: int | None = None
    mask_id: int | None = None
    ends_inside: bool = False
    first: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "modality", self.modality or self.name)
        object.__setattr__(self, "shape", tuple(self.shape))
        of = f"segment {self.name!r}"
        if not 1 <= len(self.shape) <= _MOST_AXES or min(self.shape) < 1:
            raise ValueError(f"{of} has the shape {self.shape}: one to {_MOST_AXES} axes of at least 1 are needed")
        if (self.input_dim is None) == (not self.ids):
            raise ValueError(f"{of} needs ids, or the input_dim of vectors, got {self.input_dim=} and ids={self.ids}")
        if len(set(self.ids)) != len(self.ids) or (self.ids and min(self.ids) < 0):
            raise ValueError(f"{of} has ids that are negative, or the same for two codes")
        if self.allowed is not None and not (self.allowed and set(self.allowed) <= set(self.ids)):
            raise ValueError(f"{of} allows ids that are not its own, or none: {self.allowed}")
        if self.attention not in ("causal", "bidirectional", "block_causal"):
            raise ValueError(f"{of}: attention must be causal, bidirectional or block_causal, got {self.attention!r}")
        if (self.attention == "block_causal") != bool(self.scales) or (
            self.scales and (sum(self.scales) != self.positions or min(self.scales) < 1)
        ):
            raise ValueError(
                f"{of} has {self.attention} attention and scales={self.scales}: block_causal attention needs scales "
                f"that add up to its {self.positions} positions, others have none"
            )
        if self.codes is not None and (self.codes < 1 or not self.scales or self.ids or not self.begin_ids):
            raise ValueError(
                f"{of} has codes={self.codes}, which is at least 1 and needs vectors, attention='block_causal', and "
                "begin_ids, from which the first scale is predicted"
            )
        if self.attention != "causal" and (self.row_end_id is not None or self.variable):
            raise ValueError(f"{of} with {self.attention} attention has neither ends of rows nor a variable length")
        if self.mask_id is not None and (self.attention != "bidirectional" or self.mask_id in self.ids):
            raise ValueError(
                f"{of} has mask_id={self.mask_id}, which needs other ids than this one, and attention='bidirectional'"
            )
        if self.attention != "causal" and self.ids and self.loss_weight and self.mask_id is None:
            raise ValueError(
                f"{of}: ids that see those behind them cannot be predicted one after another: set loss_weight=0, "
                "attention='causal', or a mask_id, by which they are predicted where they stand"
            )
        if self.ends_inside and (self.attention != "bidirectional" or not self.ids):
            raise ValueError(f"{of} with ends_inside=true needs ids and attention='bidirectional'")
        if self.variable and (len(self.shape) != 1 or not self.ids or not self.end_ids):
            raise ValueError(f"{of} is variable: it needs one axis, ids, and end_ids that say where it ends")
        if self.row_end_id is not None and (len(self.shape) < 2 or not self.ids):
            raise ValueError(
                f"{of} has row_end_id={self.row_end_id}, which needs ids on a grid of rows, got the shape {self.shape}"
            )
        if self.variable and self.end_ids[0] in self.allowed_ids:
            raise ValueError(
                f"{of} ends by the id {self.end_ids[0]}, which may also stand in it: leave it out of allowed"
            )

    @property
    def positions(self) -> int:
        """Positions of the grid."""
        return prod(self.shape)

    @property
    def allowed_ids(self) -> tuple[int, ...]:
        """The ids that may stand at its positions."""
        return tuple(self.ids) if self.allowed is None else self.allowed

    @property
    def elements(self) -> int:
        """The most elements that it takes, with what stands before, within and behind it."""
        rows = 0 if self.row_end_id is None else self.positions // self.shape[-1]
        return len(self.begin_ids) + self.positions + rows + len(self.end_ids)

    def structure(self) -> tuple[int, ...]:
        """Give the ids that stand before, within and behind it, and for those that are not known yet."""
        single = (self.row_end_id, self.mask_id)
        return (*self.begin_ids, *self.end_ids, *(id for id in single if id is not None))


@dataclass(frozen=True, kw_only=True)
class SegmentLayout:
    """The segments of a sequence; a generator asks for a network by calling `backbone(layout)`.

    Attributes:
        segments: in their order; of several kinds of sequences one after another, see `Segment.first`.
        interleaved: false: the sequence has each of them once, in this order. True: the first is text, and the others
            stand anywhere in it, any number of times (Chameleon); the text then begins and ends the sequence, and its
            shape is no limit.
        most_elements: N, of an interleaved sequence; of others the sum of their segments.
        positions: how elements are counted for rotary positions: one after another (`"sequence"`); the positions of a
            segment with bidirectional attention as one (`"island"`: Transfusion); or along each axis of a grid from
            where it begins (`"axial"`), text along all axes alike.

    Raises:
        ValueError: segments that no sequence can be made of.
    """

    segments: tuple[Segment, ...]
    interleaved: bool = False
    most_elements: int | None = None
    positions: PositionCount = "sequence"

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        names = [segment.name for segment in self.segments]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a layout needs segments of different names, got {names}")
        for first, *_ in self.kinds:
            if not first.begin_ids:
                raise ValueError(
                    f"segment {first.name!r} is the first and needs begin_ids: what follows is predicted from something"
                )
        if self.positions not in ("sequence", "island", "axial"):
            raise ValueError(f"positions must be 'sequence', 'island' or 'axial', got {self.positions!r}")
        modalities: dict[str, tuple[object, ...]] = {}
        for segment in self.segments:
            made = tuple(segment.ids), segment.input_dim, segment.codes, segment.scales if segment.codes else ()
            if modalities.setdefault(segment.modality, made) != made:
                raise ValueError(f"segments of the modality {segment.modality!r} have different ids, widths or scales")
        if self.interleaved:
            self._check_interleaved()
        elif self.most_elements is not None:
            raise ValueError("most_elements is of an interleaved layout; others have the elements of their segments")

    def _check_interleaved(self) -> None:
        text, *others = self.segments
        if any(segment.first or segment.ends_inside for segment in others):
            raise ValueError("first and ends_inside are of segments in a fixed order, this layout is interleaved")
        if not text.variable:
            raise ValueError(f"segment {text.name!r} is the first of an interleaved layout, and must be variable")
        firsts = [segment.begin_ids[:1] for segment in others]
        choices = {text.end_ids[0], *(first[0] for first in firsts if first)}
        if not all(firsts) or len(choices) != len(others) + 1 or any(segment.variable for segment in others):
            raise ValueError(
                "what stands in the text of an interleaved layout has a fixed length and begins by an id of its own: "
                "give each segment begin_ids whose first differ, and differ from the end of the text"
            )
        if choices & set(text.allowed_ids):
            raise ValueError(
                f"the ids {sorted(choices & set(text.allowed_ids))} begin a segment or end the text, and may also "
                f"stand in it: leave them out of allowed of {text.name!r}"
            )
        least = len(text.begin_ids) + len(text.end_ids)
        if self.most_elements is None or self.most_elements < least:
            raise ValueError(f"an interleaved layout needs most_elements of at least {least}, got {self.most_elements}")

    @property
    def length(self) -> int:
        """N, the most elements of a sequence."""
        if self.most_elements is not None:
            return self.most_elements
        return max(sum(segment.elements for segment in kind) for kind in self.kinds)

    @property
    def kinds(self) -> list[tuple[Segment, ...]]:
        """The kinds of sequences in a fixed order: the segments of each."""
        starts = [number for number, segment in enumerate(self.segments) if segment.first or not number]
        return [self.segments[begin:end] for begin, end in pairwise((*starts, len(self.segments)))]

    @property
    def vocab_size(self) -> int:
        """V, ids of all segments together, and of what stands between them."""
        return 1 + max(max((*segment.ids, *segment.structure()), default=-1) for segment in self.segments)

    @property
    def axes(self) -> int:
        """Coordinates that an element has."""
        return max(len(segment.shape) for segment in self.segments) if self.positions == "axial" else 1

    @property
    def causal(self) -> bool:
        """Whether every element sees those before it alone."""
        return all(segment.attention == "causal" for segment in self.segments)

    def number(self, name: str) -> int:
        """Find a segment by its name.

        Raises:
            ValueError: no segment of this name.
        """
        names = [segment.name for segment in self.segments]
        if name not in names:
            raise ValueError(f"no segment is named {name!r}, there are {', '.join(names)}")
        return names.index(name)

    def __getitem__(self, name: str) -> Segment:
        """Give a segment by its name."""
        return self.segments[self.number(name)]
