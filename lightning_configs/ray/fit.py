"""Train on the workers of a Ray cluster: `discrete-lit fit` as a job of Ray Train.

    pip install 'discrete-lit[ray]'
    python lightning_configs/ray/fit.py --workers 16 --gpus 1 --cpus 8 --failures 3 -- \
        --config lightning_configs/generators/llamagen_b_imagenet256.yaml --run_dir /shared/llamagen

What stands behind -- goes to `discrete-lit fit`. Ray places the workers and makes them the ranks of one run, which
writes its run folder as any other: on a file system that all nodes see, like the data. A run that a lost node broke is
started again up to `--failures` times, and goes on from its last checkpoint. `batch_size` is that of one worker.
RAY_ADDRESS names a cluster; without it Ray starts one on this machine.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(settings: dict[str, Any]) -> None:
    """Run `discrete-lit fit` in a worker, which Ray has given its rank."""
    from discrete_lit.cli.commands import main

    os.chdir(settings["folder"])  # what paths are relative to, on every node
    own = ["--trainer.num_nodes", "1", "--trainer.devices", "1"]
    for setting, name in (("strategy", "RayDDPStrategy"), ("plugins", "RayLightningEnvironment")):
        own += [f"--trainer.{setting}", json.dumps({"class_path": f"ray.train.lightning.{name}"})]
    try:
        main(["fit", *settings["arguments"], *own, "--ckpt_path", "last"])
    except SystemExit as end:
        if end.code:
            # It has said why in the worker's log.
            raise RuntimeError(f"discrete-lit fit ended with status {end.code}") from end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="ranks of the run")
    parser.add_argument("--gpus", type=float, default=0, help="of a worker")
    parser.add_argument("--cpus", type=float, default=1, help="of a worker")
    parser.add_argument("--failures", type=int, default=0, help="starts after a failure; -1 for as many as it takes")
    parser.add_argument("--ray_folder", type=Path, default="runs/ray", help="of what Ray notes, seen by all nodes")
    parser.add_argument("arguments", nargs="+", help="behind --, as `discrete-lit fit` takes them")
    given = parser.parse_args()
    if "--run_dir" not in [argument.partition("=")[0] for argument in given.arguments]:
        parser.error("name a run folder that all workers see: --run_dir FOLDER, behind --")

    ray.init(ignore_reinit_error=True)
    each = {"CPU": given.cpus, **({"GPU": given.gpus} if given.gpus else {})}
    TorchTrainer(
        train,
        train_loop_config={"arguments": given.arguments, "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=bool(given.gpus), resources_per_worker=each),
        run_config=RunConfig(
            storage_path=str(given.ray_folder.resolve()), failure_config=FailureConfig(max_failures=given.failures)
        ),
    ).fit()


if __name__ == "__main__":
    main()
