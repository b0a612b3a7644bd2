"""Conditions: what a sequence is given: a class, and beside it, where a network reads them, a grid of ids and vectors.

A plain tensor of labels is a condition too: `as_condition` makes one of it, and `plain` gives it back. All parts are
dropped together for guidance, each by what stands for nothing in it: the null label, the null id at every place, and
vectors of which none is valid, in whose place a network attends to a learned vector of its own (`ContextAttention`).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A class label of each sequence, ids that are aligned with its places, and vectors to attend to.

    Attributes:
        labels: `(B,)` int64 in [0, num_classes], the null label included.
        grid: `(B, N)` int64 in [0, K], K for none; None for a network that is given no grid.
        context: `(B, M, E)` vectors, such as the features of a text; None for a network that is given none.
        context_mask: `(B, M)` bool, which of them are valid; all where it is None. What the others hold does not
            matter, and a sequence without a valid one is given none.
        text_mask: `(B, M)` bool, which of them were valid before the condition was dropped; None where it was not. What
            stands in front of a sequence reads it (`ContextPrefix`).
        negative: `(B, M, E)` vectors in place of the context, such as the features of a negative prompt: the condition
            with these then stands for the null one, and guidance leads away from it.
        negative_mask: `(B, M)` bool, which of those are valid; a sequence without one has the null condition itself.

    Raises:
        ValueError: parts of different numbers of sequences, or a mask of other vectors than there are.
    """

    labels: Tensor
    grid: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    text_mask: Tensor | None = None
    negative: Tensor | None = None
    negative_mask: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("grid", "context"):
            part = getattr(self, name)
            if part is not None and len(part) != len(self.labels):
                raise ValueError(f"a condition has {len(self.labels)} labels, its {name} is of {len(part)} sequences")
        if (self.negative is None) != (self.negative_mask is None):
            raise ValueError("negative and negative_mask belong together: give both or neither")
        if self.negative is not None and (
            self.context is None
            or self.negative.shape != self.context.shape
            or self.negative_mask is None
            or self.negative_mask.shape != self.context.shape[:2]
        ):
            raise ValueError(
                f"negative stands in place of a context of its shape, got {_described(self.negative)} for "
                f"{_described(self.context)}"
            )
        mask = self.context_mask
        if mask is None:
            return
        if self.context is None:
            raise ValueError("context_mask says which vectors of a context are valid: give the context too")
        if mask.shape != self.context.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"context_mask must be bool of shape {tuple(self.context.shape[:2])}, as the context's vectors, got "
                f"{mask.dtype} {tuple(mask.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Condition":
        """Give the condition of some of the sequences."""
        given = {name: part[rows] for name, part in self.parts().items() if part is not None}
        return Condition(**given)

    def valid(self) -> Tensor:
        """Say which vectors of the context are valid: `(B, M)` bool."""
        assert self.context is not None
        if self.context_mask is not None:
            return self.context_mask
        return torch.ones(self.context.shape[:2], dtype=torch.bool, device=self.context.device)

    def dropped(self, where: Tensor, *, null_label: int, null_id: int | None) -> "Condition":
        """Give the condition in which some sequences `where (B,)` have the null label, no grid and no vectors."""
        grid, mask, texts = self.grid, None, None
        if grid is not None:
            assert null_id is not None
            grid = grid.masked_fill(where[:, None], null_id)
        if self.context is not None:
            texts = self.valid() if self.text_mask is None else self.text_mask
            mask = self.valid() & ~where[:, None]
        labels = self.labels.masked_fill(where, null_label)
        return Condition(labels=labels, grid=grid, context=self.context, context_mask=mask, text_mask=texts)

    def null(self, *, null_label: int, null_id: int | None) -> "Condition":
        """Give the condition of the same shape that says nothing, or what is `negative`."""
        everywhere = torch.ones_like(self.labels, dtype=torch.bool)
        nothing = self.dropped(everywhere, null_label=null_label, null_id=null_id)
        if self.negative is None or self.negative_mask is None:
            return nothing
        says = self.negative_mask.any(dim=1)
        labels, grid = torch.where(says, self.labels, nothing.labels), nothing.grid
        if self.grid is not None and grid is not None:
            grid = torch.where(says[:, None], self.grid, grid)
        return Condition(labels=labels, grid=grid, context=self.negative, context_mask=self.negative_mask)

    def with_null(self, *, null_label: int, null_id: int | None) -> "Condition":
        """Give a condition of twice as many sequences, the null one behind: for guidance."""
        null = self.null(null_label=null_label, null_id=null_id)
        both = {}
        for name, beside in null.parts().items():
            if beside is not None:
                part = getattr(self, name)
                both[name] = torch.cat((self.valid() if part is None else part, beside))
        return Condition(**both)

    def parts(self) -> dict[str, Tensor | None]:
        """Give each part by its name; what is negative, or of a condition that was dropped, only where it is there."""
        every = {part.name: getattr(self, part.name) for part in fields(self)}
        rare = ("text_mask", "negative", "negative_mask")
        return {name: part for name, part in every.items() if part is not None or name not in rare}


def as_condition(given: "Condition | Tensor") -> Condition:
    """Make a condition of labels `(B,)`, or give back what is one."""
    return given if isinstance(given, Condition) else Condition(labels=given)


def plain(condition: Condition) -> "Condition | Tensor":
    """Give the labels of a condition that has nothing else, or it itself."""
    return condition.labels if condition.grid is None and condition.context is None else condition


def check_parts(condition: Condition, *, places: int, grid_vocab: int | None, context_dim: int | None) -> None:
    """Refuse a condition that has other parts than a network reads.

    Args:
        condition: labels, with or without more.
        places: N, that a grid is aligned with.
        grid_vocab: ids in the grid that the network reads; None for a network that reads none.
        context_dim: E, the width of the vectors that it attends to; None for a network that attends to none.

    Raises:
        ValueError: a part that is missing, that the network does not read, or of another shape or type.
    """
    grid, context = condition.grid, condition.context
    if grid_vocab is None and grid is not None:
        raise ValueError("this network reads no grid of ids beside the label: it was made without grid_vocab")
    if grid_vocab is not None and (grid is None or grid.shape[1:] != (places,) or not _whole(grid)):
        raise ValueError(
            f"this network reads a grid of {places} ids in [0, {grid_vocab}] for each image, got {_described(grid)}"
        )
    if context_dim is None and context is not None:
        raise ValueError("this network attends to no vectors beside the label: it was made without context_dim")
    if context_dim is not None and (
        context is None or context.ndim != 3 or context.shape[2] != context_dim or not context.is_floating_point()
    ):
        raise ValueError(
            f"this network attends to vectors (B, M, {context_dim}), the context of a condition, got "
            f"{_described(context)}"
        )


def _whole(ids: Tensor) -> bool:
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def _described(part: Tensor | None) -> str:
    return "none" if part is None else f"{part.dtype} {tuple(part.shape)}"
