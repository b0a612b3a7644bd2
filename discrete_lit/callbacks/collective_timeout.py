"""Time-outs of a process group: the time for which ranks wait for one another before a run ends."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from discrete_lit.core.distributed import world_size


class CollectiveTimeout(Callback):
    """Gives up a collective in which ranks wait for one another for too long, of every process group, on all ranks.

    A rank that died without a word, or a server that hangs, then ends the run, and the job can be started again.
    What one rank does for long while the others wait must take less: so the time is longer up to the first batch, in
    which models are compiled and data are read for the first time, and from a checkpoint to the batch behind it.
    `HangDetector` should be silent for less.

    Args:
        seconds: of any other collective.
        long_seconds: up to the first batch and around checkpoints.

    Raises:
        ValueError: no positive number of seconds, or `long_seconds` below `seconds`.
    """

    def __init__(self, seconds: float = 1800.0, *, long_seconds: float = 3600.0) -> None:
        if not 0 < seconds <= long_seconds < float("inf"):
            raise ValueError(
                "CollectiveTimeout needs 0 < seconds <= long_seconds, both finite, got "
                f"seconds={seconds}, long_seconds={long_seconds}"
            )
        self.seconds = seconds
        self.long_seconds = long_seconds
        self._now: float | None = None
        self._begun = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._now, self._begun = None, False
        self._set(self.long_seconds)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_timeouts(self.long_seconds)  # of groups too that other callbacks have just made

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._begun:
            self._set(self.seconds)
        self._begun = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._set(self.long_seconds)

    def _set(self, seconds: float) -> None:
        if seconds != self._now:
            set_timeouts(seconds)
            self._now = seconds


def set_timeouts(seconds: float) -> None:
    """Let every process group that this process is in give up a collective that begins from now on after so long."""
    if world_size() == 1:
        return
    # Public since PyTorch 2.14. There is no public list of the groups.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):
        set_timeout(timedelta(seconds=seconds), group)
