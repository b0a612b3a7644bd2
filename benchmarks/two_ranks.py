"""How much faster two ranks train than one, with one core each, and what they wait for data.

    python benchmarks/two_ranks.py
    python benchmarks/two_ranks.py --width 768 --depth 12 --batch_size 2 --rounds 5

A generator on token arrays is trained by our Trainer with every callback that `discrete-lit fit` has, under DDP with
gloo: on one rank, and on two with as many images each, turn by turn, in processes of their own. Tokens/s and waiting
are those that the run logs (`Throughput`). Each rank has one thread for its mathematics and none that loads data.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from checkpoint_cost import IMAGE_SIZE, write_empty_tokens
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from discrete_lit.backbones import Transformer
from discrete_lit.callbacks import CollectiveTimeout, GradientNorm, HangDetector, Preemption, Throughput, TrainingGuard
from discrete_lit.cli.resume import ContinueExactly
from discrete_lit.cli.run_folder import WholeCheckpoints
from discrete_lit.data import TokenArrays
from discrete_lit.generators import Autoregressive
from discrete_lit.tokenizers import FSQ
from discrete_lit.tokenizers.networks import ConvAutoencoder

LOGGED_EVERY, LEFT_OUT = 5, 2


def train(folder: Path, given: argparse.Namespace) -> None:
    """Train on the ranks of this process's launch, and print what the first one logged as JSON."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    network = partial(
        ConvAutoencoder, channels=4, multipliers=(1, 1, 1, 1, 1), blocks=1, attention=False, norm_groups=2
    )
    generator = Autoregressive(
        FSQ(network, levels=[4, 4, 4, 4, 4]),
        IMAGE_SIZE,
        num_classes=1000,
        backbone=partial(Transformer, width=given.width, depth=given.depth, heads=8),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )
    tokens = folder / "tokens"
    if not tokens.exists():
        write_empty_tokens(tokens, 100_000, generator.tokenizer.fingerprint())
    logger = CSVLogger(folder, name=f"log-{given.ranks}")
    trainer = Trainer(
        accelerator="cpu",
        devices=given.ranks,
        strategy="ddp" if given.ranks > 1 else "auto",
        precision=given.precision,
        max_steps=given.steps,
        log_every_n_steps=LOGGED_EVERY,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            *(Throughput(), GradientNorm(), TrainingGuard(), HangDetector(), CollectiveTimeout(), ContinueExactly()),
            *(Preemption(), ModelCheckpoint(folder / f"kept-{given.ranks}", every_n_train_steps=10**6)),
        ],
        plugins=[WholeCheckpoints()],
    )
    data = TokenArrays(str(tokens), batch_size=given.batch_size)
    trainer.fit(generator, datamodule=data)
    if trainer.is_global_zero:
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row.get("throughput/tokens_per_second")][LEFT_OUT:]
        names = {"tokens": "throughput/tokens_per_second", "wait": "throughput/data_wait"}
        print(json.dumps({name: median(float(row[column]) for row in rows) for name, column in names.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8, help="of each rank")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ranks:
        train(given.folder, given)
        return
    logged: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.rounds):
            for ranks, results in logged.items():
                own = [sys.executable, __file__, *sys.argv[1:], "--ranks", str(ranks), "--folder", folder]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                answer = subprocess.run(own, env=environment, capture_output=True, text=True)
                if answer.returncode:
                    sys.exit(answer.stderr[-3000:])
                results.append(json.loads(answer.stdout.strip().splitlines()[-1]))
    ratios = [two["tokens"] / one["tokens"] for one, two in zip(*logged.values(), strict=True)]
    for ranks, results in logged.items():
        tokens, wait = (median(result[name] for result in results) for name in ("tokens", "wait"))
        print(
            f"{ranks} rank{'s' if ranks > 1 else ''}: {tokens:,.0f} tokens/s, {wait:.2%} of the time waiting for data"
        )
    print(f"two ranks {median(ratios):.2f}x one ({min(ratios):.2f} to {max(ratios):.2f}); at least 1.9")


if __name__ == "__main__":
    main()
