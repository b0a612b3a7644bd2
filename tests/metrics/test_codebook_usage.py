"""Usage and perplexity by hand."""

from math import exp, log

import pytest
import torch

from discrete_lit.metrics.codebook_usage import CodebookUsage


def test_by_hand() -> None:
    metric = CodebookUsage(8)
    metric.update(torch.tensor([[0, 0], [0, 5]]))
    usage, perplexity = metric.compute()
    assert float(usage) == 2 / 8
    assert float(perplexity) == pytest.approx(exp(-(0.75 * log(0.75) + 0.25 * log(0.25))))


def test_batches_are_counted_together() -> None:
    """The perplexity of all ids, not the mean of the batches' perplexities."""
    metric = CodebookUsage(8)
    for ids in ([1, 1, 1], [2], [7, 7, 7, 7]):
        metric.update(torch.tensor(ids))
    usage, perplexity = metric.compute()
    assert float(usage) == 3 / 8
    assert float(perplexity) == pytest.approx(exp(-sum(p * log(p) for p in (3 / 8, 1 / 8, 4 / 8))))


@pytest.mark.parametrize(("ids", "usage", "perplexity"), [([3], 0.25, 1.0), ([0, 1, 2, 3], 1.0, 4.0)])
def test_extremes(ids: list[int], usage: float, perplexity: float) -> None:
    metric = CodebookUsage(4)
    metric.update(torch.tensor(ids).reshape(1, -1, 1))
    assert [float(value) for value in metric.compute()] == pytest.approx([usage, perplexity])


def test_reset_forgets_and_nothing_enters_a_checkpoint() -> None:
    metric = CodebookUsage(4)
    metric.update(torch.arange(4))
    assert not metric.state_dict()
    metric.reset()
    metric.update(torch.tensor([2]))
    assert float(metric.compute()[0]) == 0.25


@pytest.mark.parametrize("wrong", [4, -1])
def test_ids_outside_the_vocabulary_do_not_pass(wrong: int) -> None:
    with pytest.raises(IndexError):
        CodebookUsage(4).update(torch.tensor([wrong]))
