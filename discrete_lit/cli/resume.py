"""Going on from a checkpoint: what changed in the configuration, and optimizers that follow the change."""

import logging
import warnings
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from discrete_lit.core.lightning_internals import (
    begin_next_epoch,
    count_batches_of_epoch,
    count_log_steps_from,
    end_finished_epoch,
    note_resumed_step,
)
from discrete_lit.core.trust import printable
from discrete_lit.data.data_module import ResumableDataModule
from discrete_lit.generators import Generator, LatentGenerator, SegmentGenerator
from discrete_lit.tokenizers import Tokenizer

_log = logging.getLogger(__name__)
_ABSENT = object()


def differences(now: Any, before: Any, path: str) -> Iterable[str]:
    """One line for each setting that a configuration changes: `path: new (checkpoint: old)`.

    Args:
        now: plain data, as in a YAML file.
        before: the same of the checkpoint.
        path: of both, dotted.
    """
    both = isinstance(now, Mapping) and isinstance(before, Mapping)
    if both and now.get("class_path") == before.get("class_path"):
        for name in dict.fromkeys((*now, *before)):
            yield from differences(now.get(name, _ABSENT), before.get(name, _ABSENT), f"{path}.{name}")
    elif both and "class_path" in now and "class_path" in before:
        yield f"{path}.class_path: {now['class_path']} (checkpoint: {before['class_path']})"
    elif now != before:
        yield f"{path}: {_shown(now)} (checkpoint: {_shown(before)})"


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    if isinstance(value, Mapping) and "class_path" in value:
        return printable(value["class_path"])
    return "null" if value is None else printable(value)


def check_classes(config: Mapping[str, Any], checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse the weights of a model of other classes than the configured one.

    Raises:
        ValueError: the numbers of classes differ.
    """
    saved = (checkpoint.get("hyper_parameters") or {}).get("init_args") or {}
    before, now = saved.get("num_classes"), (config.get("init_args") or {}).get("num_classes")
    if None not in (before, now) and before != now:
        raise ValueError(
            f"model.init_args.num_classes is {now}, and the weights of {path!r} are of {before} classes: a label would "
            "mean another class. Train on data of the same classes, or start without these weights"
        )


def check_tokenizer(module: LightningModule, checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse to go on with a generator whose configured tokenizer is not the one in its checkpoint.

    Raises:
        ValueError: the weights of the two tokenizers differ.
    """
    if not isinstance(module, Generator | LatentGenerator | SegmentGenerator):
        return
    tokenizers: dict[str, Any] = {"tokenizer": module.tokenizer}
    codec = getattr(module, "audio_tokenizer", None)
    if codec is not None:
        tokenizers["audio_tokenizer"] = codec
    discrete = getattr(module, "discrete", None)
    if isinstance(discrete, Tokenizer):
        tokenizers["discrete"] = discrete
    elif discrete is not None:
        # A generator, in whose place another of the same tokens may stand.
        tokenizers["discrete.tokenizer"] = discrete.tokenizer
    for place, tokenizer in tokenizers.items():
        saved = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith(f"{place}.")}
        own = tokenizer.state_dict(prefix=f"{place}.")
        # A generator that was imported without its tokenizer says nothing of it.
        if saved and not all(name in saved and torch.equal(value.cpu(), saved[name]) for name, value in own.items()):
            raise ValueError(
                f"the generator of {path!r} was trained on another tokenizer than model.init_args.{place} gives; "
                "leave the model out of the configuration to use the checkpoint's own"
            )


class ContinueExactly(Callback):
    """Makes up for five slips of Lightning 2.6 at a resume.

    From a checkpoint written at the end of an epoch, or behind it by who called `fit`, under `max_steps`, it would
    train one more batch in that epoch and then lose the rest of the next. Where the data, the batch size or the ranks
    changed between two epochs, it would take an epoch that had fewer batches for unfinished. Inside an epoch, where a
    global batch is made of more or fewer batches than before, it would count on as if they were as large. And it counts
    the steps of the log apart from `global_step`, after some resumes from one too far: a gap in every curve. Where
    gradients are accumulated a ModelCheckpoint would save the step of the resume again, inside the next one.
    """

    def __init__(self) -> None:
        self.first = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ResumableDataModule) and (batches := data.resumed_batches):
            count_batches_of_epoch(trainer, batches)
        end_finished_epoch(trainer)
        begin_next_epoch(trainer)
        note_resumed_step(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Several optimizers in manual optimization count several global steps for a batch.
        if self.first and len(trainer.optimizers) == 1:
            count_log_steps_from(trainer, trainer.global_step)
        self.first = False


class FollowConfiguration(Callback):
    """After a resume, puts the configured settings of optimizers and schedulers in place of the checkpoint's.

    Lightning restores both with all their settings, so that a new learning rate would be forgotten. Here the moments
    are restored, while the settings are those of the configuration, and its schedule is replayed up to the step where
    the run goes on: the learning rate is what it would be had the run always had this configuration. A schedule that
    follows a metric cannot be replayed: it keeps its state, and only changed settings are touched. An optimizer of
    another class starts anew.

    Args:
        changed: dotted paths of the settings that differ from the checkpoint.
    """

    def __init__(self, changed: Iterable[str]) -> None:
        self.changed = list(changed)
        self.states: list[dict[str, Any]] = []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.states = checkpoint["lr_schedulers"]
        checkpoint["lr_schedulers"] = []
        if any(path.endswith("optimizer.class_path") for path in self.changed):
            rank_zero_only(_log.warning)("the optimizer is of another class than the checkpoint's and starts anew")
            checkpoint["optimizer_states"] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.configured = [[_settings(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs)
        names = {path.rpartition(".")[2] for path in self.changed}
        for optimizer, groups in zip(trainer.optimizers, self.configured, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update({name: value for name, value in settings.items() if not measured or name in names})
        for config, state in zip_longest(trainer.lr_scheduler_configs, self.states):
            if config is None:
                break
            if isinstance(config.scheduler, ReduceLROnPlateau):
                if state is not None and "num_bad_epochs" in state:
                    config.scheduler.load_state_dict(state)
            else:
                elapsed = trainer.global_step if config.interval == "step" else trainer.current_epoch
                _replay(config.scheduler, elapsed if state is None else state["last_epoch"])


def _replay(scheduler: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        # The optimizer's steps were taken before the checkpoint was written.
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*before.*optimizer.step", UserWarning)
        for _ in range(steps):
            scheduler.step()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
