"""What the experiments share: trainings that are kept, and how a page says its machine and its seeds."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from discrete_lit.cli.commands import main as discrete_lit


def fit(run: Path, configs: Sequence[Path], settings: Mapping[str, Any]) -> Path:
    """Train by recipes, one laid over the other, and settings, in a folder, unless it holds the finished run.

    Writes `minutes.txt` beside the checkpoint, the processor time of the training: of its workers too.

    Returns:
        The checkpoint of the run.
    """
    minutes = run / "minutes.txt"
    if not minutes.is_file():
        begun = processor_minutes()
        quiet = {"trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false"}
        given = {"run_dir": run, **settings, **quiet}
        discrete_lit(
            [
                "fit",
                *(f"--config={config}" for config in configs),
                *(f"--{key}={value}" for key, value in given.items()),
            ]
        )
        minutes.write_text(f"{processor_minutes() - begun:.1f}\n")
    return run / "checkpoints" / "last.ckpt"


def seeded(seed: int, batches: int) -> dict[str, Any]:
    """Return the settings of `fit` that give a generator its seed, of weights, data and noise, and its batches."""
    return {
        "seed_everything": seed,
        "model.init_args.seed": seed,
        "model.init_args.scheduler.init_args.total_steps": batches,
        "data.init_args.seed": seed,
        "trainer.max_steps": batches,
        "trainer.val_check_interval": batches,
    }


def number_of_make(name: str) -> int:
    """Return a number that the Makefile sets, such as `BATCHES` of `make comparison`."""
    found = re.search(rf"^{name} := (\d+)$", Path("Makefile").read_text(), re.MULTILINE)
    assert found is not None, f"the Makefile sets no {name}"
    return int(found[1])


def run(arguments: Sequence[str]) -> None:
    """Run a command of `discrete-lit`, and say which."""
    print("discrete-lit", *arguments, flush=True)
    subprocess.run([str(Path(sys.executable).with_name("discrete-lit")), *arguments], check=True)


def compared_samples(recipe: Path, folder: Path, *, seed: int, batches: int) -> Path:
    """Train by a recipe and draw 1,000 images as `make comparison` does, unless the folder holds that already.

    All draws of time of the recipe are taken, of which `make comparison` saves some.

    Returns:
        The samples.
    """
    if not (folder / "finished").exists():
        run([
            *("fit", "--config", str(recipe), "--run_dir", str(folder)),
            *("--seed_everything", str(seed), "--model.init_args.seed", str(seed), "--data.init_args.seed", str(seed)),
            *("--trainer.max_steps", str(batches), "--trainer.val_check_interval", str(batches)),
            *("--data.init_args.batch_size", str(number_of_make("BATCH_SIZE"))),
            *("--model.init_args.scheduler.init_args.total_steps", str(batches), "--ckpt_path", "last"),
        ])  # fmt: skip
        (folder / "finished").touch()
    if not (folder / "samples.npz").exists():
        run([
            *("sample", "--config", "lightning_configs/quickstart/sample.yaml", "--seed", str(seed)),
            *("--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--output", str(folder)),
        ])  # fmt: skip
    return folder / "samples.npz"


def minutes_of(checkpoint: Path) -> float:
    """Return the processor time of a run of `fit`."""
    return float((checkpoint.parents[1] / "minutes.txt").read_text())


def processor_minutes() -> float:
    """Return the processor time of this process and of those that it started and that have ended."""
    return sum(os.times()[:4]) / 60


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Format the mean and the standard deviation over the seeds."""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def stamp() -> str:
    """Say when this runs, and on what."""
    return f"{date.today().isoformat()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s) on a CPU"
