"""`discrete-lit replay`: the batch that an alarm of training names, once more, on the checkpoint before it."""

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from discrete_lit.checkpoints import check_weights, read_checkpoint, rebuild
from discrete_lit.cli.devices import make_fabric
from discrete_lit.cli.run_folder import RunFolder
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.core.bounded_reading import read_json, read_text
from discrete_lit.core.configuration import build, read_settings
from discrete_lit.core.files import atomic_write_text
from discrete_lit.core.images import pixels_as_floats
from discrete_lit.core.lightning_internals import begin_at_step
from discrete_lit.data.data_module import ResumableDataModule
from discrete_lit.fsdp2 import is_sharded

_log = logging.getLogger(__name__)
_ENTRIES = {"step": int, "epoch": int, "batch": int, "ranks": list}
_MOST_SHOWN = 8


def replay(
    run_dir: str,
    *,
    alarm: str | None = None,
    ckpt_path: str | None = None,
    accelerator: str = "auto",
    precision: str | None = None,
) -> dict[str, Any]:
    """Run the batch of an alarm again, on the weights of the checkpoint before it, and say where it goes wrong.

    `fit` writes an alarm, `<run_dir>/alarms/*.json`, for a batch whose loss or gradient is not finite, or whose loss
    jumps. The batch of each rank is read again from the data of the run's `config.yaml`, with the same augmentation and
    the same noise, and run forward and backward once. The result, with the loss and its terms, the norm of each
    submodule's gradient, and the first submodule whose output is not finite, is printed, and written beside the alarm
    as `*.replay.json`. A loss that is finite here says that the weights had broken, and not the batch.

    Args:
        run_dir: the run folder.
        alarm: the file; the newest of the run by default.
        ckpt_path: a checkpoint; by default the newest whole one of the run up to the step of the alarm.
        accelerator: Lightning's; `auto` takes a GPU where there is one.
        precision: Lightning's; the run's by default.

    Returns:
        What is written.

    Raises:
        ValueError: no alarm, or none that says where its batch stands; no checkpoint from before it; data that are not
            of `discrete_lit.data`, or that give other samples now.
    """
    folder = RunFolder(run_dir)
    file = _find_alarm(folder.path) if alarm is None else Path(alarm)
    said = _read_alarm(file)
    settings = _settings_of(folder.path)
    data = _data_of(settings, folder.path)
    if ckpt_path is None:
        found = folder.newest_intact(up_to=said["step"])
        if found is None:
            raise ValueError(
                f"{run_dir!r} has no checkpoint of step {said['step']} or before: give one by --ckpt_path, such as the "
                "one that the run began with"
            )
    else:
        found = ckpt_path, read_checkpoint(ckpt_path)
    path, checkpoint = found
    if is_sharded(path):
        checkpoint = read_checkpoint(path, whole=True)
    trainer_settings = settings.get("trainer") or {}
    precision = resolve_precision(precision or str(trainer_settings.get("precision") or "32-true"), accelerator)
    make_fabric(accelerator, precision=precision)  # refuses what there is not
    ranks = []
    for entry in said["ranks"]:
        module = _module_of(checkpoint, path)
        batch = _batch_of(data, said, entry, file, checkpoint.get(type(data).__qualname__))
        _log.info("rank %s of the alarm, on %s", entry["rank"], path)
        ranks.append({"rank": entry["rank"], **_run(module, batch, checkpoint["global_step"], accelerator, precision)})
    result = {
        "alarm": str(file),
        "alarm_step": said["step"],
        "checkpoint": str(path),
        "checkpoint_step": checkpoint["global_step"],
        "ranks": ranks,
    }
    text = json.dumps(result, indent=2)
    print(text)
    atomic_write_text(file.with_suffix(".replay.json"), text + "\n")
    return result


def _find_alarm(folder: Path) -> Path:
    found = [file for file in folder.glob("alarms/*.json") if not file.name.endswith(".replay.json")]
    if not found:
        raise ValueError(f"{str(folder)!r} has no alarms: there is no batch to run again")
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def _read_alarm(file: Path) -> dict[str, Any]:
    said = read_json(file)
    for name, kind in _ENTRIES.items():
        if not isinstance(said, dict) or not isinstance(said.get(name), kind):
            raise ValueError(f"{file} does not say the {name} of a batch: it is no alarm, or one of an earlier version")
    if not all(isinstance(entry, dict) and isinstance(entry.get("rank"), int) for entry in said["ranks"]):
        raise ValueError(f"{file} does not say of which ranks its batches are")
    return said


def _settings_of(folder: Path) -> Mapping[str, Any]:
    """The settings of the newest start of a run."""
    files = [folder / "config.yaml", *folder.glob("config-resumed-*.yaml")]
    there = [file for file in files if file.is_file()]
    if not there:
        raise ValueError(f"{str(folder)!r} has no config.yaml: it is no run folder of `discrete-lit fit`")
    newest = max(there, key=lambda file: file.stat().st_mtime_ns)
    try:
        settings = read_settings(read_text(newest))
    except yaml.YAMLError as error:
        raise ValueError(f"{newest} is not valid YAML: {error}") from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{newest} holds no settings")
    return settings


def _data_of(settings: Mapping[str, Any], folder: Path) -> ResumableDataModule:
    """Build the data of a run; a class of this package alone, since a run folder may come from anybody."""
    given = settings.get("data")
    name = given.get("class_path") if isinstance(given, Mapping) else None
    if not isinstance(name, str) or not name.startswith("discrete_lit.data."):
        raise ValueError(
            f"the data of {str(folder)!r} are a {name!r}, and replay finds the batches of the DataModules of "
            "discrete_lit.data alone"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ResumableDataModule, "data", required=True)  # type: ignore[type-abstract]
    try:
        parsed = parser.parse_object({"data": given})
    except Exception as error:
        raise ValueError(f"cannot read the data of {str(folder)!r}: {error}") from error
    return build(parser, parsed)["data"]


def _module_of(checkpoint: Mapping[str, Any], path: str) -> LightningModule:
    """Build the module of a checkpoint, with the weights that were trained, not their averages."""
    module = rebuild(checkpoint, path)
    weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
    check_weights(module, {**checkpoint, "state_dict": weights}, path)
    module.load_state_dict(weights, strict=True)
    return module  # in training, but for what is frozen in it


def _batch_of(
    data: ResumableDataModule, said: Mapping[str, Any], entry: Mapping[str, Any], file: Path, state: Any
) -> Any:
    """Read the batch of a rank again, in the order of the checkpoint, and compare its keys with those of the alarm."""
    source = data.training_source_of(state, entry["rank"], len(said["ranks"]))
    batch, _ = source.batch(said["epoch"], said["batch"])
    for name in ("key", "index"):
        if name in entry and name in batch:
            found = batch[name].tolist() if isinstance(batch[name], Tensor) else list(batch[name])
            if found != entry[name]:
                raise ValueError(
                    f"the data give other samples than {file} names, first {str(found[:2])[:80]} in place of "
                    f"{str(entry[name][:2])[:80]}: the data, batch_size, workers or ranks have changed since"
                )
    return batch


def _run(module: LightningModule, batch: Any, step: int, accelerator: str, precision: str) -> dict[str, Any]:
    """Run one step of training on a batch, and say what came of it."""
    watch = _Watch(step)
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        limit_train_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[watch],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # advice for a training, on workers and validation
        trainer.fit(module, DataLoader([pixels_as_floats(batch)], batch_size=None))  # type: ignore[arg-type]
    terms = {name: _plain(value) for name, value in trainer.callback_metrics.items() if "train/" in name}
    return {"losses": watch.losses, "terms": terms, "gradient_norms": watch.norms, "not_finite": watch.broken}


class _Watch(Callback):
    """Notes the losses of a step, its gradients, and the submodules whose output or gradient is not finite."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.losses: list[float | str] = []
        self.norms: dict[str, float | str] = {}
        self.broken: list[str] = []
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begin_at_step(trainer, self.step)
        for name, part in pl_module.named_modules():
            self._hooks.append(part.register_forward_hook(self._noting(name or type(pl_module).__name__)))

    def _noting(self, name: str) -> Any:
        def note(part: torch.nn.Module, given: Any, made: Any) -> None:
            tensors = [value for value in (made if isinstance(made, tuple | list) else (made,)) if _is_float(value)]
            if len(self.broken) < _MOST_SHOWN and not all(bool(value.isfinite().all()) for value in tensors):
                self.broken.append(f"output of {name}")

        return note

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.losses.append(_plain(loss.detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients: dict[str, list[Tensor]] = {}
        for name, weight in pl_module.named_parameters():
            if weight.grad is not None:
                gradients.setdefault(name.rpartition(".")[0] or name, []).append(weight.grad)
        for name, values in gradients.items():
            norm = torch.nn.utils.get_total_norm(values)
            self.norms[name] = _plain(norm)
            if not bool(norm.isfinite()) and len(self.broken) < _MOST_SHOWN:
                self.broken.append(f"gradient of {name}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _plain(value: Any) -> float | str:
    """A number as JSON can hold it, which has no word for what is not finite."""
    number = float(value)
    return number if abs(number) < float("inf") else str(number)
