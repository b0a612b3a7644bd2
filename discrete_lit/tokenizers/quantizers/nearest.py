"""Exact nearest-code search in a memory that does not grow with rows times codes."""

import torch
from torch import Tensor

# Similarities are formed for this many (row, code) pairs at once: 64 MB of float32.
_PAIRS_AT_ONCE = 2**24


@torch.no_grad()
def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """Index of the code nearest in Euclidean distance to each row.

    Args:
        rows: `(n, D)` float32. A row that is not finite gets some id in [0, K).
        codes: `(K, D)` float32.

    Returns:
        `(n,)` int64.
    """
    offsets = codes.square().sum(dim=1)
    ids = [
        # |z - e|^2 without the term |z|^2, which is the same for every code.
        torch.addmm(offsets, part, codes.T, alpha=-2).argmin(dim=1)
        for part in rows.split(max(1, _PAIRS_AT_ONCE // len(codes)))
    ]
    return torch.cat(ids)
