"""A function of each row of wide logits, a few rows at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Entries of the logits that are worked on at once, 4 MB of float32, or more where that would be more parts than this: a
# GPU waits for the host otherwise. What is made of them on the way is a few times as large.
_ENTRIES_AT_ONCE = 2**20
_MOST_PARTS = 16


def by_rows(function: Callable[[Tensor, slice], Tensor], logits: Tensor, places: Tensor) -> Tensor:
    """`function` of some rows, 0 for the others.

    Its gradient is worked out beside its value, so that of all that the function makes of the logits nothing is kept
    but their gradient. What else the function reads gets none.

    Args:
        function: of rows `(r, S)` of the logits and where they stand in `places`; gives `(r,)`.
        logits: `(R, S)`.
        places: `(n,)` int64, rows of the logits without repetition.

    Returns:
        `(R,)`.
    """
    return _ByRows.apply(logits, places, function)  # pyright: ignore[reportReturnType]


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        count = len(places)
        size = max(1, _ENTRIES_AT_ONCE // logits.shape[1], -(-count // _MOST_PARTS))
        everywhere, wanted = count == len(logits), ctx.needs_input_grad[0]
        values = logits.new_zeros(len(logits))
        # Rows that do not count have no gradient.
        gradient = (torch.empty_like if everywhere else torch.zeros_like)(logits) if wanted else None
        for start in range(0, count, size):
            standing = slice(start, min(start + size, count))
            part = places[standing]
            rows = logits[standing].detach() if everywhere else logits[part]
            if gradient is None:
                values[part] = function(rows, standing).to(values.dtype)
                continue
            with torch.enable_grad():
                value = function(rows.requires_grad_(), standing)
                gradient[part] = torch.autograd.grad(value.sum(), rows)[0]
            values[part] = value.detach().to(values.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None], None, None
