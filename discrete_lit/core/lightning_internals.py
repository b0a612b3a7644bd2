"""Everything that this package needs of Lightning 2.6 and that has no public name.

No other file uses a private name of Lightning; `tests/core/test_lightning_internals.py` shows what each function relies
on and says what to do when a new Lightning breaks it.
"""

import csv
import io
import math
from itertools import count
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT as PrecisionInput
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import Strategy

from discrete_lit.core.files import atomic_write_text

__all__ = [
    "PrecisionInput",
    "accumulates_gradients",
    "begin_at_step",
    "continue_csv_log",
    "log_batch_now",
    "log_step",
    "logs_this_step",
    "saves_one_file",
]


def logs_this_step(trainer: Trainer) -> bool:
    """Tell whether the trainer logs at this step, by `log_every_n_steps` or because it is about to stop.

    There is no public way: `trainer.global_step` counts the steps of all optimizers, the log the batches that stepped.
    """
    return trainer._logger_connector.should_update_logs


def accumulates_gradients(trainer: Trainer) -> bool:
    """Tell whether this batch only adds to the gradients, so that no optimizer step ends with it.

    There is no public way: the last batch of an epoch steps too, however many it is.
    """
    return trainer.fit_loop._should_accumulate()


def log_batch_now(trainer: Trainer) -> None:
    """Send the metrics of the batch that just ended to the loggers, in a callback's `on_train_batch_end`.

    There is no public way: Lightning does so after all callbacks, too late for one that ends the run.
    """
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def log_step(trainer: Trainer) -> int:
    """Give the step that a batch's metrics are logged at, in a callback's `on_train_batch_end`.

    There is no public way: the log counts the batches that stepped, and counts this one only after the callbacks and
    the validation behind it.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def begin_next_epoch(trainer: Trainer) -> None:
    """Leave the epoch that a checkpoint was written at the end of, in `on_train_start` after a resume; nothing else.

    There is no public way: under `max_steps` the setter of `fit_loop.restarting` makes True of False, also where the
    epoch was wholly over, as after a `fit`, and its batches would be counted as those of the next one.
    """
    fit_loop = trainer.fit_loop
    total: Any = fit_loop.epoch_progress.total
    # What `max_steps` cuts short counts as an epoch too.
    over = total.ready == total.started == total.processed and fit_loop.epoch_loop.batch_progress.is_last_batch
    # At its last batch Lightning leaves the epoch by itself.
    if fit_loop.restarted_mid_epoch or not (fit_loop.restarting and over):
        return
    if total.completed == total.processed - 1:  # written in `on_train_epoch_end`
        fit_loop.epoch_progress.increment_completed()
    fit_loop.reset_restart_stage()
    fit_loop._restarting = False
    fit_loop.epoch_loop.restarting = False


def note_resumed_step(trainer: Trainer) -> None:
    """Let no ModelCheckpoint save again the step that a run goes on from, in `on_train_start` after a resume.

    There is no public way: it forgets the step that it saved last, and where gradients are accumulated it would save
    behind the first batch, inside an optimizer step.
    """
    for keeper in trainer.checkpoint_callbacks:
        if trainer.ckpt_path is not None and isinstance(keeper, ModelCheckpoint):
            keeper._last_global_step_saved = trainer.global_step


def end_finished_epoch(trainer: Trainer) -> None:
    """Let a checkpoint's finished epoch be as long as today's epochs are, in `on_train_start` after a resume.

    There is no public way: the loop tells by the number of its last batch whether an epoch is over.
    """
    progress, batches = trainer.fit_loop.epoch_loop.batch_progress, trainer.num_training_batches
    if progress.is_last_batch and progress.current.ready != batches and math.isfinite(batches):
        shift = int(batches) - progress.current.ready
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress.current, name, getattr(progress.current, name) + shift)


def count_batches_of_epoch(trainer: Trainer, batches: int) -> None:
    """Count the batches of a checkpoint's unfinished epoch as so many, in `on_train_start` after a resume.

    There is no public way: the loop counts batches and not samples, and they may be of another size now.

    Args:
        trainer: it.
        batches: of today's size, that the epoch had up to the checkpoint.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    before = progress.current.ready
    if before in (0, batches):
        return
    whole = progress.total.ready * batches // before  # the epochs before this one are of whole global batches too
    for counts, shift in ((progress.current, batches - before), (progress.total, whole - progress.total.ready)):
        # One more or fewer in some of them says where in a batch the checkpoint was written.
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, getattr(counts, name) + shift)


def begin_at_step(trainer: Trainer, step: int) -> None:
    """Let a trainer that starts anew count its optimizer steps from `step` on, in `on_train_start`.

    There is no public way: `trainer.global_step` comes from the checkpoint that a run goes on from.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    loop.manual_optimization.optim_step_progress.total.completed = step


def continue_csv_log(logger: CSVLogger, first_step: int | None) -> None:
    """Let a CSVLogger that was not used yet go on in the file that is there, with its rows before `first_step`.

    There is no public way: opening the log deletes the file.

    Args:
        logger: it.
        first_step: first step that will be logged; None keeps every row. At 0 nothing goes on: an earlier run's file
            gets another name, `metrics-1.csv` or the next free one.

    Raises:
        ValueError: the file is no such log, or damaged; the message names it.
    """
    writer = _ContinuedLog(logger.log_dir)
    logger._experiment = writer
    file = Path(writer.metrics_file_path)
    if not file.is_file():
        return
    if first_step == 0:
        names = (file.with_stem(f"{file.stem}-{number}") for number in count(1))
        file.rename(next(name for name in names if not name.exists()))
        return
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            reader = csv.DictReader(opened)
            columns = list(reader.fieldnames or ())
            rows = [row for row in reader if first_step is None or not row.get("step") or int(row["step"]) < first_step]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file} is damaged ({error}): move it away, and the log goes on in a new file") from error
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    atomic_write_text(file, text.getvalue())
    writer.metrics_keys = columns


class _ContinuedLog(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Delete nothing."""


def count_log_steps_from(trainer: Trainer, step: int) -> None:
    """Set the step that the next training metrics are logged at.

    There is no public way: Lightning counts it apart from `global_step` and restores it from a checkpoint.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def saves_one_file(strategy: Strategy) -> bool:
    """Tell whether checkpoints are one ordinary file each, and not a folder with a part of every rank.

    There is no public way: it is an argument of `ModelParallelStrategy` that it keeps to itself.
    """
    return not getattr(strategy, "_save_distributed_checkpoint", False)
