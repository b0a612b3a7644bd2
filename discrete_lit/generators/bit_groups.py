"""Ids of a vocabulary 2^b as g groups of b / g bits (Weber et al., "MaskBit", 2024)."""

import torch
from torch import Tensor

from discrete_lit.backbones.id_parts import bits_of_vocabulary


class BitGroups:
    """Splits ids into units of b / g bits each and joins them; group 0 has the least significant bits.

    Args:
        vocab_size: 2^b.
        groups: g, a divisor of b.

    Raises:
        ValueError: a vocabulary that is no power of two, or groups that do not divide its bits.
    """

    def __init__(self, vocab_size: int, groups: int) -> None:
        bits = bits_of_vocabulary(vocab_size, f"bit_groups={groups}")
        if groups < 1 or bits % groups:
            raise ValueError(f"bit_groups must divide the {bits} bits of an id, got {groups}")
        self.groups = groups
        self.bits = bits // groups
        self.unit_size = 2**self.bits

    def split(self, ids: Tensor) -> Tensor:
        """`(B, n)` in [0, 2^b) to units `(B, n g)` in [0, 2^(b / g)); those of an id stand next to one another.

        An id of -1, which stands for none, becomes g of them.
        """
        units = (ids[..., None] >> self._shifts(ids)) & (self.unit_size - 1)
        return units.masked_fill(ids[..., None] < 0, -1).flatten(1)

    def join(self, units: Tensor) -> Tensor:
        """The inverse of `split`."""
        grouped = units.unflatten(1, (-1, self.groups))
        return (grouped << self._shifts(units)).sum(dim=-1)

    def _shifts(self, ids: Tensor) -> Tensor:
        return torch.arange(self.groups, device=ids.device) * self.bits
