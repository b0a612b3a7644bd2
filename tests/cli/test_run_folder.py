import copy
import csv
import json
import logging
import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
import yaml
from helpers.tiny_runs import QUIET, TOKENIZER, run, write_settings
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from discrete_lit.cli.run_folder import RunFolder, WholeCheckpoints
from discrete_lit.core import auto_precision
from discrete_lit.core.locks import sole_writer


def fit(folder: Path, *arguments: Any, **trainer: Any) -> None:
    settings = copy.deepcopy(TOKENIZER)
    settings["trainer"] |= {"log_every_n_steps": 1, **trainer}
    file = write_settings(folder.parent / "settings.yaml", settings)
    run("fit", "--config", file, "--run_dir", folder, *arguments)


def step(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two batches that went on for two more."""
    folder = tmp_path_factory.mktemp("run") / "run"
    fit(folder)
    fit(folder, "--ckpt_path", "last", max_steps=4)
    return folder


def test_the_folder_holds_everything(resumed: Path) -> None:
    assert step(resumed / "checkpoints" / "last.ckpt") == 4
    assert yaml.safe_load((resumed / "config.yaml").read_text())["trainer"]["max_steps"] == 2
    assert yaml.safe_load((resumed / "config-resumed-1.yaml").read_text())["trainer"]["max_steps"] == 4
    first, second = json.loads((resumed / "run.json").read_text())["starts"]
    assert first["command"][:3] == ["discrete-lit", "fit", "--config"]
    assert first["checkpoint"] is None
    assert second["checkpoint"].endswith(".ckpt")
    assert set(first) >= {"versions", "commit", "date", "world_size", "device"}
    assert {entry.name for entry in resumed.iterdir()} == {
        "checkpoints",
        "config-resumed-1.yaml",
        "config.yaml",
        "run.json",
        "tensorboard",
    }


def test_one_curve_and_the_configuration_in_tensorboard(resumed: Path) -> None:
    log = EventAccumulator(str(resumed / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [0, 1, 2, 3]
    assert {"lr-AdamW/pg1", "gradient_norm/total"} <= set(log.Tags()["scalars"])
    assert "images/reconstructions" in log.Tags()["images"]
    text = log.Tensors("config/text_summary")
    assert b"discrete_lit.tokenizers.FSQ" in text[0].tensor_proto.string_val[0]


def test_steps_after_the_checkpoint_are_not_drawn_twice(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(folder, max_steps=4)
    for file in RunFolder(folder).checkpoints():
        contents = torch.load(file, weights_only=True)
        file.unlink()
    fit(tmp_path / "shorter", max_steps=2)
    for file in RunFolder(tmp_path / "shorter").checkpoints():
        file.rename(folder / "checkpoints" / file.name)
    fit(folder, "--ckpt_path", "last", max_steps=4)
    log = EventAccumulator(str(folder / "tensorboard"))
    log.Reload()
    assert contents["global_step"] == 4
    assert [event.step for event in log.Scalars("train/loss")] == [0, 1, 2, 3]


def test_a_folder_with_checkpoints_is_not_overwritten(resumed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(resumed)
    assert stopped.value.code == 2
    assert "`--ckpt_path last` goes on" in capsys.readouterr().err


def test_a_finished_run_ends_at_once(resumed: Path, tmp_path: Path) -> None:
    before = (resumed / "checkpoints" / "last.ckpt").read_bytes()
    fit(resumed, "--ckpt_path", "last", max_steps=4)
    assert (resumed / "checkpoints" / "last.ckpt").read_bytes() == before
    (resumed / "config-resumed-2.yaml").unlink()


def test_last_in_an_empty_folder_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path / "run", "--ckpt_path", "last")
    assert "starting from the beginning" in caplog.text
    assert step(tmp_path / "run" / "checkpoints" / "last.ckpt") == 2


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_a_broken_newest_checkpoint_is_passed_over(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_top_k": -1, "filename": "{step}"},
    }
    one_batch = ("--data.count", 4)
    fit(folder, *one_batch, callbacks=[checkpoint])
    first, second = folder / "checkpoints" / "step=1.ckpt", folder / "checkpoints" / "step=2.ckpt"
    assert (step(first), step(second)) == (1, 2)
    os.utime(second, ns=(2**61, 2**61))
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"\0" * len(whole))
    os.utime(second, ns=(2**61, 2**61))

    found = RunFolder(folder).newest_intact()
    assert found is not None
    assert found[0] == str(first)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert any("step=2.ckpt" in record.getMessage() for record in warnings)

    fit(folder, "--ckpt_path", "last", *one_batch, callbacks=[checkpoint], max_steps=3)
    assert step(folder / "checkpoints" / "step=3.ckpt") == 3


KEEPER = "lightning.pytorch.callbacks.ModelCheckpoint"
EVERY = {"class_path": KEEPER, "init_args": {"save_top_k": -1, "filename": "{step}", "every_n_train_steps": 1}}


class NumpyState(Callback):
    """A callback whose state PyTorch does not read back."""

    def state_dict(self) -> dict[str, Any]:
        return {"best": np.float64(0.5)}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: Any, **trainer: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        fit(folder, *arguments, **trainer)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def of_another(checkpoint: dict[str, Any], file: Path) -> None:
    """Write a checkpoint as a run would that has the file's folder for its own."""
    for state in checkpoint["callbacks"].values():
        if "dirpath" in state:
            state |= {"dirpath": str(file.parent), "best_model_path": str(file)}
    file.parent.mkdir()
    torch.save(checkpoint, file)


def test_a_state_that_cannot_be_read_back_is_named_when_written_and_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    settings = {"callbacks": [{"class_path": "test_run_folder.NumpyState"}], "limit_val_batches": 0}
    fit(folder, **settings)
    warned = [record.getMessage() for record in caplog.records if "no run can go on from" in record.getMessage()]
    assert len(warned) == 1
    assert "state of the callback NumpyState" in warned[0] and "numpy" in warned[0] and "x.item()" in warned[0]
    before = files(folder)
    message = refusal(capsys, folder, "--ckpt_path", "last", max_steps=1, **settings)
    for file in (folder / "checkpoints").iterdir():
        assert str(file) in message
    assert message.count("numpy") == 2 and "from the beginning" not in caplog.text
    assert files(folder) == before


@pytest.mark.parametrize("noted", [True, False])
def test_last_is_the_highest_step_wherever_the_run_writes(noted: bool, tmp_path: Path) -> None:
    """In a folder of the callback's own, and below it; in `run.json` of a start or in the settings of this one."""
    folder, scratch = tmp_path / "run", tmp_path / "scratch"
    own = {"class_path": KEEPER, "init_args": {**EVERY["init_args"], "dirpath": str(scratch), "filename": "v0/{step}"}}
    fit(folder, callbacks=[own], limit_val_batches=0)
    assert not (folder / "checkpoints").exists()
    # A copy of a run has times in any order.
    os.utime(scratch / "v0" / "step=1.ckpt", ns=(2**61, 2**61))
    given = RunFolder(folder, {"trainer": {"callbacks": [own]}})
    if noted:
        given = RunFolder(folder)
    else:
        (folder / "run.json").unlink()
    found = given.newest_intact(continues=True)
    assert found is not None and found[0] == str(scratch / "v0" / "step=2.ckpt")
    # Another run has its folder below.
    of_another(torch.load(found[0], weights_only=True) | {"global_step": 9}, scratch / "another" / "step=9.ckpt")
    assert given.newest_intact(continues=True)[0] == found[0]  # type: ignore[index]


def test_weights_alone_are_not_taken_for_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    weights = {"save_weights_only": True, "filename": "weights-{step}", "every_n_train_steps": 2}
    keepers = [
        {"class_path": KEEPER, "init_args": {"filename": "{step}", "every_n_train_steps": 1}},
        {"class_path": KEEPER, "init_args": weights},
    ]
    fit(folder, callbacks=keepers, limit_val_batches=0)
    (alone,) = (folder / "checkpoints").glob("weights-*")
    os.utime(alone, ns=(2**61, 2**61))
    run = RunFolder(folder)
    found = run.newest_intact(continues=True)
    assert found is not None and Path(found[0]).name == "step=2.ckpt"
    # An I/O error, or a permission.
    read = torch.load

    def denied(file: Any, **settings: Any) -> Any:
        if Path(file).name == "step=2.ckpt":
            raise PermissionError(13, "Permission denied", str(file))
        return read(file, **settings)

    monkeypatch.setattr(torch, "load", denied)
    for_weights = run.newest_intact()
    assert for_weights is not None and for_weights[0] == str(alone)
    before = files(folder)
    message = refusal(capsys, folder, "--ckpt_path", "last", callbacks=keepers, max_steps=1)
    assert "step=2.ckpt' cannot be read: Permission denied" in message
    assert f"{alone.name}' holds weights alone" in message and "--init_from" in message
    assert files(folder) == before


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_is_the_last_one_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder with the weights and the optimizers' states in shards; one that was not finished is passed over."""
    fit(tmp_path, limit_val_batches=0)
    file = tmp_path / "checkpoints" / "last.ckpt"
    contents = torch.load(file, weights_only=True)
    shards = {"state_dict": contents.pop("state_dict"), "optimizer_0": {"lr": torch.zeros(())}}
    del contents["optimizer_states"]
    for step_of in (7, 9):
        folder = tmp_path / "checkpoints" / f"step={step_of}.ckpt"
        torch.distributed.checkpoint.save(shards, checkpoint_id=folder, no_dist=True)
        torch.save(contents | {"global_step": step_of}, folder / "meta.pt")
    (folder / ".metadata").unlink()
    found = RunFolder(tmp_path).newest_intact(continues=True)
    assert found is not None and found[0] == str(folder.with_name("step=7.ckpt"))
    assert "step=9.ckpt" in caplog.text and "unfinished sharded checkpoint" in caplog.text


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()

    def denied(folder: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    assert RunFolder(tmp_path).newest_intact() is None
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match="checkpoints cannot be read: Permission denied"):
        RunFolder(tmp_path).newest_intact()


def test_the_second_fit_into_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with sole_writer(folder, "fit"):
        before = files(folder)
        for arguments in ((), ("--ckpt_path", "last")):
            message = refusal(capsys, folder, *arguments)
            assert str(folder) in message and f"process {os.getpid()} on" in message
        assert files(folder) == before
    # Another run folder, the same folder of checkpoints or of logs.
    own = {"class_path": KEEPER, "init_args": {"dirpath": str(tmp_path / "kept")}}
    log = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "log")}}
    for place in (tmp_path / "kept", tmp_path / "log" / "lightning_logs" / "version_0"):
        with sole_writer(place, "fit"):
            log["init_args"]["version"] = 0
            assert str(place) in refusal(capsys, folder, callbacks=[own], logger=[log])
            assert not folder.exists()


def test_a_run_that_was_killed_is_tidied_up_at_its_resume(tmp_path: Path) -> None:
    """Between the writing of a checkpoint and the removal of the one before, and while one is written."""
    folder = tmp_path / "run"
    kept = folder / "checkpoints"
    settings = {"limit_val_batches": 0, "max_epochs": -1}
    fit(folder, "--data.count", 4, max_steps=1, **settings)
    (first,) = kept.glob("epoch*")
    superseded = first.read_bytes()
    fit(folder, "--data.count", 4, "--ckpt_path", "last", max_steps=2, **settings)
    first.write_bytes(superseded)
    (kept / "mine.ckpt").write_bytes(superseded)
    (kept / f"{first.name}.tmp").write_bytes(superseded[:100])
    of_another(torch.load(first, weights_only=True), kept / "another" / "epoch=0-step=1.ckpt")
    fit(folder, "--data.count", 4, "--ckpt_path", "last", max_steps=3, **settings)
    assert (kept / "another" / "epoch=0-step=1.ckpt").exists()
    shutil.rmtree(kept / "another")
    assert sorted(file.name for file in kept.iterdir()) == ["epoch=2-step=3.ckpt", "last.ckpt", "mine.ckpt"]


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(
    "target", ["run/checkpoints/../../precious", "memory://precious", "run/checkpoints/link/precious"]
)
def test_a_checkpoint_cannot_have_files_elsewhere_removed(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of the ModelCheckpoint that wrote it names what is superseded, and so removed, folders too."""
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.chdir(tmp_path)
    fit(Path("first"))
    contents = torch.load("first/checkpoints/last.ckpt", weights_only=True)
    (state,) = contents["callbacks"].values()
    named = dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), target)
    state.update(named, dirpath="run/checkpoints", best_k_models={target: torch.tensor(0.0)})
    torch.save(contents, "hostile.ckpt")
    Path("precious").mkdir()
    Path("precious/file").write_text("years of work")
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/link").symlink_to(tmp_path)
    MemoryFileSystem().pipe("/precious", b"years of work")
    fit(Path("run"), "--ckpt_path=hostile.ckpt", max_steps=4)
    assert step(Path("run/checkpoints/last.ckpt")) == 4
    assert Path("precious/file").exists() and MemoryFileSystem().exists("/precious")


def test_the_best_checkpoint_stays_where_the_run_folder_is_given_by_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    best = {"monitor": "step", "mode": "min", "save_top_k": 1, "save_last": True, "every_n_train_steps": 1}
    callbacks = [{"class_path": KEEPER, "init_args": best}]
    fit(Path("run"), callbacks=callbacks, limit_val_batches=0)
    (kept,) = Path("run/checkpoints").glob("epoch*")
    assert step(kept) == 1
    fit(tmp_path / "run", "--ckpt_path=last", callbacks=callbacks, limit_val_batches=0, max_steps=3)
    assert list(Path("run/checkpoints").glob("epoch*")) == [kept]


@pytest.mark.parametrize("content", ["{", "[]", '{"starts": 5}', '{"starts": [5]}', '{"starts": [{"places": null}]}'])
def test_a_damaged_record_is_one_message(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        RunFolder(tmp_path).checkpoints()


def test_checkpoints_that_another_policy_kept_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(folder, callbacks=[EVERY], limit_val_batches=0)
    one = {"class_path": KEEPER, "init_args": {**EVERY["init_args"], "save_top_k": 1}}
    fit(folder, "--ckpt_path", "last", callbacks=[one], limit_val_batches=0, max_steps=3)
    assert (folder / "checkpoints" / "step=1.ckpt").exists()


def test_checkpoints_are_written_beside_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
    fit(tmp_path / "run", limit_val_batches=0)
    assert step(tmp_path / "run" / "checkpoints" / "last.ckpt") == 2


def test_a_full_disk_is_one_message_that_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, largest[1]))
    try:
        message = refusal(capsys, tmp_path / "run", logger=False, limit_val_batches=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, largest)
    assert message.splitlines()[-1].endswith(".ckpt: File too large")
    assert str(tmp_path / "run" / "checkpoints") in message
    assert [name for name in files(tmp_path / "run") if "ckpt" in name] == []


def test_a_csv_log_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    where = {"save_dir": str(folder), "name": "csv", "version": ""}
    settings = {"logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": where}]}
    fit(folder, max_steps=2, **settings)
    file = folder / "csv" / "metrics.csv"
    before = file.read_text()
    run("validate", "--config", tmp_path / "settings.yaml", "--run_dir", folder, "--ckpt_path", "last")
    assert file.read_text().startswith(before)
    second = (folder / "checkpoints" / "last.ckpt").read_bytes()
    fit(folder, "--ckpt_path", "last", max_steps=3, **settings)
    # Steps that were taken after the checkpoint are taken again.
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.unlink()
    (folder / "checkpoints" / "last.ckpt").write_bytes(second)
    fit(folder, "--ckpt_path", "last", max_steps=4, **settings)
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    trained = [int(row["step"]) for row in rows if row["train/loss"]]
    assert trained == [0, 1, 2, 3]
    kept = [row["train/loss"] for row in csv.DictReader(before.splitlines()) if row["train/loss"]]
    assert [row["train/loss"] for row in rows if row["train/loss"]][:2] == kept
    # A run that begins anew gives the rows of an earlier one another name.
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.unlink()
    earlier = file.read_text()
    fit(folder, "--ckpt_path", "last", max_steps=1, **settings)
    assert (folder / "csv" / "metrics-1.csv").read_text() == earlier and file.read_text() != earlier


def test_samples_in_the_run_folder_leave_its_record(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"sampler": "of sample"}')
    fit(folder)
    fit(folder, "--ckpt_path", "last", max_steps=3)
    record = json.loads((folder / "run.json").read_text())
    assert record["sampler"] == "of sample" and len(record["starts"]) == 2


def test_last_without_a_folder_or_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_settings(tmp_path / "settings.yaml", TOKENIZER)
    with pytest.raises(SystemExit):
        run("fit", "--config", file, "--ckpt_path", "last")
    assert "--run_dir FOLDER" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("validate", "--config", file, "--ckpt_path", "last", "--run_dir", tmp_path / "empty")
    assert "no intact checkpoint" in capsys.readouterr().err


def test_validation_needs_the_checkpoint_and_the_data_alone(
    resumed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_settings(tmp_path / "data.yaml", {"data": TOKENIZER["data"], "trainer": {**QUIET, "logger": False}})
    run("validate", "--ckpt_path", resumed / "checkpoints" / "last.ckpt", "--config", data)
    assert "validation/psnr" in capsys.readouterr().out


def test_a_run_without_a_folder_keeps_lightnings_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("fit", "--config", write_settings(tmp_path / "settings.yaml", TOKENIZER))
    version = tmp_path / "lightning_logs" / "version_0"
    assert (version / "config.yaml").is_file()
    assert list((version / "checkpoints").glob("*.ckpt"))


def test_a_users_own_callbacks_replace_the_standing_ones(tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {"logging_interval": "epoch"}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "mine"}},
    ]
    fit(tmp_path / "run", callbacks=callbacks)
    assert [file.name for file in RunFolder(tmp_path / "run").checkpoints()] == ["mine.ckpt"]


@pytest.mark.parametrize(("flags", "became"), [("avx512_bf16", "bf16-mixed"), ("avx2", "32-true")])
def test_a_record_says_what_the_automatic_precision_became(
    flags: str, became: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(auto_precision, "_CPU_FLAGS", tmp_path / "cpuinfo")
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda self, *_, **__: seen.append(self.precision))
    fit(tmp_path / "run", precision="auto")
    assert seen == [became]
    fit(tmp_path / "other", "--trainer.precision", "64-true", precision="auto")
    assert seen == [became, "64-true"]


def test_the_automatic_precision_is_in_the_configuration_of_a_run(tmp_path: Path) -> None:
    fit(tmp_path / "run", precision="auto")
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["precision"]
    assert recorded == auto_precision.resolve_precision("auto", "cpu") != "auto"


class Signals(Callback):
    """Sends this process a signal in the training step of a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_fit_that_is_told_to_end_saves_itself_without_being_asked_to(tmp_path: Path) -> None:
    told = [{"class_path": f"{__name__}.Signals", "init_args": {"batch": 2}}]
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path / "run", callbacks=told, max_steps=6)
    assert ended.value.code == 128 + signal.SIGTERM
    assert step(tmp_path / "run" / "checkpoints" / "last.ckpt") == 3
    fit(tmp_path / "run", "--ckpt_path", "last", max_steps=6)
    assert step(tmp_path / "run" / "checkpoints" / "last.ckpt") == 6


def test_a_run_that_writes_no_checkpoints_ends_as_it_did(tmp_path: Path) -> None:
    fit(tmp_path / "run", enable_checkpointing=False)
    fit(tmp_path / "other", fast_dev_run=True)


class SlowDisk:
    """Lets every write of a checkpoint wait, and notes what is there when it begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.allowed = threading.Event()
        self.there: list[list[str]] = []
        write = WholeCheckpoints._write

        def slow(*arguments: Any) -> None:
            assert self.allowed.wait(30)
            write(*arguments)
            self.there.append(sorted(os.listdir(folder)))

        monkeypatch.setattr(WholeCheckpoints, "_write", slow)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, writer = SlowDisk(monkeypatch, tmp_path), WholeCheckpoints()
    weight = torch.zeros(3)
    for number in range(2):
        weight.fill_(number)
        writer.save_checkpoint({"state_dict": {"weight": weight, "tied": weight}}, tmp_path / f"{number}.ckpt")
        # The one before is removed when this one is whole.
        writer.remove_checkpoint(tmp_path / f"{number - 1}.ckpt") if number else None
    weight.fill_(9)
    assert os.listdir(tmp_path) == []
    third = threading.Thread(target=writer.save_checkpoint, args=({"state_dict": {}}, tmp_path / "2.ckpt"))
    third.start()
    third.join(0.2)
    assert third.is_alive()  # no more than two wait in memory
    disk.allowed.set()
    third.join(30)
    writer.teardown()
    assert disk.there == [["0.ckpt"], ["0.ckpt", "1.ckpt"], ["1.ckpt", "2.ckpt"]]
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    assert saved["weight"].tolist() == [1, 1, 1] and saved["weight"].data_ptr() == saved["tied"].data_ptr()


def test_what_does_not_fit_into_memory_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discrete_lit.cli.run_folder._available_memory", lambda: 10)
    writer = WholeCheckpoints()
    writer.save_checkpoint({"state_dict": {"weight": torch.zeros(3)}}, tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"] and not writer._queue


def test_a_write_that_fails_is_an_error_of_the_next_one(tmp_path: Path) -> None:
    writer = WholeCheckpoints()
    (tmp_path / "file").write_text("no folder")
    writer.save_checkpoint({"state_dict": {}}, tmp_path / "file" / "a.ckpt")
    with pytest.raises(OSError, match="file"):
        writer.teardown()
