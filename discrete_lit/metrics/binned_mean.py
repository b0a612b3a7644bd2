"""Means in bins of a coordinate, such as the loss by mask ratio, by position or by time."""

import torch
from torch import Tensor
from torchmetrics import Metric


class BinnedMean(Metric):
    """Average values in equal bins of a coordinate in [0, 1], with weights, over all batches and ranks.

    Args:
        bins: their number.

    `compute` gives the weighted sums and the weights, each `(bins,)` float64: a mean is their quotient, over one bin
    or over several.
    """

    full_state_update = False
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
