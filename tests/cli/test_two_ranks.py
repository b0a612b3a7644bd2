"""`tokenize`, `sample` and `evaluate` on two processes give what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.stored_images import pixels, save_folder, save_npz
from PIL import Image

pytestmark = pytest.mark.ddp


def command(*arguments: object) -> None:
    """`discrete-lit` in a process of its own, which starts the second rank itself."""
    run = [sys.executable, "-m", "discrete_lit", *map(str, arguments), "--accelerator", "cpu"]
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_sample(generator_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for devices, batch_size in ((1, 7), (2, 2)):
        what = ["--ckpt_path", generator_checkpoints["Masked"], "--num_samples", 7, "--batch_size", batch_size]
        command("sample", *what, "--devices", devices, "--output", tmp_path / str(devices))
    one, two = (np.load(tmp_path / devices / "samples.npz") for devices in ("1", "2"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["labels"], two["labels"])
    assert json.loads((tmp_path / "2" / "run.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_tokenize(tokenizer_checkpoint: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(7):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    settings = {"train": str(tmp_path / "images"), "image_size": 8, "batch_size": 2, "num_workers": 0}
    data = json.dumps({"class_path": "discrete_lit.data.ImageFolder", "init_args": settings})
    for devices in (1, 2):
        where = ["--ckpt_path", tokenizer_checkpoint, "--data", data, "--output", tmp_path / str(devices)]
        command("tokenize", *where, "--devices", devices, "--crops", "flip")
    for name in ("tokens.npy", "labels.npy"):
        assert np.array_equal(np.load(tmp_path / "1" / name), np.load(tmp_path / "2" / name))


@pytest.mark.slow
def test_evaluate(tmp_path: Path) -> None:
    labels = np.arange(12) % 3
    save_folder(tmp_path / "reference", pixels(12, 0), labels)
    samples = save_npz(tmp_path / "samples.npz", pixels(12, 2), labels)
    for devices in (1, 2):
        what = ["--reference", tmp_path / "reference", "--samples", json.dumps({"mine": samples}), "--image_size", 8]
        what += ["--num_images", 12, "--batch_size", 5, "--extractor", "helpers.means_extractor.ColourMeans"]
        command("evaluate", *what, "--devices", devices, "--output", tmp_path / str(devices))
    one, two = (json.loads((tmp_path / devices / "report.json").read_text())["rows"] for devices in ("1", "2"))
    names = ("FD-Means", "precision", "recall", "count")
    assert [two[0][name] for name in names] == pytest.approx([one[0][name] for name in names], rel=1e-9)
    assert not (tmp_path / "2" / "shares").exists()
