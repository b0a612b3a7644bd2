"""What Lightning adds to a training step: the quickstart's generator in our Trainer against a bare loop.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --family Autoregressive --rounds 40

Both arms train the same model (4 blocks, width 128, 64 tokens of 240 ids, batches of 128) on the same token arrays with
the same optimizer, schedule and precision. The Lightning arm has every callback of `discrete-lit fit`, the progress
bar and a TensorBoard log every 10 steps; validation and checkpoints stand outside the measured steps. The bare arm runs
inside the Trainer's loop, between two blocks of its steps, so that the arms alternate every `--steps` steps and meet
the same state of the machine. A block of Lightning's steps is timed from the start of its first batch to the start of
the batch behind it: data, transfers, callbacks and logging are all inside. The processor time of this process stands
beside the wall clock: other programs on the machine disturb it less.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from side_by_side.between_steps import BetweenSteps

from discrete_lit import generators
from discrete_lit.backbones import Transformer
from discrete_lit.callbacks import GradientNorm, ReconstructionGrid, SampleGrid, Throughput
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.data import TokenArrays, TokenWriter
from discrete_lit.generators import Generator
from discrete_lit.optimization import WarmupCosine
from discrete_lit.tokenizers import FSQ
from discrete_lit.tokenizers.networks import ConvAutoencoder

IMAGE_SIZE, CLASSES, WARMUP = 32, 10, 10


def build(family: str, total_steps: int) -> Generator:
    """The quickstart's generator; equal weights at every call."""
    seed_everything(0, verbose=False)
    network = partial(ConvAutoencoder, channels=16, multipliers=(1, 2, 4), blocks=1, attention=False, norm_groups=8)
    return getattr(generators, family)(
        FSQ(network, levels=[8, 6, 5]),
        IMAGE_SIZE,
        num_classes=CLASSES,
        backbone=partial(Transformer, width=128, depth=4, heads=4),
        optimizer=partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.03),
        scheduler=partial(WarmupCosine, warmup_steps=50, total_steps=max(600, total_steps)),
    )


def write_tokens(folder: Path, generator: Generator, count: int) -> None:
    TokenWriter.create(
        folder,
        count=count,
        token_shape=generator.token_shape,
        vocab_size=generator.vocab_size,
        image_size=IMAGE_SIZE,
        num_classes=CLASSES,
        classes=[str(label) for label in range(CLASSES)],
        tokenizer=generator.tokenizer.fingerprint(),
        source="noise",
    )
    writer = TokenWriter(folder)
    tokens = torch.randint(generator.vocab_size, (count, *generator.token_shape))
    writer.write(torch.arange(count), tokens, torch.arange(count) % CLASSES)
    writer.close()
    TokenWriter.finalise(folder)


class BareLoop:
    """The same step as a person would write it."""

    def __init__(self, generator: Generator, batches: Iterator[dict[str, Any]], trainer: Trainer) -> None:
        configured = generator.configure_optimizers()
        self.optimizer = configured["optimizer"]
        self.scheduler = configured["lr_scheduler"]["scheduler"]
        self.generator = generator.to(trainer.strategy.root_device).train()
        self.device = trainer.strategy.root_device
        self.batches = batches
        self.bfloat16 = trainer.precision == "bf16-mixed"

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = {name: value.to(self.device) for name, value in next(self.batches).items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                random = CounterRandom(self.generator.seed, batch["index"])
                dropped = random.uniform(Purpose.LABEL_DROPOUT, 1)[:, 0] < self.generator.label_dropout
                loss, _ = self.generator.loss(batch["tokens"], batch["label"], random, dropped=dropped)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()


def endless(data: TokenArrays) -> Iterator[dict[str, Any]]:
    loader = data.training_loader()
    while True:
        yield from loader


def measure(options: argparse.Namespace, folder: Path) -> BetweenSteps:
    total = WARMUP + options.rounds * options.steps + 1
    generator = build(options.family, total)
    write_tokens(folder / "tokens", generator, 20_000)
    data = TokenArrays(str(folder / "tokens"), batch_size=options.batch_size)
    bare_data = TokenArrays(str(folder / "tokens"), batch_size=options.batch_size)
    bare = build(options.family, total)
    between = BetweenSteps(
        lambda trainer, module: BareLoop(bare, endless(bare_data), trainer).run, options.steps, WARMUP
    )
    always = [TQDMProgressBar(), ReconstructionGrid(), SampleGrid(), LearningRateMonitor("step"), GradientNorm()]
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        max_steps=total,
        log_every_n_steps=10,
        limit_val_batches=0,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="tensorboard", version=""),
        callbacks=[between, *always, Throughput(), ModelCheckpoint(folder / "checkpoints", save_last=True)],
        use_distributed_sampler=False,
    )
    trainer.fit(generator, datamodule=data)
    return between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("Masked", "Autoregressive"), default="Masked")
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each arm")
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of a block; a multiple of 10, the logging interval"
    )
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    options = parser.parse_args()
    if options.steps % 10 or options.rounds < 4:
        parser.error("--steps must be a multiple of 10, and --rounds at least 4")
    with tempfile.TemporaryDirectory() as folder:
        between = measure(options, Path(folder))
    print(f"\n{options.family}, batch {options.batch_size}, {options.precision}, {torch.get_num_threads()} threads")
    between.report("Lightning", "at most 1.05")


if __name__ == "__main__":
    main()
