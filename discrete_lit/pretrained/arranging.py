"""Published tensors that are cut, joined or put in another order before they are named."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.renaming import match


@dataclass(frozen=True)
class Arrangement:
    """Some published tensors become others, as often as their names occur; `{rest}` and numbers as in `Renaming`.

    What it takes is used up: each published tensor still has one use.

    Attributes:
        takes: templates of the published names; the first one decides how often.
        gives: templates of the names of what is made of them; none where they are only looked at.
        make: from the tensors that are taken to those that are given, in order; a `ValueError` refuses them.
    """

    takes: Sequence[str]
    gives: Sequence[str]
    make: Callable[..., Sequence[Tensor]]


def arrange(state: State, arrangements: Iterable[Arrangement]) -> State:
    """The published tensors after all arrangements in turn.

    Raises:
        ValueError: a tensor that an arrangement takes is missing, or one that it refuses.
    """
    arranged = State(state, state.source)
    for arrangement in arrangements:
        for name in list(arranged):
            fields = match(arrangement.takes[0], name)
            if fields is None:
                continue
            taken = [template.format(**fields) for template in arrangement.takes]
            try:
                made = arrangement.make(*(arranged[key] for key in taken))
            except (RuntimeError, IndexError) as error:
                raise ValueError(f"the weights of {state.source!r} do not fit: {' + '.join(taken)}: {error}") from error
            for key in taken:
                del arranged[key]
            names = [template.format(**fields) for template in arrangement.gives]
            arranged.update(zip(names, made, strict=True))
    return arranged


def cut_rows(name: str, parts: dict[str, tuple[int, int]]) -> Arrangement:
    """Rows `[first, last)` of a tensor under names of their own; the others have no use."""
    return Arrangement([name], list(parts), lambda table: [table[first:last] for first, last in parts.values()])


def reorder_chunks(name: str, order: Sequence[int]) -> Arrangement:
    """Equal parts along the first axis in another order: part `order[i]` becomes part i."""

    def make(value: Tensor) -> list[Tensor]:
        chunks = value.chunk(len(order))
        return [torch.cat([chunks[place] for place in order])]

    return Arrangement([name], [name], make)


def must_be_zero(name: str) -> Arrangement:
    """A tensor that the published code never changes from zero."""

    def check(value: Tensor) -> list[Any]:
        if value.any():
            raise ValueError(f"{name} holds other numbers than 0, which our module has no place for")
        return []

    return Arrangement([name], [], check)
