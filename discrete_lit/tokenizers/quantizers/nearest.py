"""Exact search for a row's best code, in a memory that does not grow with rows times codes.

Taking the maximum of products costs several times the products themselves, where an index is carried along. Here tiles
of products are formed that stay in the cache, and of each block of codes the maximum alone is taken. The products with
the codes of the best block are formed once more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class _Tiling(NamedTuple):
    codes: int
    """Of a tile."""
    rows: int
    """Of a tile."""
    width: int
    """Codes of a block."""


# For narrow codes the maximum costs most: 1.5 MB of float32, which a core's cache holds, in few blocks. For wide ones
# the products do, which want larger matrices, and second products that are few. On other devices a tile has 64 MB.
_NARROW = _Tiling(1024, 384, 64)
_WIDE = _Tiling(2048, 1024, 16)
_DEVICE = _Tiling(16384, 1024, 32)
_WIDE_FROM = 64


def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """Index of the code nearest in Euclidean distance to each row; the first one of equal codes.

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
    """Index of the largest `z.e + offset` of each row z over codes e, in float32 whatever the matmul precision.

    Args:
        rows: `(n, D)`; as for `nearest_codes`.
        codes: `(K, D)`.
        offsets: `(K,)`; zeros if None.

    Returns:
        `(n,)` int64.
    """
    count = len(codes)
    if len(rows) == 0:
        return rows.new_empty(0, dtype=torch.int64)
    if offsets is not None:
        # One more column of the product is cheaper than a sum behind it.
        rows, codes = F.pad(rows, (0, 1), value=1.0), torch.cat((codes, offsets[:, None]), dim=1)
    tiling = _DEVICE if rows.device.type != "cpu" else _WIDE if codes.shape[1] >= _WIDE_FROM else _NARROW
    # The last block is filled up by the last code, which comes behind its first occurrence.
    codes = torch.cat((codes, codes[-1:].expand(-count % tiling.width, -1)))
    tile_rows = min(tiling.rows, len(rows))
    # Memory that every tile uses again: fresh memory costs as much as a product.
    products = rows.new_empty(min(tiling.codes, len(codes)) * tile_rows)
    maxima = rows.new_empty(len(codes) // tiling.width * tile_rows)
    with _full_precision():
        tiles = list(rows.split(tile_rows))
        # The last tile may have fewer rows.
        memory = {len(tile): _Memory(codes, tiling, len(tile), products, maxima) for tile in (tiles[0], tiles[-1])}
        ids = [_search(tile, codes, memory[len(tile)]) for tile in tiles]
    return torch.cat(ids).clamp_(max=count - 1)


class _Memory:
    """Views of the memory for the products of tiles of some `columns`, and of their maxima; and that of the chosen
    blocks of codes."""

    def __init__(self, codes: Tensor, tiling: _Tiling, columns: int, products: Tensor, maxima: Tensor) -> None:
        self.width = tiling.width
        self.chosen = codes.new_empty(columns, tiling.width * codes.shape[1])
        self.maxima = maxima[: len(codes) // self.width * columns].view(-1, columns)
        self.steps = []
        """Codes, their products, the same in blocks, and the maxima of these."""
        of_parts = self.maxima.split(tiling.codes // self.width)
        for part, best in zip(codes.split(tiling.codes), of_parts, strict=True):
            tile = products[: len(part) * columns].view(len(part), columns)
            self.steps.append((part, tile, tile.view(len(best), self.width, columns), best))


def _search(rows: Tensor, codes: Tensor, memory: _Memory) -> Tensor:
    """The ids `(r,)` of rows `(r, D)` among codes `(K, D)`."""
    columns = rows.T
    for part, products, blocks, best in memory.steps:
        torch.mm(part, columns, out=products)
        torch.amax(blocks, dim=1, out=best)
    block = memory.maxima.max(dim=0).indices
    # `index_select` gathers several times as fast as indexing does.
    torch.index_select(codes.view(-1, memory.width * codes.shape[1]), 0, block, out=memory.chosen)
    candidates = memory.chosen.view(len(rows), memory.width, -1)
    inside = torch.bmm(candidates, rows[:, :, None])[:, :, 0].max(dim=1).indices
    return block * memory.width + inside


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 in float32, where TF32 or bfloat16 was allowed in their place."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
