"""How noisy a batch is."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from discrete_lit.processes.schedules import MaskSchedule


@dataclass(frozen=True)
class NoiseLevel:
    """A time for each sequence and what a schedule makes of it; tensors `(B, 1)` float64."""

    t: Tensor
    """In [0, 1]."""
    alpha: Tensor
    """The probability that noise has left a token alone, exp(-sigma)."""
    noise: Tensor
    """1 - alpha, m(t), as exact where it is small as alpha is where that is."""
    rate: Tensor
    """d sigma / dt = m'(t) / alpha, t being what a loss averages over."""

    @classmethod
    def at(cls, schedule: MaskSchedule, t: Tensor) -> "NoiseLevel":
        """The level of a schedule at times `t (B, 1)`."""
        return NoiseLevel(t.double(), schedule.alpha(t), schedule.mask_probability(t), schedule.rate(t))

    @property
    def sigma(self) -> Tensor:
        """The total noise, -log alpha."""
        return torch.where(self.noise < 0.5, -torch.log1p(-self.noise), -torch.log(self.alpha))

    @property
    def odds(self) -> Tensor:
        """1 / (exp(sigma) - 1) = alpha / (1 - alpha)."""
        return self.alpha / self.noise

    @property
    def mask_weight(self) -> Tensor:
        """m'(t) / m(t), the weight of a masked token's cross-entropy."""
        return self.rate * self.odds

    def take(self, rows: Tensor | slice) -> Self:
        """The levels of some of the sequences, in any number and order."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))
