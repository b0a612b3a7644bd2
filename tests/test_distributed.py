"""Two real processes (gloo) against one process with the joined batch, and against their own interruption."""

import signal

import numpy as np
import pytest
import torch
from helpers.distributed_run import (
    CLASSES,
    IMAGE_SIZE,
    alone,
    assert_close,
    generator_config,
    joined,
    on_two_ranks,
    run,
    tokenizer_config,
    vqvae_config,
    write_tokens,
)
from PIL import Image

from discrete_lit import load
from discrete_lit.checkpoints import instantiate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]
STEPS = 12  # two epochs of 52 samples in global batches of 8, the rest dropped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def tokenizer(folder):
    torch.manual_seed(0)
    module = instantiate(tokenizer_config())
    path = folder / "tokenizer.ckpt"
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return str(path)


@pytest.fixture(scope="module")
def token_data(folder, tokenizer):
    """`token_data(batch_size)`: 52 training and 11 validation samples, of which the ranks get different numbers."""
    write_tokens(folder, tokenizer, {"train": 52, "validation": 11, "uneven": 9})
    paths = {split: str(folder / split) for split in ("train", "validation")}
    return lambda batch_size: {"class": "TokenArrays", "arguments": {**paths, "batch_size": batch_size}}


@pytest.fixture(scope="module")
def image_data(folder):
    """`image_data(batch_size)`: 16 noise images, whole."""
    random = np.random.default_rng(0)
    for place in range(16):
        path = folder / "images" / str(place % CLASSES) / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)).save(path)
    paths = dict.fromkeys(("train", "validation"), str(folder / "images"))
    arguments = {**paths, "image_size": IMAGE_SIZE, "num_workers": 0}
    return lambda batch_size: {"class": "ImageFolder", "arguments": {**arguments, "batch_size": batch_size}}


@pytest.fixture(scope="module")
def one_process(folder, tokenizer, token_data):
    """`one_process(family)`: the run of one process with global batches of 8."""
    done = {}

    def get(family):
        if family not in done:
            where = str(folder / f"one-{family}")
            done[family] = run(generator_config(family, tokenizer), token_data(8), where, ranks=1)
        return done[family]

    return get


@pytest.fixture(scope="module")
def pair(folder, tokenizer, token_data, image_data):
    """Results of both ranks by the name of the run; one start of two processes for all, and one after the kill."""

    def settings(name, family, strategy="ddp", **more):
        module, where = generator_config(family, tokenizer), str(folder / name)
        shared = {"module": module, "data": token_data(4), "ranks": 2, "strategy": strategy, "folder": where}
        return shared | more

    arguments = {**token_data(4)["arguments"], "validation": str(folder / "uneven")}
    uneven = {"class": "TokenArrays", "arguments": arguments}
    preempt = {"number": signal.SIGUSR1, "batch": 3, "rank": 1}
    kill = {"number": signal.SIGKILL, "batch": 9, "rank": None}
    plan = {
        "masked": settings("masked", "Masked"),
        "autoregressive": settings("autoregressive", "Autoregressive"),
        "discretediffusion": settings("discretediffusion", "DiscreteDiffusion"),
        # Told to end in the third step; the ranks agree at the fourth.
        "preempted": settings("preempted", "Autoregressive", send={**preempt, "batch": 2}, agree_every=2),
        "after preemption": settings("preempted", "Autoregressive", resume=True),
        "sharded": settings("sharded", "Autoregressive", "fsdp"),
        "sharded, preempted": settings("sharded-preempted", "Autoregressive", "fsdp", send=preempt),
        "sharded, after preemption": settings("sharded-preempted", "Autoregressive", "fsdp", resume=True),
        "averaged": settings("averaged", "Autoregressive", average=True),
        "sharded, averaged": settings("sharded-averaged", "Autoregressive", "fsdp", average=True),
        "uneven": settings("uneven", "Masked", "fsdp", val_check_interval=1, data=uneven),
        "vqvae": settings("vqvae", "Masked", module=vqvae_config(), data=image_data(4)),
        "killed": settings("killed", "Masked", send=kill),
    }
    ranks = on_two_ranks(folder / "first", *plan.values(), expect_kill=True)
    results = {name: (ranks[0][place], ranks[1][place]) for place, name in enumerate(plan) if name != "killed"}
    ranks = on_two_ranks(folder / "second", settings("killed", "Masked", resume=True))
    return {**results, "after the kill": (ranks[0][0], ranks[1][0])}


def scalars(run_folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_folder / "log"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


@pytest.mark.parametrize("family", ["Masked", "Autoregressive", "DiscreteDiffusion"])
def test_two_ranks_train_as_one_with_the_joined_batch(pair, one_process, family, folder):
    ranks, one = pair[family.lower()], one_process(family)
    losses, indices = joined(ranks)
    expected_losses, expected_indices = alone(one)
    assert indices == expected_indices and list(losses) == list(range(STEPS))
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert len(set(losses.values())) == STEPS
    for result in ranks:
        assert_close(result["weights"], one["weights"])
        assert result["validation"] == pytest.approx(one["validation"], rel=1e-4)
    assert one["validation"][STEPS] < one["validation"][STEPS // 2]
    norms = scalars(folder / f"one-{family}", "gradient_norm/total")
    assert scalars(folder / family.lower(), "gradient_norm/total") == pytest.approx(norms, rel=1e-3)


def test_a_signal_to_one_rank_stops_all_at_the_same_batch_and_they_go_on(pair, folder):
    assert [result["status"] for result in pair["preempted"]] == [128 + signal.SIGUSR1] * 2
    before, after = joined(pair["preempted"]), joined(pair["after preemption"])
    assert (list(before[0]), list(after[0])) == (list(range(4)), list(range(4, STEPS)))
    whole = joined(pair["autoregressive"])
    assert (before[0] | after[0], before[1] | after[1]) == whole
    assert scalars(folder / "preempted", "train/loss") == scalars(folder / "autoregressive", "train/loss")


def test_a_killed_run_goes_on_from_its_last_checkpoint(pair):
    losses, indices = joined(pair["after the kill"])
    whole_losses, whole_indices = joined(pair["masked"])
    assert list(losses) == list(range(8, STEPS))
    assert losses == {batch: whole_losses[batch] for batch in losses}
    assert indices == {batch: whole_indices[batch] for batch in losses}
    for result, whole in zip(pair["after the kill"], pair["masked"], strict=True):
        assert all(torch.equal(value, whole["weights"][name]) for name, value in result["weights"].items())


def test_sharded_training_equals_ddp(pair, folder):
    losses, indices = joined(pair["sharded"])
    expected_losses, expected_indices = joined(pair["autoregressive"])
    assert indices == expected_indices
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    norms = scalars(folder / "autoregressive", "gradient_norm/total")
    assert scalars(folder / "sharded", "gradient_norm/total") == pytest.approx(norms, rel=1e-3)


def test_sharded_training_goes_on_after_preemption(pair):
    before, after = joined(pair["sharded, preempted"]), joined(pair["sharded, after preemption"])
    assert list(before[0]) == list(range(4))
    assert (before[0] | after[0], before[1] | after[1]) == joined(pair["sharded"])


def test_a_sharded_run_leaves_an_ordinary_checkpoint(pair, folder):
    (checkpoint,) = (folder / "sharded" / "checkpoints").glob("last.ckpt")
    generator = load(checkpoint)
    weights = pair["autoregressive"][0]["weights"]
    assert_close(dict(generator.state_dict()), weights)
    tokens = generator.sample(torch.tensor([0, 1, CLASSES]), seed=1)
    assert tokens.shape == (3, 4, 4)
    assert 0 <= int(tokens.min()) and int(tokens.max()) < generator.vocab_size
    other = load(folder / "autoregressive" / "checkpoints" / "last.ckpt")
    assert torch.equal(tokens, other.sample(torch.tensor([0, 1, CLASSES]), seed=1))


def test_a_sharded_run_averages_its_weights(pair, folder):
    """The checkpoint holds the averages of all parts: those of whole replicas, and not the last weights."""
    sharded, whole, last = (
        load(folder / name / "checkpoints" / "last.ckpt").state_dict()
        for name in ("sharded-averaged", "averaged", "autoregressive")
    )
    assert_close(dict(sharded), dict(whole))
    moved = [name for name in whole if not torch.equal(whole[name], last[name])]
    assert any(name.startswith("backbone.") for name in moved)


def test_sharded_validation_refuses_uneven_ranks_instead_of_waiting(pair):
    for result in pair["uneven"]:
        assert "different numbers of validation batches, [1, 2]" in result["error"]
        assert "limit_val_batches to 1" in result["error"]


def test_a_codebook_moves_by_the_latents_of_all_ranks(pair, folder, image_data):
    one = run(vqvae_config(), image_data(8), str(folder / "one-vqvae"), ranks=1)
    losses, indices = joined(pair["vqvae"])
    assert (list(losses), indices) == ([0, 1, 2, 3], alone(one)[1])
    assert losses == pytest.approx(alone(one)[0], rel=1e-4)
    start = run(vqvae_config(), image_data(8), str(folder / "untrained-vqvae"), ranks=1, max_steps=0)["weights"]
    for name in ("codes", "cluster_size", "embedding_sum"):
        moved = one["weights"][f"quantizer.codebook.{name}"]
        assert not torch.allclose(moved, start[f"quantizer.codebook.{name}"])
        for result in pair["vqvae"]:
            torch.testing.assert_close(result["weights"][f"quantizer.codebook.{name}"], moved, rtol=1e-4, atol=1e-6)
