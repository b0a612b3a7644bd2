"""Images a second as `discrete-lit advise` predicts them, beside those of whole networks.

    OMP_NUM_THREADS=2 python benchmarks/advised_speed.py --image_size 32

For each recipe of a size: the prediction, from timed draws of networks with one and three blocks, and draws of the
whole network with all its blocks, random weights, the same batch and precision, decoded. The two take turns.

Measured on 28 November 2026, one thread of an AMD EPYC with avx512_bf16, shared with much other work, batches of 8,
bf16-mixed, 3 rounds: next-token prediction +5.6%, MaskGIT -1.9%, MaskBit +13.8%, next-scale +13.3%, DiT +9.7%.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from side_by_side.published_shapes import autocast

from discrete_lit.checkpoints import instantiate
from discrete_lit.core.random import CounterRandom
from discrete_lit.evaluation.advice import read_facts, whole_model
from discrete_lit.evaluation.draw_cost import median_seconds, time_draw
from discrete_lit.generators import Unified

CONFIGS = Path(__file__).parents[1] / "lightning_configs"
TARGET = 0.2


def whole_draw(model: dict, batch: int, device: torch.device, precision: str) -> Callable[[], None]:
    generator: Any = instantiate(model).eval().to(device)
    images = torch.arange(batch, device=device)
    condition = images % generator.num_classes
    if isinstance(generator, Unified):
        condition = generator.condition_of_texts(["a six"] * batch)

    def draw() -> None:
        with torch.inference_mode(), autocast(device, precision):
            generator.tokenizer.decode(generator.draw(condition, CounterRandom(0, images), None).tokens)

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, nargs="+", default=[32], help="one side, or height and width")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the two")
    parser.add_argument("--recipes", nargs="+", default=[], help="names; all of the size by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    size = options.image_size[0] if len(options.image_size) == 1 else tuple(options.image_size)
    device = torch.device(options.device)
    clock = partial(median_seconds, device=device)
    print(f"batches of {options.batch_size}, {options.precision}, {torch.get_num_threads()} threads")
    for recipe in read_facts()[0]:
        if recipe.image_size != size or (options.recipes and recipe.name not in options.recipes):
            continue
        model, begin = whole_model(recipe, CONFIGS), perf_counter()
        draw = whole_draw(model, options.batch_size, device, options.precision)
        rates: dict[str, list[float]] = {"predicted": [], "measured": []}
        for _ in range(options.rounds):
            seconds = time_draw(
                model,
                batch_size=options.batch_size,
                clock=clock,
                device=device,
                precision=partial(autocast, device, options.precision),
            )
            rates["predicted"].append(1 / seconds)
            rates["measured"].append(options.batch_size / clock(draw))
        predicted, measured = (median(values) for values in rates.values())
        error = predicted / measured - 1
        verdict = "within" if abs(error) <= TARGET else "NOT within"
        print(
            f"{recipe.name:30} predicted {predicted:9.2f} images/s, measured {measured:9.2f}: {error:+.1%}, {verdict} "
            f"{TARGET:.0%}; {perf_counter() - begin:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
