"""How noisy a batch is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from discrete_lit.processes.schedules import MaskSchedule


@dataclass(frozen=True)
class NoiseLevel:
    """A time for each sequence and what a schedule makes of it; tensors `(B, 1)` float64."""

    t: Tensor
    """In [0, 1]."""
    alpha: Tensor
    """1 - m(t): the probability that noise has left a token alone."""
    rate: Tensor
    """d sigma / dt = m'(t) / (1 - m(t)), with sigma = -log alpha."""

    @classmethod
    def at(cls, schedule: MaskSchedule, t: Tensor) -> "NoiseLevel":
        """The level of a schedule at times `t (B, 1)`."""
        alpha = 1 - schedule.mask_probability(t)
        return cls(t.double(), alpha, schedule.derivative(t) / alpha)

    @property
    def sigma(self) -> Tensor:
        """The total noise, -log alpha."""
        return -torch.log(self.alpha)

    @property
    def odds(self) -> Tensor:
        """1 / (exp(sigma) - 1) = alpha / (1 - alpha)."""
        return self.alpha / (1 - self.alpha)

    def first_rows(self, count: int) -> "NoiseLevel":
        """The levels of the first `count` sequences."""
        return NoiseLevel(self.t[:count], self.alpha[:count], self.rate[:count])
