"""Sharded checkpoints on gloo ranks: written whole, read on other numbers of ranks, by one process, and as one file."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.distributed_run import (
    alone,
    assert_close,
    generator_config,
    run,
    run_all,
    tokenizer_config,
    write_tokens,
)
from helpers.several_ranks import on_ranks

from discrete_lit import load
from discrete_lit.callbacks.collective_timeout import set_timeouts
from discrete_lit.checkpoints import instantiate, read_checkpoint, save
from discrete_lit.cli.weights import export_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ddp,
    pytest.mark.filterwarnings(
        "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning",
        "ignore:The dirpath has changed from:UserWarning",
    ),
]
STEPS = 8  # two epochs of 52 samples in global batches of 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks to the end; two that are told to end; three, and one, that go on from these."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    save(instantiate(tokenizer_config()), folder / "tokenizer.ckpt")
    write_tokens(folder, str(folder / "tokenizer.ckpt"), {"train": 52, "validation": 12})
    paths = {split: str(folder / split) for split in ("train", "validation")}
    model = generator_config("Autoregressive", str(folder / "tokenizer.ckpt"))

    def settings(name: str, ranks: int, strategy: str = "sharded", **more: Any) -> dict[str, Any]:
        data = {"class": "TokenArrays", "arguments": {**paths, "batch_size": 12 // ranks}}
        where = {"folder": str(folder / name), "ranks": ranks, "strategy": strategy}
        return {"module": model, "data": data, "average": True, **where, **more}

    told = {"number": signal.SIGTERM, "batch": 4, "rank": 1}
    two = on_ranks(2, run_all, folder / "two", [settings("whole", 2), settings("stopped", 2, send=told)])
    shutil.copytree(folder / "stopped", folder / "copy")
    three = on_ranks(3, run_all, folder / "three", [settings("stopped", 3, resume=True)])
    file = folder / "one.ckpt"
    export_weights(str(folder / "copy" / "checkpoints" / "last.ckpt"), "checkpoint", output=str(file))
    one = run(**settings("one", 1, "auto", resume=str(file)))
    return {
        "folder": folder,
        "whole": [rank[0] for rank in two],
        "stopped": [rank[1] for rank in two],
        "three": [rank[0] for rank in three],
        "one": one,
        "file": file,
    }


def joined(ranks: list[dict[str, Any]]) -> tuple[dict[int, float], dict[int, list[int]]]:
    """Losses and samples of the global batches."""
    samples = {batch: [index for rank in ranks for index in rank["batches"][batch][1]] for batch in ranks[0]["batches"]}
    return alone(ranks[0])[0], samples


def last(runs: dict[str, Any], name: str) -> Path:
    return runs["folder"] / name / "checkpoints" / "last.ckpt"


def test_any_number_of_ranks_goes_on(runs: dict[str, Any]) -> None:
    whole, stopped = joined(runs["whole"]), joined(runs["stopped"])
    assert [rank["status"] for rank in runs["stopped"]] == [128 + signal.SIGTERM] * 2
    assert (list(whole[0]), list(stopped[0])) == (list(range(STEPS)), list(range(5)))
    for goes_on in (joined(runs["three"]), alone(runs["one"])):
        assert stopped[1] | goes_on[1] == whole[1] and list(goes_on[1]) == list(range(5, STEPS))
        assert stopped[0] | goes_on[0] == pytest.approx(whole[0], rel=1e-4)


def test_raw_weights_averages_and_optimizer_are_whole(runs: dict[str, Any]) -> None:
    whole, three = (read_checkpoint(last(runs, name), whole=True) for name in ("whole", "stopped"))
    one = read_checkpoint(last(runs, "one"))
    names = set(one["state_dict"])
    moved = [name for name in names if not torch.equal(one["state_dict"][name], one["current_model_state"][name])]
    assert len(moved) > 5
    for other in (three, one):
        for entry in ("state_dict", "current_model_state"):
            assert set(other[entry]) == set(whole[entry]) == names
            assert_close(other[entry], whole[entry])
    assert whole["averaging_state"] == three["averaging_state"] == one["averaging_state"]
    first, second = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, three))
    for name, state in first.items():
        torch.testing.assert_close(second[name]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_accumulated_micro_batches_of_sharded_weights(runs: dict[str, Any], tmp_path: Path) -> None:
    """Masked tokens differ in number from rank to rank and from batch to batch; a step is that of all of them."""
    folder = runs["folder"]
    model = generator_config("Masked", str(folder / "tokenizer.ckpt"))

    def settings(name: str, ranks: int, batch_size: int, strategy: str, accumulated: int) -> dict[str, Any]:
        paths = {split: str(folder / split) for split in ("train", "validation")}
        data = {"class": "TokenArrays", "arguments": {**paths, "batch_size": batch_size}}
        where = {"folder": str(tmp_path / name), "ranks": ranks, "strategy": strategy}
        return {"module": model, "data": data, **where, "max_epochs": 1, "accumulate_grad_batches": accumulated}

    on_ranks(2, run_all, tmp_path / "two", [settings("parts", 2, 3, "sharded", 2)])
    run(**settings("whole", 1, 12, "auto", 1))
    parts, whole = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt", whole=True) for name in ("parts", "whole")
    )
    assert parts["global_step"] == whole["global_step"] == 4
    assert_close(parts["state_dict"], whole["state_dict"])


def test_the_folder_is_used_like_a_file(runs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    generator = load(last(runs, "copy"))
    of_file = load(runs["file"])
    assert all(torch.equal(value, generator.state_dict()[name]) for name, value in of_file.state_dict().items())
    labels = torch.tensor([0, 1])
    assert torch.equal(generator.sample(labels, seed=1), of_file.sample(labels, seed=1))
    with pytest.raises(ValueError, match=r"one\.ckpt' is no folder"):
        export_weights(str(runs["file"]), "checkpoint", output="other.ckpt")


def test_nothing_temporary_is_left(runs: dict[str, Any]) -> None:
    for name in ("whole", "stopped"):
        assert [file.name for file in last(runs, name).parent.iterdir()] == ["last.ckpt"]
        assert sorted(file.suffix for file in last(runs, name).iterdir())[:1] == [""]


def wait_for_another(seconds: float) -> str:
    """On rank 1 come late to a collective; what rank 0 says of it."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    set_timeouts(seconds)
    try:
        for where in (None, group):
            time.sleep(2 * rank)
            dist.all_reduce(torch.zeros(1), group=where)
    except RuntimeError as error:
        return type(error).__name__ + str(error)
    return "met"


@pytest.mark.parametrize(("seconds", "met"), [(0.5, False), (30.0, True)])
def test_a_collective_is_given_up_after_the_set_time(tmp_path: Path, seconds: float, met: bool) -> None:
    found = on_ranks(2, wait_for_another, tmp_path, seconds)
    assert (found[0] == "met") == met, found
