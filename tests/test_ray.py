"""A training by Ray Train on two workers of this machine; skips where Ray is not installed (`.[ray]`).

Ray in a folder of its own is found by PYTHONPATH: `pip install --no-deps --target FOLDER ray pyarrow pandas msgpack
tensorboardX jsonschema`, with what these lack.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.distributed_run import OPTIMIZER, generator_config, tokenizer_config

from discrete_lit.checkpoints import instantiate, save
from discrete_lit.cli.commands import main
from discrete_lit.data import TokenArrays

ROOT = Path(__file__).parents[1]
STEPS, STOP, BATCH = 6, 4, 3
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A generator of a few thousand parameters on token arrays, with a ledger of its batches."""
    from helpers.stored_images import pixels, save_folder

    torch.manual_seed(0)
    save(instantiate(tokenizer_config()), tmp_path / "tokenizer.ckpt")
    save_folder(tmp_path / "images", pixels(14, 0, 16), torch.arange(14).numpy() % 2)
    images = {"train": str(tmp_path / "images"), "image_size": 16, "batch_size": 2, "num_workers": 0}
    data = json.dumps({"class_path": "discrete_lit.data.ImageFolder", "init_args": images})
    where = ["--output", str(tmp_path / "tokens"), "--accelerator", "cpu"]
    main(["tokenize", "--data", data, "--ckpt_path", str(tmp_path / "tokenizer.ckpt"), *where])
    callbacks = [
        {"class_path": "kills.ledger.Ledger", "init_args": {"folder": str(tmp_path / "ledger"), "pause": 0.0}},
        {"class_path": "ExponentialMovingAverage"},
    ]
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    settings = {
        "model": generator_config("Masked", str(tmp_path / "tokenizer.ckpt")),
        "data": {"class_path": "TokenArrays", "init_args": {"train": str(tmp_path / "tokens"), "num_workers": 0}},
        "trainer": {**quiet, "max_epochs": -1, "log_every_n_steps": 1, "callbacks": callbacks},
    }
    settings["model"]["init_args"] |= {"optimizer": OPTIMIZER}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.mark.slow
def test_two_workers_of_ray_train_as_one_process_does(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    script = [sys.executable, str(ROOT / "lightning_configs/ray/fit.py"), "--workers", "2", "--cpus", "0.5"]
    script += ["--ray_folder", str(tmp_path / "ray"), "--", "--config", "recipe.yaml"]
    for attempt, steps in (("first", STOP), ("second", STEPS)):
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "KILLS_ATTEMPT": attempt}
        given = ["--run_dir", "run", "--data.init_args.batch_size", str(BATCH), "--trainer.max_steps", str(steps)]
        command = [*script, *given]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 2] and starts[1]["checkpoint"] is not None
    # Each worker had its half of the global batches of one process, before the resume and behind it.
    loader = TokenArrays(train=str(tmp_path / "tokens"), batch_size=2 * BATCH, num_workers=0).training_loader(0, 1)
    batches: list[list[int]] = []
    while len(batches) < STEPS:
        batches += [batch["index"].tolist() for batch in loader]
    for rank in range(2):
        lines = [
            json.loads(line)
            for attempt in ("first", "second")
            for line in (tmp_path / "ledger" / attempt / f"rank-{rank}.jsonl").read_text().splitlines()
        ]
        assert [line["step"] for line in lines] == list(range(STEPS))
        taken = [[index for index, _ in line["samples"]] for line in lines]
        assert taken == [batch[rank * BATCH : (rank + 1) * BATCH] for batch in batches[:STEPS]]

    monkeypatch.chdir(tmp_path)
    one = ["--run_dir", "whole", "--data.init_args.batch_size", str(2 * BATCH), "--trainer.max_steps", str(STEPS)]
    main(["fit", "--config", str(recipe), *one])
    by_ray, whole = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("run", "whole")
    )
    assert list(by_ray) == list(whole)
    for name, weights in whole.items():
        torch.testing.assert_close(by_ray[name], weights, rtol=1e-4, atol=1e-5)
