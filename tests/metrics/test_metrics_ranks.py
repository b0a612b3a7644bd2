"""Every streaming measure over two ranks with unequal numbers of images is that of all images together."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from test_frechet import Flatten
from torch import Tensor

from discrete_lit.metrics.binned_mean import BinnedMean
from discrete_lit.metrics.codebook_usage import CodebookUsage
from discrete_lit.metrics.frechet import FeatureMoments
from discrete_lit.metrics.precision_recall import ClassSpread
from discrete_lit.metrics.reconstruction import ReconstructionFidelity


def measured(rows: slice) -> dict[str, Tensor]:
    """The results of all measures after some of 17 images."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(17, 4, dtype=torch.float64, generator=random)[rows]
    tokens = torch.randint(0, 20, (17, 3), generator=random)[rows]
    images = torch.randint(0, 256, (17, 3, 12, 12), dtype=torch.uint8, generator=random)[rows]
    rebuilt = torch.randint(0, 256, (17, 3, 12, 12), dtype=torch.uint8, generator=random)[rows]
    moments, spread, usage, binned = FeatureMoments(Flatten(4)), ClassSpread(3, 4), CodebookUsage(32), BinnedMean(2)
    fidelity = ReconstructionFidelity(lpips=lambda first, second: (first - second).abs().mean())
    moments.update(features)
    spread.update(features, torch.arange(17)[rows] % 3)
    usage.update(tokens)
    binned.update(features, features.sigmoid(), features.square())
    fidelity.update(rebuilt, images)
    found = moments.compute()
    # A second time: what was added up over the ranks is not added up again.
    assert torch.equal(moments.compute().mean, found.mean)
    moments.update(features[:0])
    assert torch.equal(moments.compute().covariance, found.covariance)
    return {
        "count": torch.tensor(found.count),
        "mean": found.mean,
        "covariance": found.covariance,
        "spread": spread.compute(),
        "usage": torch.stack(usage.compute()),
        "binned": torch.stack(binned.compute()),
        "fidelity": torch.stack(fidelity.compute()),
    }


def gather(rank: int, address: str, output: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(measured(slice(5) if rank == 0 else slice(5, None)), f"{output}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_measures_over_two_ranks_are_those_of_the_whole(tmp_path):
    context = multiprocessing.get_context("spawn")
    address = f"file://{tmp_path}/rendezvous"
    ranks = [context.Process(target=gather, args=(rank, address, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0, 0]
    expected = measured(slice(None))
    assert expected["count"] == 17 and all(value.isfinite().all() for value in expected.values())
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["count"] == 17
        for name, value in expected.items():
            if name == "fidelity":  # the terms of a batch are added in float32
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
            else:
                torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


def test_no_state_enters_a_checkpoint():
    for metric in (FeatureMoments(Flatten(4)), ClassSpread(3, 4), ReconstructionFidelity(), CodebookUsage(8)):
        assert not metric.state_dict() and not list(metric.parameters()) and not list(metric.buffers())
