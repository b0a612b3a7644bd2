"""What a backbone keeps while one batch of sequences is sampled."""

from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """Keys and values of one attention: a part of a `Cache`, which moves the fill mark for all of them."""

    keys: Tensor
    """`(B, heads, length, head_dim)`."""
    values: Tensor
    """The same shape."""
    filled: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `(B, heads, n, head_dim)` behind what is filled; returns views of all keys and values so far.

        Raises:
            ValueError: more places than the cache has.
        """
        count, length = keys.shape[2], self.keys.shape[2]
        end = self.filled + count
        if end > length:
            raise ValueError(f"the key-value cache holds {length} positions, {end} were asked for")
        self.keys.narrow(2, self.filled, count).copy_(keys)
        self.values.narrow(2, self.filled, count).copy_(values)
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


class Cache:
    """Modulations of the batch's labels, computed once; and of a causal backbone the keys and values so far.

    Args:
        modulations: of each block, then of the head; empty where nothing is modulated.
        keys_and_values: `(layers, 2, B, heads, length, head_dim)`, preallocated; None for a backbone that sees
            everything at every pass.
    """

    def __init__(self, modulations: list[tuple[Tensor, ...]], keys_and_values: Tensor | None) -> None:
        self.modulations = modulations
        self.filled = 0
        self._buffers = keys_and_values

    @property
    def holds_keys(self) -> bool:
        """Whether it is of a causal backbone."""
        return self._buffers is not None

    @property
    def length(self) -> int:
        """Places that there are keys and values for."""
        return 0 if self._buffers is None else self._buffers.shape[4]

    def layer(self, number: int) -> LayerCache | None:
        """What one attention reads and writes; None where it sees everything at every pass."""
        if self._buffers is None:
            return None
        return LayerCache(self._buffers[number, 0], self._buffers[number, 1], self.filled)

    def first_rows(self, count: int) -> "Cache":
        """The cache of the first `count` sequences, which goes on where this one is; it shares its memory."""
        modulations = [tuple(part[:count] for part in parts) for parts in self.modulations]
        rows = Cache(modulations, None if self._buffers is None else self._buffers[:, :, :count])
        rows.advance(self.filled)
        return rows

    def advance(self, count: int) -> None:
        """Mark `count` more places as filled in every layer."""
        self.filled += count


def new_buffers(
    layers: int, batch: int, heads: int, length: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Empty keys and values of every layer."""
    return torch.zeros(layers, 2, batch, heads, length, head_dim, device=device, dtype=dtype)
