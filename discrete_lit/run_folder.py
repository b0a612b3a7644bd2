"""A run folder: one place for everything that a run writes, through all its interruptions.

checkpoints/    the newest checkpoints
tensorboard/    one log, continued by every resume
config.yaml     the settings of the first start; config-resumed-1.yaml, … those of the next ones
run.json        of every start: time, command line, git commit, versions, checkpoint
"""

import json
import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from discrete_lit.checkpoints import read_checkpoint
from discrete_lit.files import atomic_write_text
from discrete_lit.provenance import environment

_log = logging.getLogger(__name__)


class RunFolder:
    """The layout of a run folder; nothing is written before a run starts.

    Args:
        path: the folder, made when it is needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def checkpoints(self) -> list[Path]:
        """Every checkpoint of the run, newest first."""
        found = [(file.stat().st_mtime_ns, str(file)) for file in (self.path / "checkpoints").rglob("*.ckpt")]
        return [Path(name) for _, name in sorted(found, reverse=True)]

    def newest_intact(self) -> tuple[str, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with its contents; each one that cannot is logged and passed over."""
        for file in self.checkpoints():
            try:
                return str(file), read_checkpoint(file)
            except ValueError as error:
                rank_zero_only(_log.warning)("skipped a broken checkpoint: %s", error)
        return None

    def logger(self, first_step: int | None) -> TensorBoardLogger:
        """The one TensorBoard log of the run; a resume passes its first step, from which older events are hidden."""
        return TensorBoardLogger(self.path, name="tensorboard", version="", purge_step=first_step)

    def place_checkpoints(self, callbacks: Sequence[Callback]) -> list[Callback]:
        """Send checkpoints of the user's own ModelCheckpoints here; if there are none, the ModelCheckpoint to add.

        It writes at the end of every epoch and of the run; the newest, and `last.ckpt` beside it, are kept.
        """
        own = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
        folder = str(self.path / "checkpoints")
        for callback in own:
            callback.dirpath = callback.dirpath or folder
        return [] if own else [ModelCheckpoint(folder, save_last=True, enable_version_counter=False)]


class RecordStart(Callback):
    """Writes the settings of every start into a folder and, as text, into TensorBoard.

    Args:
        folder: where `config.yaml` and `run.json` go; None writes to TensorBoard alone.
        command: the command and its arguments, for `run.json`.
        configuration: the resolved settings, as YAML.
        checkpoint: what the run goes on from.
    """

    def __init__(self, folder: Path | None, command: Sequence[str], configuration: str, checkpoint: str | None) -> None:
        self.folder, self.command, self.configuration, self.checkpoint = folder, command, configuration, checkpoint

    @rank_zero_only
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self._free_name(), self.configuration)
            self._append_start(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = "\n".join(f"    {line}" for line in self.configuration.splitlines())
                logger.experiment.add_text("config", text, trainer.global_step)

    def _free_name(self) -> Path:
        """`config.yaml`, then `config-resumed-1.yaml` and so on; other commands than `fit` bear their names."""
        assert self.folder is not None
        name = "resumed" if self.command[0] == "fit" else self.command[0]
        count = 0
        file = self.folder / "config.yaml"
        while file.exists() or (count == 0 and name != "resumed"):
            count += 1
            file = self.folder / f"config-{name}-{count}.yaml"
        return file

    def _append_start(self, trainer: Trainer) -> None:
        assert self.folder is not None
        file = self.folder / "run.json"
        starts = json.loads(file.read_text())["starts"] if file.exists() else []
        start = {
            "command": ["discrete-lit", *self.command],
            "checkpoint": self.checkpoint,
            "host": platform.node(),
            "world_size": trainer.world_size,
            **environment(trainer.strategy.root_device),
        }
        atomic_write_text(file, json.dumps({"starts": [*starts, start]}, indent=2) + "\n")
