"""What the experiments share: a training that is kept, and how a page says its machine and its seeds."""

import os
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
