"""Send a command of `discrete-lit` as an array of jobs, and behind it the job that joins its parts, by submitit.

    pip install submitit
    python lightning_configs/slurm/submit.py --parts 64 --at_once 16 --set slurm_partition=gpu gpus_per_node=1 \
        timeout_min=240 -- tokenize --config tokens.yaml --output runs/tokens/train

What `--set` gives goes to submitit's executor, whose names it has. `--cluster local` runs the jobs on this machine, one
process each, to try it out. Sent again, it sends the parts alone that are not done, and then joins.
"""

import argparse
import ast
import subprocess
import sys
from typing import Any

import submitit


def run(arguments: list[str]) -> None:
    """Run `discrete-lit` on a node, in the Python that sent the job."""
    subprocess.run([sys.executable, "-m", "discrete_lit", *arguments], check=True)


def parts_left(arguments: list[str], parts: int) -> list[int]:
    """Ask which parts are not done: all of them where none has begun."""
    ask = [sys.executable, "-m", "discrete_lit", *arguments, "--missing", "true"]
    answer = subprocess.run(ask, capture_output=True, text=True)
    if answer.returncode == 2 and "has begun in" in answer.stderr:
        return list(range(1, parts + 1))
    if answer.returncode not in (0, 1):
        raise SystemExit(answer.stderr)
    numbers: list[int] = []
    for piece in filter(None, answer.stdout.strip().rpartition("\n")[2].split(",")):
        first, _, last = piece.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, required=True)
    parser.add_argument("--at_once", type=int, default=256, help="jobs that run at a time")
    parser.add_argument("--cluster", help="slurm or local; by default slurm where there is one")
    parser.add_argument("--folder", default="runs/jobs", help="of the jobs' logs")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters of submitit's executor")
    parser.add_argument("command", nargs="+", help="behind --, as `discrete-lit` takes it")
    given = parser.parse_args()

    settings: dict[str, Any] = {}
    for name, _, value in (pair.partition("=") for pair in given.set):
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value

    executor = submitit.AutoExecutor(folder=f"{given.folder}/%j", cluster=given.cluster)
    executor.update_parameters(slurm_array_parallelism=given.at_once, **settings)
    left = parts_left(given.command, given.parts)
    jobs = executor.map_array(run, [[*given.command, "--part", f"{part}/{given.parts}"] for part in left])
    print(f"{len(jobs)} jobs for the parts {left}")
    if executor.cluster == "slurm" and jobs:
        after = ":".join(job.job_id for job in jobs)
        executor.update_parameters(slurm_additional_parameters={"dependency": f"afterok:{after}"})
    else:
        for job in jobs:
            job.result()
    joining = executor.submit(run, [*given.command, "--join", str(given.parts)])
    print(f"job {joining.job_id} joins them")
    if executor.cluster != "slurm":
        joining.result()


if __name__ == "__main__":
    main()
