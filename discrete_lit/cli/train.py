"""`discrete-lit fit`, `validate`, `test` and `predict`: one LightningCLI, and what it starts with."""

import argparse
import errno
import importlib
import json
import logging
import os
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

from discrete_lit.callbacks import (
    CollectiveTimeout,
    GradientNorm,
    HangDetector,
    Preemption,
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
from discrete_lit.cli.devices import check_devices
from discrete_lit.cli.init_from import read_start, take_weights
from discrete_lit.cli.resume import ContinueExactly, FollowConfiguration, check_classes, check_tokenizer, differences
from discrete_lit.cli.run_folder import (
    PredictionFiles,
    RecordStart,
    RemoveSuperseded,
    RunFolder,
    WholeCheckpoints,
    checkpoint_folders,
    holds_a_run,
    logged_steps,
)
from discrete_lit.core.allocator import keep_freed_memory
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.core.configuration import build, current_names
from discrete_lit.core.lightning_internals import PrecisionInput, continue_csv_log
from discrete_lit.core.locks import FolderInUse, sole_writer
from discrete_lit.core.trust import check_plain

_log = logging.getLogger(__name__)
# A configuration may name a class without its package once its module is imported: here are the modules of every class
# that a configuration can hold.
_PACKAGES = (
    "backbones",
    "callbacks",
    "data.audio_clips",
    "data.image_folder",
    "data.image_shards",
    "data.latent_arrays",
    "data.paired_token_arrays",
    "data.token_arrays",
    "data.video_clips",
    "diffusion.losses",
    "evaluation.classifier",
    "fsdp2",
    "generators",
    "optimization",
    "samplers",
    "tokenizers",
    "tokenizers.losses.clip_discriminator",
    "tokenizers.losses.discriminators",
)

_SHARDED = (FSDPStrategy, ModelParallelStrategy)
_FILES = (TensorBoardLogger, CSVLogger)

# What Lightning says about itself, or about what this command does on purpose.
_UNASKED_ADVICE = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    "Checkpoint directory .* exists and is not empty.*",
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
            with ExitStack() as held:
                TrainingCLI(command, arguments, held=held).run()
        except TrainingStopped as stopped:
            sys.stderr.write(f"stopped: {stopped}\n")
            raise SystemExit(1) from stopped


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


class AutoPrecisionTrainer(Trainer):
    """Lightning's Trainer, in whose settings `precision` may be `auto`: see `resolve_precision`."""

    def __init__(self, *, precision: PrecisionInput | Literal["auto"] | None = None, **settings: Any) -> None:
        accelerator = settings.get("accelerator", "auto")
        if precision == "auto":
            precision = cast(PrecisionInput, resolve_precision("auto", str(accelerator)))
        super().__init__(precision=precision, **settings)


class TrainingCLI(LightningCLI):
    """Parse the settings of one command, build model, data and trainer, and run the command.

    Args:
        command: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        arguments: what follows it on the command line.
        held: the locks of the folders that the command writes into, for whoever calls to give them back.
    """

    def __init__(self, command: str, arguments: list[str], *, held: ExitStack) -> None:
        self.command = command
        self.arguments = arguments
        self.held = held
        self.held_folders: set[str] = set()
        self.init_from: str | None = None
        self.checkpoint: dict[str, Any] | None = None
        self.checkpoint_path: str | None = None
        self.model_from_checkpoint = False
        self.changed: list[str] = []
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            trainer_class=AutoPrecisionTrainer,
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
            help="A checkpoint to go on from, or `last`: of all checkpoints of the run in --run_dir the one of the "
            "highest step, none in an empty folder. Without a model in the configuration, the model is the "
            "checkpoint's.",
        )
        if self.command == "fit":
            parser.add_argument(
                "--init_from",
                type=str | None,
                help="A checkpoint, trained or imported, whose weights a new run starts from: at step 0, with new "
                "optimizers. Of a run with an EMA they are the averages. What the model has beyond them, such as a "
                "discriminator, is new, and so is a class table of another number of classes; the run says which. "
                "With `--ckpt_path last` it counts while the run has no checkpoint of its own. Without a model in the "
                "configuration, the model is the checkpoint's.",
            )
            parser.add_argument(
                "--init_anew",
                type=list[str],
                default=[],
                help="Beside --init_from, names of weights, or of modules, that begin new whatever the checkpoint has. "
                "So begin the layers around another codebook: `'[network.encoder.6, network.decoder.0]'`, for one.",
            )
        skipped: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        skipped |= {"ckpt_path", "weights_only", "return_predictions"}
        self.command_settings = parser.add_method_arguments(Trainer, self.command, skip=skipped)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = read_given(self.arguments)
        arguments = self.arguments
        asked = {argument.partition("=")[0] for argument in arguments}
        if not asked & {"-h", "--help"}:
            for name in ("run_dir", "ckpt_path", "init_from"):  # used before the parser looks at them
                path = given.values.get(name)
                if path is not None and (not isinstance(path, str) or not path or "\0" in path):
                    source = f" (from {given.source(name)})" if given.source(name) else ""
                    raise ValueError(f"{name} is {path!r}, accepted: a path or null{source}")
            run_dir = given.values.get("run_dir")
            if self.command in ("fit", "predict") and run_dir not in (None, "null") and "--print_config" not in asked:
                # Before anything is read: the holder may be about to write its last checkpoint.
                self._hold(str(run_dir))
            arguments = self._with_checkpoint(given)
        try:
            self.config = parser.parse_args(arguments)
        except argparse.ArgumentError as error:
            raise ValueError(explain(parser, arguments, error)) from error
        if not isinstance(self.config.trainer, Namespace):  # of a group the parser takes anything
            raise ValueError(f"trainer is {self.config.trainer!r}, accepted: settings of the Trainer")
        if self.config.trainer.precision == "auto":
            # From here on it is what it became: in the run's record too.
            self.config.trainer.precision = resolve_precision("auto", str(self.config.trainer.accelerator))
        if self.command == "predict" and not self.config.run_dir:
            raise ValueError("predict needs --run_dir FOLDER: predictions are written into FOLDER/predictions")
        self.folder = RunFolder(self.config.run_dir, given.values) if self.config.run_dir else None
        if self.command == "fit" and self.folder and not given.values.get("ckpt_path"):
            if earlier := self.folder.checkpoints():
                raise ValueError(
                    f"run_dir={str(self.folder.path)!r} holds the checkpoints of an earlier run ({earlier[0]}):"
                    " `--ckpt_path last` goes on with it, and a new run needs another folder"
                )

    def _hold(self, folder: str) -> None:
        """Be the only one with this command that writes into a folder, until the command ends.

        Raises:
            ValueError: another one writes there.
        """
        if os.path.realpath(folder) in self.held_folders:
            return
        # Lightning ends a fit on SIGTERM at the end of a batch; `Preemption` does so with a checkpoint.
        self.held.enter_context(sole_writer(folder, self.command, end_on_signals=self.command != "fit"))
        self.held_folders.add(os.path.realpath(folder))

    def _resolve(self, given: GivenSettings) -> tuple[str, dict[str, Any]] | None:
        """Find the checkpoint that `--ckpt_path` means, or else the one that `--init_from` names, and read it.

        Raises:
            ValueError: there is none, or it is broken, or a run cannot go on from it.
        """
        path, folder, init_from = (given.values.get(name) for name in ("ckpt_path", "run_dir", "init_from"))
        path, init_from = (None if name == "null" else name for name in (path, init_from))
        if init_from is None and given.values.get("init_anew"):
            raise ValueError("init_anew says what of init_from is left out, and there is no init_from")
        if path is not None and path != "last":
            checkpoint = read_checkpoint(path)
            if init_from is not None:
                raise ValueError(
                    f"ckpt_path={path!r} goes on with a run, init_from={init_from!r} starts one: give one of them"
                )
            if self.command == "fit" and not holds_a_run(checkpoint):
                raise ValueError(
                    f"ckpt_path={path!r} holds weights alone, and not the state of a run to go on with: "
                    f"`--init_from {path}` in its place starts a new run from them"
                )
            return path, checkpoint
        if path == "last":
            if not folder:
                raise ValueError("--ckpt_path last needs the run folder that it is in: --run_dir FOLDER")
            run = RunFolder(folder, given.values)
            newest = run.newest_intact(continues=self.command == "fit")
            if newest is not None:
                return newest
            if self.command != "fit":
                raise ValueError(f"--ckpt_path last: there is no intact checkpoint in run_dir={folder!r}")
            places = ", ".join(run.places())
            rank_zero_only(_log.info)("no checkpoint in %s yet: starting from the beginning", places)
        if init_from is not None and self.command == "fit":
            self.init_from = init_from
            return init_from, read_start(init_from)
        return None

    def _with_checkpoint(self, given: GivenSettings) -> list[str]:
        """Resolve `--ckpt_path` in the arguments; where they name no model, put the checkpoint's before them."""
        asked = given.values.get("ckpt_path")
        found = self._resolve(given)
        if found is None:
            return [*self.arguments, "--ckpt_path=null"] if asked else self.arguments
        self.checkpoint_path, self.checkpoint = found
        goes_on = "null" if self.init_from is not None else self.checkpoint_path
        arguments = [*self.arguments, f"--ckpt_path={goes_on}"]
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
            if self.init_from is not None:
                check_tokenizer(self.model, self.checkpoint, path)
                for line in take_weights(self.model, self.checkpoint, path, anew=self.config.init_anew):
                    rank_zero_only(_log.info)(line)
            elif self.model_from_checkpoint:
                # A generator compares its tokenizer with the data before Lightning restores the weights.
                load_weights(self.model, self.checkpoint, path)
            else:
                check_classes(self.config_dump["model"], self.checkpoint, path)
                check_weights(self.model, self.checkpoint, path)
                check_tokenizer(self.model, self.checkpoint, path)
        if self.command == "fit" and not any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError(
                f"this {type(self.model).__name__} has no weights to train. `from_checkpoint` freezes what it loads, "
                "as the tokenizer of a generator: to train such a model on, leave it out and give `--init_from FILE`"
            )
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init["trainer"]
        callbacks = settings["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        logger, folder = settings["logger"], self.folder
        if folder is not None:
            kwargs["default_root_dir"] = settings["default_root_dir"] or str(folder.path)
            if logger in (None, True):
                logger = folder.logger(self._first_step())
            elif logger:
                logger = logger if isinstance(logger, list) else [logger]
                if not any(isinstance(each, _FILES) for each in logger):  # a service, such as W&B
                    logger = [folder.logger(self._first_step()), *logger]
            if settings["enable_checkpointing"] is not False:
                callbacks += folder.direct_checkpoints(callbacks)
        elif logger in (None, True):
            logger = self._own_version(settings["default_root_dir"] or ".")
        if self.command == "predict":
            assert folder is not None
            callbacks.append(PredictionFiles(folder.path / "predictions"))
        callbacks += self._always_on(callbacks, bool(logger))
        if not settings["fast_dev_run"]:
            callbacks += [self._record_start(logger), RemoveSuperseded()]
        if self._resumed() is not None:
            callbacks.insert(0, ContinueExactly())
            if self.changed:
                callbacks.append(FollowConfiguration(self.changed))
        if settings["accumulate_grad_batches"] < 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {settings['accumulate_grad_batches']}, accepted: 1 or more"
            )
        check_devices(settings["devices"], "trainer.devices")
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, logger=logger, **kwargs)
        except TypeError as error:  # so Lightning refuses some numbers of devices
            raise ValueError(f"trainer: {error}") from error
        keep_freed_memory(trainer.strategy.root_device)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer

    def _resumed(self) -> dict[str, Any] | None:
        """Return the checkpoint that training goes on from."""
        return self.checkpoint if self.command == "fit" and self.init_from is None else None

    def _first_step(self) -> int | None:
        """Return the first step that the log of a resumed run gets."""
        checkpoint = self._resumed()
        return None if checkpoint is None else logged_steps(checkpoint)

    def _own_version(self, root: str) -> TensorBoardLogger:
        """Open a new log in Lightning's layout, one that no other run is just beginning too."""
        while True:
            logger = TensorBoardLogger(root, name="lightning_logs")
            try:
                if self.command == "fit" and not self.config_init["trainer"]["fast_dev_run"]:
                    self._hold(logger.log_dir)
                return logger
            except FolderInUse:
                continue  # its folder is there now, and the next version has another number

    def _always_on(self, callbacks: list[Callback], logged: bool) -> list[Callback]:
        """List the callbacks that every run has, without those that the user configured."""
        settings = self.config_init["trainer"]
        always: list[Callback] = []
        if settings["enable_progress_bar"] is not False:
            always.append(TQDMProgressBar())
        if self.command == "fit":
            always.append(TrainingGuard())
            if not settings["fast_dev_run"]:
                always += [HangDetector(), CollectiveTimeout()]
                keepers = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
                if settings["enable_checkpointing"] is not False and isinstance(
                    (keepers or [ModelCheckpoint()])[0], ModelCheckpoint
                ):
                    always.append(Preemption())
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
            checkpoint=None if self.init_from is not None else self.checkpoint_path,
            init_from=self.init_from,
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
                "does not read: use FSDP2Strategy, or go on from the one file that `discrete-lit export --ckpt_path "
                f"{path} --family checkpoint --output FILE` makes of it"
            )
        settings = {name: self.config_init[name] for name in self.command_settings}
        if self.command == "test" and not is_overridden("test_step", self.model):
            raise ValueError(
                f"{type(self.model).__name__} has no test step: `discrete-lit validate` computes its metrics on "
                "data.init_args.validation, `discrete-lit evaluate` compares its images with a reference"
            )
        if self.command == "predict":
            settings["return_predictions"] = False  # they are in files, and need not fit into memory
        if not self.config_init["trainer"]["fast_dev_run"]:
            self._open_logs()
        try:
            return getattr(self.trainer, self.command)(
                self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path, weights_only=True, **settings
            )
        except OSError as error:
            # TensorBoard's writer does not say where it writes.
            if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise OSError(error.errno, error.strerror, self.trainer.default_root_dir) from error
            raise

    def _open_logs(self) -> None:
        """Hold the folders of logs and checkpoints, and let logs in CSV files go on instead of being deleted."""
        files = [logger for logger in self.trainer.loggers if isinstance(logger, _FILES)]
        if self.command == "fit":
            places = [*checkpoint_folders(self.trainer.checkpoint_callbacks), *(str(log.log_dir) for log in files)]
            for place in places:
                if "://" not in place:
                    self._hold(place)
        for logger in files if self.trainer.is_global_zero else []:
            if isinstance(logger, CSVLogger):
                begins = self.command == "fit" and self._resumed() is None
                continue_csv_log(logger, 0 if begins else self._first_step())
