"""What a generator asks of its backbone."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SequenceLayout:
    """The sequence that a generator models; it asks for a backbone by calling `backbone(layout)`.

    Attributes:
        vocab_size: K, the ids that the backbone predicts.
        grid: shape of the token grid; the sequence is its raster order, N its product.
        num_classes: labels lie in [0, num_classes); the null label is `num_classes`.
        attention: which positions see which.
        mask_token: whether the mask id K may stand in the input.
    """

    vocab_size: int
    grid: tuple[int, ...]
    num_classes: int
    attention: Literal["bidirectional", "causal"]
    mask_token: bool = False

    @property
    def length(self) -> int:
        """N, tokens in a sequence."""
        return prod(self.grid)

    @property
    def mask_id(self) -> int:
        """The id of the mask token: K."""
        return self.vocab_size

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.num_classes


class KeyValueCache:
    """Preallocated keys and values of every layer of a causal backbone.

    Args:
        layers, batch, heads, length, head_dim: shape of the buffers, `(layers, 2, batch, heads, length, head_dim)`.
        device, dtype: of the buffers.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.length = length
        self.filled = 0
        self._buffers = torch.zeros(layers, 2, batch, heads, length, head_dim, device=device, dtype=dtype)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `(B, heads, n, head_dim)` behind what is filled; returns views of all keys and values so far.

        The fill mark moves by `advance`, once for all layers.

        Raises:
            ValueError: more positions than the cache has.
        """
        end = self.filled + keys.shape[2]
        if end > self.length:
            raise ValueError(f"the key-value cache holds {self.length} positions, {end} were asked for")
        self._buffers[layer, 0, :, :, self.filled : end] = keys
        self._buffers[layer, 1, :, :, self.filled : end] = values
        return self._buffers[layer, 0, :, :, :end], self._buffers[layer, 1, :, :, :end]

    def advance(self, count: int) -> None:
        """Mark `count` more positions as filled in every layer."""
        self.filled += count


class Backbone(nn.Module, ABC):
    """Token ids and a label to logits.

    Args:
        layout: the sequence.
    """

    def __init__(self, layout: SequenceLayout) -> None:
        super().__init__()
        self.layout = layout

    @abstractmethod
    def forward(self, tokens: Tensor, labels: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits for the tokens.

        Bidirectional: `tokens (B, N)` to `(B, N, K)`, the prediction of each position.
        Causal: a prefix `tokens (B, n)`, 0 <= n < N, to `(B, n + 1, K)`; row i predicts token i from the tokens before
        it. With a cache, `tokens` are those that follow what the cache holds, and one row is returned for each; the
        first call on an empty cache also returns row 0, so it may be given no token at all.

        Args:
            tokens: int64 ids; the mask id K only where the layout allows it.
            labels: `(B,)` int64 in [0, num_classes], the null label included.
            cache: filled as the sequence grows; causal only.

        Returns:
            float32 logits over the K ids, the mask id never among them.

        Raises:
            ValueError: more tokens than the layout has.
        """

    @abstractmethod
    def shards(self) -> Iterable[nn.Module]:
        """The parts that FSDP gathers one after another: the blocks."""

    @abstractmethod
    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty cache for `batch` sequences of N tokens; causal only."""
