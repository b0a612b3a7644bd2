"""What a VQGAN's training step costs over the bare sum of its network passes.

    python benchmarks/vqgan_step.py
    python benchmarks/vqgan_step.py --image_size 128 --channels 32

The step is that of our Trainer: quantizer, losses, adaptive weight, one backward pass, Adam, callbacks and logging. The
bare sum is what no implementation can leave out, pass by pass on tensors of the same shapes: encoder and decoder
forward and backward; the perceptual network forward on images, forward and backward on outputs; the discriminator
forward on both kinds of images, backward to the outputs for the generator, and backward to its weights for both. A
reference implementation passes the reconstructions forward through the discriminator once more. VGG's and all other
weights are random: the time does not depend on them. Adam's part grows with the weights
and not with the images, so it weighs most in small batches.

Both arms alternate in blocks of `--steps` inside one run and meet the same state of the machine; the bare passes run
inside the Trainer's loop, between two blocks of its steps. The processor time of this process stands beside the wall
clock: other programs on the machine disturb it less.

Measured on 22 November 2026, 2 threads on 2 cores of an Intel Xeon that did nothing else, 64 pixels, batch 8, 12 pairs:
1.020 (quartiles 0.981 to 1.042) in wall clock, 1.020 in processor time.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from side_by_side.between_steps import BetweenSteps
from side_by_side.passes import VQGANPasses
from torch.utils.data import DataLoader

from discrete_lit.callbacks import GradientNorm, Throughput, TrainingGuard
from discrete_lit.tokenizers import VQGAN
from discrete_lit.tokenizers.losses import LPIPS, AdversarialLoss
from discrete_lit.tokenizers.losses.discriminators import PatchGAN
from discrete_lit.tokenizers.networks import ConvAutoencoder
from discrete_lit.tokenizers.quantizers import VectorQuantizer

WARMUP = 3


def build(options: argparse.Namespace) -> VQGAN:
    seed_everything(0, verbose=False)
    network = partial(ConvAutoencoder, channels=options.channels, multipliers=(1, 1, 2, 4), blocks=2)
    return VQGAN(
        network,
        VectorQuantizer(1024, 256, codebook_update="gradient"),
        reconstruction_loss="l1",
        perceptual_loss=LPIPS("random"),
        adversarial_loss=AdversarialLoss(PatchGAN(), adaptive=not options.fixed_weight),
        optimizer=partial(torch.optim.Adam, lr=1e-4, betas=(0.5, 0.9)),
    )


def measure(options: argparse.Namespace, folder: Path) -> BetweenSteps:
    total = WARMUP + options.rounds * options.steps + 1
    images = torch.rand(options.batch_size, 3, options.image_size, options.image_size) * 2 - 1
    batch = {"image": images, "label": torch.zeros(options.batch_size, dtype=torch.int64)}

    def bare(trainer: Trainer, module: LightningModule) -> Callable[[int], None]:
        assert isinstance(module, VQGAN)
        return VQGANPasses(module, images.to(module.device)).run

    between = BetweenSteps(bare, options.steps, WARMUP)
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        max_steps=total,
        log_every_n_steps=10,
        limit_val_batches=0,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="tensorboard", version=""),
        callbacks=[between, GradientNorm(), Throughput(), TrainingGuard(min_codebook_usage=0.0)],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(build(options), DataLoader([batch] * total, batch_size=None))
    return between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each arm")
    parser.add_argument("--steps", type=int, default=2, help="steps of a block")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--channels", type=int, default=64, help="of the autoencoder at full resolution")
    parser.add_argument("--fixed_weight", action="store_true", help="no adaptive weight")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    options = parser.parse_args()
    if options.rounds < 4:
        parser.error("--rounds must be at least 4")
    with tempfile.TemporaryDirectory() as folder:
        between = measure(options, Path(folder))
    print(f"\n{options.image_size} px, batch {options.batch_size}, {options.channels} channels, {options.precision}")
    between.report("step", "at most 1.10")


if __name__ == "__main__":
    main()
