"""`discrete-lit fit` on two workers of a local Ray cluster: the training of one process with twice the batch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stored_images import pixels, save_folder
from helpers.tiny_runs import TOKENIZER, run, write_settings

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_two_ray_workers_train_as_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    save_folder(tmp_path / "images", pixels(16, 0), np.arange(16) % 2)
    images = {"train": str(tmp_path / "images"), "image_size": 8, "batch_size": 4, "num_workers": 0, "flip": False}
    data = {"class_path": "discrete_lit.data.ImageFolder", "init_args": images}
    trainer = {**TOKENIZER["trainer"], "max_steps": 3, "log_every_n_steps": 1}
    file = write_settings(tmp_path / "fit.yaml", {**TOKENIZER, "data": data, "trainer": trainer})

    options = ["--workers", "2", "--cpus", "1", "--gpus", "0", "--results", str(tmp_path / "ray")]
    command = [sys.executable, str(ROOT / "lightning_configs/ray/fit.py"), *options, "--"]
    given = ["--config", str(file), "--seed_everything", "3"]
    answer = subprocess.run(
        [*command, *given, "--run_dir", str(tmp_path / "two")], capture_output=True, text=True, timeout=900, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    run("fit", *given, "--run_dir", tmp_path / "one", "--data.init_args.batch_size", 8)
    two, one = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("two", "one"))
    assert two["global_step"] == one["global_step"] == 3
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
