"""The cache of a backbone: what is computed once while one batch of sequences is sampled.

A causal backbone keeps the keys and values of the tokens so far (the KV cache); every backbone may keep the modulations
(adaLN) of the labels, and the keys and values of the vectors that it attends to. In a `RaggedCache` every sequence has
a length of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """The keys and values of one attention, which belong to a `Cache`; that moves the fill mark of all of them."""

    keys: Tensor
    """`(B, heads, length, head_dim)`."""
    values: Tensor
    """The same shape."""
    filled: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `(B, heads, n, head_dim)` behind what is filled; returns views of all keys and values so far.

        Raises:
            ValueError: more positions than the cache has.
        """
        count, length = keys.shape[2], self.keys.shape[2]
        end = self.filled + count
        if end > length:
            raise ValueError(f"the key-value cache holds {length} positions, {end} were asked for")
        self.keys.narrow(2, self.filled, count).copy_(keys)
        self.values.narrow(2, self.filled, count).copy_(values)
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


class Cache:
    """The part of a batch's condition that is computed once; and of a causal backbone the keys and values so far.

    Args:
        modulations: of each block, then of the head; empty where nothing is modulated.
        keys_and_values: `(layers, 2, B, heads, length, head_dim)`, preallocated; None for a backbone that sees
            everything at every pass.
        context: keys and values of the vectors to attend to, of each block; empty where there are none.

    Attributes:
        ahead: positions beyond the next one that the coming pass of a backbone with position instructions is also asked
            for; each of their instructions sees those before it, and the cache forgets them behind the pass.
    """

    def __init__(
        self,
        modulations: list[tuple[Tensor, ...]],
        keys_and_values: Tensor | None,
        *,
        context: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.modulations = modulations
        self.context = context or []
        self.filled = self.ahead = 0
        self.tokens: Tensor | None = None
        self._buffers = keys_and_values

    @property
    def holds_keys(self) -> bool:
        """Whether it is the cache of a causal backbone."""
        return self._buffers is not None

    @property
    def length(self) -> int:
        """The positions that there are keys and values for."""
        return 0 if self._buffers is None else self._buffers.shape[4]

    def layer(self, number: int) -> LayerCache | None:
        """Give what one attention reads and writes; None where it sees everything at every pass."""
        if self._buffers is None:
            return None
        return LayerCache(self._buffers[number, 0], self._buffers[number, 1], self.filled)

    def first_rows(self, count: int) -> "Cache":
        """Give the cache of the first `count` sequences, which goes on where this one is; it shares its memory."""
        modulations = [tuple(vector[:count] for vector in vectors) for vectors in self.modulations]
        context = [(keys[:count], values[:count]) for keys, values in self.context]
        rows = Cache(modulations, None if self._buffers is None else self._buffers[:, :, :count], context=context)
        rows.advance(self.filled)
        rows.tokens = None if self.tokens is None else self.tokens[:count]
        return rows

    def begin_again(self, tokens: Tensor) -> None:
        """Mark all positions as empty, and keep the tokens `(B, n)` that are about to be read, to read them again."""
        self.filled = 0
        self.tokens = tokens

    def advance(self, count: int) -> None:
        """Mark `count` more positions as filled in every layer."""
        self.filled += count


class RaggedLayerCache(NamedTuple):
    """The keys and values of one attention, which belong to a `RaggedCache`."""

    keys: Tensor
    """`(B, heads, length, head_dim)`."""
    values: Tensor
    """The same shape."""
    filled: Tensor
    """`(B,)` int64."""
    reach: int
    """The most that are filled in any sequence."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `(B, heads, n, head_dim)` behind what is filled of each sequence; returns views of the first
        `reach + n` keys and values, in which each sequence has what it has.

        Raises:
            ValueError: more positions than the cache has.
        """
        count, length = keys.shape[2], self.keys.shape[2]
        end = self.reach + count
        if end > length:
            raise ValueError(f"the key-value cache holds {length} positions, {end} were asked for")
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        columns = self.filled[:, None] + torch.arange(count, device=keys.device)
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept.transpose(1, 2)[rows, columns] = new.transpose(1, 2).to(kept.dtype)
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


class RaggedCache:
    """The keys and values so far of sequences that differ in length: each has its own fill mark.

    What a pass writes stays where `advance` follows. A sequence that waits is passed over with a count of 0: the next
    pass writes over what it has there.

    Args:
        keys_and_values: `(layers, 2, B, heads, length, head_dim)`, preallocated.

    Attributes:
        origin: `(B,)` int64, where the next element of each stands, in the units of its layout's positions.
        reach: the most of `filled`, as the host knows it; never less.
        even: whether all sequences are known to be of one length.
    """

    def __init__(self, keys_and_values: Tensor) -> None:
        batch, device = keys_and_values.shape[2], keys_and_values.device
        self._buffers = keys_and_values
        self.origin = torch.zeros(batch, dtype=torch.int64, device=device)
        self.reach = 0
        self.even = True
        self._filled = self.origin

    @property
    def filled(self) -> Tensor:
        """`(B,)` int64, elements of each sequence."""
        return torch.full_like(self.origin, self.reach) if self.even else self._filled

    def layer(self, number: int) -> RaggedLayerCache | LayerCache:
        """Give what one attention reads and writes."""
        keys, values = self._buffers[number, 0], self._buffers[number, 1]
        if self.even:
            return LayerCache(keys, values, self.reach)
        return RaggedLayerCache(keys, values, self.filled, self.reach)

    def advance(self, counts: Tensor | int, then: Tensor, *, reach: int | None = None) -> None:
        """Keep the first elements of a pass.

        Args:
            counts: `(B,)` int64, how many of each sequence; one number for all.
            then: `(B, n)` int64, where an element behind each of the pass would begin.
            reach: the most of `filled` from now on; needed where the counts differ.
        """
        if isinstance(counts, int):
            self._filled = self._filled if self.even else self._filled + counts
            self.reach += counts
            self.origin = then[:, counts - 1]
            return
        assert reach is not None, "the host must know how long the longest sequence is"
        filled, self.even = self.filled, False
        last = then.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        self.origin = torch.where(counts > 0, last, self.origin)
        self._filled, self.reach = filled + counts, reach


def new_buffers(
    *, layers: int, batch: int, heads: int, length: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Make room for the keys and values of every layer: zeros `(layers, 2, batch, heads, length, head_dim)`."""
    return torch.zeros(layers, 2, batch, heads, length, head_dim, device=device, dtype=dtype)
