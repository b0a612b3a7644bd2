"""Codebooks of residual quantizers on two ranks are those of one process with the joined batch."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from discrete_lit.tokenizers.quantizers import MultiScaleResidualQuantizer, Quantizer, ResidualQuantizer


def quantizers() -> dict[str, Quantizer]:
    torch.manual_seed(0)
    ema = {"codebook_update": "ema", "decay": 0.7, "revive_below": 1.0}
    return {
        "shared": ResidualQuantizer(12, 3, 3, shared_codebook=True, decay=0.7),
        "separate": ResidualQuantizer(12, 3, 3, shared_codebook=False, decay=0.7),
        "scales": MultiScaleResidualQuantizer(12, 3, [1, 2, 4], **ema),
    }


def trained(batches: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    made = quantizers()
    for quantizer in made.values():
        for batch in batches:
            quantizer.train()(batch)
    return {name: quantizer.state_dict() for name, quantizer in made.items()}


def joined_batches() -> list[Tensor]:
    return list(torch.randn(4, 6, 4, 4, 3, generator=torch.Generator().manual_seed(0)))


def on_one_rank(rank: int, address: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(trained([batch.chunk(2)[rank] for batch in joined_batches()]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_ranks_are_one_process_on_the_joined_batch(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    address = f"file://{tmp_path}/rendezvous"
    ranks = [context.Process(target=on_one_rank, args=(rank, address, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0, 0]
    expected = trained(joined_batches())
    untrained = {name: quantizer.state_dict() for name, quantizer in quantizers().items()}
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, state in expected.items():
            torch.testing.assert_close(found[name], state, rtol=1e-4, atol=1e-5)
            moved = [
                key for key in state if key.endswith("codes") and not torch.equal(state[key], untrained[name][key])
            ]
            assert len(moved) == (3 if name == "separate" else 1)
