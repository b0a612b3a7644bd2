"""Weights & Biases by configuration: numbers, settings and pictures, beside the run folder's own log."""

import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.recipe_files import ROOT
from helpers.tiny_runs import TOKENIZER, run, write_settings
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from discrete_lit.callbacks import logged_media

RECIPE = ROOT / "lightning_configs" / "trainer" / "wandb.yaml"


class Shown:
    """A picture, clip, sound or table as it was handed over."""

    def __init__(self, *content: Any, **settings: Any) -> None:
        self.content, self.settings = content, settings


class Run:
    """A run of W&B that keeps what is logged."""

    id = name = "fake"
    dir = "."

    def __init__(self, **settings: Any) -> None:
        self.settings, self.rows = settings, []
        self.config: Any = types.SimpleNamespace(update=lambda values, **_: self.given.append(values))
        self.given: list[dict[str, Any]] = []

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def logged(self, tag: str) -> list[Any]:
        return [row[tag] for row in self.rows if tag in row]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Put a package in the place of `wandb`; the runs that it begins. Lightning's own logger stands in front of it."""
    from lightning.pytorch.loggers import wandb as lightnings

    begun: list[Run] = []

    def init(**settings: Any) -> Run:
        begun.append(Run(**settings))
        return begun[-1]

    kinds = {kind: type(kind, (Shown,), {}) for kind in ("Image", "Video", "Audio", "Table")}
    package = types.ModuleType("wandb")
    package.__dict__.update(init=init, run=None, **kinds)
    inside = {
        "wandb.sdk": {},
        "wandb.sdk.lib": {"RunDisabled": type("RunDisabled", (), {})},
        "wandb.wandb_run": {"Run": Run},
    }
    for name, content in {"wandb": package.__dict__, **inside}.items():
        module = package if name == "wandb" else types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lightnings, "_WANDB_AVAILABLE", True)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return begun


def test_a_run_logs_numbers_settings_and_pictures(runs: list[Run], tmp_path: Path) -> None:
    file = write_settings(tmp_path / "settings.yaml", TOKENIZER)
    steps = ("--trainer.log_every_n_steps", "1")
    run("fit", "--config", file, "--config", RECIPE, "--run_dir", tmp_path / "run", *steps)
    (begun,) = runs
    assert begun.settings["project"] == "discrete-lit" and begun.settings["resume"] == "allow"
    assert [row["trainer/global_step"] for row in begun.rows if "train/loss" in row] == [0, 1]
    (settings,) = begun.given
    assert settings == yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    ((picture,),) = begun.logged("images/reconstructions")
    # The run folder has its own log all the same, with the same picture.
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [0, 1]
    (image,) = log.Images("images/reconstructions")
    (tmp_path / "image.png").write_bytes(image.encoded_image_string)
    assert np.array_equal(np.asarray(picture.content[0]), np.asarray(Image.open(tmp_path / "image.png")))


def test_clips_sounds_and_texts(runs: list[Run]) -> None:
    from lightning import Trainer
    from lightning.pytorch.loggers import WandbLogger

    trainer = Trainer(accelerator="cpu", logger=WandbLogger(), enable_checkpointing=False, enable_progress_bar=False)
    logged_media.log_picture(trainer, "grey", np.full((2, 3, 1), 7, np.uint8))
    logged_media.log_gif(trainer, "clip", b"GIF89a", size=(2, 3, 3))
    logged_media.log_sound(trainer, "sound", np.zeros(5, np.float32), sample_rate=8000)
    logged_media.log_text(trainer, "alarm", "the loss is nan")
    (begun,) = runs
    ((grey,),), ((clip,),), ((sound,),) = (begun.logged(tag) for tag in ("grey", "clip", "sound"))
    assert grey.content[0].mode == "L" and grey.content[0].size == (3, 2) and grey.content[0].getpixel((0, 0)) == 7
    assert clip.content[0].getvalue() == b"GIF89a" and clip.settings == {"format": "gif"}
    assert sound.content[0].shape == (5,) and sound.settings == {"sample_rate": 8000}
    assert begun.logged("alarm")[0].settings["data"] == [["0", "the loss is nan"]]


def test_without_the_package(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if find_spec("wandb"):
        pytest.skip("wandb is installed")
    file = write_settings(tmp_path / "settings.yaml", TOKENIZER)
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--config", file, "--config", RECIPE, "--run_dir", tmp_path / "run")
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "pip install -U 'wandb" in message and "subclass" not in message


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_package_offline(tmp_path: Path) -> None:
    """In a process of its own, as W&B starts a service."""
    file = write_settings(tmp_path / "settings.yaml", TOKENIZER)
    command = [sys.executable, "-m", "discrete_lit", "fit", "--config", file, "--config", RECIPE]
    offline = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*map(str, command), "--run_dir", str(tmp_path / "run"), "--trainer.log_every_n_steps", "1"],
        cwd=tmp_path,
        env=offline,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    (picture,) = folder.glob("files/media/images/images/reconstructions*.png")
    with Image.open(picture) as shown:
        assert shown.size[0] > 8
