"""The folder of a run: what lies where, which checkpoint is the last one, and how checkpoints are written.

run_dir/
    checkpoints/    the newest checkpoints
    tensorboard/    one log, continued by every resume
    predictions/    what `predict` wrote
    config.yaml     the settings of the first start; config-resumed-1.yaml, ... those of the next ones
    run.json        time, command line, git commit, versions, checkpoint and checkpoint folders of every start
    .fit.lock       while a `fit` writes here: who it is
"""

import errno
import io
import json
import logging
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from discrete_lit.checkpoints import read_checkpoint
from discrete_lit.core.background import BackgroundQueue
from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.configuration import read_settings
from discrete_lit.core.files import UNFINISHED_SUFFIX, atomic_write, atomic_write_text
from discrete_lit.core.provenance import environment

_log = logging.getLogger(__name__)
# What a checkpoint says of how many each ModelCheckpoint kept when it was written.
_KEPT = "kept_checkpoints"
_MOST_LISTED = 10
# Checkpoints in the memory of the host that are not written yet: the best one and `last.ckpt` beside it.
_MOST_PENDING = 2


class RunFolder:
    """Know the layout of a run folder; nothing is written before a run starts.

    Args:
        path: the folder, made when it is needed.
        settings: the settings of this start as they were given, which may send checkpoints elsewhere.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.settings = settings or {}

    def places(self) -> list[str]:
        """List the folders that the run's checkpoints are in: its own, and those of each callback that has its own.

        They are in the given settings, or were noted in `run.json` by an earlier start.
        """
        noted = [place for start in _starts(self.path) for place in start.get("places", ())]
        inside = ["checkpoints", *noted]
        trainer = self.settings.get("trainer")
        given = _folders(trainer.get("callbacks")) if isinstance(trainer, Mapping) else []
        found = [*(place if "://" in place else os.path.join(self.path, place) for place in inside), *given]
        return list(dict.fromkeys(place if "://" in place else os.path.normpath(place) for place in found))

    def checkpoints(self) -> list[Path]:
        """List every checkpoint of the run, files and folders of sharded ones; in no order.

        Raises:
            ValueError: a folder cannot be read.
        """
        beside = self.path.glob("hpc_ckpt_*.ckpt")  # of Lightning's own preemption
        return list(dict.fromkeys((*beside, *(file for place in self.places() for file in _checkpoints_in(place)))))

    def newest_intact(self, *, continues: bool = False, up_to: int | None = None) -> tuple[str, dict[str, Any]] | None:
        """Find the checkpoint of the highest `global_step`, and read it; log and skip each one that is broken.

        The time of a file counts only between checkpoints of one step: copying a run changes it.

        Args:
            continues: training must be able to go on from it, so that weights alone do not do.
            up_to: later steps are passed over; by default none.

        Returns:
            Its path and content; None where there is no checkpoint at all.

        Raises:
            ValueError: there are checkpoints, and none serves; the message says of each why.
        """
        found: list[tuple[tuple[int, ...], str]] = []
        unfit: list[str] = []
        broken: list[str] = []
        for file in self.checkpoints():
            try:
                checkpoint = _glance(file)
                if self._is_anothers(file, checkpoint) or (up_to is not None and checkpoint["global_step"] > up_to):
                    continue
                if continues and not holds_a_run(checkpoint):
                    unfit.append(f"{str(file)!r} holds weights alone")
                else:
                    found.append(((*_progress(checkpoint), file.stat().st_mtime_ns), str(file)))
            except (OSError, ValueError) as error:
                broken.append(_first_line(file, error))
        for _, name in sorted(found, reverse=True):
            try:
                newest = name, read_checkpoint(name)
            except (OSError, ValueError) as error:
                broken.append(_first_line(Path(name), error))
                continue
            for reason in broken:
                rank_zero_only(_log.warning)("skipped a broken checkpoint: %s", reason)
            return newest
        if broken or unfit:
            reasons = [*broken, *unfit]
            more = [f"and {len(reasons) - _MOST_LISTED} more"] if len(reasons) > _MOST_LISTED else []
            advice = "`--init_from FILE` in a new run folder starts from the weights of a file" if unfit else None
            lines = [*reasons[:_MOST_LISTED], *more, *([advice] if advice else [])]
            raise ValueError(
                f"run_dir={str(self.path)!r} has checkpoints, and the run can go on from none of them:\n       "
                + "\n       ".join(lines)
            )
        return None

    def _is_anothers(self, file: Path, checkpoint: Mapping[str, Any]) -> bool:
        """Tell whether a checkpoint below a folder of this run's was written by a run that has its folder there."""
        folder = os.path.realpath(file.parent)
        if folder in map(os.path.realpath, self.places()) or Path(folder).is_relative_to(os.path.realpath(self.path)):
            return False
        return folder in _written_into(checkpoint)

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


def holds_a_run(checkpoint: Mapping[str, Any]) -> bool:
    """Tell whether training can go on from a checkpoint: it has loops, schedulers and optimizers, not weights alone."""
    # The optimizers' states of a sharded checkpoint are in its shards, as its weights are.
    return {"loops", "lr_schedulers"} <= checkpoint.keys() and (
        "optimizer_states" in checkpoint or "state_dict" not in checkpoint
    )


def logged_steps(checkpoint: Mapping[str, Any]) -> int:
    """Count the steps that a run had logged up to a checkpoint: with several optimizers one for each batch."""
    step, batches, _ = _progress(checkpoint)
    return batches if len(checkpoint.get("optimizer_states", ())) > 1 else step


def checkpoint_folders(callbacks: Iterable[Callback]) -> list[str]:
    """List the folders that callbacks write checkpoints into."""
    places = [getattr(callback, "dirpath", None) for callback in callbacks if isinstance(callback, Checkpoint)]
    return list(dict.fromkeys(str(place) for place in places if place))


def _folders(settings: Any) -> Iterator[str]:
    """Find each `dirpath` in the settings of callbacks, which may be in a string as the command line has them."""
    if isinstance(settings, str) and settings.lstrip().startswith(("[", "{")):
        with suppress(yaml.YAMLError):  # the parser says what is wrong with it
            settings = read_settings(settings)
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            if name == "dirpath" and isinstance(value, str):
                yield value
            else:
                yield from _folders(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _folders(value)


def _checkpoints_in(place: str) -> Iterator[Path]:
    """List the checkpoints below a folder."""
    if "://" in place:
        raise ValueError(
            f"--ckpt_path last does not look into {place!r}, where this run's checkpoints are: download the newest one "
            "and give its path"
        )

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, inner, files in os.walk(place, onerror=refuse):
        sharded = [name for name in inner if name.endswith(".ckpt") or Path(folder, name, "meta.pt").exists()]
        inner[:] = [name for name in inner if name not in sharded and not name.startswith(".")]
        yield from (Path(folder, name) for name in sharded if not name.startswith("."))
        yield from (Path(folder, name) for name in files if name.endswith(".ckpt") and not name.startswith("."))


def _glance(path: Path) -> dict[str, Any]:
    """Read a checkpoint without looking at its weights.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    file = path / "meta.pt" if path.is_dir() else path
    if path.is_dir() and not (path / ".metadata").exists():
        raise ValueError("it is an unfinished sharded checkpoint")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(_unreadable(error)) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("global_step"), int):
        raise ValueError("it is not a checkpoint of `discrete-lit fit`")
    return checkpoint


def _written_into(checkpoint: Mapping[str, Any]) -> list[str]:
    """List the folders of the ModelCheckpoints of the run that wrote a checkpoint."""
    states = (checkpoint.get("callbacks") or {}).values()
    places = [state.get("dirpath") for state in states if isinstance(state, Mapping)]
    return [os.path.realpath(place) for place in places if isinstance(place, str)]


def _unreadable(error: Exception) -> str:
    """Say in a line why PyTorch does not read a file."""
    if named := re.search(r"[Gg]lobal:? (?:GLOBAL )?([\w.]+) was not an allowed", str(error)):
        return f"it holds {named[1]}, mostly in the state of a callback, which is not read since it could execute code"
    return f"it is truncated or damaged ({str(error).strip().splitlines()[0][:200] if str(error).strip() else error!r})"


def _first_line(file: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{str(file)!r} cannot be read: {error.strerror or error}"
    text = (str(error).strip() or repr(error)).splitlines()[0]
    return text if str(file) in text else f"{str(file)!r} cannot be read: {text}"


def _progress(checkpoint: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return how far a run was: optimizer steps, then batches and finished epochs."""
    fit = (checkpoint.get("loops") or {}).get("fit_loop") or {}
    batches = fit.get("epoch_loop.batch_progress", {}).get("total", {}).get("ready", 0)
    epochs = fit.get("epoch_progress", {}).get("total", {}).get("processed", 0)
    return checkpoint["global_step"], batches, epochs


def _starts(folder: Path) -> list[dict[str, Any]]:
    """Read what `run.json` says of the starts of a run."""
    file = folder / "run.json"
    if not file.is_file():
        return []
    try:
        starts = read_json(file).get("starts", [])
        if not all(isinstance(start.get("places", []), list) for start in starts):
            raise ValueError("the places of its checkpoints are no list")
        return starts
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it") from error


class WholeCheckpoints(TorchCheckpointIO):
    """Write each checkpoint beside its final name first, while training goes on, and check that it can be read again.

    Lightning writes into TMPDIR, and copies from there where that is another file system: it fills a small TMPDIR,
    leaves files there, and a kill in between leaves half a checkpoint under the final name.

    Training waits until the file is made in the host's memory, if that has room for four. A thread writes one after the
    other, and two of them wait at most. What is removed is removed in its turn: the one before a checkpoint stays until
    that is whole. An error of the disk is raised at the next save, or at the end of the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()
        self._queue = BackgroundQueue("checkpoints")
        """A checkpoint that is written weighs one, one that is removed nothing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if _size(checkpoint) > _available_memory() // 4:
            self.wait()
            self._write(checkpoint, path, None)
            return
        self.wait(_MOST_PENDING - 1)
        # The very bytes of the file, so that what shares memory shares it there too.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        self._queue.submit(self._write, checkpoint, path, content, weight=1)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **settings: Any) -> Any:
        self.wait()
        return super().load_checkpoint(path, *arguments, **settings)

    def remove_checkpoint(self, path: str | Path) -> None:
        if self._queue:
            self._queue.submit(super().remove_checkpoint, path)
        else:
            super().remove_checkpoint(path)

    def teardown(self) -> None:
        self._queue.close()

    def wait(self, most: int = 0) -> None:
        """Wait until at most so many checkpoints are being written.

        Raises:
            OSError: one could not be written.
        """
        self._queue.wait(most)

    def _write(self, checkpoint: dict[str, Any], path: str | Path, content: io.BytesIO | None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            if content is None:
                torch.save(checkpoint, file)
            else:
                file.write(content.getbuffer())
            file.flush()
            self._check_readable(checkpoint, Path(file.name), path)

    def _check_readable(self, checkpoint: dict[str, Any], written: Path, path: str | os.PathLike[str]) -> None:
        try:
            torch.load(written, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            faults = list(_unreadable_entries(checkpoint))
            if not faults:
                raise OSError(errno.EIO, f"written, and cannot be read again ({error})", os.fspath(path)) from error
            for entry, why in faults:
                if entry not in self._told:
                    self._told.add(entry)
                    _log.warning(
                        "no run can go on from %s: %s of it cannot be read again, since %s. Let it be made of plain "
                        "numbers (float(x), x.item()), strings, lists, dictionaries and tensors.",
                        os.fspath(path),
                        entry,
                        why,
                    )


def _size(value: Any) -> int:
    """Bytes of the tensors in nested mappings and lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if not isinstance(value, Mapping | list | tuple):
        return 0
    return sum(map(_size, value.values() if isinstance(value, Mapping) else value))


def _available_memory() -> int:
    """Bytes of the host's memory that nothing uses; unlimited where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2**62


def _unreadable_entries(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name the entries of a checkpoint, and of its callbacks, that `weights_only=True` does not read."""
    parts = {f"the entry {name!r}": value for name, value in checkpoint.items() if name != "callbacks"}
    states = checkpoint.get("callbacks") or {}
    parts |= {f"the state of the callback {key}": state for key, state in states.items()}
    for name, value in parts.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, map_location="cpu", weights_only=True)
        except Exception as error:
            yield name, _unreadable(error)


class RemoveSuperseded(Callback):
    """At a resume, removes what a kill kept earlier starts from removing.

    That is files that were being written, and checkpoints that a ModelCheckpoint had superseded: it forgets those that
    it does not find in its own state. One is removed only if a checkpoint says of itself that this ModelCheckpoint,
    keeping as many as today, wrote it under its present name, if the run went on from a later step, and if the state
    does not name it.

    What a ModelCheckpoint remembers it removes later, files and folders. A checkpoint may come from anybody, and
    Lightning checks neither `..` nor another file system: names outside of its folder are forgotten. And it would
    forget all, the best ones too, where the run folder is given by another path than before.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for keeper in _keepers(trainer):
            state, folder = (checkpoint.get("callbacks") or {}).get(keeper.state_key) or {}, str(keeper.dirpath)
            if os.path.realpath(str(state.get("dirpath"))) == os.path.realpath(folder):
                state["dirpath"] = folder
            for entry in ("best_model_path", "kth_best_model_path", "last_model_path"):
                if entry in state:
                    state[entry] = _inside(folder, state[entry])
            if "best_k_models" in state:
                named = [(_inside(folder, name), score) for name, score in state["best_k_models"].items()]
                state["best_k_models"] = {name: score for name, score in named if name}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEPT] = {keeper.state_key: keeper.save_top_k for keeper in _keepers(trainer)}

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for keeper in _keepers(trainer):
            place = str(keeper.dirpath)
            if "://" in place or not Path(place).is_dir():
                continue
            for pattern in (
                f"*.ckpt{UNFINISHED_SUFFIX}",
                ".*.ckpt.unfinished",
                f".*.ckpt.unfinished{UNFINISHED_SUFFIX}",
            ):
                for file in Path(place).glob(pattern):  # not below it, where another run may be writing
                    trainer.strategy.remove_checkpoint(file)
            if trainer.ckpt_path is None or keeper.save_top_k < 1:
                continue
            named = {trainer.ckpt_path, keeper.best_model_path, keeper.last_model_path, *keeper.best_k_models}
            current = {os.path.realpath(name) for name in map(str, named) if name}
            for file in _checkpoints_in(place):
                if os.path.realpath(file) not in current and self._is_superseded(file, keeper, trainer.global_step):
                    _log.info("removed %s, which a later checkpoint had superseded", file)
                    trainer.strategy.remove_checkpoint(file)

    def _is_superseded(self, file: Path, keeper: ModelCheckpoint, step: int) -> bool:
        try:
            checkpoint = _glance(file)
        except (OSError, ValueError):
            return False
        state = (checkpoint.get("callbacks") or {}).get(keeper.state_key)
        if state is None or os.path.realpath(str(state["dirpath"])) != os.path.realpath(str(keeper.dirpath)):
            return False
        if (checkpoint.get(_KEPT) or {}).get(keeper.state_key) != keeper.save_top_k:
            return False
        kept = (state["best_model_path"], *state["best_k_models"])
        own = any(os.path.realpath(name) == os.path.realpath(file) for name in kept if name)
        return own and checkpoint["global_step"] < step


def _inside(folder: str, name: Any) -> str:
    """Write the name of a file below a folder by the folder's path; empty for one elsewhere, wherever `..` leads."""
    above, last = os.path.split(str(name))
    same_system = any(mark in above for mark in ("://", "::")) == ("://" in folder)
    below = os.path.relpath(os.path.realpath(above), os.path.realpath(folder))
    if not last or not same_system or below.split(os.sep)[0] == os.pardir:
        return ""
    return os.path.join(folder, last) if below == os.curdir else os.path.join(folder, below, last)


def _keepers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


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
    """Write the settings of every start into a folder, and into the loggers: TensorBoard as text, others as parameters.

    Args:
        folder: where `config.yaml` and `run.json` go; None writes to the loggers alone.
        command: the command and its arguments, for `run.json`.
        configuration: the resolved settings, as YAML.
        checkpoint: what the run goes on from.
        init_from: the checkpoint whose weights the run began with.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        command: Sequence[str],
        configuration: str,
        checkpoint: str | None,
        init_from: str | None = None,
    ) -> None:
        self.folder, self.command, self.configuration = folder, command, configuration
        self.checkpoint, self.init_from = checkpoint, init_from

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
            else:
                logger.log_hyperparams(yaml.safe_load(self.configuration))

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
        # `sample` may have written its own record into the same folder.
        others = read_json(file) if file.exists() else {}
        start = {
            "command": ["discrete-lit", *self.command],
            "checkpoint": self.checkpoint,
            **({} if self.init_from is None else {"init_from": self.init_from}),
            "places": [self._noted(place) for place in checkpoint_folders(trainer.checkpoint_callbacks)],
            "host": platform.node(),
            "world_size": trainer.world_size,
            **environment(trainer.strategy.root_device),
        }
        atomic_write_text(file, json.dumps({**others, "starts": [*_starts(self.folder), start]}, indent=2) + "\n")

    def _noted(self, place: str) -> str:
        """Write a folder inside the run folder relative to it, so that a copy of the run has its own."""
        assert self.folder is not None
        if "://" in place:
            return place
        absolute, folder = os.path.abspath(place), os.path.abspath(self.folder)
        return os.path.relpath(absolute, folder) if Path(absolute).is_relative_to(folder) else absolute
