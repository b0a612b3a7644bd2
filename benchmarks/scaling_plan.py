"""What a recipe costs on 8 to 512 GPUs: input, computation, communication, checkpoints and sampling, on paper.

    python benchmarks/scaling_plan.py                                     # the recipes of docs/scaling.md
    python benchmarks/scaling_plan.py --recipes rar_xxl_imagenet256 --gpus 64 512 --mfu 0.42
    python benchmarks/scaling_plan.py --measure                           # first measures what this machine can tell

Parameters and operations are those of the recipe's own model, built at full size without data. All else is an
assumption, printed with the result, and an option: the single-GPU figure that matters most is `--mfu`, the share of the
peak that a training step reaches on one GPU, which `throughput/mfu` of a short run says.

The model of a step of N GPUs with the recipe's global batch G, so b = G / N images on each:

- computation: b x operations of an image / (peak x MFU), two thirds of it the backward pass. Below `least_batch` images
  a GPU is no faster than with so many.
- communication: DDP reduces float32 gradients in a ring, 2 (N - 1) / N x 4 bytes x parameters through the slowest link:
  NVLink within a node, all network cards of a node between nodes; 2 log2(N) latencies for each bucket. It hides behind
  the backward pass, but for what is longer than that, and for the last bucket.
- input: b / (cores of a GPU x images a core and second), beside the step; the step waits for what is longer.
- a checkpoint of weights, averages and AdamW's moments is copied to the host, which blocks, and written behind.
- sampling: the larger of the operations at `sampling_mfu` and of reading weights and cache in every pass.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = (
    "llamagen_b_imagenet256",
    "llamagen_xl_imagenet256",
    "rar_b_imagenet256",
    "rar_xxl_imagenet256",
    "maskgit_imagenet256",
    "var_d16_imagenet256",
    "var_d30_imagenet256",
)
GPUS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Machine:
    """Assumptions; every one is an option of the command."""

    peak: float = 989.5e12  # operations/s of a GPU in bfloat16, dense: H100's data sheet
    mfu: float = 0.35  # share of it in training on one GPU: assumed, not measured
    sampling_mfu: float = 0.25  # share of it in full passes of sampling: assumed, not measured
    memory_rate: float = 2.7e12  # bytes/s of a GPU's memory, of 3.35e12 on the data sheet: assumed
    gpus_per_node: float = 8  # NVLink between them
    nvlink: float = 300e9  # bytes/s of an all-reduce within a node: assumed
    network: float = 280e9  # bytes/s of a node between nodes, of 8 cards of 50e9: assumed, 70%
    latency: float = 10e-6  # s of a step of a collective: assumed
    bucket: float = 25e6  # bytes of gradients that DDP reduces at once: its default
    least_batch: float = 4  # images below which a GPU gets no faster: assumed
    cores: float = 8  # processor cores for each GPU's input: trainer/slurm.yaml's
    images_per_core: float = 150.0  # images/s that a core decodes and crops: --measure, or benchmarks/image_pipeline.py
    rows_per_core: float = 50e3  # rows of tokens/s that a core reads: --measure
    to_host: float = 20e9  # bytes/s of a copy from a GPU to the host: assumed
    storage: float = 2e9  # bytes/s that one process writes to the shared disk: assumed
    save_every: float = 1800.0  # s between checkpoints: assumed
    sampling_batch: float = 256  # images of a batch that is drawn: the recipes'


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks for."""

    name: str
    parameters: int  # that are trained
    flops: float  # of an image in a training step, forward and backward
    global_batch: int
    steps: int
    images: bool  # whether batches are images, and not rows of tokens
    averaged: bool  # whether averaged weights are kept
    passes: int  # network passes of a draw, one after the other
    full_passes: int  # of these, those over all places; the others have their part of them
    rows: int  # of the network for an image: 2 with guidance
    cache_bytes: float  # of keys and values of one row, when all places are there


@dataclass(frozen=True)
class Step:
    """Seconds of a training step."""

    compute: float
    communication: float
    exposed: float
    """What of the communication nothing hides."""
    load: float
    seconds: float

    @property
    def waiting(self) -> float:
        """The share of the step that waits for data."""
        return 1 - (self.compute + self.exposed) / self.seconds


def all_reduce(bytes_: float, gpus: int, machine: Machine) -> float:
    """Seconds of an all-reduce in a ring."""
    if gpus == 1:
        return 0.0
    rate = machine.nvlink if gpus <= machine.gpus_per_node else min(machine.nvlink, machine.network)
    buckets = math.ceil(bytes_ / machine.bucket)
    return 2 * (gpus - 1) / gpus * bytes_ / rate + buckets * 2 * math.log2(gpus) * machine.latency


def step(recipe: Recipe, gpus: int, machine: Machine) -> Step:
    """A training step of the recipe's global batch on some GPUs."""
    batch = recipe.global_batch / gpus
    compute = max(batch, machine.least_batch) * recipe.flops / (machine.peak * machine.mfu)
    gradients = 4.0 * recipe.parameters
    communication = all_reduce(gradients, gpus, machine)
    last = all_reduce(min(gradients, machine.bucket), gpus, machine)
    exposed = min(communication, last + max(0.0, communication - last - compute * 2 / 3))
    load = batch / (machine.cores * (machine.images_per_core if recipe.images else machine.rows_per_core))
    return Step(compute, communication, exposed, load, max(compute + exposed, load))


def state_bytes(recipe: Recipe) -> float:
    """Bytes of a checkpoint: float32 weights, AdamW's two moments, and the averages if they are kept."""
    return (4 + 8 + 4 * recipe.averaged) * recipe.parameters


def saving(recipe: Recipe, machine: Machine) -> tuple[float, float]:
    """Seconds that a checkpoint blocks training, and those that it is written in."""
    return state_bytes(recipe) / machine.to_host, state_bytes(recipe) / machine.storage


def drawing(recipe: Recipe, images: int, gpus: int, machine: Machine) -> float:
    """Seconds of drawing some images, without decoding them."""
    batch = min(machine.sampling_batch, math.ceil(images / gpus))
    forward = recipe.flops / 3  # of one row over all places
    arithmetic = batch * recipe.rows * forward * max(1, recipe.full_passes) / (machine.peak * machine.sampling_mfu)
    # Weights in bfloat16 in every pass; the cache is on average half full.
    partial = recipe.passes - recipe.full_passes
    moved = recipe.passes * 2.0 * recipe.parameters + partial * batch * recipe.rows * recipe.cache_bytes / 2
    return math.ceil(images / gpus / batch) * max(arithmetic, moved / machine.memory_rate)


def recipe_of(name: str) -> Recipe:
    """Build a generator's recipe at full size without data, and count what it asks for."""
    sys.path.insert(0, str(ROOT / "tests"))
    from training_proof.recipes import build, settings_of

    from discrete_lit.generators import Generator, Masked

    settings, module = settings_of(f"generators/{name}"), build(f"generators/{name}")
    if not isinstance(module, Generator):
        raise ValueError(f"{name} trains a {type(module).__name__}; accepted: recipes of generators of ids")
    shape = module.tokenizer.token_shape(module.image_size)
    text = (ROOT / f"lightning_configs/generators/{name}.yaml").read_text() + (
        ROOT / f"lightning_configs/generators/{base_of(name)}.yaml"
    ).read_text()
    per_gpu = settings["data"]["init_args"]["batch_size"]
    callbacks = str(settings["trainer"].get("callbacks+", "")) + str(settings["trainer"].get("callbacks", ""))
    backbone = settings["model"]["init_args"]["backbone"]["init_args"]
    sampler: Any = module.sampler
    length = math.prod(shape)
    masked = isinstance(module, Masked)
    # The backward pass costs two forward ones. What is read token by token is given all but the last.
    flops = 3 * module.backbone.flops(1, length if masked else length - 1)
    passes = (
        int(sampler.steps) if hasattr(sampler, "steps") else len(getattr(module.tokenizer, "scales", range(length)))
    )
    return Recipe(
        name=name,
        parameters=sum(parameter.numel() for parameter in module.backbone.parameters()),
        flops=flops,
        global_batch=per_gpu * gpus_of(text, per_gpu),
        steps=settings["trainer"]["max_steps"],
        images="image_size" in settings["data"]["init_args"],
        averaged="ExponentialMovingAverage" in callbacks,
        passes=passes,
        full_passes=passes if masked else 0,
        rows=1 if getattr(sampler, "guidance_scale", 1.0) == 1 else 2,
        cache_bytes=0.0 if masked else 2 * 2.0 * backbone["depth"] * backbone["width"] * length,
    )


def base_of(name: str) -> str:
    """The recipe over which one is laid, or itself."""
    from helpers.recipe_files import configs_of, header_command

    return Path(configs_of(header_command(f"lightning_configs/generators/{name}.yaml"))[1]).stem


def gpus_of(text: str, per_gpu: int) -> int:
    """The number of GPUs that a recipe's comment gives its batch for."""
    found = re.search(rf"batch_size: {per_gpu}\s+# on each of (\d+) GPUs", text)
    if found is None:
        raise ValueError(f"the recipe does not say on how many GPUs it has a batch of {per_gpu}")
    return int(found[1])


def measured(machine: Machine) -> Machine:
    """Replace what this machine can tell: what a core decodes and reads, and what a process writes to its disk."""
    import numpy as np
    import torch
    from image_pipeline import batch_of, jpeg

    from discrete_lit.data import TokenArrays, TokenWriter
    from discrete_lit.data.image_batches import ImagePipeline

    torch.set_num_threads(1)
    pipeline = ImagePipeline(256, 0, crop="random", flip=True, apply_exif=False)
    files = [jpeg(number) for number in range(32)]
    batch_of(files, pipeline, training=True)
    images = len(files) / fastest(lambda: batch_of(files, pipeline, training=True))
    with tempfile.TemporaryDirectory() as folder:
        count = 50_000
        settings: dict[str, Any] = {"token_shape": (16, 16), "vocab_size": 1024, "image_size": 256, "num_classes": 1000}
        TokenWriter.create(folder, count=count, classes=[], tokenizer="none", source="noise", **settings)
        writer = TokenWriter(folder)
        writer.write(torch.arange(count), torch.randint(1024, (count, 16, 16)), torch.arange(count) % 1000)
        writer.close()
        TokenWriter.finalise(folder)
        source = TokenArrays(folder, batch_size=256).training_source(0, 1)
        source.batch(0, 0)
        rows = 100 * 256 / fastest(lambda: [source.batch(0, number) for number in range(100)])
        block = np.random.default_rng(0).bytes(2**28)

        def write() -> None:
            with open(Path(folder) / "state", "wb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())

        rate = len(block) / fastest(write)
    print(f"measured here: {images:.0f} images/s and {rows:,.0f} rows/s a core, {rate / 1e9:.2f} GB/s to the disk\n")
    return replace(machine, images_per_core=images, rows_per_core=rows)


def fastest(run: Any, rounds: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def table(recipe: Recipe, gpus: Iterable[int], machine: Machine) -> str:
    """The plan of a recipe in Markdown."""
    blocked, written = saving(recipe, machine)
    lines = [
        f"## {recipe.name}",
        "",
        f"{recipe.parameters / 1e6:,.0f}M parameters, {recipe.flops / 1e9:,.0f} GFLOP of training an image, "
        f"{recipe.steps:,} steps of {recipe.global_batch:,} {'images' if recipe.images else 'rows of tokens'}. "
        f"A checkpoint has {state_bytes(recipe) / 1e9:.1f} GB: it blocks for {blocked:.2f} s "
        f"({blocked / machine.save_every:.2%} of the time) and is written in {written:.1f} s.",
        "",
        "| GPUs | images of each | compute, ms | all-reduce, ms | not hidden, ms | input, ms | step, ms | waiting | "
        "speed-up per GPU | days | 50,000 samples, min |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    first = None
    for number in gpus:
        batch = recipe.global_batch / number
        if batch < 1:
            lines.append(
                f"| {number} | {batch:g} | | | | | | | | | {drawing(recipe, 50_000, number, machine) / 60:.1f} |"
            )
            continue
        one = step(recipe, number, machine)
        first = first or one.seconds * number
        cells = [
            f"{number}",
            f"{batch:g}",
            *(f"{1e3 * each:.1f}" for each in (one.compute, one.communication, one.exposed, one.load, one.seconds)),
            f"{one.waiting:.0%}",
            f"{first / (one.seconds * number):.0%}",
            f"{one.seconds * recipe.steps / 86400:.2f}",
            f"{drawing(recipe, 50_000, number, machine) / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="of lightning_configs/generators")
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS)
    parser.add_argument("--measure", action="store_true", help="measure what this machine can tell first")
    for field in fields(Machine):
        parser.add_argument(f"--{field.name}", type=float, default=field.default)
    given = parser.parse_args()
    machine = Machine(**{field.name: getattr(given, field.name) for field in fields(Machine)})
    if given.measure:
        machine = measured(machine)
    print("Assumed: " + ", ".join(f"{name} {value:g}" for name, value in asdict(machine).items()) + "\n")
    for name in given.recipes:
        print(table(recipe_of(name), given.gpus, machine), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
