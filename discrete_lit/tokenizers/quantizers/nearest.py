"""The exact search for the nearest code of each latent, in a memory that does not grow with latents times codes.

A maximum that carries its index along costs several times the products that it is taken of. So products are formed in
tiles that stay in the cache, and of each block of codes only the maximum is kept, without an index. Which block is the
best is then looked for among few numbers, and the products with the codes of that block are formed once more.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.modules import full_precision


class _Tiling(NamedTuple):
    """The sizes of the search: a tile is a matrix of products, a block is what one maximum is taken of."""

    codes: int
    """Codes in a tile; a multiple of `width`."""
    rows: int
    """Rows in a tile, at most."""
    width: int
    """Codes in a block."""


# For narrow codes the maximum costs most: 1.6 MB of float32, which a core's cache holds, in few blocks. For wide ones
# the products do, which want larger matrices, and second products that are few. On other devices a tile has 64 MB.
_NARROW = _Tiling(1024, 416, 64)
_WIDE = _Tiling(2048, 1024, 16)
_DEVICE = _Tiling(16384, 1024, 32)
_WIDE_FROM = 64
# Blocks in a group: one more maximum is taken of each group, and the best group is looked for with its index.
_BLOCKS = 16
# Elements at most of the maxima of blocks, and of the codes of the best blocks: 16 MB of float32 each.
_LARGEST = 2**22


def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """Find the code nearest in Euclidean distance to each row; of equal codes the first.

    Args:
        rows: `(n, D)` float32 or float64. A row that is not finite gets some id in [0, K).
        codes: `(K, D)`, of the same precision.

    Returns:
        `(n,)` int64 ids in [0, K).
    """
    # argmin |z - e|^2 = argmax z.e - |e|^2 / 2
    return largest_product(rows, codes, codes.detach().square().sum(dim=1) / -2)


@torch.no_grad()
def largest_product(rows: Tensor, codes: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Find the code e with the largest `z.e + offset` for each row z, in their precision whatever that of matmul.

    Args:
        rows: `(n, D)` float32 or float64, as for `nearest_codes`.
        codes: `(K, D)`, of the same precision.
        offsets: `(K,)`, of the same precision, one for each code; zeros if None.

    Returns:
        `(n,)` int64 ids in [0, K).
    """
    count = len(codes)
    if len(rows) == 0:
        return rows.new_empty(0, dtype=torch.int64)
    if offsets is not None:
        # One more column of the product is cheaper than a sum behind it.
        rows, codes = F.pad(rows, (0, 1), value=1.0), torch.cat((codes, offsets[:, None]), dim=1)
    tiling = _DEVICE if rows.device.type != "cpu" else _WIDE if codes.shape[1] >= _WIDE_FROM else _NARROW
    # Tiles of equal width, in whole cache lines.
    columns = -(-len(rows) // -(-len(rows) // tiling.rows))
    columns += -columns % 16
    tiles = F.pad(rows, (0, 0, 0, -len(rows) % columns)).view(-1, columns, rows.shape[1])
    search = _Search(codes, tiling)
    with full_precision(rows.device):
        ids = torch.cat([search(part) for part in tiles.split(search.tiles_at_once(columns))])
    return ids[: len(rows)].clamp_(max=count - 1)


@torch.no_grad()
def near_codes(ids: Tensor, codes: Tensor, count: int) -> Tensor:
    """Find the codes nearest in Euclidean distance to the code of each id, other than itself.

    Args:
        ids: int64 of any shape, in [0, K).
        codes: `(K, D)` float32 or float64.
        count: how many, in [1, K).

    Returns:
        `(*ids.shape, count)` int64 ids, the nearest first.
    """
    asked, place = ids.unique(return_inverse=True)
    found = []
    for some in asked.split(max(1, _LARGEST // len(codes))):
        # By differences, not by products: codes that are as far away then have equal distances.
        distances = torch.cdist(codes[some], codes, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(some), device=some.device), some] = torch.inf
        found.append(distances.topk(count, largest=False).indices)
    return torch.cat(found)[place]


class _Search:
    """The search among codes `(K, D)` for the rows of some tiles at once."""

    def __init__(self, codes: Tensor, tiling: _Tiling) -> None:
        self.width = width = tiling.width
        self.blocks = max(1, min(_BLOCKS, len(codes) // width // _BLOCKS))
        # The last blocks are filled up with copies of the last code, which lose against their first occurrence.
        codes = torch.cat((codes, codes[-1:].expand(-len(codes) % (width * self.blocks), -1)))
        self.code_tiles = codes.split(tiling.codes)
        self.count, self.dim = codes.shape
        # The second products read the codes of a block faster as columns.
        self.of_blocks = codes.view(-1, width, self.dim).transpose(1, 2).reshape(-1, self.dim * width)

    def tiles_at_once(self, columns: int) -> int:
        """The number of tiles of `columns` rows each that fit into the memory."""
        return max(1, _LARGEST // (columns * max(self.count // self.width, self.dim * self.width)))

    def __call__(self, rows: Tensor) -> Tensor:
        """Find the ids `(tiles * columns,)` of rows `(tiles, columns, D)`."""
        tiles, columns, _ = rows.shape
        maxima = rows.new_empty(tiles, self.count // self.width, columns)
        # Memory that every tile uses again: fresh memory costs as much as a product.
        products = rows.new_empty(len(self.code_tiles[0]), columns)
        steps = [(part, products[: len(part)]) for part in self.code_tiles]
        blocks = [tile.view(-1, self.width, columns) for _, tile in steps]
        for tile, of_tile in zip(rows.transpose(1, 2).unbind(), maxima.unbind(), strict=True):
            best = of_tile.split(len(blocks[0]))
            for (part, product), block, maximum in zip(steps, blocks, best, strict=True):
                torch.mm(part, tile, out=product)
                torch.amax(block, dim=1, out=maximum)
        block = self._best_block(maxima).view(-1)
        rows = rows.reshape(-1, 1, self.dim)
        # `index_select` gathers several times as fast as indexing does.
        candidates = torch.index_select(self.of_blocks, 0, block).view(-1, self.dim, self.width)
        inside = torch.bmm(rows, candidates)[:, 0].max(dim=1).indices
        return torch.add(inside, block, alpha=self.width)

    def _best_block(self, maxima: Tensor) -> Tensor:
        """Find the first block `(tiles, columns)` with the largest of maxima `(tiles, blocks, columns)`."""
        tiles, _, columns = maxima.shape
        grouped = maxima.view(tiles, -1, self.blocks, columns)
        group = grouped.amax(dim=2).max(dim=1).indices
        tile, column = (torch.arange(size, device=maxima.device) for size in (tiles, columns))
        inside = grouped[tile[:, None], group, :, column].max(dim=2).indices
        return torch.add(inside, group, alpha=self.blocks)
