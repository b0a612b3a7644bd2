"""Moments over two ranks with unequal shares are those of the whole."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from test_frechet import Flatten

from discrete_lit.metrics.frechet import FeatureMoments, Moments


def gather(rank: int, address: str, output: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    moments = FeatureMoments(Flatten(4))
    moments.update(features()[:5] if rank == 0 else features()[5:])
    moments.over_ranks().compute().save(f"{output}/{rank}.npz")
    dist.destroy_process_group()


def features() -> torch.Tensor:
    return torch.randn(17, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.ddp
def test_moments_over_two_ranks_are_those_of_the_whole(tmp_path):
    context = multiprocessing.get_context("spawn")
    address = f"file://{tmp_path}/rendezvous"
    ranks = [context.Process(target=gather, args=(rank, address, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0, 0]
    whole = FeatureMoments(Flatten(4))
    whole.update(features())
    expected = whole.compute()
    for rank in (0, 1):
        found = Moments.load(tmp_path / f"{rank}.npz")
        assert found.count == 17
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-12, atol=1e-14)
