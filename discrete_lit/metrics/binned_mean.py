"""Means over an epoch, and in bins of a coordinate, such as the loss by mask ratio, by position or by time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class SumsInFloat64(Metric):
    """A metric whose sums stay in float64 where the module that holds it is put into another precision.

    In bfloat16 a count ends at 256, and a mean over an epoch is that of its first images.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda values: values.to(fn(values).device), exclude_state)


class BinnedMean(SumsInFloat64):
    """Average values in equal bins of a coordinate in [0, 1], with weights, over all batches and ranks.

    Args:
        bins: their number.

    `compute` gives the weighted sums and the weights, each `(bins,)` float64: a mean is their quotient, over one bin
    or over several.
    """

    total: Tensor
    weight: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.add_state("total", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, coordinate: Tensor, weights: Tensor) -> None:
        """Add values with their coordinates and weights, three tensors of one shape."""
        index = (coordinate * self.bins).long().clamp(0, self.bins - 1).reshape(-1)
        weights = weights.double().reshape(-1)
        self.total.index_add_(0, index, values.double().reshape(-1) * weights)
        self.weight.index_add_(0, index, weights)

    def compute(self) -> tuple[Tensor, Tensor]:
        return self.total, self.weight


class Mean(SumsInFloat64):
    """Average values over all batches and ranks."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        self.total += values.double().sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        return self.total / self.count
