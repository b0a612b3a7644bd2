"""Batches of sequences of segments: put together from their parts, and packed several to a row.

All that a network needs beside the ids follows from the state of the grammar at each element: where it stands
(`coordinates_of`), and what it sees, which is one interval of its row (`seen_by`): from the first element of its
sample to itself, or to the end of its island.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from discrete_lit.backbones.segment_grammar import SegmentGrammar
from discrete_lit.backbones.segments import Segment


@dataclass(frozen=True, kw_only=True)
class SegmentPart:
    """The content of one segment, of every sample of a batch.

    Attributes:
        segment: its name.
        content: `(B, P)` int64 ids of the layout's vocabulary, or `(B, P, E)` vectors.
        lengths: `(B,)` int64, ids of a variable segment; all P by default.
        present: `(B,)` bool, the samples that have it, of an interleaved layout; all by default.
        times: `(B,)` float in [0, 1], how noisy the vectors of each sample are; clean by default.
    """

    segment: str
    content: Tensor
    lengths: Tensor | None = None
    present: Tensor | None = None
    times: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SegmentSequence:
    """Rows of elements, in each of which one or more samples stand one after another, then padding.

    Attributes:
        ids: `(B, N)` int64; 0 where a vector stands, and in padding.
        states: `(B, N)` int64, the grammar's state that each element stands in; `done` in padding.
        sample: `(B, N)` int64, the sample of the batch that each belongs to; -1 in padding.
        vectors: of each segment of vectors, `(B, N, E)`, 0 where none stands.
        times: `(B, N)` float, how noisy each vector is; None where all are clean.
        packed: whether a row may have several samples.
    """

    ids: Tensor
    states: Tensor
    sample: Tensor
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    times: Tensor | None = None
    packed: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> Tensor:
        """Count the elements of each row, padding not among them: `(B,)` int64."""
        return (self.sample >= 0).sum(dim=1)

    def first(self) -> Tensor:
        """Find the first element of each element's sample: `(B, N)` int64, its number in the row."""
        number = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        if not self.packed:
            return torch.zeros_like(number)
        begins = torch.ones_like(self.ids, dtype=torch.bool)
        begins[:, 1:] = self.sample[:, 1:] != self.sample[:, :-1]
        return number.where(begins, 0).cummax(dim=1).values

    def up_to(self, count: int) -> "SegmentSequence":
        """Give the first elements of each row, `(B, count)`, with the same samples."""
        return SegmentSequence(
            ids=self.ids[:, :count],
            states=self.states[:, :count],
            sample=self.sample[:, :count],
            vectors={name: vectors[:, :count] for name, vectors in self.vectors.items()},
            times=None if self.times is None else self.times[:, :count],
            packed=self.packed,
        )

    def taken(self, rows: Tensor, columns: Tensor, *, valid: Tensor, padding: int) -> "SegmentSequence":
        """Make rows of some of its elements.

        Args:
            rows, columns: `(B', N')` int64, which element comes where.
            valid: `(B', N')` bool, where one comes; elsewhere is padding.
            padding: the state of padding.
        """

        def take(values: Tensor, fill: int) -> Tensor:
            taken = values[rows, columns]
            return taken.where(valid.view(*valid.shape, *(1,) * (taken.ndim - 2)), fill)

        return SegmentSequence(
            ids=take(self.ids, 0),
            states=take(self.states, padding),
            sample=take(self.sample, -1),
            vectors={name: take(vectors, 0) for name, vectors in self.vectors.items()},
            times=None if self.times is None else take(self.times, 0),
            packed=self.packed,
        )


def assemble(
    grammar: SegmentGrammar,
    parts: Sequence[SegmentPart],
    *,
    closed: Tensor | bool = True,
    begun: str | None = None,
) -> SegmentSequence:
    """Put the parts of samples together, with what stands before, within and behind them, one sample a row.

    Args:
        grammar: of the layout.
        parts: in the order of the sequence: of a layout in a fixed order the first segments of one of its kinds, or
            all; of an interleaved one any, each as often as it comes.
        closed: of an interleaved layout, whether the text's end stands behind the last part; one for all, or `(B,)`.
        begun: a segment of an interleaved layout that is begun behind the last part, by its first begin id.

    Returns:
        `(B, N)` elements, padding behind each sample.

    Raises:
        ValueError: parts that the layout has not in this order, or of another shape.
    """
    layout = grammar.layout
    if not layout.interleaved:
        names = [part.segment for part in parts]
        kinds = [[segment.name for segment in kind] for kind in layout.kinds]
        if names not in [kind[: len(parts)] for kind in kinds] or begun is not None:
            raise ValueError(
                f"the sequence has the segments {', or '.join(', '.join(kind) for kind in kinds)} in this order, got "
                f"{', '.join(names)}"
            )
    batch, device = len(parts[0].content), parts[0].content.device
    columns = Columns(grammar, batch, device=device)
    if layout.interleaved:
        columns.fixed(range(len(layout.segments[0].begin_ids)), layout.segments[0].begin_ids)
    for part in parts:
        segment = layout[part.segment]
        _check_part(part, segment, batch)
        if layout.interleaved and segment is layout.segments[0]:
            columns.text(part, columns.loop, each=0)
        elif segment.variable:
            states = grammar.states_of(segment.name).tolist()
            before, after = len(segment.begin_ids), segment.end_ids[1:]
            columns.fixed(states[:before], segment.begin_ids)
            columns.text(part, states[before], each=1)
            assert part.lengths is not None
            columns.add(states[before] + part.lengths, segment.end_ids[0])
            columns.fixed(states[len(states) - len(after) :], after)
        else:
            columns.grid(part, segment)
    if layout.interleaved:
        if begun is not None:
            columns.add(columns.loop, layout[begun].begin_ids[0])
        elif closed is not False:
            present = None if closed is True else closed
            text = layout.segments[0]
            columns.add(columns.loop, text.end_ids[0], present=present)
            last = len(text.end_ids) - 1
            columns.fixed(range(grammar.done - last, grammar.done), text.end_ids[1:], present=present)
    return columns.joined()


def _check_part(part: SegmentPart, segment: Segment, batch: int) -> None:
    content, vectors = part.content, segment.input_dim is not None
    expected = (batch, segment.positions, *((segment.input_dim,) if vectors else ()))
    fits = content.is_floating_point() == vectors and content.ndim == len(expected) and len(content) == batch
    if segment.variable:
        fits = fits and content.shape[1] <= segment.positions
        if part.lengths is None or part.lengths.shape != (batch,):
            raise ValueError(f"segment {segment.name!r} is variable: its part needs lengths ({batch},)")
    else:
        fits = fits and tuple(content.shape) == expected
    if not fits:
        kind = f"vectors {expected}" if vectors else f"ids {expected}"
        raise ValueError(
            f"segment {segment.name!r} holds {kind}{' or fewer' if segment.variable else ''}, got {content.dtype} "
            f"{tuple(content.shape)}"
        )


class Columns:
    """Collects the elements of a batch, column by column; some samples have none in some of them.

    Args:
        grammar: of the layout.
        batch: B.
        device: of the ids.
    """

    def __init__(self, grammar: SegmentGrammar, batch: int, *, device: torch.device) -> None:
        self.grammar, self.batch, self.device = grammar, batch, device
        self.ids: list[Tensor] = []
        self.states: list[Tensor] = []
        self.valid: list[Tensor | None] = []
        self.vectors: list[dict[str, Tensor]] = []
        self.times: list[Tensor | None] = []
        self.loop = len(grammar.layout.segments[0].begin_ids)
        """The state of an interleaved layout's text."""

    def append(
        self,
        ids: Tensor,
        states: Tensor,
        *,
        valid: Tensor | None = None,
        vectors: dict[str, Tensor] | None = None,
        times: Tensor | None = None,
    ) -> None:
        """Append columns.

        Args:
            ids, states: `(B or 1, n)` int64.
            valid: `(B or 1, n)` bool, which samples have them; all by default.
            vectors: `(B, n, E)` of a segment, by its name.
            times: `(B or 1, n)` float, how noisy they are.
        """
        # Sampling appends every id that it draws: nothing is computed here that can wait.
        shape = (self.batch, states.shape[1])
        self.ids.append(ids if ids.shape == shape else ids.expand(shape))
        self.states.append(states if states.shape == shape else states.expand(shape))
        self.valid.append(valid if valid is None or valid.shape == shape else valid.expand(shape))
        self.vectors.append(vectors or {})
        self.times.append(times)

    def fixed(self, states: Sequence[int], ids: Sequence[int], *, present: Tensor | None = None) -> None:
        """Append ids that are the same for all."""
        if len(ids):
            row = torch.tensor([list(ids), list(states)], device=self.device)
            self.append(row[:1], row[1:], valid=None if present is None else present[:, None])

    def add(self, states: Tensor | int, id: int, *, present: Tensor | None = None) -> None:
        """Append one column of an id, in a state that may be another for each sample."""
        column = torch.as_tensor(states, device=self.device).expand(self.batch)[:, None]
        self.append(torch.full_like(column, id), column, valid=None if present is None else present[:, None])

    def text(self, part: SegmentPart, state: int, *, each: int) -> None:
        """Append a variable segment, whose states lie `each` apart."""
        number = torch.arange(part.content.shape[1], device=self.device)
        assert part.lengths is not None
        valid = number < part.lengths[:, None]
        if part.present is not None:
            valid = valid & part.present[:, None]
        self.append(part.content.where(valid, 0), (state + each * number)[None], valid=valid)

    def grid(self, part: SegmentPart, segment: Segment) -> None:
        """Append a segment of fixed size, with what stands around it."""
        grammar, present = self.grammar, None if part.present is None else part.present[:, None]
        states = grammar.states_of(segment.name)
        if grammar.layout.interleaved:
            states = torch.cat((states.new_tensor([self.loop]), states))
        places = grammar.place_of[states]
        structure = [*segment.begin_ids, *segment.end_ids]
        inside = places >= 0
        if grammar.layout.interleaved:
            inside[0] = False
        ids = states.new_zeros(len(states))
        around = (~inside).nonzero()[:, 0]
        if segment.row_end_id is not None:
            ids[around] = segment.row_end_id
        before, after = len(segment.begin_ids), len(segment.end_ids)
        ids[:before] = ids.new_tensor(structure[:before])
        ids[len(ids) - after :] = ids.new_tensor(structure[before:])
        vectors, times = {}, None
        if segment.input_dim is None:
            ids = torch.where(inside, part.content[:, places.clamp(min=0)], ids)
        else:
            content = part.content[:, places.clamp(min=0)]
            vectors[segment.name] = content.where(inside[:, None], 0)
            if part.times is not None:
                times = part.times[:, None].where(inside, 0)
            ids = ids[None]
        self.append(ids, states[None], valid=present, vectors=vectors, times=times)

    def joined(self) -> SegmentSequence:
        """Give the elements that each sample has, in their order, padding behind them."""
        pairs = zip(self.valid, self.states, strict=True)
        valid = torch.cat([torch.ones_like(each, dtype=torch.bool) if v is None else v for v, each in pairs], dim=1)
        rows = torch.arange(self.batch, device=self.device)[:, None]
        names = sorted({name for vectors in self.vectors for name in vectors})
        dense = {name: torch.cat([self._of(name, number) for number in range(len(self.ids))], dim=1) for name in names}
        times = None
        if any(time is not None for time in self.times):
            times = torch.cat(
                [
                    self.ids[number].new_zeros(self.ids[number].shape, dtype=torch.float32)
                    if time is None
                    else time.float().expand(self.ids[number].shape)
                    for number, time in enumerate(self.times)
                ],
                dim=1,
            )
        sequence = SegmentSequence(
            ids=torch.cat(self.ids, dim=1),
            states=torch.cat(self.states, dim=1),
            sample=rows.expand(valid.shape),
            vectors=dense,
            times=times,
        )
        # The elements that there are first, in their order; no sequence has more than the layout's.
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.grammar.layout.length]
        return sequence.taken(rows, order, valid=valid.gather(1, order), padding=self.grammar.done)

    def _of(self, name: str, number: int) -> Tensor:
        if name in self.vectors[number]:
            return self.vectors[number][name]
        found = next(vectors[name] for vectors in self.vectors if name in vectors)
        return found.new_zeros(*self.ids[number].shape, found.shape[2])


def pack(sequence: SegmentSequence, length: int, *, padding: int) -> SegmentSequence:
    """Pack the samples of a batch into rows of a length, several to a row where they fit (first fit, longest first).

    Args:
        sequence: one sample a row.
        length: elements of a row.
        padding: the state of padding, the grammar's `done`.

    Returns:
        Rows `(B', length)`, B' <= B. The host waits for the lengths of the samples.

    Raises:
        ValueError: a sample that is longer than a row.
    """
    assert not sequence.packed
    lengths = sequence.lengths().tolist()
    if max(lengths) > length:
        raise ValueError(f"a sample has {max(lengths)} elements, rows of {length} cannot hold it")
    held: list[list[int]] = []
    free: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        row = next((number for number, space in enumerate(free) if space >= lengths[sample]), len(free))
        if row == len(free):
            held.append([])
            free.append(length)
        held[row].append(sample)
        free[row] -= lengths[sample]
    device = sequence.ids.device
    rows, columns = torch.zeros(2, len(held), length, dtype=torch.int64)
    valid = torch.zeros(len(held), length, dtype=torch.bool)
    for number, samples in enumerate(held):
        begin = 0
        for sample in samples:
            here = slice(begin, begin + lengths[sample])
            rows[number, here] = sample
            columns[number, here] = torch.arange(lengths[sample])
            valid[number, here] = True
            begin += lengths[sample]
    packed = replace(sequence, packed=True)
    return packed.taken(rows.to(device), columns.to(device), valid=valid.to(device), padding=padding)


def coordinates_of(
    grammar: SegmentGrammar, states: Tensor, *, first: Tensor | None = None, origin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find where elements stand, in the units of the layout's `positions`.

    Args:
        grammar: of the layout.
        states: `(B, n)` of elements that follow one another.
        first: `(B, n)` int64, the column of the first element of the sample of each, where a row has several.
        origin: `(B,)` int64, where the first element begins; by default it is the first of its sample, at 0.

    Returns:
        Coordinates `(B, n, axes)` int64, and where an element behind each would begin, `(B, n)`.
    """
    extents = grammar.extent_of[states]
    then = extents.cumsum(dim=1)
    begin = then - extents
    if first is not None:
        before = begin.gather(1, first)
        begin, then = begin - before, then - before
    if origin is not None:
        begin, then = begin + origin[:, None], then + origin[:, None]
    return begin[..., None] + grammar.coordinates[states], then


def seen_by(first: Tensor, last: Tensor, *, elements: int) -> Tensor:
    """Make the mask of attention: `(B, 1, n, elements)` bool, which elements of its row each element sees.

    Args:
        first, last: `(B, n)` int64, the first and the last that each sees, numbered from the beginning of its row.
        elements: of a row, those of a cache among them.
    """
    number = torch.arange(elements, device=first.device)
    return ((number >= first[..., None]) & (number <= last[..., None]))[:, None]
