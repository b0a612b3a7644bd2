"""Two ranks with unequal numbers of a batch's rows end with the codebook of one process with the whole batch."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from discrete_lit.tokenizers.quantizers import Codebook, VectorQuantizer

EMA: dict[str, Any] = {"size": 24, "dim": 3, "decay": 0.7}
SETTINGS: dict[str, dict[str, Any]] = {
    "running means": {**EMA, "init": "data"},
    "k-means": {**EMA, "init": "kmeans"},
    "revival": {**EMA, "init": "kmeans", "revive_below": 2.0},
    "sphere": {**EMA, "init": "kmeans", "revive_below": 2.0, "normalize": True},
    "gradient": {**EMA, "init": "data", "revive_below": 2.0, "update": "gradient"},
}
STEPS, ROWS = 6, 80


def batches() -> torch.Tensor:
    """Latents in a few dense clouds, so that codes die; some are not finite."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(STEPS, ROWS, 3, generator=generator).pow(3)
    latents[:, 11, 0], latents[:, 70, 2] = torch.nan, torch.inf
    return latents


def train(settings: dict[str, Any], rows: slice) -> dict[str, torch.Tensor]:
    codebook = Codebook(**settings)
    for batch in batches():
        latents = batch[rows]
        codebook.prepare(latents)
        codebook.observe(latents, codebook.search(latents))
    return codebook.state_dict()


def quantizer_loss(rows: slice) -> dict[str, torch.Tensor]:
    """Loss terms of a whole quantizer whose entropies are those of the joined batch."""
    torch.manual_seed(1)
    quantizer = VectorQuantizer(
        16, 3, codebook_update="gradient", codebook_init="normal", entropy_weight=0.1, entropy_temperature=0.5
    )
    return quantizer(batches()[0].nan_to_num(0, 0, 0)[rows]).losses


def rank_of_two(rank: int, address: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    own = slice(0, 50) if rank == 0 else slice(50, ROWS)
    made: dict[str, Any] = {name: train(settings, own) for name, settings in SETTINGS.items()}
    made["losses"] = quantizer_loss(slice(0, 40) if rank == 0 else slice(40, ROWS))
    torch.save(made, f"{output}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    arguments = f"file://{folder}/rendezvous", str(folder)
    processes = [context.Process(target=rank_of_two, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_are_one_process_on_the_joined_batch(pair, name: str) -> None:
    alone = train(SETTINGS[name], slice(0, ROWS))
    assert alone.keys() == pair[0][name].keys()
    for key, value in alone.items():
        assert torch.equal(pair[0][name][key], pair[1][name][key]), key
        torch.testing.assert_close(pair[0][name][key], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.slow
@pytest.mark.ddp
def test_entropies_are_those_of_the_joined_batch(pair) -> None:
    alone = quantizer_loss(slice(0, ROWS))
    for name in ("sample_entropy", "batch_entropy"):
        for rank in (0, 1):
            torch.testing.assert_close(pair[rank]["losses"][name], alone[name])


def test_codes_die_in_these_batches() -> None:
    """What the comparison of revivals needs: codes are replaced in it, at more than one step."""
    settings = SETTINGS["revival"]
    alone = train(settings, slice(0, ROWS))
    without = train({**settings, "revive_below": None}, slice(0, ROWS))
    assert (without["cluster_size"] < 2.0).sum() > 3
    assert not torch.allclose(alone["codes"], without["codes"])
