"""Run `discrete-lit fit` on the workers of a Ray cluster, by Ray Train.

    pip install 'discrete-lit[ray]'
    python lightning_configs/ray/fit.py --workers 8 --cpus 8 -- --config MODEL_AND_DATA.yaml \
        --config lightning_configs/trainer/ddp.yaml --run_dir runs/NAME

Each worker is a rank. The run folder must lie where all nodes see it: with `--failures N` a worker that is lost starts
all of them again, up to N times, from the run's last checkpoint. Strategy, devices and the process group are Ray's:
`--trainer.strategy` and `--trainer.num_nodes` of the configuration do not count.
"""

import argparse
import os
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

_PACKAGE = "ray.train.lightning"


def fit(settings: dict[str, Any]) -> None:
    """Train on one worker, as a rank of Ray's process group."""
    from discrete_lit.cli.commands import main

    os.chdir(settings["folder"])  # where the configuration's paths begin; Ray starts workers elsewhere
    own = [
        f'--trainer.strategy={{"class_path": "{_PACKAGE}.RayDDPStrategy"}}',
        f'--trainer.plugins+={{"class_path": "{_PACKAGE}.RayLightningEnvironment"}}',
        "--trainer.devices=auto",
        "--trainer.num_nodes=1",
        "--ckpt_path=last",
    ]
    try:
        main(["fit", *settings["arguments"], *own])
    except SystemExit as stopped:
        if stopped.code:
            raise RuntimeError(f"discrete-lit fit ended with status {stopped.code}, see the worker's log") from stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="ranks")
    parser.add_argument("--cpus", type=int, default=8, help="processor cores of each")
    parser.add_argument("--gpus", type=int, default=1, help="0 or 1 GPU of each")
    parser.add_argument("--failures", type=int, default=0, help="how often lost workers are replaced")
    parser.add_argument("--results", default="runs/ray", help="folder of Ray's own records")
    parser.add_argument("arguments", nargs="+", help="behind --, as `discrete-lit fit` takes them")
    given = parser.parse_args()
    ray.init(ignore_reinit_error=True)
    TorchTrainer(
        fit,
        train_loop_config={"folder": os.getcwd(), "arguments": given.arguments},
        scaling_config=ScalingConfig(
            num_workers=given.workers, use_gpu=bool(given.gpus), resources_per_worker={"CPU": given.cpus}
        ),
        run_config=RunConfig(
            storage_path=os.path.abspath(given.results), failure_config=FailureConfig(max_failures=given.failures)
        ),
    ).fit()


if __name__ == "__main__":
    main()
