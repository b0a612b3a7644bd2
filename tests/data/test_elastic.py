"""A run goes on with other ranks, workers, batch sizes and accumulation, and sees the same global batches."""

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.elastic_ranks import take_steps
from helpers.several_ranks import on_ranks
from lightning import LightningModule, Trainer

from discrete_lit.cli.resume import ContinueExactly
from discrete_lit.data import ImageShards, TokenArrays
from discrete_lit.data.data_module import ResumableDataModule
from discrete_lit.data.loaders import BatchSource, TrainingLoader
from discrete_lit.data.shard_order import SampleStream
from discrete_lit.data.shard_set import Shard, ShardSet

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning",
    "ignore:.*`tensorboardX` has been removed:UserWarning",
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:The number of training batches:UserWarning",
    "ignore:You passed in a `val_dataloader`:UserWarning",
)


class Cluster(NamedTuple):
    """Ranks, the batch size of each, the batches that it accumulates, and the workers of each."""

    ranks: int
    batch_size: int
    accumulated: int = 1
    workers: int = 1


# Of global batches of 12; 43 samples have three of them.
CLUSTERS = (Cluster(1, 12), Cluster(2, 6, 1, 3), Cluster(3, 2, 2, 2), Cluster(12, 1), Cluster(1, 4, 3, 2))


def loaders_on(make_data: Callable[..., ResumableDataModule], cluster: Cluster) -> list[TrainingLoader]:
    """The loader of each rank, without processes, which decide nothing."""
    data = make_data(batch_size=cluster.batch_size, num_workers=cluster.workers)
    sources = [data.training_source(rank, cluster.ranks) for rank in range(cluster.ranks)]
    return [TrainingLoader(source, accumulated=cluster.accumulated, max_bad_fraction=0.5) for source in sources]


def train(loaders: list[TrainingLoader], steps: int) -> list[list[tuple[int, int, str]]]:
    """Take the global batches of some optimizer steps: index, label and content of each sample."""

    def forever(loader: TrainingLoader) -> Iterator[Any]:
        while True:
            yield from loader

    ranks = [forever(loader) for loader in loaders]
    taken = []
    for _ in range(steps):
        step: list[tuple[int, int, str]] = []
        for _ in range(loaders[0].accumulated):
            for batch in map(next, ranks):
                content = next(batch[name] for name in ("image", "tokens", "latents") if name in batch)
                hashes = [hashlib.sha256(sample.contiguous().numpy().tobytes()).hexdigest() for sample in content]
                step += zip(batch["index"].tolist(), batch["label"].tolist(), hashes, strict=True)
        taken.append(step)
    return taken


@pytest.mark.parametrize("first", range(len(CLUSTERS)))
def test_global_batches_stay_whatever_the_cluster(make_data: Callable[..., ResumableDataModule], first: int) -> None:
    clusters = [*CLUSTERS[first:], *CLUSTERS[:first]]
    whole = train(loaders_on(make_data, clusters[0]), 8)
    assert len({index for step in whole for index, _, _ in step}) == 8 * 12
    seen, state = [], None
    # In the first epoch, over its end, at the end of the second, and in the third.
    for cluster, steps in zip(clusters, (1, 3, 2, 1, 1), strict=True):
        loaders = loaders_on(make_data, cluster)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        seen += train(loaders, steps)
        assert len({str(loader.state_dict()) for loader in loaders}) == 1
        state = loaders[0].state_dict()
    assert seen == whole


def test_workers_that_are_processes_go_on_too(make_data: Callable[..., ResumableDataModule]) -> None:
    whole = train(loaders_on(make_data, Cluster(2, 6, 1, 2)), 4)
    before = loaders_on(make_data, Cluster(2, 6, 1, 2))
    train(before, 1)
    (after,) = loaders_on(make_data, Cluster(1, 4, 3, 2))
    processes = TrainingLoader(after.source, 2, accumulated=3, max_bad_fraction=0.5)
    processes.load_state_dict(before[0].state_dict())
    assert train([processes], 3) == whole[1:]


def test_a_resume_reads_nothing_of_what_was_taken(
    tmp_path: Path, make_shards: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make_shards(tmp_path / "shards", [8] * 10))

    def data(cluster: Cluster) -> ResumableDataModule:
        workers, batch = cluster.workers, cluster.batch_size
        return ImageShards(folder, image_size=8, batch_size=batch, num_workers=workers, shuffle_window=0)

    before = loaders_on(lambda **_: data(Cluster(1, 8)), Cluster(1, 8))
    train(before, 9)
    opened: list[str] = []
    original = Shard.open
    monkeypatch.setattr(Shard, "open", lambda shard: opened.append(shard.url) or original(shard))
    after = loaders_on(lambda **_: data(Cluster(4, 2)), Cluster(4, 2))
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
    train(after, 1)
    assert len(set(opened)) == 1


def stored(source: Any, epoch: int, number: int) -> list[int]:
    """The samples of a batch by their numbers in the set, by the arithmetic of its order alone."""
    if not hasattr(source, "positions"):
        return source.order.permutation(epoch)[source.order.positions(number)].tolist()
    splits, places = source.order.locate(source.positions(number))
    starts = np.cumsum([0, *(shard.count for shard in source.shards.shards)])
    shuffled = SampleStream.of_epoch(source.shards, seed=source.pipeline.seed, epoch=epoch).order
    stream = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shuffled])
    given_out = {split: source.order.given_out(epoch, split) for split in set(splits.tolist())}
    return [int(stream[given_out[split][place]]) for split, place in zip(splits.tolist(), places.tolist(), strict=True)]


@pytest.mark.parametrize("kind", ["tokens", "shards"])
def test_sixty_four_ranks(kind: str, tmp_path: Path, make_token_folder: Callable[..., Path]) -> None:
    """By arithmetic alone: each global batch of 64 ranks, and of what goes on from them, is that of one rank."""
    count = 1000
    if kind == "tokens":
        folder = str(make_token_folder(tmp_path / "tokens", count=count))

    def make(batch_size: int, num_workers: int) -> ResumableDataModule:
        if kind == "tokens":
            return TokenArrays(folder, batch_size=batch_size, num_workers=num_workers)
        data = ImageShards("none.tar", image_size=8, batch_size=batch_size, num_workers=num_workers, shuffle_window=9)
        sizes = [23 + number % 5 for number in range(40)]
        sizes[-1] += count - sum(sizes)
        shards = tuple(Shard(f"{number}.tar", size) for number, size in enumerate(sizes))
        data.__dict__["shards"] = {"train": ShardSet(shards, ())}
        return data

    # Global batches of 192: five in an epoch. The numbers of steps on each cluster cross two ends of epochs.
    plan = [(Cluster(64, 3, 1, 2), 3), (Cluster(96, 1, 2, 1), 4), (Cluster(8, 24, 1, 5), 1), (Cluster(48, 2, 2, 2), 4)]
    alone = loaders_on(make, Cluster(1, 192))[0]
    alone.source.follow(loaders_on(make, plan[0][0])[0].source.layout())
    state, step = None, 0
    for cluster, steps in plan:
        loaders = loaders_on(make, cluster)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(steps):
            epoch, number = divmod(step, 5)
            joined = []
            for _ in range(cluster.accumulated):
                for loader in loaders:
                    at_end = loader.consumed >= loader.batches_per_epoch
                    loader.epoch, loader.consumed = loader.epoch + at_end, 0 if at_end else loader.consumed
                    assert loader.epoch == epoch
                    joined += stored(loader.source, epoch, loader.consumed)
                    loader.consumed += 1
            assert joined == stored(alone.source, epoch, number)
            assert len(set(joined)) == 192
            step += 1
        state = loaders[0].state_dict()
        assert all(loader.state_dict() == state for loader in loaders)


@pytest.mark.slow
def test_sixty_four_processes(tmp_path: Path, make_token_folder: Callable[..., Path]) -> None:
    """Joined by gloo: they take the global batches of one rank, and so do 48 and 8 that go on from them."""
    folder = str(make_token_folder(tmp_path / "tokens", count=1000))
    alone = TokenArrays(folder, batch_size=192, num_workers=0).training_loader(0, 1)
    expected: list[list[int]] = []
    while len(expected) < 9:
        expected += [batch["index"].tolist() for batch in alone]
    state, taken = None, []
    # Global batches of 192: five in an epoch.
    for cluster, steps in ((Cluster(64, 3), 3), (Cluster(48, 2, 2), 4), (Cluster(8, 24), 2)):
        where = tmp_path / f"{cluster.ranks} ranks"
        settings = (folder, cluster.batch_size, cluster.accumulated, steps, state)
        ranks = on_ranks(cluster.ranks, take_steps, where, *settings)
        print(f"{cluster.ranks} ranks agree in {1e3 * max(rank['agreement'] for rank in ranks):.2f} ms")
        assert all(rank["same"] and rank["global"] == ranks[0]["global"] for rank in ranks)
        taken, state = taken + ranks[0]["global"], ranks[0]["state"]
    assert taken == expected[:9]


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (
            Cluster(1, 8),
            r"global batch was 12, is 8 \(batch_size 8 x 1 rank x accumulate_grad_batches 1\); batch_size 6",
        ),
        (Cluster(2, 4, 2), r"was 12, is 16 .*; batch_size 3 with accumulate_grad_batches 2 makes it 12"),
        (Cluster(5, 2), r"was 12, is 10 .* 5 ranks cannot share 12 samples equally"),
    ],
)
def test_another_global_batch_is_refused_inside_an_epoch(
    make_data: Callable[..., ResumableDataModule], cluster: Cluster, message: str
) -> None:
    before = loaders_on(make_data, Cluster(1, 12))
    train(before, 1)
    with pytest.raises(ValueError, match=message):
        loaders_on(make_data, cluster)[0].load_state_dict(before[0].state_dict())


def test_a_state_inside_an_optimizer_step_goes_on_with_its_own_batches_alone(
    make_data: Callable[..., ResumableDataModule],
) -> None:
    (before,) = loaders_on(make_data, Cluster(1, 4, 3))
    next(iter(before))
    (same,) = loaders_on(make_data, Cluster(1, 4, 3))
    same.load_state_dict(before.state_dict())
    assert same.consumed == 1
    with pytest.raises(ValueError, match="between two accumulated batches"):
        loaders_on(make_data, Cluster(1, 12))[0].load_state_dict(before.state_dict())


def test_a_state_of_an_earlier_version(make_data: Callable[..., ResumableDataModule]) -> None:
    """It says the batch size and ranks of shards, or their product, and nothing of accumulation."""
    whole = train(loaders_on(make_data, Cluster(2, 6, 1, 2)), 4)
    before = loaders_on(make_data, Cluster(2, 6, 1, 2))
    train(before, 1)
    state = before[0].state_dict()
    layout, global_batch = state.pop("layout"), state.pop("global_batch")
    state["identity"] |= layout or {"samples_per_step": global_batch}
    after = loaders_on(make_data, Cluster(3, 4, 1, 1))
    for loader in after:
        loader.load_state_dict(state)
    assert train(after, 3) == whole[1:]


@pytest.mark.parametrize("layout", [{"batch_size": 12, "world_size": 1, "workers": 0}, {"batch_size": 12}])
def test_a_layout_that_cannot_be_is_refused(
    tmp_path: Path, make_shards: Callable[..., Path], layout: dict[str, int]
) -> None:
    data = ImageShards(str(make_shards(tmp_path / "shards", [30])), image_size=8, batch_size=12, num_workers=0)
    loader = data.training_loader(0, 1)
    next(iter(loader))
    with pytest.raises(ValueError, match="data state has the layout"):
        data.training_loader(0, 1).load_state_dict(loader.state_dict() | {"layout": layout})


def test_an_epoch_has_whole_optimizer_steps(make_data: Callable[..., ResumableDataModule]) -> None:
    data = make_data(batch_size=4)
    assert len(TrainingLoader(data.training_source(0, 1), accumulated=4)) == 8
    with pytest.raises(ValueError, match=r"do not fill one optimizer step of 44 .*accumulate_grad_batches 11"):
        TrainingLoader(data.training_source(0, 1), accumulated=11)


def test_far_more_is_passed_over_than_read(
    tmp_path: Path, make_shards: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(make_shards(tmp_path / "shards", [60]))

    def source(batch_size: int, ranks: int, workers: int) -> BatchSource:
        data = ImageShards(folder, image_size=8, batch_size=batch_size, num_workers=workers)
        return data.training_source(0, ranks)

    source(2, 6, 1).follow({"batch_size": 4, "world_size": 3, "workers": 1})
    assert not caplog.records
    source(1, 12, 2).follow({"batch_size": 12, "world_size": 1, "workers": 1})
    (record,) = caplog.records
    assert "order of 1 ranks with 1 workers" in record.getMessage() and "over 24 samples" in record.getMessage()


class Steps(LightningModule):
    """Writes down the samples of each optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batch: list[int] = []
        self.steps: dict[int, list[int]] = {}

    def training_step(self, batch: dict[str, Any], batch_index: int) -> torch.Tensor:
        self.batch += batch["index"].tolist()
        return self.weight.sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps[self.trainer.global_step] = self.batch
        self.batch = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_trainer_counts_in_batches_of_the_new_size(tmp_path: Path, make_token_folder: Callable[..., Path]) -> None:
    folder = str(make_token_folder(tmp_path / "tokens", count=43))

    def fit(steps: int, batch_size: int, accumulated: int, resume: str | None = None) -> Steps:
        model = Steps()
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            max_steps=steps,
            accumulate_grad_batches=accumulated,
            limit_val_batches=0,
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[ContinueExactly()] if resume else [],
        )
        trainer.fit(model, datamodule=TokenArrays(folder, batch_size=batch_size), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model

    whole = fit(11, 12, 1).steps
    steps = fit(2, 12, 1).steps
    for until, batch_size, accumulated in ((4, 4, 3), (7, 6, 2), (8, 2, 6), (11, 12, 1)):
        steps |= fit(until, batch_size, accumulated, str(tmp_path / f"{max(steps) + 1}.ckpt")).steps
    assert steps == whole and len(steps) == 11


def test_any_sequence_of_clusters(tmp_path: Path, make_token_folder: Callable[..., Path]) -> None:
    """Random ones, of global batches of 24."""
    folder = str(make_token_folder(tmp_path / "tokens", count=200))
    rng = random.Random(0)
    pick = [Cluster(r, 24 // r // a, a) for r in (1, 2, 3, 4, 6, 8, 12, 24) for a in (1, 2) if 24 % (r * a) == 0]
    state: Any = None
    whole = train(loaders_on(lambda **s: TokenArrays(folder, **s), Cluster(1, 24)), 30)
    seen: list[Any] = []
    while len(seen) < 30:
        loaders = loaders_on(lambda **s: TokenArrays(folder, **s), rng.choice(pick))
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        seen += train(loaders, min(rng.randint(1, 6), 30 - len(seen)))
        state = loaders[0].state_dict()
    assert seen == whole
