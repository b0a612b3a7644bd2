import os
import signal
import stat
from copy import deepcopy

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from discrete_lit.callbacks import Preemption


class Interrupt(Callback):
    """Sends this process a signal in the training step of a batch."""

    def __init__(self, number, batch):
        self.number, self.batch = number, batch

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


class Losses(Callback):
    """Loss and sample indices of every batch, by the number of the batch in the run."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[trainer.fit_loop.total_batch_idx] = (float(outputs["loss"]), batch["index"].tolist())


class Resumable:
    """A loader that continues in the middle of its epoch."""

    def __init__(self, loader):
        self.batches = list(loader)
        self.consumed = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        if self.consumed >= len(self):
            self.consumed = 0
        for batch in self.batches[self.consumed :]:
            self.consumed += 1
            yield batch

    def state_dict(self):
        return {"consumed": self.consumed}

    def load_state_dict(self, state):
        self.consumed = state["consumed"]


@pytest.fixture
def fit(make_trainer, make_loader, tmp_path):
    """Three epochs of four batches, saved at each validation; returns what `Losses` saw."""

    def run(module, *callbacks, **settings):
        losses = Losses()
        keeper = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_top_k=0)
        trainer = make_trainer(
            **{"max_epochs": 3, "log_every_n_steps": 1, "enable_checkpointing": True, **settings},
            callbacks=[losses, *callbacks, keeper],
        )
        ckpt_path = "last" if (tmp_path / "checkpoints").exists() else None
        try:
            trainer.fit(module, Resumable(make_loader(4)), make_loader(1), ckpt_path=ckpt_path)
        except SystemExit as end:
            return losses.seen, end.code
        return losses.seen, None

    return run


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A job's environment with an `scontrol` on the path that notes how it was called."""
    calls = tmp_path / "calls"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return lambda: calls.read_text().splitlines() if calls.exists() else []


# Batch 3 is the last of its epoch, before a validation and its checkpoint.
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_goes_on_from_the_same_batch(tokenizer, fit, tmp_path, read_scalars, batch):
    first_half, second_half = deepcopy(tokenizer), deepcopy(tokenizer)
    whole, _ = fit(tokenizer)
    curve = read_scalars("train/loss")
    for folder in ("checkpoints", "log"):
        for file in (tmp_path / folder).iterdir():
            file.unlink()
        (tmp_path / folder).rmdir()

    first, status = fit(first_half, Interrupt(signal.SIGTERM, batch), Preemption())
    assert status == 128 + signal.SIGTERM
    assert list(first) == list(range(batch + 1))
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]
    second, status = fit(second_half, Preemption())
    assert status is None
    assert first | second == whole
    assert not first.keys() & second.keys()
    finished = tokenizer.state_dict()
    assert all(torch.equal(value, finished[name]) for name, value in second_half.state_dict().items())
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]
    assert read_scalars("train/loss") == curve


def test_usr1_requeues_the_job_once(tokenizer, fit, scontrol):
    _, status = fit(tokenizer, Interrupt(signal.SIGUSR1, 1), Preemption())
    assert status == 0
    assert scontrol() == ["requeue 17"]


def test_a_task_of_an_array_requeues_itself(tokenizer, fit, scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    fit(tokenizer, Interrupt(signal.SIGUSR1, 1), Preemption())
    assert scontrol() == ["requeue 16_3"]


def test_sigterm_saves_without_requeueing(tokenizer, fit, scontrol, tmp_path):
    _, status = fit(tokenizer, Interrupt(signal.SIGTERM, 1), Preemption())
    assert status == 128 + signal.SIGTERM
    assert scontrol() == []
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_usr1_outside_a_job_saves_and_says_so_by_its_status(tokenizer, fit, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    _, status = fit(tokenizer, Interrupt(signal.SIGUSR1, 1), Preemption())
    assert status == 128 + signal.SIGUSR1


def test_waits_for_the_end_of_an_accumulation(tokenizer, fit):
    seen, _ = fit(tokenizer, Interrupt(signal.SIGTERM, 0), Preemption(), accumulate_grad_batches=2)
    assert list(seen) == [0, 1]


def test_ranks_agree_every_so_many_steps(tokenizer, fit, monkeypatch):
    asked, preemption = [], Preemption(every_n_batches=3)

    def agree():
        asked.append(preemption._steps)
        return preemption._received

    monkeypatch.setattr(preemption, "_agree", agree)
    started = preemption.on_train_start
    # As with other ranks, which are asked here.
    monkeypatch.setattr(
        preemption, "on_train_start", lambda *given: (started(*given), vars(preemption).update(_group=1))
    )
    seen, status = fit(tokenizer, Interrupt(signal.SIGTERM, 3), preemption)
    assert status == 128 + signal.SIGTERM
    assert (asked, list(seen)) == ([3, 6], list(range(6)))
    with pytest.raises(ValueError, match="every_n_batches is 0; it must be 1 or more"):
        Preemption(every_n_batches=0)


def test_a_checkpoint_that_cannot_be_finished_leaves_the_last_one(tokenizer, fit, tmp_path, monkeypatch):
    resumed = deepcopy(tokenizer)
    fit(tokenizer, Interrupt(signal.SIGTERM, 1), Preemption())
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("discrete_lit.callbacks.preemption.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        fit(resumed, Interrupt(signal.SIGTERM, 2), Preemption())
    assert last.read_bytes() == before


@pytest.mark.parametrize("interrupted", [False, True])
def test_handlers_are_put_back(tokenizer, fit, interrupted):
    received = []
    previous = {number: signal.signal(number, lambda n, frame: received.append(n)) for number in HANDLED}
    try:
        fit(tokenizer, Preemption(), *([Interrupt(signal.SIGTERM, 1)] if interrupted else []))
        for number in HANDLED:
            os.kill(os.getpid(), number)
        assert received == list(HANDLED)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


HANDLED = (signal.SIGUSR1, signal.SIGTERM)


def test_needs_to_know_where_the_checkpoints_are(tokenizer, make_trainer, make_loader):
    with pytest.raises(ValueError, match="ModelCheckpoint"):
        make_trainer(callbacks=[Preemption()]).fit(tokenizer, make_loader(1), make_loader(1))
