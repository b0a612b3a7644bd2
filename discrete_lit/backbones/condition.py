"""Conditions: what a sequence is given, a class, and beside it, where a network reads one, a grid of ids.

A plain tensor of labels is a condition too: `as_condition` makes one of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A class label of each sequence, and ids that are aligned with its places.

    Attributes:
        labels: `(B,)` int64 in [0, num_classes], the null label included.
        grid: `(B, N)` int64 in [0, K], K for none; None for a network that is given no grid.
    """

    labels: Tensor
    grid: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def dropped(self, where: Tensor, *, null_label: int, null_id: int | None) -> "Condition":
        """Give the condition in which some sequences `where (B,)` have the null label, and no grid."""
        grid = self.grid
        if grid is not None:
            assert null_id is not None
            grid = grid.masked_fill(where[:, None], null_id)
        return Condition(labels=self.labels.masked_fill(where, null_label), grid=grid)

    def null(self, *, null_label: int, null_id: int | None) -> "Condition":
        """Give the condition of the same shape that says nothing."""
        return self.dropped(torch.ones_like(self.labels, dtype=torch.bool), null_label=null_label, null_id=null_id)

    def with_null(self, *, null_label: int, null_id: int | None) -> "Condition":
        """Give a condition of twice as many sequences, the null one behind: for guidance."""
        null = self.null(null_label=null_label, null_id=null_id)
        grid = None if self.grid is None or null.grid is None else torch.cat((self.grid, null.grid))
        return Condition(labels=torch.cat((self.labels, null.labels)), grid=grid)


def as_condition(given: "Condition | Tensor") -> Condition:
    """Make a condition of labels `(B,)`, or give back what is one."""
    return given if isinstance(given, Condition) else Condition(labels=given)
