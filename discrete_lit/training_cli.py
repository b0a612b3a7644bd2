"""`fit`, `validate`, `test` and `predict`: a LightningCLI of one command."""

import importlib
from typing import Any

import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from discrete_lit.checkpoints import record_config

# Classes of these packages may be named without their package in a configuration.
_PACKAGES = ("tokenizers", "generators", "backbones", "samplers", "data", "callbacks")


class TrainingCLI(LightningCLI):
    """Parses the settings of one command, builds model, data and trainer, and runs the command.

    Args:
        command: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        arguments: what follows it on the command line.
    """

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command = command
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False},
            parser_kwargs={"prog": f"discrete-lit {command}"},
            args=arguments,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        skipped: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        self.command_settings = parser.add_method_arguments(Trainer, self.command, skip=skipped)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def after_instantiate_classes(self) -> None:
        self._dump_config()
        record_config(self.model, self.config_dump["model"])

    def run(self) -> Any:
        """Run the command on what was built."""
        settings = {name: self.config_init[name] for name in self.command_settings}
        return getattr(self.trainer, self.command)(self.model, datamodule=self.datamodule, **settings)


def run_training(command: str, arguments: list[str]) -> Any:
    """Run one of the four commands with the settings of the command line."""
    for package in _PACKAGES:
        importlib.import_module(f"discrete_lit.{package}")
    return TrainingCLI(command, arguments).run()
