"""Times spread over the batch: one in each part, the same however the batch is split, unbiased, of less variance."""

import pytest
import torch
from scipy.stats import kstest

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.schedules import spread_times, stratified_times


def times(indices: torch.Tensor, strata: int, seed: int = 0) -> torch.Tensor:
    return stratified_times(CounterRandom(seed, indices), strata)


@pytest.mark.parametrize("first", [0, 5, 12345, 2**40 + 3])
def test_one_time_in_each_part_of_a_batch_that_starts_anywhere(first: int) -> None:
    found = times(torch.arange(first, first + 32), 32)
    assert found.shape == (32, 1) and found.dtype == torch.float64
    assert sorted((found[:, 0] * 32).long().tolist()) == list(range(32))


def test_the_same_times_whatever_the_ranks_and_after_a_resume() -> None:
    indices = torch.arange(70, 70 + 24)
    whole = times(indices, 24)
    for ranks in (2, 3, 8):
        parts = [times(part, 24) for part in indices.chunk(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(times(indices[5:6], 24), whole[5:6])
    assert not torch.equal(times(indices + 24, 24), whole) and not torch.equal(times(indices, 24, seed=1), whole)


def test_unbiased_and_of_less_variance_than_independent_times() -> None:
    """The mean of t^2 over batches of 16, whose independent variance is 4 / 45 / 16."""
    indices = torch.arange(16 * 4000)
    stratified = times(indices, 16)[:, 0]
    independent = CounterRandom(0, indices).uniform(Purpose.MASK_RATIO, 1)[:, 0]
    assert kstest(stratified.numpy(), "uniform").pvalue > 1e-4
    means = {name: (t**2).view(4000, 16).mean(dim=1) for name, t in (("both", stratified), ("one", independent))}
    assert means["one"].var() == pytest.approx(4 / 45 / 16, rel=0.1)
    assert means["both"].var() < 0.02 * means["one"].var()
    assert float(means["both"].mean()) == pytest.approx(1 / 3, abs=4 * float(means["both"].std()) / 4000**0.5)


def test_the_last_part_stays_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CounterRandom, "uniform", lambda self, *_: torch.full((1, 1), 1 - 2.0**-53).double())
    last = times(torch.tensor([2**20 - 1]), 2**20)
    assert 0.999 < float(last) < 1


@pytest.mark.parametrize("count", [4, 37, 500])
def test_times_of_validation_are_spread_over_every_run_of_samples(count: int) -> None:
    """Discrepancy below 2 log(n) / n wherever the run begins, and uniform over seeds."""
    for first in (0, 17, 2**33):
        found = spread_times(CounterRandom(0, torch.arange(first, first + count)))[:, 0].sort().values
        grid = torch.arange(count) / count
        assert (found - grid).abs().max() < 2 * torch.log(torch.tensor(2.0 * count)) / count
    one = torch.tensor([11])
    over_seeds = torch.cat([spread_times(CounterRandom(seed, one)) for seed in range(400)])[:, 0]
    assert kstest(over_seeds.numpy(), "uniform").pvalue > 1e-4
    whole = spread_times(CounterRandom(3, torch.arange(50)))
    assert torch.equal(spread_times(CounterRandom(3, torch.arange(20, 30))), whole[20:30])
