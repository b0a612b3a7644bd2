"""A run that was stopped and resumed sees what an uninterrupted run would have seen, to the bit."""

import errno
import hashlib
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from discrete_lit.cli.resume import ContinueExactly
from discrete_lit.data import ImageFolder, ImageShards, LatentArrays, TokenArrays
from discrete_lit.data.data_module import ResumableDataModule
from discrete_lit.data.loaders import TrainingLoader

pytestmark = pytest.mark.filterwarnings(
    # Advice about the size of the machine that the test runs on.
    "ignore:This DataLoader will create:UserWarning",
    "ignore:The number of training batches:UserWarning",
    "ignore:.*`tensorboardX` has been removed:UserWarning",
)

Seen = tuple[tuple[int, ...], tuple[int, ...], str]
COUNTS = (13, 3, 9, 18)
STEPS = 10


def seen(batch: dict[str, Any]) -> Seen:
    """What a batch holds: index, labels, and a hash of the pixels, tokens or latents."""
    content = next(batch[name] for name in ("image", "tokens", "latents") if name in batch)
    digest = hashlib.sha256(content.contiguous().numpy().tobytes()).hexdigest()
    return tuple(batch["index"].tolist()), tuple(batch["label"].tolist()), digest


def epochs(loader: TrainingLoader, count: int) -> list[list[Seen]]:
    return [[seen(batch) for batch in loader] for _ in range(count)]


@pytest.mark.slow_but(12)
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True), (4, True)])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_a_loader_continues_with_the_same_batches(
    make_data: Callable[..., ResumableDataModule], workers: int, rank: int, world_size: int, persistent: bool
) -> None:
    data = make_data(num_workers=workers, persistent_workers=persistent)
    batches = STEPS // world_size
    expected = epochs(data.training_loader(rank, world_size), 2)
    assert [len(epoch) for epoch in expected] == [batches, batches]
    assert expected[0] != expected[1]
    # Where the workers start costs most of the time, one cut shows that a worker starts inside its part.
    for cut in range(1, batches + 1) if workers == 0 else (batches // 2,):
        stopped = data.training_loader(rank, world_size)
        iterator = iter(stopped)
        assert [seen(next(iterator)) for _ in range(cut)] == expected[0][:cut]
        # Lightning writes rank 0's state and gives it to every rank.
        state = stopped.state_dict()
        resumed = data.training_loader(rank, world_size)
        resumed.load_state_dict(state)
        rest = expected[0][cut:]
        if rest:
            assert [seen(batch) for batch in resumed] == rest
        assert [seen(batch) for batch in resumed] == expected[1]


def test_full_shared_memory_is_an_error_and_not_a_hang(
    tmp_path: Path, make_token_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    folder = str(make_token_folder(tmp_path / "tokens", count=43))
    assert len(list(TokenArrays(folder, batch_size=4).training_loader(0, 1))) == 10
    with pytest.raises(ValueError, match="/dev/shm has no room for a batch"):
        list(TokenArrays(folder, batch_size=4, num_workers=1).training_loader(0, 1))


def test_a_full_folder_for_temporary_files_is_an_error_and_not_a_hang(
    tmp_path: Path, make_token_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**settings: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    folder = str(make_token_folder(tmp_path / "tokens", count=43))
    assert len(list(TokenArrays(folder, batch_size=4).training_loader(0, 1))) == 10
    with pytest.raises(ValueError, match=r"has no room.* TMPDIR .*No space left on device"):
        list(TokenArrays(folder, batch_size=4, num_workers=1).training_loader(0, 1))


def test_workers_outlive_a_signal_to_all_processes_of_a_job(
    make_token_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """As `scancel` and preemption of SLURM send it, and not the training itself, which ends them so."""
    data = TokenArrays(str(make_token_folder(tmp_path / "tokens", count=64)), batch_size=2, num_workers=2)
    loader = data.training_loader(0, 1)
    batches = iter(loader)
    # One of each: from then on both workers run.
    next(batches), next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    assert len(list(batches)) == 30 and loader.consumed == 32

    batches = iter(loader)
    next(batches), next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_the_state_is_the_same_on_every_rank(make_data: Callable[..., ResumableDataModule]) -> None:
    states = []
    for rank in range(2):
        loader = make_data().training_loader(rank, 2)
        next(iter(loader))
        states.append(loader.state_dict())
    assert states[0] == states[1]
    assert states[0]["samples"] == 8


def test_creating_an_iterator_changes_nothing_and_uses_no_global_randomness(
    make_data: Callable[..., ResumableDataModule],
) -> None:
    loader = make_data(num_workers=2).training_loader(0, 1)
    before = torch.get_rng_state()
    iter(loader)
    iterator = iter(loader)
    first = seen(next(iterator))
    assert loader.state_dict()["samples"] == 4
    assert torch.equal(torch.get_rng_state(), before)
    # The same from any other global state, and without workers.
    torch.manual_seed(1)
    assert seen(next(iter(make_data(num_workers=2).training_loader(0, 1)))) == first
    alone = iter(make_data().training_loader(0, 1))
    assert seen(next(alone)) == first
    # The second worker of shards begins with a part of its own, whereas other data have one order for all workers.
    same_order = not isinstance(make_data(), ImageShards)
    assert (seen(next(alone)) == seen(next(iterator))) == same_order


def test_a_state_of_other_settings_is_refused(make_data: Callable[..., ResumableDataModule]) -> None:
    loader = make_data().training_loader(0, 1)
    next(iter(loader))
    other = make_data(batch_size=3).training_loader(0, 1)
    with pytest.raises(ValueError, match=r"was 4, is 3"):
        other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        make_data(seed=1).training_loader(0, 1).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="format None"):
        loader.load_state_dict({"epoch": 1})


class Recorder(LightningModule):
    """Writes down every batch; its one parameter never moves."""

    def __init__(self, read_estimated_steps: bool = False) -> None:
        super().__init__()
        self.read_estimated_steps = read_estimated_steps
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.training_batches: list[Seen] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Any], batch_index: int) -> torch.Tensor:
        self.training_batches.append(seen(batch))
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        self.validated += batch["index"].tolist()

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> list[int]:
        return batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.read_estimated_steps:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves after the given numbers of steps, where a preemption would."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class EndAt(Callback):
    """Ends a run in the batch that leads to a step, as a crash does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError


def make_trainer(tmp_path: Path, callbacks: list[Callback] | None = None, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": tmp_path,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks or []),
        "max_epochs": 3,
    }
    return Trainer(callbacks=callbacks, **(defaults | settings))


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_lightning_resumes_in_mid_epoch(
    make_data: Callable[..., ResumableDataModule], tmp_path: Path, workers: int
) -> None:
    # In the middle of two epochs, at the last batch of one, and at the first of the next.
    cuts = (3, 10, 11, 17) if workers == 0 else (13,)
    epochs = 3 if workers == 0 else 2
    whole = Recorder()
    trainer = make_trainer(tmp_path, [SaveAt(tmp_path, cuts)], max_epochs=epochs)
    trainer.fit(whole, datamodule=make_data(num_workers=workers))
    assert len(whole.training_batches) == len(set(whole.training_batches)) == epochs * STEPS
    for cut in cuts:
        resumed = Recorder()
        trainer = make_trainer(tmp_path, max_epochs=epochs)
        trainer.fit(resumed, datamodule=make_data(num_workers=workers), ckpt_path=tmp_path / f"{cut}.ckpt")
        assert resumed.training_batches == whole.training_batches[cut:], cut


@pytest.mark.parametrize("stop", [STEPS, 14])
def test_lightning_resumes_what_max_steps_stopped(
    make_data: Callable[..., ResumableDataModule], tmp_path: Path, stop: int
) -> None:
    """Saved by the caller of `fit`, who has it stopped behind an epoch, or in one."""
    whole, stopped, resumed = Recorder(), Recorder(), Recorder()
    make_trainer(tmp_path, max_epochs=-1, max_steps=30).fit(whole, datamodule=make_data())
    trainer = make_trainer(tmp_path, max_epochs=-1, max_steps=stop)
    trainer.fit(stopped, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    trainer = make_trainer(tmp_path, [ContinueExactly()], max_epochs=-1, max_steps=30)
    trainer.fit(resumed, datamodule=make_data(), ckpt_path=tmp_path / "stopped.ckpt")
    assert len(stopped.training_batches) == stop
    assert stopped.training_batches + resumed.training_batches == whole.training_batches
    # Lightning counts what `max_steps` cuts short as an epoch.
    assert trainer.current_epoch == 3 + (stop % STEPS > 0) and trainer.global_step == 30


@pytest.mark.filterwarnings("ignore:Total length of `list`:UserWarning")
def test_nothing_is_saved_inside_the_first_step_of_a_resume(
    make_token_folder: Callable[..., Path], tmp_path: Path
) -> None:
    tokens = str(make_token_folder(tmp_path / "tokens", count=48))
    trainer = make_trainer(tmp_path, [SaveAt(tmp_path, (3,))], max_steps=3, max_epochs=-1, limit_val_batches=0)
    trainer.fit(Recorder(), datamodule=TokenArrays(tokens, batch_size=4, num_workers=0))
    keeper = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = make_trainer(tmp_path, [keeper, ContinueExactly()], max_steps=6, max_epochs=-1, accumulate_grad_batches=2)
    data = TokenArrays(tokens, batch_size=2, num_workers=0)
    trainer.fit(Recorder(), datamodule=data, ckpt_path=tmp_path / "3.ckpt")
    assert os.listdir(tmp_path / "kept") == ["step=6.ckpt"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize(("at_epoch_end", "steps"), [(True, {10, 20}), (False, {5, 10, 15, 20, 25})])
def test_lightning_resumes_from_what_model_checkpoint_saved(
    make_data: Callable[..., ResumableDataModule], tmp_path: Path, at_epoch_end: bool, steps: set[int]
) -> None:
    checkpoints = ModelCheckpoint(
        tmp_path / "saved", filename="{step}", save_top_k=-1, monitor=None, save_on_train_epoch_end=at_epoch_end
    )
    whole = Recorder()
    trainer = make_trainer(tmp_path, [checkpoints], val_check_interval=5)
    trainer.fit(whole, datamodule=make_data())
    saved = {int(file.stem.rpartition("step=")[2]): file for file in (tmp_path / "saved").glob("*.ckpt")}
    assert set(saved) == steps | {30}
    for step in steps:
        file = saved[step]
        resumed = Recorder()
        make_trainer(tmp_path, val_check_interval=5).fit(resumed, datamodule=make_data(), ckpt_path=file)
        assert resumed.training_batches == whole.training_batches[step:], file.name


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("saved", ["batch", "validation", "epoch", "end"])
def test_after_a_whole_epoch_data_and_batch_size_may_be_others(
    saved: str, batch_size: int, tmp_path: Path, make_token_folder: Callable[..., Path]
) -> None:
    """Saved at the last batch, as a preemption is; at the end of the epoch with and without validation; at the end."""
    few, many = make_token_folder(tmp_path / "few", count=16), make_token_folder(tmp_path / "many", count=24)
    kept = ModelCheckpoint(tmp_path / "kept", filename="4", save_on_train_epoch_end=saved != "validation")
    validation = saved == "validation"
    saving = [SaveAt(tmp_path / "kept", (4,)) if saved == "batch" else kept, *([] if saved == "end" else [EndAt(5)])]
    settings = {} if validation else {"limit_val_batches": 0}
    trainer = make_trainer(tmp_path, saving, max_epochs=1 if saved == "end" else 2, **settings)
    stopped = Recorder()
    with suppress(KeyError):
        trainer.fit(stopped, datamodule=TokenArrays(str(few), str(few) if validation else None, batch_size=4))
    assert [len(batch[0]) for batch in stopped.training_batches[:4]] == [4] * 4

    resumed = Recorder()
    data = TokenArrays(str(many), str(many) if validation else None, batch_size=batch_size)
    trainer = make_trainer(tmp_path, [ContinueExactly()], max_epochs=3, **settings)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "kept" / "4.ckpt")
    batches = 24 // batch_size
    assert len(resumed.training_batches) == 2 * batches
    whole = data.training_loader(0, 1)
    whole.epoch, whole.consumed = 1, 0
    assert resumed.training_batches == [seen(batch) for _ in range(2) for batch in whole]
    assert trainer.current_epoch == 3 and trainer.global_step == 4 + 2 * batches
    assert len(resumed.validated) == (2 * 24 if validation else 0)


def test_after_a_whole_epoch_the_global_batch_may_be_another(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    folder = str(make_shards(tmp_path / "shards", COUNTS))
    loader = ImageShards(folder, image_size=8, batch_size=4, num_workers=2).training_loader(0, 1)
    for _ in loader:
        state = loader.state_dict()
    assert state["finished"]
    # The same global batch keeps its order; another has the one that a run of these settings would have.
    for workers, world_size, goes_on in ((3, 1, True), (2, 2, False)):
        for rank in range(world_size):
            other = ImageShards(folder, image_size=8, batch_size=4, num_workers=workers)
            resumed, fresh = (other.training_loader(rank, world_size) for _ in range(2))
            resumed.load_state_dict(state)
            fresh.epoch = 1
            assert epochs(resumed, 2) == (epochs(loader, 2) if goes_on else epochs(fresh, 2))
    # A version before wrote no word of it.
    del state["finished"], state["global_batch"]
    state["identity"] |= state.pop("layout")
    resumed.load_state_dict(state)
    state["samples"] -= 4
    with pytest.raises(ValueError, match="inside an epoch"):
        resumed.load_state_dict(state)


def test_reading_the_estimated_steps_does_not_lose_the_state(
    make_data: Callable[..., ResumableDataModule], tmp_path: Path
) -> None:
    whole = Recorder(read_estimated_steps=True)
    make_trainer(tmp_path, [SaveAt(tmp_path, (14,))]).fit(whole, datamodule=make_data())
    resumed = Recorder(read_estimated_steps=True)
    make_trainer(tmp_path).fit(resumed, datamodule=make_data(), ckpt_path=tmp_path / "14.ckpt")
    assert resumed.training_batches == whole.training_batches[14:]


@pytest.mark.parametrize("limit", [6, 0.6])
def test_an_epoch_that_the_trainer_cuts_short_resumes_too(
    make_data: Callable[..., ResumableDataModule], tmp_path: Path, limit: float
) -> None:
    whole = Recorder()
    trainer = make_trainer(tmp_path, [SaveAt(tmp_path, (6, 8))], limit_train_batches=limit)
    trainer.fit(whole, datamodule=make_data())
    assert len(whole.training_batches) == 18
    for cut in (6, 8):
        resumed = Recorder()
        trainer = make_trainer(tmp_path, limit_train_batches=limit)
        trainer.fit(resumed, datamodule=make_data(), ckpt_path=tmp_path / f"{cut}.ckpt")
        assert resumed.training_batches == whole.training_batches[cut:], cut


def test_loaders_that_are_made_anew_every_epoch_go_on_with_the_epochs(
    make_data: Callable[..., ResumableDataModule], tmp_path: Path
) -> None:
    whole, reloaded = Recorder(), Recorder()
    make_trainer(tmp_path).fit(whole, datamodule=make_data())
    make_trainer(tmp_path, reload_dataloaders_every_n_epochs=1).fit(reloaded, datamodule=make_data())
    assert reloaded.training_batches == whole.training_batches


def test_overfitting_repeats_the_same_batches(make_data: Callable[..., ResumableDataModule], tmp_path: Path) -> None:
    model = Recorder()
    make_trainer(tmp_path, overfit_batches=2).fit(model, datamodule=make_data())
    assert model.training_batches == model.training_batches[:2] * 3


def test_a_state_that_validate_loaded_does_not_move_a_later_fit(
    make_data: Callable[..., ResumableDataModule], tmp_path: Path
) -> None:
    whole = Recorder()
    make_trainer(tmp_path, [SaveAt(tmp_path, (3,))]).fit(whole, datamodule=make_data())
    data, again = make_data(), Recorder()
    make_trainer(tmp_path).validate(again, datamodule=data, ckpt_path=tmp_path / "3.ckpt", verbose=False)
    make_trainer(tmp_path).fit(again, datamodule=data)
    assert again.training_batches == whole.training_batches


def test_validation_and_prediction_see_each_sample_once(
    make_data: Callable[..., ResumableDataModule], tmp_path: Path
) -> None:
    data, model = make_data(num_workers=2), Recorder()
    trainer = make_trainer(tmp_path)
    trainer.validate(model, datamodule=data, verbose=False)
    predictions = trainer.predict(model, datamodule=data)
    assert predictions is not None
    broken = {TokenArrays: set(), LatentArrays: set(), ImageFolder: {3}, ImageShards: {7, 30}}[type(data)]
    assert sorted(model.validated) == sorted(set(range(43)) - broken)
    assert sorted(index for batch in predictions for index in batch) == sorted(model.validated)
