"""Preemption: a run that is told to end saves itself, and goes on later from the same batch."""

import os
import signal
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from discrete_lit.core.files import publish
from discrete_lit.core.lightning_internals import accumulates_gradients, log_batch_now

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preemption(Callback):
    """Finish the batch on SIGUSR1 or SIGTERM, save, and end the process; `--ckpt_path last` goes on from there.

    The handler only sets a flag. After each optimizer step the ranks agree whether any of them has it, so that all stop
    at the same batch. The checkpoint is written beside the others as `last.ckpt`, whole or not at all. Then the process
    ends by `SystemExit`: no validation and no end of the epoch, which have not been reached.

    SIGUSR1 is what the job script asks SLURM for before the time limit (`#SBATCH --signal=SIGUSR1@120`): rank 0 puts
    the job back into the queue and the exit status is 0. SIGTERM saves and ends with status 143 without requeueing,
    because SLURM sends it for `scancel` too, and requeues by itself what it preempts in mode REQUEUE.

    `discrete-lit fit` has it always, where it writes checkpoints. Lightning's own requeueing is switched off: it saves
    inside the signal handler, wherever that interrupts the program, on each rank for itself.

    Args:
        every_n_batches: optimizer steps from one agreement of several ranks to the next. Each is a message around the
            ranks on the host: thousandths of a second for some tens of ranks. With n, a run ends up to n - 1 steps
            later: n steps and the checkpoint have to fit into the time that the cluster leaves.

    Raises:
        ValueError: `every_n_batches` is below 1; or the trainer has no `ModelCheckpoint`, which says where the run's
            checkpoints are.
    """

    def __init__(self, *, every_n_batches: int = 1) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches is {every_n_batches}; it must be 1 or more")
        self.every_n_batches = every_n_batches
        self._steps = 0
        self._received = 0
        self._active = False
        self._replaced: dict[int, Any] = {}
        self._group: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            raise ValueError(
                "Preemption saves into the folder of the trainer's ModelCheckpoint, and there is none: add "
                "lightning.pytorch.callbacks.ModelCheckpoint to trainer.callbacks, or remove Preemption"
            )
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received = self._steps = 0
        if threading.current_thread() is not threading.main_thread():
            return  # signals cannot be handled in another, such as a notebook's or a launcher's
        self._active = True
        # Before the workers of the loaders start: SLURM signals them too, and they must not die of it.
        self._replaced = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        if trainer.world_size > 1 and dist.is_initialized():
            # On the host: asking an accelerator would make it wait for its own queue at every batch.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Over the handler that Lightning has put around ours: it communicates with the other ranks at once.
        for number in _SIGNALS if self._active else ():
            signal.signal(number, self._receive)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if accumulates_gradients(trainer):
            return
        self._steps += 1
        # Each rank has taken as many steps.
        if (self._group is not None and self._steps % self.every_n_batches) or not (received := self._agree()):
            return
        self._save(trainer)
        status = 128 + received
        if received == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
            status = 0
            if trainer.is_global_zero:
                _requeue()
        raise SystemExit(status)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning is about to put back the handlers that it found, which are ours.
        self._active = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._active = False
        self._group = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._active:
            signal.signal(number, self._replaced[number])
            signal.raise_signal(number)
        # The request to requeue stands if both signals come.
        elif self._received != signal.SIGUSR1:
            self._received = number

    def _agree(self) -> int:
        """The signal that any rank has received, SIGUSR1 first; 0 if none has."""
        flags = torch.tensor([self._received == number for number in _SIGNALS], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return next((number for number, flag in zip(_SIGNALS, flags.tolist(), strict=True) if flag), 0)

    def _save(self, trainer: Trainer) -> None:
        keeper = trainer.checkpoint_callback
        assert isinstance(keeper, ModelCheckpoint) and keeper.dirpath is not None
        last = Path(keeper.dirpath) / f"{keeper.CHECKPOINT_NAME_LAST}{keeper.FILE_EXTENSION}"
        unfinished = last.with_name(f".{last.name}.unfinished")
        # The resumed run overwrites this file as its own last one instead of opening another beside it.
        keeper.last_model_path = str(last)
        trainer.save_checkpoint(unfinished, weights_only=False)
        # It may be written while training goes on, which it does not here.
        for writer in (trainer.strategy, trainer.strategy.checkpoint_io):
            if (wait := getattr(writer, "wait", None)) is not None:
                wait()
        trainer.strategy.barrier()
        # Lightning would log this batch after the callbacks; the resumed run starts behind it.
        log_batch_now(trainer)
        if trainer.is_global_zero:
            publish(unfinished, last)
            for logger in trainer.loggers:
                logger.save()
        trainer.strategy.barrier()
        rank_zero_info(f"Saved {last} after step {trainer.global_step}.")


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", job], check=True)
    rank_zero_info(f"SLURM job {job} is back in the queue.")
