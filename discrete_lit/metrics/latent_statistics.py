"""Mean and deviation of every channel of continuous latents over a data set, and whether generators can take them.

A diffusion model of latents is built for data of unit deviation: its noise schedule says how much signal is left at a
time. Latents of another scale train without an error and sample badly.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from discrete_lit.metrics.binned_mean import SumsInFloat64

_LEAST, _MOST = 0.5, 2.0
"""The deviations that are about 1: a factor 2 either way, in which a batch of unlike images still lies."""
_FARTHEST_MEAN = 1.0
"""The root mean square of the channels' means above which they are not about 0: there is more of them than of noise."""


class LatentStatistics(SumsInFloat64):
    """Mean and deviation of each channel of latents `(B, D, *grid)`, over samples and grid, all batches and ranks.

    Where latents are random, their own variances count too, by the law of total variance: the variance of a latent is
    that of its mean plus the mean of its variance. So the statistics are those of sampled latents, without drawing any.

    Args:
        channels: D.

    `compute` gives the mean and the deviation, `(D,)` float64 each: the root of the unbiased variance, as that of
    VA-VAE's published statistics.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    own: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # Of each rank by itself; `compute` merges them.
        for name in ("mean", "squares", "own"):
            self.add_state(name, torch.zeros(channels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, latents: Tensor, logvar: Tensor | None = None) -> None:
        """Add latents, or their means, and the logarithms of their variances: `(B, D, *grid)` each.

        Raises:
            ValueError: another number of channels, or numbers that are not finite.
        """
        if latents.ndim < 2 or latents.shape[1] != self.channels:
            raise ValueError(f"latents must be (B, {self.channels}, *grid), got {tuple(latents.shape)}")
        values = latents.detach().double().transpose(0, 1).flatten(1)
        if not bool(values.isfinite().all()):
            raise ValueError("these latents hold numbers that are not finite")
        self.count += values.shape[1]
        self.mean += values.sum(dim=1)
        self.squares += values.square().sum(dim=1)
        if logvar is not None:
            self.own += logvar.detach().double().exp().transpose(0, 1).flatten(1).sum(dim=1)

    def compute(self) -> tuple[Tensor, Tensor]:
        mean = self.mean / self.count
        scattered = (self.squares - self.count * mean.square()).clamp(min=0)
        return mean, ((scattered + self.own) / (self.count - 1).clamp(min=1)).sqrt()


def check_latent_scale(latents: Tensor, *, least: float = _LEAST, most: float = _MOST) -> None:
    """Check that latents have about unit deviation, and means about 0, as a schedule of noise takes for granted.

    Generators of latents call it on their first batch: latents of another tokenizer, or without its scale, train
    without an error and sample badly (MAR's KL-16 without its factor 0.2325 has a deviation of about 4.3).

    Args:
        latents: `(B, D, *grid)`, of which all numbers together are looked at, about zero: the root of their mean
            square.
        least: the least deviation that passes.
        most: the largest one.

    Raises:
        ValueError: ids instead of latents; numbers that are not finite; a deviation outside `[least, most]`; channels
            whose means are together farther from 0 than 1.
    """
    if not latents.is_floating_point():
        raise ValueError(
            f"latents are floating-point numbers, got {latents.dtype} {tuple(latents.shape)}: are these the ids of a "
            "discrete tokenizer?"
        )
    values = latents.detach().double().transpose(0, 1).flatten(1)
    complaint = scale_complaint(float(values.square().mean().sqrt()), least=least, most=most)
    if complaint is None:
        means = values.mean(dim=1)
        shift = float(means.square().mean().sqrt())
        if shift > _FARTHEST_MEAN:
            complaint = (
                f"latents must have means about 0 in their channels, and these have {means.min().item():.4g} to "
                f"{means.max().item():.4g}, a root mean square of {shift:.4g} where at most {_FARTHEST_MEAN} passes: "
                "was the tokenizer's latent_mean not subtracted? `discrete-lit measure_latents --scale channels` "
                "writes a checkpoint that does"
            )
    if complaint is not None:
        raise ValueError(f"the first batch of latents: {complaint}")


def scale_complaint(deviation: float, *, least: float = _LEAST, most: float = _MOST) -> str | None:
    """Say what is wrong with latents of this deviation; None where it is about 1."""
    if least <= deviation <= most:
        return None
    factor = f"a factor of {1 / deviation:.4g}" if 0 < deviation < float("inf") else "no factor"
    return (
        f"latents must have about unit deviation, between {least} and {most}, and these have {deviation:.4g}; "
        f"{factor} would do. The scale is the tokenizer's: its scale_factor, or latent_mean and latent_std of its "
        "channels; `discrete-lit measure_latents` measures them, and writes a checkpoint that has them"
    )


def overall_deviation(mean: Sequence[float], deviation: Sequence[float], *, about: float | None = None) -> float:
    """The deviation of all latents together, from the mean and the deviation of each channel.

    Args:
        mean: of each channel.
        deviation: of each channel.
        about: the number that it is taken about; None takes the mean of all, as LDM's `1 / std(z)` does.
    """
    centre = sum(mean) / len(mean) if about is None else about
    variances = [each**2 + (of_channel - centre) ** 2 for of_channel, each in zip(mean, deviation, strict=True)]
    return math.sqrt(sum(variances) / len(variances))
