"""What the key-value cache saves: sampling the quickstart's autoregressive generator with it and without.

    python benchmarks/cached_sampling.py

Both arms draw the same 64-token sequences from the same random numbers. With the cache each token takes one pass over
one position; without, one pass over the whole prefix. A hook on the first block counts the positions that the backbone
computes. The arms alternate; times are medians.
"""

import argparse
from collections.abc import Callable
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Tensor
from training_step import build

from discrete_lit.backbones import Backbone
from discrete_lit.processes import CounterRandom, Purpose
from discrete_lit.samplers import RasterSampler


def without_cache(sampler: RasterSampler, backbone: Backbone, labels: Tensor, random: CounterRandom) -> Tensor:
    """The tokens of `RasterSampler` without guidance, each from a pass over everything before it."""
    length = backbone.layout.length
    uniforms = random.uniform(Purpose.TOKEN, length)
    tokens = labels.new_empty(len(labels), 0)
    for place in range(length):
        logits = backbone(tokens, labels)[:, -1:]
        drawn, _ = sampler.choose(logits, uniforms[:, place : place + 1])
        tokens = torch.cat((tokens, drawn), dim=1)
    return tokens


def count_passes(backbone: Backbone, draw: Callable[[], Tensor]) -> tuple[Tensor, list[int]]:
    """What `draw` gives, and the positions that each pass through the backbone computed."""
    positions: list[int] = []
    first_block = next(iter(backbone.shards()))
    handle = first_block.register_forward_pre_hook(lambda block, inputs: positions.append(inputs[0].shape[1]))
    try:
        return draw(), positions
    finally:
        handle.remove()


def timed(draw: Callable[[], Tensor]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = perf_counter()
    draw()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="sequences drawn at once")
    parser.add_argument("--rounds", type=int, default=7, help="draws of each arm")
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("--rounds must be at least 3")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = build("Autoregressive", 600).to(device).eval()
    backbone, sampler = generator.backbone, RasterSampler()
    labels = torch.arange(options.images, device=device) % generator.num_classes
    random = CounterRandom(0, torch.arange(options.images, device=device))

    def cached() -> Tensor:
        return sampler(backbone, labels, random).tokens

    def full() -> Tensor:
        return without_cache(sampler, backbone, labels, random)

    print(f"{options.images} sequences of {generator.length} tokens on {device}, {torch.get_num_threads()} threads")
    drawn = {}
    for name, draw in (("cached", cached), ("full", full)):
        drawn[name], positions = count_passes(backbone, draw)
        sizes = f"{min(positions)} to {max(positions)} positions, {sum(positions)} in all"
        print(f"{name:7s} {len(positions)} passes over {sizes}")
    print(f"equal tokens: {float((drawn['cached'] == drawn['full']).double().mean()):.2%}")

    seconds = [(timed(cached), timed(full)) for _ in range(options.rounds)]
    ratios = [slow / quick for quick, slow in seconds]
    low, middle, high = quantiles(ratios, n=4)
    print(f"cached  {1e3 * median(quick for quick, _ in seconds):9.1f} ms")
    print(f"full    {1e3 * median(slow for _, slow in seconds):9.1f} ms")
    print(f"ratio   {middle:9.2f} (median of {options.rounds} pairs; quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
