"""`discrete-lit advise`: which tokenizer, generator and sampler to take, by what this machine can do."""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Any

from discrete_lit.cli.devices import make_fabric
from discrete_lit.cli.recipes import recipes_folder
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.core.images import ImageSize, height_and_width, normal_size
from discrete_lit.evaluation import advice
from discrete_lit.evaluation.advice import DISTANCE, WISHES, Budget, Wish, evidence_of, suitable, table_of
from discrete_lit.evaluation.machine_speed import measure_speed

_SMALL = 64 * 64
_DTYPES = {"bf16": "bfloat16", "16": "float16"}


def advise(
    wish: Wish,
    *,
    image_size: ImageSize = 32,
    images: int = 1,
    seconds: float | None = None,
    memory_gb: float | None = None,
    training_seconds: float | None = None,
    training_flops: float | None = None,
    batch_size: int | None = None,
    accelerator: str = "auto",
    precision: str = "auto",
    recipes: str | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Say which tokenizer, generator and sampler to take, from what this machine can do in about a minute.

    It measures products of matrices and the memory, draws with random weights from shallow networks of each recipe, and
    predicts what a whole one costs. Then it leaves out what the budget does not allow, and orders the rest by the wish
    and by what this project's own runs measured.

    Args:
        wish: text: text and image in one sequence; speed: most images a second; quality: lowest distance; likelihood:
            -log p of images; editing: positions that are kept.
        image_size: pixels, a number or [height, width]; there must be recipes of it.
        images: to draw.
        seconds: limit for drawing them.
        memory_gb: limit of 10^9 bytes while a batch is drawn.
        training_seconds: limit for training; predicted at the speed of a large matrix product, so at least that.
        training_flops: limit of floating-point operations for training.
        batch_size: images drawn at a time; by default 32 on a CPU up to 64 x 64 pixels, else 1, and 64 on a GPU.
        accelerator: auto, cpu or gpu.
        precision: Lightning's; bf16-mixed by default where this machine multiplies bfloat16.
        recipes: the folder of the recipes; by default that of the package, as `discrete-lit recipes` lists it.
        json: print JSON in the place of a table.

    Returns:
        What `json` prints.

    Raises:
        ValueError: a wish that is not known, a size that no recipe has, a limit that is no number above 0, a device
            that is not there, or a budget that nothing keeps.
    """
    budget = Budget(
        images=images,
        seconds=seconds,
        memory_gb=memory_gb,
        training_seconds=training_seconds,
        training_flops=training_flops,
    )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, accepted: 1 or more")
    suitable(advice.read_facts()[0], wish, image_size)
    fabric = make_fabric(accelerator, precision=resolve_precision(precision, accelerator))
    if batch_size is None:
        height, width = height_and_width(image_size)
        batch_size = (32 if height * width <= _SMALL else 1) if fabric.device.type == "cpu" else 64
    folder = recipes_folder() if recipes is None else Path(recipes)
    if folder is None:
        raise ValueError("this package was installed without its recipes: give their folder, --recipes FOLDER")
    speed = measure_speed(fabric.device)
    resolved = resolve_precision(precision, accelerator)
    dtype = next((name for prefix, name in _DTYPES.items() if resolved.startswith(prefix)), "float32")
    found = advice.advise(
        wish,
        normal_size(image_size),
        budget=budget,
        speed=speed,
        folder=folder,
        batch_size=batch_size,
        device=fabric.device,
        dtype=dtype,
        precision=fabric.autocast,
    )
    result = {
        "wish": wish,
        "order": WISHES[wish],
        "image_size": image_size,
        "budget": asdict(budget),
        "machine": asdict(speed),
        "precision": resolved,
        "batch_size": batch_size,
        "recipes": [{**asdict(each), "images_per_second": 1 / each.seconds} for each in found],
        "evidence": evidence_of(found),
    }
    if json:
        print(json_format.dumps(result, indent=2, allow_nan=False, default=str))
        return result
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in speed.products.items())
    print(
        f"this machine: {speed.device}, {rates}, {speed.bandwidth / 1e9:,.1f} GB/s; draws in {resolved}, batches of "
        f"{batch_size}"
    )
    print(f"{wish}: {WISHES[wish]}\n")
    print(table_of(found))
    print(
        f"\nmeasured: {DISTANCE}. ~: from the operations, not timed. training: of the measured run or the recipe's own"
    )
    print("\n".join(evidence_of(found)))
    return result
