"""Each private name of Lightning that the package leans on still does what it is used for."""

import ast
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from discrete_lit.core import lightning_internals as internals

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
PACKAGE = Path(internals.__file__).parent
ADVICE = (
    f"Lightning {lightning.__version__} does not do what discrete_lit/lightning_internals.py expects. Look for the new "
    "name in Lightning's source, or for a public way; change the function there, and the bounds of lightning in "
    "pyproject.toml if older versions no longer fit."
)


def advised(test: Callable[..., None]) -> Callable[..., None]:
    """Add the advice to whatever a test raises."""

    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        try:
            test(*arguments, **named)
        except BaseException as error:
            error.add_note(ADVICE)
            raise

    return run


class Line(LightningModule):
    """One weight, with a loss that is logged at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.weight * batch).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Steps(Logger):
    """Keeps the steps that losses are logged at."""

    name = "steps"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int | None] = []

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "loss" in metrics:
            self.found.append(step)


class AtBatchEnd(Callback):
    def __init__(self, ask: Callable[[Trainer], Any]) -> None:
        self.ask = ask
        self.answers: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.answers.append(self.ask(trainer))


def fit(
    folder: Path, *callbacks: Callback, batches: int = 4, ckpt_path: Path | None = None, **settings: Any
) -> Trainer:
    settings = {"max_epochs": 1, "log_every_n_steps": 1, "logger": False, **settings}
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    kept = ModelCheckpoint(folder, save_last=True)
    trainer = Trainer(callbacks=[*callbacks, kept], default_root_dir=folder, **quiet, **settings)
    trainer.fit(Line(), DataLoader(torch.ones(batches)), ckpt_path=ckpt_path, weights_only=True)
    return trainer


@advised
def test_logs_this_step(tmp_path: Path) -> None:
    asked = AtBatchEnd(internals.logs_this_step)
    fit(tmp_path, asked, log_every_n_steps=2)
    # At the end of a batch its step is counted only after the callbacks.
    assert asked.answers == [False, True, False, True]


@advised
def test_accumulates_gradients(tmp_path: Path) -> None:
    asked = AtBatchEnd(internals.accumulates_gradients)
    fit(tmp_path, asked, batches=5, accumulate_grad_batches=2)
    assert asked.answers == [True, False, True, False, False]


@advised
def test_log_batch_now(tmp_path: Path) -> None:
    logger = Steps()

    def found(trainer: Trainer) -> list[int | None]:
        internals.log_batch_now(trainer)
        return list(logger.found)

    asked = AtBatchEnd(found)
    fit(tmp_path, asked, batches=1, logger=logger)
    assert asked.answers == [[0]]


@advised
def test_log_step(tmp_path: Path) -> None:
    logger, asked = Steps(), AtBatchEnd(internals.log_step)
    fit(tmp_path, asked, batches=3, logger=logger)
    assert asked.answers == logger.found == [0, 1, 2]


@advised
def test_begin_next_epoch(tmp_path: Path) -> None:
    class Begin(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.was_at_the_end = trainer.fit_loop.restarted_on_epoch_end
            internals.begin_next_epoch(trainer)

    fit(tmp_path, max_epochs=-1, max_steps=4)
    begin, asked = Begin(), AtBatchEnd(lambda trainer: (trainer.current_epoch, trainer.global_step))
    fit(tmp_path, begin, asked, max_epochs=-1, max_steps=8, ckpt_path=tmp_path / "last.ckpt")
    assert begin.was_at_the_end
    assert asked.answers == [(1, 5), (1, 6), (1, 7), (1, 8)]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@advised
def test_end_finished_epoch(tmp_path: Path) -> None:
    class SaveLast(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    class End(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            internals.end_finished_epoch(trainer)

    fit(tmp_path, SaveLast())
    asked = AtBatchEnd(lambda trainer: (trainer.current_epoch, trainer.global_step))
    fit(tmp_path, End(), asked, batches=6, max_epochs=2, ckpt_path=tmp_path / "four.ckpt")
    assert asked.answers == [(1, step) for step in range(5, 11)]


def test_continue_csv_log(tmp_path: Path) -> None:
    def log(first_step: int | None, *rows: dict[str, float]) -> None:
        logger = CSVLogger(tmp_path, name="csv", version="")
        internals.continue_csv_log(logger, first_step)
        for step, row in enumerate(rows, start=first_step or 0):
            logger.log_metrics(row, step)
        logger.save()

    file = tmp_path / "csv" / "metrics.csv"
    log(0, {"a": 1.5}, {"a": 2.5}, {"a": 3.5})
    log(2, {"b": 7.0})
    assert file.read_text().split() == ["a,b,step", "1.5,,0", "2.5,,1", ",7.0,2"]
    log(None)
    assert file.read_text().split()[1:] == ["1.5,,0", "2.5,,1", ",7.0,2"]
    log(0, {"c": 1.0})
    log(0, {"d": 1.0})
    assert [(tmp_path / "csv" / f"metrics{n}.csv").read_text()[0] for n in ("-1", "-2", "")] == ["a", "c", "d"]


@pytest.mark.parametrize("content", [b"step,loss\r\n0,1.5\r\n3\xff", b"step,loss\r\n0,1.5\r\n1.0,2\r\n"])
def test_a_damaged_csv_log_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.csv is damaged"):
        internals.continue_csv_log(CSVLogger(tmp_path, name="csv", version=""), 2)
    assert (tmp_path / "csv" / "metrics.csv").read_bytes() == content


@advised
def test_count_log_steps_from(tmp_path: Path) -> None:
    class From(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> None:
            if index == 0:
                internals.count_log_steps_from(trainer, 7)

    logger = Steps()
    fit(tmp_path, From(), batches=2, logger=logger)
    assert logger.found == [7, 8]


@advised
@pytest.mark.parametrize("one_file", [True, False])
def test_saves_one_file(one_file: bool) -> None:
    strategy = ModelParallelStrategy(1, 1, save_distributed_checkpoint=not one_file)
    assert internals.saves_one_file(strategy) == one_file
    assert internals.saves_one_file(SingleDeviceStrategy())


def foreign_private_names(file: Path) -> list[str]:
    """Names that begin with one underscore, are read from an object, and are not given to anything in the file."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    read = [(node.attr, ast.unparse(node)) for node in nodes if isinstance(node, ast.Attribute)]
    read += [
        (alias.name, f"{node.module}.{alias.name}")
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
    ]
    private = [(name, text) for name, text in read if name.startswith("_") and not name.startswith("__")]
    return [text for name, text in private if name not in own]


def test_no_other_file_uses_a_private_name_of_lightning() -> None:
    # Of jsonargparse and of torch, where their files say why.
    others = ("parser._actions", "jsonargparse._common", "torch.ops.mkldnn._", "_aten._")
    found = {
        str(file.relative_to(PACKAGE)): names
        for file in PACKAGE.rglob("*.py")
        if file.name != "lightning_internals.py"
        and (names := [name for name in foreign_private_names(file) if not name.startswith(others)])
    }
    assert not found, "give it a function with a plain name in discrete_lit/lightning_internals.py"
    assert "trainer._logger_connector" in foreign_private_names(PACKAGE / "lightning_internals.py")
