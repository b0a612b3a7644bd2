"""What checkpoints cost: how long a save keeps training waiting, and a resume its first batch.

    python benchmarks/checkpoint_cost.py
    python benchmarks/checkpoint_cost.py --images 1300000 --width 256

Save: a generator of `--depth` blocks with its averages and AdamW is trained by our Trainer, with the writer of
`discrete-lit fit`, and saved every `--every` steps; the time of a step with a save less that of the others is what the
save keeps training waiting. The file is written meanwhile by a thread. From it follow the seconds for each GB, and how
far apart saves must be to take 2% of the time at most.

Resume: token arrays of `--images` images of 256 ids, files without content that take no place on the disk. Timed in a
process of its own: opening them, restoring the state from the middle of the third epoch, and the first batch of 256.
Nothing is read of what the epoch had before; the order of the epoch is drawn once.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from discrete_lit.backbones import Transformer
from discrete_lit.callbacks import ExponentialMovingAverage
from discrete_lit.cli.run_folder import WholeCheckpoints
from discrete_lit.data import TokenArrays, TokenWriter
from discrete_lit.generators import Autoregressive
from discrete_lit.tokenizers import FSQ
from discrete_lit.tokenizers.networks import ConvAutoencoder

CODES, SHAPE, IMAGE_SIZE = 1024, (16, 16), 256


def write_empty_tokens(folder: Path, images: int, tokenizer: str = "a" * 64) -> None:
    """Write token arrays of zeros, which take no place on the disk until they are written."""
    settings = {"vocab_size": CODES, "image_size": IMAGE_SIZE, "num_classes": 1000, "tokenizer": tokenizer}
    classes = [str(label) for label in range(1000)]
    TokenWriter.create(folder, count=images, token_shape=SHAPE, classes=classes, source="zeros", **settings)  # type: ignore[arg-type]
    writer = TokenWriter(folder)
    writer._written.write(np.arange(images), np.ones(images))
    writer.close()
    TokenWriter.finalise(folder)


def resume(folder: Path, images: int) -> None:
    """Print the seconds up to the first batch of a resume, part by part."""
    begin, used = time.perf_counter(), time.process_time()
    data = TokenArrays(str(folder), batch_size=256)
    loader = data.training_loader(0, 64)
    opened = time.perf_counter()
    state = loader.state_dict() | {"epoch": 2, "samples": images // 2 // (64 * 256) * 64 * 256, "finished": False}
    loader.load_state_dict(state)
    batch = next(iter(loader))
    done, used = time.perf_counter(), time.process_time() - used
    assert int(batch["index"][0]) == 2 * images + state["samples"]
    parts = f"opening {opened - begin:.2f} s, first batch {done - opened:.2f} s"
    print(f"{parts}, together {done - begin:.2f} s ({used:.2f} of the processor)")


class Timed(Callback):
    """The seconds from each batch's start to the next one's, of those that saved and of the others."""

    def __init__(self, every: int) -> None:
        self.every, self.last = every, 0.0
        self.saving: list[float] = []
        self.others: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if trainer.global_step > 2:
            (self.others if trainer.global_step % self.every else self.saving).append(now - self.last)
        self.last = now


def save(folder: Path, *, width: int, depth: int, every: int, saves: int) -> None:
    """Print what a save keeps training waiting."""
    seed_everything(0, verbose=False)
    network = partial(
        ConvAutoencoder, channels=4, multipliers=(1, 1, 1, 1, 1), blocks=1, attention=False, norm_groups=2
    )
    generator = Autoregressive(
        FSQ(network, levels=[4, 4, 4, 4, 4]),
        IMAGE_SIZE,
        num_classes=1000,
        backbone=partial(Transformer, width=width, depth=depth, heads=8),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )
    write_empty_tokens(folder / "tokens", 1000, generator.tokenizer.fingerprint())
    timed = Timed(every)
    keeper = ModelCheckpoint(folder / "kept", every_n_train_steps=every, save_last=True, enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=every * saves + 2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[timed, keeper, ExponentialMovingAverage()],
        plugins=[WholeCheckpoints()],
    )
    trainer.fit(generator, datamodule=TokenArrays(str(folder / "tokens"), batch_size=1))
    size = (folder / "kept" / "last.ckpt").stat().st_size / 1e9
    step, waited = median(timed.others), median(timed.saving) - median(timed.others)
    print(
        f"{size:.2f} GB twice (the newest and last.ckpt): a step takes {step:.2f} s, a save keeps it waiting for "
        f"{waited:.2f} s more, {waited / size:.2f} s for each GB. Saves that are {waited / 0.02:.0f} s apart take 2%"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=13_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.resume is not None:
        resume(given.resume, given.images)
        return
    with tempfile.TemporaryDirectory() as folder:
        print("save:   ", end="", flush=True)
        save(Path(folder), width=given.width, depth=given.depth, every=given.every, saves=given.saves)
        tokens = Path(folder, "many")
        write_empty_tokens(tokens, given.images)
        print(f"resume, {given.images:,} images: ", end="", flush=True)
        own = [sys.executable, __file__, "--resume", str(tokens), "--images", str(given.images)]
        subprocess.run(own, check=True)


if __name__ == "__main__":
    main()
