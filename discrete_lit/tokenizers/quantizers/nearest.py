"""Exact search for a row's best code in a memory that does not grow with rows times codes."""

import torch
from torch import Tensor

# Similarities are formed for this many (row, code) pairs at once: 64 MB of float32.
_PAIRS_AT_ONCE = 2**24


def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """Index of the code nearest in Euclidean distance to each row.

    Args:
        rows: `(n, D)` float32. A row that is not finite gets some id in [0, K).
        codes: `(K, D)` float32.

    Returns:
        `(n,)` int64.
    """
    # argmin |z - e|^2 = argmax z.e - |e|^2 / 2
    return largest_product(rows, codes, codes.detach().square().sum(dim=1) / -2)


@torch.no_grad()
def largest_product(rows: Tensor, codes: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Index of the largest `z.e + offset` of each row z over codes e; arguments as for `nearest_codes`.

    Args:
        rows: `(n, D)`.
        codes: `(K, D)`.
        offsets: `(K,)`; zeros if None.
    """
    offsets = codes.new_zeros(len(codes)) if offsets is None else offsets
    chunks = rows.split(max(1, _PAIRS_AT_ONCE // len(codes)))
    return torch.cat([torch.addmm(offsets, chunk, codes.T).argmax(dim=1) for chunk in chunks])
