import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_runs import QUIET, TOKENIZER, run, write_settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from discrete_lit.cli.run_folder import RunFolder


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
