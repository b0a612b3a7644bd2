"""Adversarial training on two real processes (gloo) against one process with the joined batch."""

import json
import signal

import numpy as np
import pytest
import torch
from helpers.distributed_run import (
    CLASSES,
    IMAGE_SIZE,
    alone,
    assert_close,
    joined,
    on_two_ranks,
    run,
    vqgan_config,
    vqvae_config,
)
from PIL import Image

from discrete_lit import load
from discrete_lit.checkpoints import read_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]
SYNC = {"discriminator": {"norm": "sync"}}
# Codes that the first batch gives, an optimizer moves, and every batch revives: they are written within steps.
CODEBOOK = {
    "class_path": "discrete_lit.tokenizers.quantizers.VectorQuantizer",
    "init_args": {"codebook_size": 16, "dim": 4, "codebook_update": "gradient", "revive_below": 1.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def data(folder):
    """`data(batch_size)`: 24 noise images."""
    random = np.random.default_rng(0)
    for place in range(24):
        path = folder / "images" / str(place % CLASSES) / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)).save(path)
    paths = dict.fromkeys(("train", "validation"), str(folder / "images"))
    arguments = {**paths, "image_size": IMAGE_SIZE, "num_workers": 0}
    return lambda batch_size: {"class": "ImageFolder", "arguments": {**arguments, "batch_size": batch_size}}


@pytest.fixture(scope="module")
def pair(folder, data):
    """Results of both ranks by the name of the run."""

    def settings(name, module, **more):
        shared = {"module": module, "data": data(4), "ranks": 2, "strategy": "ddp", "folder": str(folder / name)}
        return shared | {"average": True, "limit_val_batches": 0} | more

    stop = {"number": signal.SIGUSR1, "batch": 3, "rank": 1}
    plan = {
        "group": settings("group", vqgan_config()),
        "sync": settings("sync", vqgan_config(**SYNC)),
        "stopped": settings("stopped", vqgan_config(), send=stop),
        "resumed": settings("stopped", vqgan_config(), resume=True),
        "spoilt": settings("spoilt", vqgan_config(), average=False, spoil={"batch": 2, "rank": 1}),
    }
    told = {"number": signal.SIGTERM, "batch": 3, "rank": 1}
    validated = {"limit_val_batches": 2, "encode": True, "gradient_clip_val": 0.5, "max_epochs": 4}
    for name, quantizer in (("levels", None), ("codes", CODEBOOK)):
        for strategy in ("ddp", "fsdp", "sharded"):
            plan[f"{name}, {strategy}"] = settings(
                f"{name}-{strategy}", vqgan_config(quantizer), strategy=strategy, **validated
            )
    cut = {"strategy": "sharded", **validated}
    plan["cut"] = settings("cut", vqgan_config(CODEBOOK), send=told, **cut)
    plan["gone on"] = settings("cut", vqgan_config(CODEBOOK), resume=True, **cut)
    accumulated = vqvae_config()
    accumulated["init_args"] |= {"codebook_update": "gradient", "revive_below": 1.0}
    for strategy in ("ddp", "sharded"):
        plan[f"accumulated, {strategy}"] = settings(
            f"accumulated-{strategy}", accumulated, strategy=strategy, accumulate_grad_batches=3, max_epochs=4
        )
    ranks = on_two_ranks(folder / "processes", *plan.values())
    return {name: (ranks[0][place], ranks[1][place]) for place, name in enumerate(plan)}


@pytest.mark.parametrize(("name", "settings"), [("group", {}), ("sync", SYNC)])
def test_two_ranks_train_as_one_with_the_joined_batch(pair, folder, data, name, settings):
    one = run(
        vqgan_config(**settings), data(8), str(folder / f"one-{name}"), ranks=1, average=True, limit_val_batches=0
    )
    losses, indices = joined(pair[name])
    expected_losses, expected_indices = alone(one)
    assert indices == expected_indices and list(losses) == list(range(6))
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for result in pair[name]:
        assert_close(result["weights"], one["weights"])
    means = [one["weights"][f"objective.adversarial.lecam.{kind}_mean"] for kind in ("real", "fake")]
    assert all(float(mean) != 0 for mean in means)


def test_averages_go_on_after_a_stop(pair, folder):
    """Both ranks hold the same averages; stopped and resumed they are those of the whole run, bit for bit."""
    first, second = (result["weights"] for result in pair["group"])
    checkpoint = torch.load(folder / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)
    raw = checkpoint["current_model_state"]
    assert any(not torch.equal(first[name], value) for name, value in raw.items())
    assert {batch for batch in joined(pair["stopped"])[0]} == {0, 1, 2, 3}
    for weights in (second, *(result["weights"] for result in pair["resumed"])):
        assert all(torch.equal(weights[name], value) for name, value in first.items())
    loaded = load(folder / "stopped" / "checkpoints" / "last.ckpt").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in first.items())


def test_a_batch_that_is_bad_on_one_rank_is_skipped_on_both(pair, folder):
    first, second = (result["weights"] for result in pair["spoilt"])
    assert all(value.isfinite().all() for value in first.values())
    assert all(torch.equal(second[name], value) for name, value in first.items())
    (file,) = (folder / "spoilt" / "alarms").iterdir()
    of_ranks = json.loads(file.read_text())["ranks"]
    assert [len(of_rank["not_finite"]) for of_rank in of_ranks] == [0, 1]
    assert of_ranks[1]["not_finite"] == of_ranks[1]["key"][:1]
    losses = joined(pair["group"])[0]
    spoilt = {batch: pair["spoilt"][0]["batches"][batch][0] for batch in losses}
    assert [spoilt[batch] == losses[batch] for batch in range(3)] == [True, True, False]
    assert spoilt[2] != spoilt[2] and all(np.isfinite(spoilt[batch]) for batch in (3, 4, 5))


def saved(folder, name):
    """Averages, raw weights and the optimizer's state of the last checkpoint, as a whole."""
    return read_checkpoint(folder / name / "checkpoints" / "last.ckpt", whole=True)


@pytest.mark.parametrize("strategy", ["fsdp", "sharded"])
@pytest.mark.parametrize("quantizer", ["levels", "codes"])
def test_sharded_weights_train_as_whole_ones(pair, folder, quantizer, strategy):
    """Discriminator, adaptive weight, clipping, averages, and the codes that steps write."""
    whole, sharded = pair[f"{quantizer}, ddp"], pair[f"{quantizer}, {strategy}"]
    losses, indices = joined(sharded)
    expected_losses, expected_indices = joined(whole)
    assert indices == expected_indices and losses == pytest.approx(expected_losses, rel=1e-4)
    for one, other in zip(sharded, whole, strict=True):
        assert one["validation"] == pytest.approx(other["validation"], rel=1e-4)
        # Behind each step with the weights that it left.
        for ours, theirs in zip(one["tokens"], other["tokens"], strict=True):
            assert float((ours != theirs).float().mean()) < 0.05
    ours, theirs = (saved(folder, f"{quantizer}-{each}") for each in (strategy, "ddp"))
    assert ours["hyper_parameters"] == theirs["hyper_parameters"]
    for entry in ("state_dict", "current_model_state"):
        assert_close(ours[entry], theirs[entry])
    loaded = load(folder / f"{quantizer}-{strategy}" / "checkpoints" / "last.ckpt").state_dict()
    assert_close(dict(loaded), {name: ours["state_dict"][name] for name in loaded})


def test_sharded_weights_go_on_after_a_stop(pair, folder):
    before, after = joined(pair["cut"]), joined(pair["gone on"])
    assert list(before[0]) == [0, 1, 2, 3] and list(after[0]) == list(range(4, 12))
    assert (before[0] | after[0], before[1] | after[1]) == joined(pair["codes, sharded"])
    ours, whole = saved(folder, "cut"), saved(folder, "codes-sharded")
    for entry in ("state_dict", "current_model_state"):
        assert not [name for name, value in whole[entry].items() if not torch.equal(ours[entry][name], value)]


def test_codes_that_are_revived_behind_micro_batches_reach_the_shards(pair, folder):
    losses, expected = (joined(pair[f"accumulated, {strategy}"])[0] for strategy in ("sharded", "ddp"))
    assert len(expected) == 12 and losses == pytest.approx(expected, rel=1e-4)
    ours, theirs = (saved(folder, f"accumulated-{strategy}") for strategy in ("sharded", "ddp"))
    assert_close(ours["state_dict"], theirs["state_dict"])
