"""Kill `discrete-lit` commands at random points: `PYTHONPATH=.:tests python -m kills.run [--kills N] [--seed S]`.

A `fit` of a tokenizer on image shards, of a generator on token arrays, a `tokenize` and a `sample` are started again
and again, each on a random number of ranks, and killed (SIGKILL: one rank, all, or a worker of a loader; or told to end
by SIGTERM) at a random moment: while it starts, loads its first batch, trains, saves or validates. Whatever is killed,

- every process of the run is gone within the patience (no orphan, no hang);
- the next start goes on from the newest checkpoint that was there, which is at most two save intervals old, and after
  SIGTERM from the very batch;
- every batch of every rank has the samples, in the order and with the augmentation, of a run that nothing interrupted;
- in the end there is no temporary file and no superseded checkpoint, and the results of `tokenize` and `sample` are
  those of commands that nothing interrupted.

With `--slurm` the trainings are jobs of a cluster, see `slurm.py`.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import yaml
from helpers.distributed_run import OPTIMIZER, generator_config, tokenizer_config
from PIL import Image

from discrete_lit.checkpoints import instantiate, save
from discrete_lit.cli.commands import main as run_command
from discrete_lit.cli.run_folder import RunFolder
from discrete_lit.core.images import pixels_as_floats
from discrete_lit.data import ImageShards, TokenArrays
from discrete_lit.data.loaders import TrainingLoader
from kills.ledger import samples_of

GLOBAL_BATCH, COUNT, STEPS, SAVE_EVERY = 12, 52, 24, 3
RANKS = (1, 2, 3)
MOMENTS = ("start", "loading", "batch", "batch", "save", "save", "validation")
TARGETS = ("all", "first rank", "last rank", "worker", "told to end")
PATIENCE = float(os.environ.get("KILLS_PATIENCE", "300"))
"""Seconds that a command may take, and that its processes may outlive a kill."""
TOKEN = "KILLS_SERIES"
"""Variable of the environment by which all processes of a series are found."""
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


@dataclass
class Verdict:
    """What was found over all kills."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    batches: int = 0
    """Batches of ranks that were compared."""
    silence: float = 0.0
    """Seconds that the slowest processes outlived the kill of one or all ranks."""


class Series:
    """Commands of one series of kills, in one folder."""

    ranks = RANKS
    targets = TARGETS
    writes = True
    """Whether a `tokenize` and a `sample` are killed too."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.token = f"{os.getpid()}-{seed}"
        self.attempts = 0
        self.verdict = Verdict()
        self._make_data()

    # What is trained.

    def _make_data(self) -> None:
        pixels = np.random.default_rng(0)
        for number in range(COUNT):
            image = self.folder / "images" / str(number % 4) / f"{number:03d}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(image)
        torch.manual_seed(0)
        save(instantiate(tokenizer_config()), self.folder / "tokenizer.ckpt")
        source = {
            "class_path": "discrete_lit.data.sources.ClassFolders",
            "init_args": {"root": str(self.folder / "images")},
        }
        self.must(
            "shards",
            "--source",
            json.dumps(source),
            "--split",
            "train",
            "--samples_per_shard",
            9,
            "--output",
            self.folder / "shards",
        )
        self.must(*self.tokenize(self.folder / "tokens"))
        for name, kind in (("tokenizer", self.fit_tokenizer()), ("generator", self.fit_generator())):
            (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(kind))
        self.must(*self.sample(self.folder / "samples"))

    def tokenize(self, output: Path) -> list[Any]:
        data = {"train": str(self.folder / "images"), "image_size": 16, "batch_size": 2, "num_workers": 1}
        data = json.dumps({"class_path": "discrete_lit.data.ImageFolder", "init_args": data})
        where = ["--ckpt_path", self.folder / "tokenizer.ckpt", "--output", output, "--accelerator", "cpu"]
        return ["tokenize", "--data", data, *where]

    def sample(self, output: Path) -> list[Any]:
        if not (file := self.folder / "generator.ckpt").exists():
            torch.manual_seed(0)
            save(instantiate(generator_config("Masked", str(self.folder / "tokenizer.ckpt"))), file)
        what = ["--num_samples", 24, "--batch_size", 2, "--accelerator", "cpu"]
        return ["sample", "--ckpt_path", file, "--output", output, *what]

    def fit_tokenizer(self) -> dict[str, Any]:
        data = {"train": str(self.folder / "shards"), "validation": str(self.folder / "shards"), "image_size": 16}
        data |= {"shuffle_window": 7, "num_workers": 2, "crop": "random_resized"}
        model = tokenizer_config()
        model["init_args"] |= {"optimizer": OPTIMIZER}
        return self._fit(model, "ImageShards", data)

    def fit_generator(self) -> dict[str, Any]:
        data = {"train": str(self.folder / "tokens"), "validation": str(self.folder / "tokens"), "num_workers": 1}
        return self._fit(generator_config("Masked", str(self.folder / "tokenizer.ckpt")), "TokenArrays", data)

    def _fit(self, model: dict[str, Any], data: str, arguments: dict[str, Any]) -> dict[str, Any]:
        keeper = {
            "every_n_train_steps": SAVE_EVERY,
            "save_last": True,
            "save_top_k": 1,
            "enable_version_counter": False,
        }
        callbacks = [
            {"class_path": "kills.ledger.Ledger", "init_args": {"folder": str(self.folder / "ledger")}},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keeper},
            {"class_path": "ExponentialMovingAverage"},
        ]
        trainer = {**QUIET, "max_epochs": -1, "max_steps": STEPS, "val_check_interval": 2, "callbacks": callbacks}
        return {
            "model": model,
            "data": {"class_path": f"discrete_lit.data.{data}", "init_args": {**arguments, "batch_size": GLOBAL_BATCH}},
            "trainer": {**trainer, "limit_val_batches": 1, "strategy": "auto"},
        }

    # Processes.

    def start(self, *command: Any, attempt: str = "none") -> subprocess.Popen[str]:
        root = Path(__file__).parents[2]
        path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, TOKEN: self.token, "KILLS_ATTEMPT": attempt}
        environment["OMP_NUM_THREADS"] = "1"
        log = (self.folder / f"{attempt}.log").open("w")
        with log:
            return self.launch([str(word) for word in command], environment, log)

    def launch(self, command: list[str], environment: dict[str, str], log: IO[str]) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-m", "discrete_lit", *command]
        return subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    def start_fit(self, ranks: int, *command: Any, attempt: str) -> subprocess.Popen[str]:
        """Start a training on so many ranks."""
        return self.start("fit", *command, "--trainer.devices", ranks, attempt=attempt)

    def must(self, *command: Any) -> None:
        """Run a command to its end, in this process."""
        with redirect_stdout(io.StringIO()):
            run_command([str(word) for word in command])

    def log(self, attempt: str) -> str:
        return (self.folder / f"{attempt}.log").read_text(errors="replace")[-3000:]

    def processes(self) -> dict[int, tuple[int, str]]:
        """Parent and command of every living process of the series."""
        found = {}
        mark = f"{TOKEN}={self.token}".encode()
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError, IndexError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                    if state != "Z":
                        found[int(entry.name)] = int(parent), (entry / "cmdline").read_bytes().decode(errors="replace")
        return found

    def all_gone(self, process: subprocess.Popen[str], attempt: str, *, killed: str | None) -> None:
        """Wait until nothing of a command is left; what is left after the patience is a fault, and is ended."""
        begin = time.monotonic()
        while time.monotonic() - begin < PATIENCE:
            process.poll()
            if not self.processes():
                break
            time.sleep(0.05)
        else:
            for number, (_, command) in self.processes().items():
                self.fault(attempt, f"process {number} is left: {command[:200]!r}")
                with suppress(OSError):
                    os.kill(number, signal.SIGKILL)
        process.wait()
        # Without a worker a run may go on, and one that was told to end saves first.
        if killed is not None and not any(word in killed for word in ("worker", "told", "cancelled")):
            self.verdict.silence = max(self.verdict.silence, time.monotonic() - begin)

    def fault(self, attempt: str, text: str) -> None:
        self.verdict.faults.append(f"{attempt}: {text}")
        print(f"FAULT {attempt}: {text}", flush=True)

    # Killing.

    def ranks_of(self, attempt: str) -> list[int]:
        """The processes of the ranks that have come so far, by rank."""
        return [int(file.read_text()) for file in sorted((self.folder / "ledger" / attempt).glob("rank-*.pid"))]

    def reached(self, attempt: str, moment: str) -> int:
        """How often the first rank has come to a moment."""
        file = self.folder / "ledger" / attempt / "rank-0.phase"
        return file.read_text().split().count(moment) if file.exists() else 0

    def victims(self, process: subprocess.Popen[str], attempt: str, target: str) -> list[int]:
        living = self.processes()
        ranks = self.ranks_of(attempt) or self.first_processes(process, living)
        if target == "all":
            return list(living)
        if target == "worker":
            workers = [
                number for number, (parent, command) in living.items() if parent in ranks and number not in ranks
            ]
            workers = [number for number in workers if "resource_tracker" not in living[number][1]]
            return [self.random.choice(workers)] if workers else [ranks[0]]
        return [ranks[-1] if target == "last rank" else ranks[0]]

    def first_processes(self, process: subprocess.Popen[str], living: dict[int, tuple[int, str]]) -> list[int]:
        """The processes of a training none of whose ranks has come to its ledger."""
        return [process.pid]

    def strike(self, process: subprocess.Popen[str], attempt: str, target: str) -> None:
        for victim in self.victims(process, attempt, target):
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGTERM if target == "told to end" else signal.SIGKILL)

    def kill(self, process: subprocess.Popen[str], attempt: str, *, moments: tuple[str, ...]) -> str | None:
        """Kill something at a random moment: what and when, or None where the command ended before."""
        moment, target = self.random.choice(moments), self.random.choice(self.targets)
        if moment in ("start", "loading") and target == "told to end":
            target = "all"  # nothing is trained yet that could be saved
        # A start comes to its loading once.
        most = {"loading": 1, "batch": 6}.get(moment, 2)
        times, delay = self.random.randint(1, most), self.random.random() * 0.05
        until = time.monotonic() + (self.random.uniform(1, 8) if moment == "start" else PATIENCE)
        while process.poll() is None and time.monotonic() < until:
            if moment != "start" and self.reached(attempt, moment) >= times:
                break
            time.sleep(0.002)
        time.sleep(delay)
        if process.poll() is not None:
            return None
        if moment != "start" and self.reached(attempt, moment) < times:
            self.fault(attempt, f"did not come to its {moment}:\n{self.log(attempt)}")
            target = "all"
        self.strike(process, attempt, target)
        return f"{target}, {moment}"

    # The two kinds of command.

    def disturb_fit(self, name: str, kills: int) -> int:
        """Train to the end, with at most so many kills; how many there were."""
        run, number, done = self.folder / f"run-{self.attempts}", 0, 0
        while True:
            ranks = self.random.choice(self.ranks)
            attempt = f"{name}-{self.attempts}-{number}"
            newest = RunFolder(run).newest_intact(continues=True) if run.exists() else None
            begins = 0 if newest is None else newest[1]["global_step"]
            # It says on how many ranks the order was laid out, where the order is of them.
            state = {} if newest is None else newest[1][{"tokenizer": "ImageShards"}.get(name, "TokenArrays")]
            layout = state.get("layout") or {"batch_size": GLOBAL_BATCH // ranks, "world_size": ranks, "workers": 2}
            batch_size, accumulated = GLOBAL_BATCH // ranks, 1
            if ranks == 1 and self.random.random() < 0.5:
                batch_size, accumulated = batch_size // 2, 2
                layout = state.get("layout") or {"batch_size": batch_size, "world_size": 1, "workers": 2}
            settings = ["--config", self.folder / f"{name}.yaml", "--data.init_args.batch_size", batch_size]
            settings += ["--trainer.accumulate_grad_batches", accumulated, "--ckpt_path", "last", "--run_dir", run]
            process = self.start_fit(ranks, *settings, attempt=attempt)
            killed = self.kill(process, attempt, moments=MOMENTS) if done < kills else None
            if killed is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
            self.all_gone(process, attempt, killed=killed)
            self.compare(name, attempt, begins=begins, layout=layout, accumulated=accumulated)
            number += 1
            if killed is not None:
                done += 1
                what, moment = killed.split(", ")
                told = what == "told to end" and process.returncode == 128 + signal.SIGTERM
                told |= what == "cancelled" and moment not in ("start", "loading")
                self.verdict.kills[killed] += 1
                print(f"{attempt} on {ranks}: {killed}, exit {process.returncode}", flush=True)
                self.check_progress(attempt, run, told=told)
            elif process.returncode == 0:
                break
            else:
                self.fault(attempt, f"ended with {process.returncode} and was not killed:\n{self.log(attempt)}")
                break
        self.attempts += 1
        self.check_left(attempt, run)
        return done

    def entries(self, attempt: str) -> Iterator[list[dict[str, Any]]]:
        """The batches of each rank of an attempt; a line that a kill cut short is no batch."""
        for file in sorted((self.folder / "ledger" / attempt).glob("rank-*.jsonl")):
            lines = file.read_text().splitlines()
            with suppress(json.JSONDecodeError):
                lines = lines if not lines else [*lines[:-1], json.dumps(json.loads(lines[-1]))]
                yield [json.loads(line) for line in lines]
                continue
            yield [json.loads(line) for line in lines[:-1]]

    def compare(self, name: str, attempt: str, *, begins: int, layout: dict[str, int], accumulated: int) -> None:
        """Compare each batch of an attempt with that of a run on one rank that nothing interrupted."""
        expected = self.expected(name, layout)
        for rank, batches in enumerate(self.entries(attempt)):
            if batches and batches[0]["step"] != begins:
                self.fault(attempt, f"rank {rank} began at step {batches[0]['step']}, the checkpoint is of {begins}")
            for place, batch in enumerate(batches):
                step, size = begins + place // accumulated, len(batch["samples"])
                first = ((place % accumulated) * batch["ranks"] + rank) * size
                self.verdict.batches += 1
                if batch["step"] != step or batch["samples"] != expected[step][first : first + size]:
                    self.fault(attempt, f"batch {place} of rank {rank}, step {batch['step']}, differs")

    def expected(self, name: str, layout: dict[str, int]) -> list[list[list[Any]]]:
        """The global batches of a run: index and hash of each sample."""
        settings = yaml.safe_load((self.folder / f"{name}.yaml").read_text())["data"]["init_args"]
        kind = ImageShards if name == "tokenizer" else TokenArrays
        source = kind(**{**settings, "num_workers": 0}).training_source(0, 1)
        if name == "tokenizer":
            source.follow(layout)
        loader, steps = TrainingLoader(source), []
        while len(steps) < STEPS:
            steps += [samples_of(pixels_as_floats(batch)) for batch in loader]
        return steps

    def check_progress(self, attempt: str, run: Path, *, told: bool) -> None:
        """The newest checkpoint is at most two intervals older than the last batch; exact after SIGTERM."""
        taken = [batches[-1]["step"] for batches in self.entries(attempt) if batches]
        newest = RunFolder(run).newest_intact(continues=True) if run.exists() else None
        step = 0 if newest is None else newest[1]["global_step"]
        if taken and max(taken) - step >= 2 * SAVE_EVERY:
            self.fault(attempt, f"trained at step {max(taken)}, and the newest checkpoint is of step {step}")
        if taken and told and step != max(taken) + 1:
            self.fault(attempt, f"was told to end in step {max(taken)}, and saved step {step}")

    def check_left(self, attempt: str, run: Path) -> None:
        left = sorted(file.name for file in (run / "checkpoints").glob("*"))
        if len(left) != 2 or "last.ckpt" not in left or not all(name.endswith(".ckpt") for name in left):
            self.fault(attempt, f"checkpoints that are left: {left}")
        odd = [str(file) for file in run.rglob("*") if file.name.endswith((".tmp", ".unfinished"))]
        if odd:
            self.fault(attempt, f"temporary files that are left: {odd}")

    def disturb_writing(self, name: str) -> int:
        """Kill a `tokenize` or a `sample`, run it again, and compare the result."""
        attempt, output = f"{name}-{self.attempts}", self.folder / f"{name}-{self.attempts}"
        self.attempts += 1
        command = self.tokenize(output) if name == "tokenize" else self.sample(output)
        process = self.start(*command, attempt=attempt)
        # From its first file on.
        begin, delay = time.monotonic(), self.random.uniform(0, 2)
        while process.poll() is None and not output.exists() and time.monotonic() - begin < PATIENCE:
            time.sleep(0.002)
        time.sleep(delay)
        target = self.random.choice(("all", "first rank"))
        killed = process.poll() is None
        for victim in list(self.processes()) if target == "all" else [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        self.all_gone(process, attempt, killed=target if killed else None)
        if killed:
            self.verdict.kills[f"{target}, {name}"] += 1
            print(f"{attempt}: {target}", flush=True)
            again = self.start(*command, attempt=f"{attempt}-again")
            if again.wait(PATIENCE) != 0:
                self.fault(attempt, f"did not go on:\n{self.log(f'{attempt}-again')}")
                return 1
        whole = self.folder / ("tokens" if name == "tokenize" else "samples")
        for file in whole.glob("*.np*"):
            if file.read_bytes() != (output / file.name).read_bytes():
                self.fault(attempt, f"{file.name} differs from that of a command that nothing interrupted")
        odd = {file.name for file in output.rglob("*")} - {file.name for file in whole.rglob("*")}
        if odd:
            self.fault(attempt, f"files that are left: {sorted(odd)}")
        return int(killed)


def run(series: Series, kills: int) -> Verdict:
    """Make so many kills of a series."""
    done = 0
    kinds = ["tokenizer", "generator"]
    if kills > 2 and series.writes:
        kinds += ["tokenize", "sample"]
    while done < kills:
        for name in kinds:
            if done < kills and name in ("tokenize", "sample"):
                done += series.disturb_writing(name)
            elif done < kills:
                done += series.disturb_fit(name, min(kills - done, 2 if kills < 10 else 5))
    return series.verdict


def main() -> int:
    """Make a series of kills, and print what was found; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--slurm", action="store_true", help="trainings alone, as jobs of a cluster of two nodes or more"
    )
    parser.add_argument("--keep", type=Path, help="a folder to work in, which stays; by default a temporary one")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    try:
        kind = Series
        if given.slurm:
            from kills.slurm import SlurmSeries as kind
        verdict = run(kind(folder, given.seed), given.kills)
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{sum(verdict.kills.values())} kills in {time.monotonic() - begin:.0f} s, seed {given.seed}: "
        f"{verdict.batches} batches of ranks compared, {len(verdict.faults)} faults; after the kill of a rank the last "
        f"process was gone in at most {verdict.silence:.1f} s"
    )
    for kind, count in sorted(verdict.kills.items()):
        print(f"  {count:3d} {kind}")
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main())
