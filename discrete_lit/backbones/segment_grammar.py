"""The grammar of a sequence of segments, which says what may follow what: a finite automaton, read off a layout.

Its state says which position of which segment comes next. Training restricts the softmax to the ids that may stand
there, likelihoods are of the law that this makes, and sampling draws from it: so no sequence is ever invalid, whatever
the network thinks. One rule has no place in a table: an id may be chosen only if what it begins can still end within
the length of the sequence. By it Chameleon begins no image for which too few elements are left, and every text ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from discrete_lit.backbones.embeddings import grid_coordinates
from discrete_lit.backbones.segments import Segment, SegmentLayout

_NOWHERE = 10**9
_DONE = -2
"""Stands for the state `done` until all states are known."""
_identity = id


@dataclass(kw_only=True)
class _State:
    """A state while the automaton is built; what comes next is known when all states are."""

    segment: int
    ids: tuple[int, ...]
    place: int = -1
    coordinates: tuple[int, ...] = ()
    extent: int = 1
    ahead: int = 0
    island: int = 0
    next: dict[int, int] = field(default_factory=dict)
    """State behind each chosen id; -1 stands for every other id."""


class SegmentGrammar(nn.Module):
    """The states of a layout's sequences, as tables on the device of the network that holds it.

    State `start` comes before everything, and its id is given, never predicted; each further kind of sequence of a
    layout in a fixed order begins in a state of its own. State `done` is the end: nothing may follow. It also stands
    for padding.

    Args:
        layout: the sequence.

    Attributes:
        sets: the different sets of ids that may stand somewhere: a segment's number and the ids, in rising order.
        starts: the states that further kinds of sequences begin in, by the first id of each.
        choices: ids that decide what comes next: ends of variable segments, beginnings of interleaved ones.
        following: the state behind each state, by its number; None where what stands in it decides.
        islands: by the number of a state, how many elements are drawn together from it on, because they see each other:
            vectors, and ids from masks; 0 elsewhere.
        set_numbers, segment_numbers: of each state, as the tables below, for the host.
    """

    set_of: Tensor
    """`(S,)` the number of the set of ids that may stand in each state; -1 for vectors and for `done`."""
    segment_of: Tensor
    """`(S,)` the number of the segment that the state belongs to; -1 for `done`."""
    place_of: Tensor
    """`(S,)` the position in the grid of its segment, in raster order; -1 for what stands around it."""
    is_vector: Tensor
    """`(S,)` bool: whether a vector stands here."""
    ahead_of: Tensor
    """`(S,)` the number of elements behind that an element of this state sees."""
    coordinates: Tensor
    """`(S, axes)` the distance from where its grid, or itself, begins."""
    extent_of: Tensor
    """`(S,)` how far the elements behind it are moved by it."""
    next_of: Tensor
    """`(S, E)` the state behind each event; event 0 is an id without one."""
    event_of: Tensor
    """`(V,)` the event of each id."""
    shortest: Tensor
    """`(S,)` the least number of elements from here to the end, the one of this state included."""
    allowed_in: Tensor
    """`(A, V)` bool: the ids of each set, and none in the last row."""

    def __init__(self, layout: SegmentLayout) -> None:
        super().__init__()
        self.layout = layout
        self.choices = tuple(self._choices())
        self.starts: dict[int, int] = {}
        states = self._interleaved() if layout.interleaved else self._in_order()
        self.start, self.done = 0, len(states)
        self.sets: list[tuple[int, tuple[int, ...]]] = []
        self._make_tables(states)
        rows: list[list[int]] = self.next_of.tolist()
        self.following = [row[0] if len(set(row)) == 1 else None for row in rows]
        self._spans: dict[int, Tensor] = {}
        self.islands = [state.island for state in states] + [0]
        self.set_numbers: list[int] = self.set_of.tolist()
        self.segment_numbers: list[int] = self.segment_of.tolist()

    # The automaton.

    def _choices(self) -> Sequence[int]:
        layout = self.layout
        ends = {segment.end_ids[0] for segment in layout.segments if segment.variable}
        begins = {segment.begin_ids[0] for segment in layout.segments[1:]} if layout.interleaved else set()
        return sorted(ends | begins)

    def _in_order(self) -> list[_State]:
        states: list[_State] = []
        for number, segment in enumerate(self.layout.segments):
            begin = len(states)
            if segment.first:
                # What stood before is over where this begins.
                for state in states:
                    state.next = {id: _DONE if then == begin else then for id, then in state.next.items()}
                self.starts.setdefault(segment.begin_ids[0], begin)
            self._append(states, number, segment.begin_ids)
            if not segment.variable:
                self._append_grid(states, number)
                self._append(states, number, segment.end_ids)
                if segment.ends_inside:
                    self._join(states[begin:], segment)
                continue
            end = len(states) + segment.positions + 1  # behind the first id of the end
            inside = (*segment.allowed_ids, segment.end_ids[0])  # one tuple for all: vocabularies are large
            for place in range(segment.positions + 1):
                last = place == segment.positions
                state = _State(segment=number, ids=inside[-1:] if last else inside, place=-1 if last else place)
                state.next = {-1: len(states) + 1, segment.end_ids[0]: end}
                states.append(state)
            self._append(states, number, segment.end_ids[1:])
        return states

    def _interleaved(self) -> list[_State]:
        text, *others = self.layout.segments
        states: list[_State] = []
        self._append(states, 0, text.begin_ids)
        loop = _State(segment=0, ids=text.allowed_ids, place=0)
        here = len(states)
        loop.next = {-1: here}
        states.append(loop)
        for number, segment in enumerate(others, 1):
            loop.ids += segment.begin_ids[:1]
            loop.next[segment.begin_ids[0]] = len(states)
            self._append(states, number, segment.begin_ids[1:])
            self._append_grid(states, number)
            self._append(states, number, segment.end_ids)
            states[-1].next = {-1: here}
        loop.ids += text.end_ids[:1]
        loop.next[text.end_ids[0]] = len(states)
        self._append(states, 0, text.end_ids[1:])
        return states

    @staticmethod
    def _join(island: Sequence[_State], segment: Segment) -> None:
        """Let what stands around the positions of a segment belong to its island."""
        for number, state in enumerate(island):
            state.ahead, state.island = len(island) - 1 - number, 0
        if segment.mask_id is not None:
            island[0].island = len(island)

    def _append(self, states: list[_State], segment: int, ids: Sequence[int]) -> None:
        """Append states in which one id alone may stand."""
        for id in ids:
            states.append(_State(segment=segment, ids=(id,), next={-1: len(states) + 1}))

    def _append_grid(self, states: list[_State], number: int) -> None:
        """Append the states of a grid of fixed size, with the ends of its rows."""
        segment = self.layout.segments[number]
        first, axial = len(states), self.layout.positions == "axial"
        together = segment.mask_id is not None or not segment.ids
        island = self.layout.positions == "island" and segment.attention == "bidirectional"
        ids = segment.allowed_ids if segment.ids else ()
        for place, at in enumerate(grid_coordinates(segment.shape).tolist()):
            made = [_State(segment=number, ids=ids, place=place)]
            if segment.row_end_id is not None and at[-1] == segment.shape[-1] - 1:
                made.append(_State(segment=number, ids=(segment.row_end_id,)))
            for column, state in enumerate(made):
                state.next = {-1: len(states) + 1}
                if axial:
                    state.coordinates, state.extent = (*at[:-1], at[-1] + column), 0
                elif island:
                    state.extent = 0
                states.append(state)
            made[0].ahead = _ahead(segment, place)
        if axial:
            states[-1].extent = max((*segment.shape[:-1], segment.shape[-1] + (segment.row_end_id is not None)))
        elif island:
            states[-1].extent = 1
        assert len(states) > first
        states[first].island = segment.positions if together else 0

    def _make_tables(self, states: list[_State]) -> None:
        layout, done = self.layout, self.done
        for state in states:
            state.next = {id: done if then == _DONE else then for id, then in state.next.items()}
        event = {id: number for number, id in enumerate(self.choices, 1)}
        sets: dict[tuple[int, tuple[int, ...]], int] = {}
        set_of, next_of, coordinates = [], [], []
        seen: dict[tuple[int, int], int] = {}  # by the tuple of ids itself: many states share a long one
        for state in states:
            shared = state.segment, _identity(state.ids)
            if shared not in seen:
                key = state.segment, tuple(sorted(state.ids))
                seen[shared] = sets.setdefault(key, len(sets)) if state.ids else -1
            set_of.append(seen[shared])
            row = [state.next[-1]] * (1 + len(event))
            for id, then in state.next.items():
                if id in event:
                    row[event[id]] = then
            next_of.append(row)
            # An axis that a segment does not have is one that it does not move along.
            coordinates.append((0,) * (layout.axes - len(state.coordinates)) + state.coordinates)
        next_of.append([done] * (1 + len(event)))
        self.sets = list(sets)
        allowed = torch.zeros(len(sets) + 1, layout.vocab_size, dtype=torch.bool)
        for (_, ids), number in sets.items():
            allowed[number, list(ids)] = True
        event_of = torch.zeros(layout.vocab_size, dtype=torch.int64)
        for id, number in event.items():
            event_of[id] = number
        tables = {
            "set_of": torch.tensor([*set_of, -1]),
            "segment_of": torch.tensor([*(state.segment for state in states), -1]),
            "place_of": torch.tensor([*(state.place for state in states), -1]),
            "is_vector": torch.tensor([*(not state.ids for state in states), False]),
            "ahead_of": torch.tensor([*(state.ahead for state in states), 0]),
            "coordinates": torch.tensor([*coordinates, (0,) * layout.axes]),
            "extent_of": torch.tensor([*(state.extent for state in states), 0]),
            "next_of": torch.tensor(next_of),
            "event_of": event_of,
            "shortest": torch.tensor(_shortest(states, event)),
            "allowed_in": allowed,
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        if int(self.shortest[0]) > layout.length:
            raise ValueError(f"most_elements={layout.length} is too short for any sequence: {int(self.shortest[0])}")

    # Its use.

    def states_of(self, segment: str) -> Tensor:
        """List the states of a segment in their order: `(n,)` int64."""
        return (self.segment_of == self.layout.number(segment)).nonzero()[:, 0]

    def ids_of(self, number: int) -> Tensor:
        """Give the ids of a set in rising order: `(K,)` int64."""
        return torch.arange(self.layout.vocab_size, device=self.event_of.device)[self.span_of(number)]

    def span_of(self, number: int) -> slice | Tensor:
        """Give the ids of a set as an index of rows: a slice where they are a range, else the ids `(K,)`."""
        ids = self.sets[number][1]
        if ids[-1] - ids[0] + 1 == len(ids):
            return slice(ids[0], ids[-1] + 1)
        if number not in self._spans or self._spans[number].device != self.event_of.device:
            self._spans[number] = torch.tensor(ids, device=self.event_of.device)
        return self._spans[number]

    def is_masked(self, number: int) -> bool:
        """Say whether the ids of a set are predicted where they stand, from masks."""
        segment, ids = self.sets[number]
        of = self.layout.segments[segment]
        return of.mask_id is not None and ids == tuple(sorted(of.allowed_ids))

    def masked_set(self, segment: str) -> int:
        """Find the set of a segment's ids that are predicted from masks."""
        mine = self.layout.number(segment)
        return next(number for number, (of, _) in enumerate(self.sets) if of == mine and self.is_masked(number))

    def has_choice(self, number: int) -> bool:
        """Say whether an id of a set decides what comes next."""
        return bool(set(self.sets[number][1]) & set(self.choices))

    def forbidden_events(self, segments: Sequence[str] | None) -> Tensor:
        """Say which events lead out of some segments into others: `(E,)` bool; none where all may be drawn."""
        forbidden = torch.zeros(self.next_of.shape[1], dtype=torch.bool, device=self.next_of.device)
        if segments is None or not self.layout.interleaved:
            return forbidden
        for segment in self.layout.segments[1:]:
            if segment.name not in segments:
                forbidden[self.event_of[segment.begin_ids[0]]] = True
        return forbidden

    def allowed(self, states: Tensor, remaining: Tensor, *, forbidden: Tensor | None = None) -> Tensor:
        """Say which ids may stand next.

        Args:
            states: `(...)` int64.
            remaining: `(...)` int64, elements that the sequence has left, the next one included.
            forbidden: `(E,)` bool, events that may not happen.

        Returns:
            `(..., V)` bool; nothing for vectors and at the end.
        """
        ids = self.allowed_in[self.set_of[states]]
        if forbidden is None and not self.layout.interleaved:
            return ids
        return ids & self.possible_events(states, remaining, forbidden=forbidden)[..., self.event_of]

    def possible_events(self, states: Tensor, remaining: Tensor, *, forbidden: Tensor | None = None) -> Tensor:
        """Say which events can happen so that the sequence still ends in time: `(..., E)` bool; as for `allowed`."""
        possible = self.shortest[self.next_of[states]] < remaining[..., None]
        return possible if forbidden is None else possible & ~forbidden

    def advance(self, states: Tensor, ids: Tensor) -> Tensor:
        """Give the states behind ids, or behind vectors, whose ids do not matter: `(...)` int64."""
        events = torch.where(self.is_vector[states] | (states == self.done), 0, self.event_of[ids])
        return self.next_of[states, events]

    def read(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Find the state of each element of sequences.

        Args:
            ids: `(B, N)` int64; what stands at positions of vectors does not matter.
            lengths: `(B,)`, elements of each; what is behind them is padding.

        Returns:
            `(B, N)` int64, the state that each element stands in; `done` for padding.

        Raises:
            ValueError: an id where it may not stand, or a sequence that ends before its end.
        """
        states, state = [], ids.new_full((len(ids),), self.start)
        for id, start in self.starts.items():
            state = state.masked_fill(ids[:, 0] == id, start)
        for number in range(ids.shape[1]):
            inside = number < lengths
            here = torch.where(inside, state, self.done)
            # What stands at a vector's position, and behind the end, is no id.
            read = ids[:, number].where(inside & ~self.is_vector[here], 0)
            may = self.allowed(here, here.new_full(here.shape, self.layout.length - number))
            fault = inside & ~self.is_vector[here] & ~may.gather(1, read[:, None].clamp(0, may.shape[1] - 1))[:, 0]
            fault |= inside & ((read < 0) | (read >= self.layout.vocab_size))
            if bool(fault.any()):
                row = int(fault.nonzero()[0, 0])
                raise ValueError(
                    f"id {int(ids[row, number])} may not stand at element {number} of sequence {row}: "
                    f"{self.described(int(here[row]))}"
                )
            states.append(here)
            state = torch.where(inside, self.advance(here, read), state)
        unfinished = (state != self.done).nonzero()[:, 0]
        if len(unfinished):
            row = int(unfinished[0])
            raise ValueError(
                f"sequence {row} ends after {int(lengths[row])} elements, before its end: "
                f"{self.described(int(state[row]))}"
            )
        return torch.stack(states, dim=1)

    def described(self, state: int) -> str:
        """Say in words what a state waits for."""
        if state == self.done:
            return "the sequence is over"
        segment = self.layout.segments[int(self.segment_of[state])]
        if bool(self.is_vector[state]):
            return f"vector {int(self.place_of[state])} of {segment.name!r} comes next"
        ids = self.sets[int(self.set_of[state])][1]
        shown = ", ".join(map(str, ids[:4])) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
        place = int(self.place_of[state])
        where = f"around {segment.name!r}" if place < 0 else f"at position {place} of {segment.name!r}"
        return f"{where} may stand {shown}"


def _ahead(segment: Segment, place: int) -> int:
    """Count the positions behind its own that an element of a segment sees."""
    if segment.attention == "causal":
        return 0
    end = segment.positions
    if segment.attention == "block_causal":
        end = 0
        for scale in segment.scales:
            end += scale
            if place < end:
                break
    return end - 1 - place


def _shortest(states: Sequence[_State], event: dict[int, int]) -> list[int]:
    """The least number of elements from each state to the end, 0 at the end itself."""
    least = [_NOWHERE] * len(states) + [0]
    changed = True
    while changed:
        changed = False
        for number in range(len(states) - 1, -1, -1):
            state = states[number]
            ordinary = not state.ids or any(id not in event or id not in state.next for id in state.ids)
            then = [other for id, other in state.next.items() if id >= 0]
            best = 1 + min(least[other] for other in (*then, *((state.next[-1],) if ordinary else ())))
            if best < least[number]:
                least[number], changed = best, True
    return least
