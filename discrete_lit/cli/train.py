"""`discrete-lit fit`, `validate`, `test` and `predict`: one LightningCLI, and the run folder that it writes into.

run_dir/
    checkpoints/    the newest checkpoints
    tensorboard/    one log, continued by every resume
    predictions/    what `predict` wrote
    config.yaml     the settings of the first start; config-resumed-1.yaml, ... those of the next ones
    run.json        time, command line, git commit, versions and checkpoint of every start
"""

import argparse
import importlib
import json
import logging
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

from discrete_lit.callbacks import (
    GradientNorm,
    ReconstructionGrid,
    SampleGrid,
    Throughput,
    TrainingGuard,
    TrainingStopped,
)
from discrete_lit.checkpoints import (
    check_parses,
    check_weights,
    load_weights,
    module_config,
    read_checkpoint,
    record_config,
)
from discrete_lit.cli.config import TRUST_HELP, GivenSettings, explain, read_given
from discrete_lit.cli.resume import ContinueExactly, FollowConfiguration, check_tokenizer, differences
from discrete_lit.core.configuration import build, current_names
from discrete_lit.core.files import atomic_write, atomic_write_text
from discrete_lit.core.provenance import environment
from discrete_lit.core.trust import check_plain

_log = logging.getLogger(__name__)
# A configuration may name a class without its package once its module is imported: here are the modules of every class
# that a configuration can hold.
_PACKAGES = (
    "backbones",
    "callbacks",
    "data.image_folder",
    "data.image_shards",
    "data.token_arrays",
    "diffusion.losses",
    "evaluation.classifier",
    "generators",
    "optimization",
    "samplers",
    "tokenizers",
    "tokenizers.losses.discriminators",
)

_SHARDED = (FSDPStrategy, ModelParallelStrategy)

# What Lightning says about itself, or about what this command does on purpose.
_UNASKED_ADVICE = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*exists and is not empty.*",
    ".*srun. command is available.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*isinstance.treespec, LeafSpec.*",
    "The dirpath has changed from.*",
)


def run_training(command: str, arguments: list[str]) -> None:
    """Run one of the four commands with the settings of the command line.

    Raises:
        ValueError: a user's mistake.
        SystemExit: with code 1 where the training guard ended the run.
    """
    for package in _PACKAGES:
        importlib.import_module(f"discrete_lit.{package}")
    log = logging.getLogger("discrete_lit")
    log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
    with warnings.catch_warnings():
        for message in _UNASKED_ADVICE:
            warnings.filterwarnings("ignore", message)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
        try:
            TrainingCLI(command, arguments).run()
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error
        except TrainingStopped as stopped:
            sys.stderr.write(f"stopped: {stopped}\n")
            raise SystemExit(1) from stopped


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


class TrainingCLI(LightningCLI):
    """Parse the settings of one command, build model, data and trainer, and run the command.

    Args:
        command: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        arguments: what follows it on the command line.
    """

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command = command
        self.arguments = arguments
        self.checkpoint: dict[str, Any] | None = None
        self.checkpoint_path: str | None = None
        self.model_from_checkpoint = False
        self.changed: list[str] = []
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False, "log_every_n_steps": 10},
            parser_kwargs={
                "prog": f"discrete-lit {command}",
                "exit_on_error": False,
                "allow_abbrev": False,
                "epilog": TRUST_HELP,
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            help="Folder for everything that the run writes. `--ckpt_path last` goes on from its newest checkpoint.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="A checkpoint to start from, or `last`: the newest intact one of --run_dir, none in an empty folder. "
            "Without a model in the configuration, the model is the checkpoint's.",
        )
        skipped: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        skipped |= {"ckpt_path", "weights_only", "return_predictions"}
        self.command_settings = parser.add_method_arguments(Trainer, self.command, skip=skipped)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = read_given(self.arguments)
        arguments = self.arguments
        if not {"-h", "--help"}.intersection(arguments):
            arguments = self._with_checkpoint(given)
        try:
            self.config = parser.parse_args(arguments)
        except argparse.ArgumentError as error:
            raise ValueError(explain(parser, arguments, error)) from error
        self.folder = RunFolder(self.config.run_dir) if self.config.run_dir else None
        if self.command == "predict" and self.folder is None:
            raise ValueError("predict needs --run_dir FOLDER: predictions are written into FOLDER/predictions")
        if self.command == "fit" and self.folder and self.folder.checkpoints() and not given.values.get("ckpt_path"):
            raise ValueError(
                f"run_dir={str(self.folder.path)!r} holds the checkpoints of an earlier run: `--ckpt_path last` goes on"
                " with it, and a new run needs another folder"
            )

    def _resolve(self, path: str | None, folder: str | None) -> tuple[str, dict[str, Any]] | None:
        """Find the checkpoint that `--ckpt_path` means, and read it.

        Raises:
            ValueError: there is none, or it is broken.
        """
        if path in (None, "null"):
            return None
        if path != "last":
            return path, read_checkpoint(path)
        if not folder:
            raise ValueError("--ckpt_path last needs the run folder that it is in: --run_dir FOLDER")
        newest = RunFolder(folder).newest_intact()
        if newest is None and self.command != "fit":
            raise ValueError(f"--ckpt_path last: there is no intact checkpoint in run_dir={folder!r}")
        if newest is None:
            rank_zero_only(_log.info)("no checkpoint in %s yet: starting from the beginning", folder)
        return newest

    def _with_checkpoint(self, given: GivenSettings) -> list[str]:
        """Resolve `--ckpt_path` in the arguments; where they name no model, put the checkpoint's before them."""
        asked = given.values.get("ckpt_path")
        found = self._resolve(asked, given.values.get("run_dir"))
        if found is None:
            return [*self.arguments, "--ckpt_path=null"] if asked else self.arguments
        self.checkpoint_path, self.checkpoint = found
        arguments = [*self.arguments, f"--ckpt_path={self.checkpoint_path}"]
        model = given.values.get("model")
        self.model_from_checkpoint = not (isinstance(model, str) or (isinstance(model, dict) and "class_path" in model))
        if self.model_from_checkpoint:
            saved = module_config(self.checkpoint, found[0])
            check_parses(saved, found[0])
            arguments = [f"--config={json.dumps({'model': saved})}", *arguments]
        return arguments

    def _parse_ckpt_path(self) -> None:
        """Report each setting in which the given configuration, which wins, differs from the checkpoint's."""
        if self.checkpoint is None or self.checkpoint_path is None:
            return
        self._dump_config()
        if self.model_from_checkpoint:
            saved = module_config(self.checkpoint, self.checkpoint_path)
        else:
            saved = self.checkpoint.get("hyper_parameters") or {}
            if "class_path" in saved:
                check_plain(saved, self.checkpoint_path)
                saved = current_names(saved)
        if "class_path" in saved:
            lines = list(differences(self.config_dump["model"], saved, "model"))
            for line in lines:
                rank_zero_only(_log.info)(line)
            self.changed = [line.partition(": ")[0] for line in lines]

    def _dump_config(self) -> None:
        self.config_text = self.parser.dump(self.config, skip_unset=False, format="yaml")
        self.config_dump = yaml.safe_load(self.config_text)

    def instantiate_classes(self) -> None:
        self.config_init = build(self.parser, self.config)
        self.datamodule = self.config_init["data"]
        self.model = self.config_init["model"]
        self._dump_config()
        record_config(self.model, self.config_dump["model"])
        if self.checkpoint is not None and "state_dict" in self.checkpoint:
            path = str(self.checkpoint_path)
            if self.model_from_checkpoint:
                # A generator compares its tokenizer with the data before Lightning restores the weights.
                load_weights(self.model, self.checkpoint, path)
            else:
                check_weights(self.model, self.checkpoint, path)
                check_tokenizer(self.model, self.checkpoint, path)
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init["trainer"]
        callbacks = settings["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        logger, folder = settings["logger"], self.folder
        if folder is not None:
            kwargs["default_root_dir"] = settings["default_root_dir"] or str(folder.path)
            if logger in (None, True):
                resumed = self.command == "fit" and self.checkpoint is not None
                logger = folder.logger(self.checkpoint["global_step"] if resumed and self.checkpoint else None)
            if settings["enable_checkpointing"] is not False:
                callbacks += folder.direct_checkpoints(callbacks)
        elif logger in (None, True):
            logger = TensorBoardLogger(settings["default_root_dir"] or ".", name="lightning_logs")
        if self.command == "predict":
            assert folder is not None
            callbacks.append(PredictionFiles(folder.path / "predictions"))
        callbacks += self._always_on(callbacks, bool(logger))
        if not settings["fast_dev_run"]:
            callbacks.append(self._record_start(logger))
        if self.command == "fit" and self.checkpoint is not None:
            callbacks.insert(0, ContinueExactly())
            if self.changed:
                callbacks.append(FollowConfiguration(self.changed))
        return super().instantiate_trainer(callbacks=callbacks, logger=logger, **kwargs)

    def _always_on(self, callbacks: list[Callback], logged: bool) -> list[Callback]:
        """List the callbacks that every run has, without those that the user configured."""
        settings = self.config_init["trainer"]
        always: list[Callback] = []
        if settings["enable_progress_bar"] is not False:
            always.append(TQDMProgressBar())
        if self.command == "fit":
            always.append(TrainingGuard())
        if logged:
            always += [ReconstructionGrid(), SampleGrid()]
            if self.command == "fit":
                always += [LearningRateMonitor(logging_interval="step"), GradientNorm(), Throughput()]
        given = tuple(ProgressBar if isinstance(callback, ProgressBar) else type(callback) for callback in callbacks)
        return [callback for callback in always if not isinstance(callback, given)]

    def _record_start(self, logger: Any) -> "RecordStart":
        folder = self.folder.path if self.folder is not None else None
        if folder is None and isinstance(logger, TensorBoardLogger):
            folder = Path(logger.log_dir)
        return RecordStart(
            folder,
            command=[self.command, *self.arguments],
            configuration=self.config_text,
            checkpoint=self.checkpoint_path,
        )

    def run(self) -> Any:
        """Run the command on what was built.

        Raises:
            ValueError: `test` of a model without a test step; a sharded checkpoint for a strategy that does not read
                one.
        """
        path = self.config.ckpt_path
        if path is not None and Path(path).is_dir() and not isinstance(self.trainer.strategy, _SHARDED):
            raise ValueError(
                f"--ckpt_path {path!r} is a sharded checkpoint, a folder, which {type(self.trainer.strategy).__name__} "
                "does not read: use the strategy that wrote it, FSDPStrategy or ModelParallelStrategy"
            )
        settings = {name: self.config_init[name] for name in self.command_settings}
        if self.command == "test" and not is_overridden("test_step", self.model):
            raise ValueError(
                f"{type(self.model).__name__} has no test step: `discrete-lit validate` computes its metrics on "
                "data.init_args.validation, `discrete-lit evaluate` compares its images with a reference"
            )
        if self.command == "predict":
            settings["return_predictions"] = False  # they are in files, and need not fit into memory
        return getattr(self.trainer, self.command)(
            self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path, weights_only=True, **settings
        )


class RunFolder:
    """Know the layout of a run folder; nothing is written before a run starts.

    Args:
        path: the folder, made when it is needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def checkpoints(self) -> list[Path]:
        """List every checkpoint of the run, newest first."""
        found = [(file.stat().st_mtime_ns, str(file)) for file in (self.path / "checkpoints").rglob("*.ckpt")]
        return [Path(name) for _, name in sorted(found, reverse=True)]

    def newest_intact(self) -> tuple[str, dict[str, Any]] | None:
        """Find the newest checkpoint that can be read, and read it; log and skip each one that cannot."""
        for file in self.checkpoints():
            try:
                return str(file), read_checkpoint(file)
            except ValueError as error:
                rank_zero_only(_log.warning)("skipped a broken checkpoint: %s", error)
        return None

    def logger(self, first_step: int | None) -> TensorBoardLogger:
        """Open the one TensorBoard log of the run; from the first step of a resume on, older events are hidden."""
        return TensorBoardLogger(self.path, name="tensorboard", version="", purge_step=first_step)

    def direct_checkpoints(self, callbacks: Sequence[Callback]) -> list[Callback]:
        """Send checkpoints of the user's own ModelCheckpoints here; if there are none, the ModelCheckpoint to add.

        It writes at the end of every epoch and of the run; the newest, and `last.ckpt` beside it, are kept.
        """
        own = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
        folder = str(self.path / "checkpoints")
        for callback in own:
            callback.dirpath = callback.dirpath or folder
        return [] if own else [ModelCheckpoint(folder, save_last=True, enable_version_counter=False)]


class PredictionFiles(BasePredictionWriter):
    """Write what a model predicts, a file `{rank}-{batch}.pt` for each batch: `prediction` and the batch's `index`.

    Args:
        folder: where the files go; made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder = folder

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        index = batch.get("index") if isinstance(batch, dict) else None
        with atomic_write(self.folder / f"{trainer.global_rank}-{batch_idx:06d}.pt") as file:
            torch.save({"prediction": prediction, "index": index}, file)


class RecordStart(Callback):
    """Write the settings of every start into a folder and, as text, into TensorBoard.

    Args:
        folder: where `config.yaml` and `run.json` go; None writes to TensorBoard alone.
        command: the command and its arguments, for `run.json`.
        configuration: the resolved settings, as YAML.
        checkpoint: what the run goes on from.
    """

    def __init__(
        self, folder: Path | None, *, command: Sequence[str], configuration: str, checkpoint: str | None
    ) -> None:
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
        """Choose `config.yaml`, then `config-resumed-1.yaml` and so on; commands other than `fit` put their name in."""
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
