"""An id as several parts, so that a large vocabulary is predicted by a few small softmaxes."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn


class IdParts(nn.Module):
    """Ids in [0, K) as digits of unequal bases, the least significant first.

    With sizes 2^6 and 2^12 the first part of an 18-bit id is its low 6 bits (Luo et al., "Open-MAGVIT2", 2024).

    Args:
        sizes: of the parts; their product is K.
        vocab_size: K.

    Raises:
        ValueError: parts of fewer than two values, or whose product is not K.
    """

    moduli: Tensor
    units: Tensor

    def __init__(self, sizes: Sequence[int], vocab_size: int) -> None:
        super().__init__()
        if not sizes or min(sizes) < 2 or prod(sizes) != vocab_size:
            raise ValueError(
                f"the parts of an id must have 2 or more values each, and {vocab_size} together, the tokenizer's "
                f"vocabulary; got sizes={list(sizes)}, which multiply to {prod(sizes)}"
            )
        self.sizes = tuple(sizes)
        units = [prod(sizes[:part]) for part in range(len(sizes))]
        self.register_buffer("moduli", torch.tensor(sizes), persistent=False)
        self.register_buffer("units", torch.tensor(units), persistent=False)

    def __len__(self) -> int:
        return len(self.sizes)

    def split(self, ids: Tensor) -> Tensor:
        """`(...)` int64 in [0, K) to `(..., P)`, part p in [0, size of p)."""
        return ids[..., None] // self.units % self.moduli

    def join(self, parts: Tensor) -> Tensor:
        """The inverse of `split`."""
        return (parts * self.units).sum(dim=-1)


def bits_of_vocabulary(vocab_size: int, what_needs_them: str) -> int:
    """b of a vocabulary of 2^b ids.

    Raises:
        ValueError: a vocabulary that is no power of two, or of one id; it names `what_needs_them`.
    """
    bits = vocab_size.bit_length() - 1
    if vocab_size != 2**bits or bits == 0:
        raise ValueError(f"{what_needs_them} needs a vocabulary that is a power of 2, the tokenizer's is {vocab_size}")
    return bits
