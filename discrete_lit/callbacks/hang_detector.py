"""The stacks of a run that hangs, of every rank, written while it still waits."""

import faulthandler
import logging
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lightning import Callback, LightningModule, Trainer

from discrete_lit.core.distributed import rank

_log = logging.getLogger(__name__)
# Setting the alarm anew starts a thread; so it is set a few times in its interval.
_SETTINGS_OF_AN_INTERVAL = 20


class HangDetector(Callback):
    """Writes the stack of every thread of a process that has been silent for long: no batch, no checkpoint.

    Ranks that wait for one another for ever are ended by the process group's time-out, 30 minutes by default, and
    nothing says then where each of them stood. Before that each writes its own file,
    `<default_root_dir>/stacks/rank-0.txt`; the one whose stack is not in a collective is the one that the others wait
    for. It is written by a thread of Python's `faulthandler`, also while all others wait in C. A run that goes on says
    in its log that it was silent.

    Args:
        seconds: of silence. Less than the time-out of the process group, and more than any batch, validation batch or
            checkpoint takes; the first batch may compile.

    Raises:
        ValueError: no positive number of seconds.
    """

    def __init__(self, seconds: float = 1200.0) -> None:
        if not 0 < seconds < float("inf"):
            raise ValueError(f"seconds of HangDetector must be a positive number, got {seconds}")
        self.seconds = seconds
        self._file: IO[str] | None = None
        self._header = 0
        self._set_at = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        # Held open, since the thread that writes into it can open nothing.
        self._file = (folder / f"rank-{rank()}.txt").open("w", encoding="utf-8")
        self._file.write(f"rank {rank()}, process {os.getpid()} on {platform.node()}, silent for {self.seconds:g} s:\n")
        self._file.flush()
        self._header = self._size()
        self._listen(always=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._listen()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._listen()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._listen()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _listen(self, *, always: bool = False) -> None:
        """Set the alarm anew: there is a sign of life."""
        if self._file is None:
            return
        now = time.monotonic()
        if always or now - self._set_at > self.seconds / _SETTINGS_OF_AN_INTERVAL:
            if not always:
                self._say()
            faulthandler.dump_traceback_later(self.seconds, file=self._file)
            self._set_at = now

    def _say(self) -> None:
        if self._file is not None and self._size() > self._header:
            _log.warning(
                "rank %d was silent for more than %g s; where it was is in %s", rank(), self.seconds, self._file.name
            )
            self._header = self._size()

    def _size(self) -> int:
        assert self._file is not None
        return os.fstat(self._file.fileno()).st_size

    def _end(self) -> None:
        """Take the alarm off; a file without a stack is removed."""
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._say()
        path, is_empty = Path(self._file.name), "File " not in Path(self._file.name).read_text(encoding="utf-8")
        self._file.close()
        self._file = None
        if is_empty:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # while others have files there; and the last ones may end at once
                path.parent.rmdir()
