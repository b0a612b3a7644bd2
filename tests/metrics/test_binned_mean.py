"""Weighted means by bins of a coordinate."""

import pytest
import torch

from discrete_lit.metrics.binned_mean import BinnedMean, Mean


def test_by_hand_over_two_batches() -> None:
    metric = BinnedMean(4)
    metric.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.24], [0.5, 0.9]]), torch.ones(2, 2))
    metric.update(torch.tensor([10.0, 100.0]), torch.tensor([0.1, 0.7]), torch.tensor([2.0, 0.0]))
    total, weight = metric.compute()
    assert total.dtype == weight.dtype == torch.float64
    assert total.tolist() == [1 + 2 + 20, 0, 3, 4]
    assert weight.tolist() == [1 + 1 + 2, 0, 1, 1]


@pytest.mark.parametrize(("coordinate", "index"), [(0.0, 0), (0.25, 1), (0.499, 1), (0.5, 2), (0.75, 3), (1.0, 3)])
def test_bins_hold_their_lower_edge_and_the_last_both(coordinate: float, index: int) -> None:
    metric = BinnedMean(4)
    metric.update(torch.ones(1), torch.tensor([coordinate]), torch.ones(1))
    assert metric.compute()[1].nonzero().flatten().tolist() == [index]


def test_sums_are_float64() -> None:
    """A million small losses behind a large one: float32 would drop them."""
    metric = BinnedMean(1)
    metric.update(torch.tensor([2.0**24]), torch.zeros(1), torch.ones(1))
    metric.update(torch.ones(1000), torch.zeros(1000), torch.ones(1000))
    assert float(metric.compute()[0]) == 2**24 + 1000


def test_reset_forgets_and_nothing_enters_a_checkpoint() -> None:
    metric = BinnedMean(2)
    metric.update(torch.ones(3), torch.zeros(3), torch.ones(3))
    assert not metric.state_dict()
    metric.reset()
    metric.update(torch.ones(1), torch.ones(1), torch.ones(1))
    assert metric.compute()[1].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_stay_in_float64_in_modules_of_another_precision(dtype: torch.dtype) -> None:
    bins, mean = BinnedMean(2), Mean()
    torch.nn.ModuleList([bins, mean]).to(dtype)
    for value in (1.0, 3.0):
        for _ in range(300):
            bins.update(torch.ones(1), torch.zeros(1), torch.ones(1))
            mean.update(torch.tensor([value]))
    assert bins.compute()[0].tolist() == [600, 0]
    assert float(mean.compute()) == 2
