"""Levels for the numbers of a normal law, one in each of B cells of equal probability (TokenBridge).

Wang et al., "Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation", 2025. With Phi the normal
distribution function and phi its density:

    b_k = Phi^-1(k / B), k = 0 ... B, cut to [-r, r]            boundaries of the cells
    v_k = (phi(b_k) - phi(b_(k+1))) / (Phi(b_(k+1)) - Phi(b_k))  mean of the law in cell k

A number takes the nearest of these values, as in the authors' code; the cell that it lies in may be the one beside.
"""

import math
from typing import cast

import torch
from torch import Tensor

from discrete_lit.core.modules import FullPrecision, at_least_float32


class NormalLevels(FullPrecision):
    """Round numbers to the nearest of B levels of the normal law, each by itself.

    Numbers in `[low, high]` are mapped linearly to `[-std_range, std_range]`, and those outside to its ends. So the
    levels are those of a normal law whose deviation is `(high - low) / (2 std_range)`: 5/3 with TokenBridge's [-5, 5]
    and 3, for latents of deviation 1.

    Args:
        levels: B, at least 2.
        low: the number that is mapped to `-std_range`.
        high: the number that is mapped to `std_range`.
        std_range: r, in deviations.

    Raises:
        ValueError: a setting out of its range.
    """

    boundaries: Tensor
    values: Tensor
    _midpoints: Tensor

    def __init__(self, levels: int, *, low: float = -5.0, high: float = 5.0, std_range: float = 3.0) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"low must lie below high, both finite, got {low} and {high}")
        if not 0 < std_range < math.inf:
            raise ValueError(f"std_range must be above 0 and finite, got {std_range}")
        boundaries = torch.special.ndtri(torch.linspace(0, 1, levels + 1, dtype=torch.float64))
        boundaries = boundaries.clamp(-std_range, std_range)
        mass = torch.special.ndtr(boundaries).diff()
        if not bool((mass > 0).all()):
            raise ValueError(
                f"std_range={std_range} leaves no room for the outermost of {levels} levels: their boundaries lie at "
                f"{float(torch.special.ndtri(torch.tensor(1 - 1 / levels, dtype=torch.float64))):.4g}"
            )
        values = -_density(boundaries).diff() / mass
        self.levels = levels
        self.low = low
        self.high = high
        self.std_range = std_range
        # In the state, so that the fingerprint tells two of these apart; boundaries say where the values come from.
        self.register_buffer("values", self._unmapped(values).float())
        self.register_buffer("boundaries", self._unmapped(boundaries).float())
        self.register_buffer("_midpoints", self._unmapped((values[1:] + values[:-1]) / 2).float(), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """Find the level of each number of any shape: int64 in [0, B); of two that are as near, the lower."""
        numbers = at_least_float32(numbers).contiguous()
        return torch.bucketize(numbers, self._midpoints.to(numbers.dtype))

    def lookup(self, ids: Tensor) -> Tensor:
        """Look up the numbers that levels in [0, B) stand for: float32, or float64 of such a module."""
        return self.values[ids]

    def _unmapped(self, normal: Tensor) -> Tensor:
        """The numbers that are mapped to these."""
        share = (normal + self.std_range) / (2 * self.std_range)
        return cast(Tensor, share * (self.high - self.low) + self.low)


def _density(values: Tensor) -> Tensor:
    return torch.exp(-values.square() / 2) / math.sqrt(2 * math.pi)
