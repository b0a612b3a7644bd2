"""Entropy terms and codebooks of residual quantizers on two ranks are those of one process with the joined batch."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from discrete_lit.tokenizers.quantizers import MultiScaleResidualQuantizer, Quantizer, ResidualQuantizer
from discrete_lit.tokenizers.quantizers.entropy import bits_entropy, joint_bits_entropy, softmax_entropies


def entropies(rows: Tensor, *, across_ranks: bool = True) -> tuple[Tensor, Tensor]:
    """A mixture of all terms, of `(n, 13)`, and its gradient."""
    rows = rows.detach().requires_grad_()
    per_sample, batch = softmax_entropies(rows[:, :7], across_ranks=across_ranks)
    pairs = rows[:, 7:].unflatten(1, (2, -1))
    bits = bits_entropy(rows[:, 7:]) - 2 * joint_bits_entropy(pairs, across_ranks=across_ranks)
    value = per_sample - 3 * batch + bits
    (gradient,) = torch.autograd.grad(value, rows)
    return value.detach(), gradient


def quantizers() -> dict[str, Quantizer]:
    torch.manual_seed(0)
    ema = {"codebook_update": "ema", "codebook_init": "data", "decay": 0.7, "revive_below": 1.0}
    return {
        "shared": ResidualQuantizer(12, 3, depth=3, shared_codebook=True, decay=0.7),
        "separate": ResidualQuantizer(12, 3, depth=3, shared_codebook=False, decay=0.7),
        "scales": MultiScaleResidualQuantizer(12, 3, scales=[1, 2, 4], **ema),
    }


def trained(batches: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    made = quantizers()
    for quantizer in made.values():
        for batch in batches:
            quantizer.train()(batch)
    return {name: quantizer.state_dict() for name, quantizer in made.items()}


def joined() -> tuple[Tensor, list[Tensor]]:
    """Rows for the entropies, and batches of latents."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(12, 13, dtype=torch.float64, generator=random), list(
        torch.randn(4, 6, 4, 4, 3, generator=random)
    )


def on_one_rank(rank: int, address: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    rows, batches = joined()
    own = rows.chunk(2)[rank]
    joint_and_apart = [entropies(own, across_ranks=across_ranks) for across_ranks in (True, False)]
    results = joint_and_apart, trained([batch.chunk(2)[rank] for batch in batches])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_each_rank(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    address = f"file://{folder}/rendezvous"
    ranks = [context.Process(target=on_one_rank, args=(rank, address, str(folder))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.ddp
@pytest.mark.parametrize("across_ranks", [True, False])
def test_entropies(on_each_rank, across_ranks: bool) -> None:
    """Those of the joint batch, or the mean of those that each rank would have alone."""
    rows = joined()[0]
    value, gradient = entropies(rows)
    if not across_ranks:
        parts = [entropies(part) for part in rows.chunk(2)]
        apart = torch.stack([part for part, _ in parts]).mean()
        assert abs(float(apart - value)) > 0.1
        value, gradient = apart, torch.cat([part for _, part in parts]) / 2
    found = [joint_and_apart[0 if across_ranks else 1] for joint_and_apart, _ in on_each_rank]
    for on_rank, _ in found:
        torch.testing.assert_close(on_rank, value, rtol=1e-12, atol=0)
    # DDP averages the gradients of its ranks.
    averaged = torch.cat([on_rank for _, on_rank in found]) / 2
    torch.testing.assert_close(averaged, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.ddp
@pytest.mark.parametrize("name", ["shared", "separate", "scales"])
def test_codebooks(on_each_rank, name: str) -> None:
    expected, untrained = trained(joined()[1])[name], quantizers()[name].state_dict()
    for _, states in on_each_rank:
        torch.testing.assert_close(states[name], expected, rtol=1e-4, atol=1e-5)
    codes = [key for key in expected if key.endswith("codes")]
    assert len(codes) == (3 if name == "separate" else 1)
    assert not any(torch.equal(expected[key], untrained[key]) for key in codes)
