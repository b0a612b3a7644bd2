"""`discrete-lit replay`: the batch of an alarm, again, on the checkpoint before it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
import yaml
from helpers.tiny_runs import TOKENIZER, refusal, run, write_settings
from PIL import Image

BROKEN = "network.encoder.conv_in"


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that saved itself at step 2, and whose loss is not finite at step 3."""
    (tmp_path / "images" / "class").mkdir(parents=True)
    for number in range(12):
        pixels = np.random.RandomState(number).randint(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "class" / f"{number}.png")
    images = {"train": str(tmp_path / "images"), "image_size": 8, "batch_size": 2, "num_workers": 0}
    keeper = {"every_n_train_steps": 2, "save_top_k": -1}
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keeper}]
    settings = {
        "model": TOKENIZER["model"],
        "data": {"class_path": "discrete_lit.data.ImageFolder", "init_args": images},
        "trainer": {**TOKENIZER["trainer"], "max_steps": 6, "limit_val_batches": 0, "callbacks": callbacks},
    }
    file = write_settings(tmp_path / "settings.yaml", settings)
    spoil(monkeypatch, step=3)
    with pytest.raises(SystemExit):
        run("fit", "--config", file, "--run_dir", tmp_path / "run")
    monkeypatch.undo()
    return tmp_path / "run"


def spoil(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the loss of every batch from a step on be infinite."""
    from discrete_lit.tokenizers import FSQ

    loss = FSQ.loss

    def broken(self: Any, *arguments: Any, **named: Any) -> Any:
        total, *more = loss(self, *arguments, **named)
        return (total * (torch.inf if self.global_step >= step else 1), *more)

    monkeypatch.setattr(FSQ, "loss", broken)


def test_the_batch_of_the_newest_alarm(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (alarm,) = (stopped / "alarms").iterdir()
    said = json.loads(alarm.read_text())
    assert (said["step"], said["batch"], len(said["ranks"][0]["key"])) == (3, 3, 2)
    capsys.readouterr()
    run("replay", "--run_dir", stopped)
    result = json.loads(capsys.readouterr().out)
    assert json.loads(alarm.with_suffix(".replay.json").read_text()) == result
    assert (result["alarm_step"], result["checkpoint_step"]) == (3, 2)
    assert result["checkpoint"].endswith("step=2.ckpt")
    (rank,) = result["ranks"]
    # What had broken is mended here, so that the batch is innocent.
    assert rank["not_finite"] == [] and 0 < rank["losses"][0] < 100
    assert rank["gradient_norms"][BROKEN] > 0 and "train/reconstruction" in rank["terms"]


def test_the_first_part_that_is_not_finite_is_named(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from discrete_lit.tokenizers.quantizers import FiniteScalarQuantizer

    forward = FiniteScalarQuantizer.forward
    monkeypatch.setattr(
        FiniteScalarQuantizer,
        "forward",
        lambda self, latents: replace(out := forward(self, latents), z_q=out.z_q * torch.nan),
    )
    capsys.readouterr()
    run("replay", "--run_dir", stopped)
    (rank,) = json.loads(capsys.readouterr().out)["ranks"]
    assert rank["losses"] == ["nan"] and "decoder" in rank["not_finite"][0]


def test_the_same_loss_as_in_training(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the checkpoint of step 2 the batch that followed it: its loss is what training saw."""
    (alarm,) = (stopped / "alarms").iterdir()
    said = json.loads(alarm.read_text())
    source = yaml.safe_load((stopped / "config.yaml").read_text())["data"]["init_args"]
    assert source["batch_size"] == 2
    said |= {"step": 2, "batch": 2, "ranks": [{"rank": 0}]}
    (stopped / "alarms" / "mine.json").write_text(json.dumps(said))
    capsys.readouterr()
    run("replay", "--run_dir", stopped, "--alarm", stopped / "alarms" / "mine.json")
    first = json.loads(capsys.readouterr().out)["ranks"][0]["losses"]
    run("replay", "--run_dir", stopped, "--alarm", stopped / "alarms" / "mine.json")
    assert json.loads(capsys.readouterr().out)["ranks"][0]["losses"] == first


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    run("replay", "--run_dir", stopped)
    expected = json.loads(capsys.readouterr().out)["ranks"]
    (file,) = (stopped / "checkpoints").glob("*.ckpt")
    contents = torch.load(file, weights_only=True)
    file.unlink()
    shards = {"state_dict": contents.pop("state_dict"), "optimizer_0": contents.pop("optimizer_states")[0]}
    torch.distributed.checkpoint.save(shards, checkpoint_id=file, no_dist=True)
    torch.save(contents, file / "meta.pt")
    run("replay", "--run_dir", stopped)
    assert json.loads(capsys.readouterr().out)["ranks"] == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 1}, "has no checkpoint of step 1 or before"),
        ({"batch": None}, "does not say the batch of a batch"),
        ({"ranks": [{"key": ["a", "b"], "rank": 0}]}, "the data give other samples than"),
        ({"ranks": [3]}, "does not say of which ranks"),
    ],
)
def test_what_cannot_be_run_again(
    change: dict[str, Any], words: str, stopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (alarm,) = (stopped / "alarms").iterdir()
    alarm.write_text(json.dumps(json.loads(alarm.read_text()) | change))
    assert words in refusal(capfd, "replay", "--run_dir", stopped)


def test_data_of_another_package_are_not_built(stopped: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = stopped / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(settings | {"data": {"class_path": "os.system", "init_args": {"command": "true"}}}))
    assert "the DataModules of discrete_lit.data alone" in refusal(capfd, "replay", "--run_dir", stopped)


def test_no_alarm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "has no alarms" in refusal(capfd, "replay", "--run_dir", tmp_path)
