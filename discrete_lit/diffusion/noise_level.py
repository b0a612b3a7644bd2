"""The times of a batch with what a schedule makes of them, `NoiseLevel`, and the two ways to draw these times."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.schedules import MaskSchedule


@dataclass(frozen=True, kw_only=True)
class NoiseLevel:
    """The noise of each sequence of a batch: a time and what a schedule makes of it; tensors `(B, 1)` float64."""

    t: Tensor
    """The time, in [0, 1]."""
    alpha: Tensor
    """exp(-sigma), the probability that noise has left a token alone."""
    noise: Tensor
    """m = 1 - alpha, with all its digits where it is small, where `1 - alpha` would lose them."""
    rate: Tensor
    """sigma' = m'(t) / alpha, the slope in the variable that the loss averages over."""

    @classmethod
    def at(cls, schedule: MaskSchedule, t: Tensor) -> "NoiseLevel":
        """Return the level of a schedule at times `t (B, 1)`."""
        return NoiseLevel(
            t=t.double(), alpha=schedule.alpha(t), noise=schedule.mask_probability(t), rate=schedule.rate(t)
        )

    @classmethod
    def of(cls, schedule: MaskSchedule, sigma: Tensor) -> "NoiseLevel":
        """Return the level of a schedule with the total noise `sigma (B, 1)`, which may be next to 0 or very large."""
        noise = -torch.expm1(-sigma)
        t = schedule.inverse(noise.clamp(*schedule.ends()))
        return NoiseLevel(t=t, alpha=torch.exp(-sigma), noise=noise, rate=schedule.rate(t))

    @property
    def sigma(self) -> Tensor:
        """The total noise sigma = -log alpha."""
        return torch.where(self.noise < 0.5, -torch.log1p(-self.noise), -torch.log(self.alpha))

    @property
    def odds(self) -> Tensor:
        """The odds that a token was left alone, alpha / (1 - alpha) = 1 / (exp(sigma) - 1)."""
        return self.alpha / self.noise

    @property
    def mask_weight(self) -> Tensor:
        """The weight of a masked token's cross-entropy, m'(t) / m(t)."""
        return self.rate * self.odds

    def take(self, rows: Tensor | slice | int) -> Self:
        """Select the levels of some of the sequences, in any number and order."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def stratified_times(random: CounterRandom, strata: int) -> Tensor:
    """Draw training times spread evenly over a batch: one in each of `strata` equal parts of (0, 1).

    The mean of a loss over t is then estimated with less noise than from independent times (Kingma et al.,
    "Variational Diffusion Models", 2021, appendix I.1; MDLM draws within the parts as here). A sample's number in the
    run, modulo `strata`, is its part. So a batch of samples that follow one another has one time in each part, however
    it is split over ranks, and after a resume.

    Args:
        random: one stream for each sample.
        strata: the number of samples in the batch over all ranks.

    Returns:
        `(B, 1)` float64 in (0, 1).
    """
    return within_part(random.uniform(Purpose.MASK_RATIO, 1), (random.indices % strata)[:, None], parts=strata)


def within_part(uniforms: Tensor, part: Tensor, *, parts: int) -> Tensor:
    """Move numbers in (0, 1) into equal parts of it: each into its `part`, of 0 ... `parts` - 1; float64."""
    return ((part + uniforms.double()) / parts).clamp(max=1 - 2.0**-53)  # the sum may round up


# 2^64 over the golden ratio, odd, as a signed number: its multiples fill the circle evenly (Weyl).
_GOLDEN = -7046029254386353131


def spread_times(random: CounterRandom) -> Tensor:
    """Draw validation times `(B, 1)` in (0, 1) that are spread evenly over any samples in a row, whatever the batches.

    Each time is a function of seed and index alone, and uniform over seeds.
    """
    shift = CounterRandom(random.seed, random.indices.new_zeros(1)).uniform(Purpose.MASK_RATIO, 1)
    turn = ((random.indices * _GOLDEN) >> 11) & (2**53 - 1)  # the upper bits of a product modulo 2^64
    times = (turn.double()[:, None] * 2.0**-53 + shift) % 1
    return times.clamp(2.0**-53, 1 - 2.0**-53)
