"""Kills of trainings that are jobs of SLURM, by the template `lightning_configs/slurm/train.sbatch`, on two nodes.

`PYTHONPATH=.:tests python -m kills.run --slurm --kills 30 --seed 0`, where `sinfo` shows two nodes that share this
machine's processes: what is killed is looked for in /proc.
"""

import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from kills.run import TARGETS, Series

SCRIPT = Path(__file__).parents[2] / "lightning_configs" / "slurm" / "train.sbatch"
NODES = {1: 1, 2: 2, 4: 2}
"""Nodes that so many ranks are on."""


class SlurmSeries(Series):
    """Kills of a rank, all, or a worker, as without SLURM; and jobs that are cancelled: all ranks are told to end."""

    ranks = tuple(NODES)
    targets = (*TARGETS, "cancelled")
    writes = False

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        self.job = f"kills-{self.token}"

    def start_fit(self, ranks: int, *command: Any, attempt: str) -> subprocess.Popen[str]:
        tasks = ranks // NODES[ranks]
        self.sizes = [f"--nodes={NODES[ranks]}", f"--ntasks-per-node={tasks}", "--cpus-per-task=1"]
        devices = ["--trainer.num_nodes", NODES[ranks], "--trainer.devices", tasks]
        return self.start(*command, *devices, attempt=attempt)

    def launch(self, command: list[str], environment: dict[str, str], log: IO[str]) -> subprocess.Popen[str]:
        # What `sbatch` does with the script `salloc` does at once, without a place in the queue or a requeue.
        at = command.index("--run_dir")
        run, arguments = command[at + 1], command[:at] + command[at + 2 :]
        given = ["salloc", "--quiet", f"--job-name={self.job}", *self.sizes, "bash", str(SCRIPT), *arguments]
        return subprocess.Popen(
            given,
            env={**environment, "VENV": sys.prefix, "RUN_DIR": run},
            cwd=SCRIPT.parents[2],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def first_processes(self, process: subprocess.Popen[str], living: dict[int, tuple[int, str]]) -> list[int]:
        tasks = [
            number
            for number, (_, command) in living.items()
            if "discrete-lit\0fit" in command and not command.startswith("srun")
        ]
        return sorted(tasks) or [process.pid]

    def victims(self, process: subprocess.Popen[str], attempt: str, target: str) -> list[int]:
        found = super().victims(process, attempt, target)
        # Without a task there is the job's script alone, all of which ends with it.
        return list(self.processes()) if found == [process.pid] else found

    def strike(self, process: subprocess.Popen[str], attempt: str, target: str) -> None:
        if target == "cancelled":
            self._cancel()
        else:
            super().strike(process, attempt, target)

    def all_gone(self, process: subprocess.Popen[str], attempt: str, *, killed: str | None) -> None:
        super().all_gone(process, attempt, killed=killed)
        # SLURM does not learn that a `salloc` was killed, and would keep its nodes.
        self._cancel()

    def _cancel(self) -> None:
        subprocess.run(["scancel", "--name", self.job], check=True)
