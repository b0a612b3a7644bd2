"""What a generator asks of its backbone."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor, nn

from discrete_lit.backbones.cache import Cache
from discrete_lit.backbones.place_head import PlaceHead


@dataclass(frozen=True)
class SequenceLayout:
    """The sequence that a generator models; it asks for a backbone by calling `backbone(layout)`.

    Attributes:
        vocab_size: K, the ids that the backbone predicts.
        grid: shape of the token grid; the sequence is its raster order unless an order says otherwise.
        num_classes: labels lie in [0, num_classes); the null label is `num_classes`.
        attention: which places see which: all, those before, or those of the scales before and of the same.
        mask_token: whether the mask id K may stand in the input.
        parts: ids at each place, which stand one after another in the sequence, as the bit groups of a code do.
        scales: places of each scale in turn, of `"block_causal"` attention; the first has one.
        input_dim: width of the vectors that stand for ids in the input; None where the ids themselves do.
        any_order: whether a causal sequence may come in an order of its own.
        timed: whether the backbone is told how noisy its input is.
        mask_output: whether it has a logit of the mask id too, as the last; ratios of probabilities have one.
    """

    vocab_size: int
    grid: tuple[int, ...]
    num_classes: int
    attention: Literal["bidirectional", "causal", "block_causal"]
    mask_token: bool = False
    parts: int = 1
    scales: tuple[int, ...] = ()
    input_dim: int | None = None
    any_order: bool = False
    timed: bool = False
    mask_output: bool = False

    @property
    def places(self) -> int:
        """Places of the grid."""
        return prod(self.grid)

    @property
    def length(self) -> int:
        """N, ids in a sequence."""
        return self.places * self.parts

    @property
    def mask_id(self) -> int:
        """The id of the mask token: K."""
        return self.vocab_size

    @property
    def outputs(self) -> int:
        """Logits of each id: K, or K + 1 with that of the mask id."""
        return self.vocab_size + int(self.mask_output)

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.num_classes


class Backbone(nn.Module, ABC):
    """Token ids and a label to logits.

    Args:
        layout: the sequence.

    Attributes:
        place_head: of a causal backbone that predicts an id in parts: what makes them of the hidden states that
            `forward` then gives in the place of logits.
    """

    place_head: PlaceHead | None

    def __init__(self, layout: SequenceLayout) -> None:
        super().__init__()
        self.layout = layout
        self.place_head = None

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        cache: Cache | None = None,
        order: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """Logits for the tokens.

        Bidirectional: `tokens (B, N)` to `(B, N, K)`, the prediction of each id.
        Causal: a prefix `tokens (B, n)`, 0 <= n < N, to `(B, n + 1, K)`; row i predicts token i from the tokens before
        it. With a cache, `tokens` are those that follow what the cache holds, and one row is returned for each; the
        first call on an empty cache also returns row 0, so it may be given no token at all.
        Block-causal: the same with whole scales: row i predicts place i from the input at that place, which is made of
        the scales before; the first scale has no input of its own.

        Args:
            tokens: int64 ids, the mask id K only where the layout allows it; `(B, n, input_dim)` vectors where the
                layout has them.
            labels: `(B,)` int64 in [0, num_classes], the null label included; ignored where the cache knows them.
            cache: of `new_cache`; filled as a causal sequence grows.
            order: `(B, N)` int64, of an any-order layout: the place of the grid that each token in turn stands at;
                raster order by default.
            time: `(B,)` float, of a timed layout: how noisy the input is, in the units that the generator chose.

        Returns:
            float32 logits over the K ids, the mask id not among them unless the layout has its output; with a
            `place_head` what it reads, `(B, rows, D)`.

        Raises:
            ValueError: more tokens than the layout has, or a part of a scale.
        """

    @abstractmethod
    def shards(self) -> Iterable[nn.Module]:
        """The parts that FSDP gathers one after another: the blocks."""

    @abstractmethod
    def new_cache(self, labels: Tensor) -> Cache:
        """What can be computed once for labels `(B,)`, and room for the keys and values of B sequences of N tokens."""

    @abstractmethod
    def flops(self, batch: int, tokens: int, cache: Cache | None = None) -> int:
        """Floating-point operations of the matrix products of a forward pass, as torch's `FlopCounterMode` counts them.

        Args:
            batch: sequences B.
            tokens: input ids, or vectors, of each.
            cache: as it is before the pass.
        """

    @abstractmethod
    def cache_flops(self, batch: int) -> int:
        """Those of `new_cache` for B labels."""
