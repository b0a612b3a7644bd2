"""Sampling an autoregressive generator token by token: ours, its bare products, `transformers`, and no cache.

    OMP_NUM_THREADS=2 python benchmarks/cached_sampling.py
    OMP_NUM_THREADS=2 python benchmarks/cached_sampling.py --precision bf16-mixed --batch 32
    OMP_NUM_THREADS=2 python benchmarks/cached_sampling.py --precision 32-true --batch 1 --compile --recomputed 0

LlamaGen-B's shape (12 blocks of width 768, 256 tokens of 16,384 ids) with guidance, so with 2 B rows in each pass. The
arms take turns; all draw the same `--tokens` places in the middle of the sequence, before which the cache is filled
outside the measured time, so that the mean length of what attention reads is that of the whole sequence:

- ours: `RasterSampler` through its public call, drawing and guidance included, in inference mode as `discrete-lit
  sample` runs it, and with `--compile` as its `--compile` does;
- bare: the linear layers and attention reads alone, of the same shapes and precision (under `bf16-mixed` the logits are
  of float32, as ours), each a plain call of PyTorch;
- transformers: `LlamaForCausalLM.generate` of the same size with its static cache and as many rows, without guidance,
  all of it in bfloat16 under `bf16-mixed`;
- no cache: what a pass over the whole prefix takes at some of the same places.

The roofline is the time that the weights and the filled part of the cache take to be read once at the measured memory
bandwidth, or the products at the measured peak of a large matrix product, where that is longer.

Measured on 22 November 2026, 2 threads on 2 cores of an Intel Xeon that did nothing else, 2 or 3 rounds of 16 or 32
places, at batch 1, 8 and 32: in float32 1.44 (missed), 0.94 and 0.93 times the bare products, 1.17 (missed), 1.68 and
1.75 times as fast as transformers, 10, 34 and 61 times as fast as without a cache, 1.5, 2.3 and 3.1 times the roofline;
in bf16 1.08 (1.25 in another run), 1.16 and 1.11 times the bare products, 1.56, 1.59 and 1.99 times as fast as
transformers, 11, 26 and 50 times as fast as without a cache, 2.0, 3.2 and 3.6 times the roofline. At batch 1 the bare
products are reads of the weights at full bandwidth, and the small operations between them weigh most; compilation joins
these. With `--compile`: in float32 1.20, 0.96 and 1.10 times the bare products, 1.38, 1.52 and 1.46 times as fast as
transformers; in bf16 1.13, 1.11 and 1.02, and 1.52, 1.74 and 2.07. Freezing the weights (`torch.compile` with
`freezing`) took 50 s to compile in place of 15, and gave 1.39 and 1.12 at batch 1.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from side_by_side.machine import bandwidth, matmul_peak
from side_by_side.peers import generate, transformers_llama
from side_by_side.published_shapes import CODES, DEPTH, HEADS, HIDDEN, WIDTH, autocast, llama_shape
from side_by_side.timing import Seconds, clock, milliseconds, ratio, since
from torch import nn
from torch.nn import functional as F

from discrete_lit.backbones import Transformer
from discrete_lit.backbones.execution import compile_for_sampling
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import RasterSampler

LENGTH = 256


class Enough(Exception):
    """The last measured place is drawn."""


def between_passes(network: nn.Module, run: Callable[[], object], count: int) -> list[Seconds]:
    """What each of `count` places takes, from its pass to the next, without the first pass, which fills the cache."""
    stamps: list[Seconds] = []

    def note(*_: object) -> None:
        stamps.append(clock())
        if len(stamps) == count + 2:
            raise Enough

    handle = network.register_forward_pre_hook(note)
    try:
        run()
    except Enough:
        pass
    finally:
        handle.remove()
    return [Seconds(b.wall - a.wall, b.processor - a.processor) for a, b in pairwise(stamps[1:])]


class Case:
    """The arms at one batch size; each gives the seconds of every place."""

    def __init__(self, backbone: Transformer, llama: Any, batch: int, precision: str, first: int, count: int) -> None:
        self.llama = llama
        self.backbone, self.batch, self.rows, self.precision = backbone, batch, 2 * batch, precision
        self.first, self.count = first, count
        self.device = next(backbone.parameters()).device
        self.dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
        self.tokens = torch.randint(CODES, (batch, LENGTH), device=self.device)
        self.labels = torch.arange(batch, device=self.device)
        self._make_bare()

    def _make_bare(self) -> None:
        shapes = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * HIDDEN), (HIDDEN, WIDTH)] * DEPTH
        self.weights = [torch.randn(out, of, device=self.device, dtype=self.dtype) for of, out in shapes]
        self.weights.append(torch.randn(CODES, WIDTH, device=self.device))
        self.inputs = [
            torch.randn(self.rows, weight.shape[1], device=self.device, dtype=weight.dtype) for weight in self.weights
        ]
        shape = (DEPTH, 2, self.rows, HEADS, LENGTH, WIDTH // HEADS)
        self.cache = torch.randn(shape, device=self.device, dtype=self.dtype)
        self.query = self.cache[0, 0, :, :, :1].clone()

    def ours(self) -> list[Seconds]:
        known = self.tokens.clone()
        known[:, self.first :] = -1
        sampler, random = RasterSampler(guidance_scale=2.0), CounterRandom(0, self.labels)
        with autocast(self.device, self.precision):
            draw = partial(sampler, self.backbone, self.labels, random, known=known)
            return between_passes(self.backbone, draw, self.count)

    def bare(self) -> list[Seconds]:
        taken = []
        for place in range(self.first + 1, self.first + 1 + self.count):
            start = clock()
            for layer, rows in enumerate(zip(self.inputs, self.weights, strict=True)):
                F.linear(*rows)
                if layer % 4 == 0 and layer < 4 * DEPTH:
                    key, value = self.cache[layer // 4, :, :, :, : place + 1]
                    F.scaled_dot_product_attention(self.query, key, value)
            taken.append(since(start))
        return taken

    def transformers(self) -> list[Seconds]:
        prompt = torch.cat((self.tokens, self.tokens))[:, : self.first + 1]
        draw = partial(generate, self.llama, prompt, LENGTH - self.first)
        return between_passes(self.llama, draw, self.count)

    def no_cache(self, places: list[int]) -> dict[int, Seconds]:
        labels, tokens = torch.cat((self.labels, self.labels)), torch.cat((self.tokens, self.tokens))
        taken = {}
        with autocast(self.device, self.precision):
            for place in places:
                start = clock()
                self.backbone(tokens[:, :place], labels)
                taken[place] = since(start)
        return taken

    def roofline(self) -> float:
        """Seconds of a place in the middle."""
        length = self.first + 1 + self.count // 2
        filled = 2 * DEPTH * self.rows * WIDTH * length * self.dtype.itemsize
        read = sum(weight.numel() * weight.element_size() for weight in self.weights) + filled
        products = sum(2 * self.rows * weight.numel() for weight in self.weights[:-1]) + 4 * DEPTH * WIDTH * length
        logits = 2 * self.rows * self.weights[-1].numel()
        arithmetic = products / matmul_peak(self.device, self.dtype) + logits / matmul_peak(self.device, torch.float32)
        return max(read / bandwidth(self.device, torch.float32), arithmetic)


def measure(case: Case, rounds: int, recomputed: int) -> None:
    arms = {"ours": case.ours, "bare": case.bare, "transformers": case.transformers}
    places: dict[str, list[Seconds]] = {name: [] for name in arms}
    totals: dict[str, list[Seconds]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, run in arms.items():
            taken = run()
            if number:  # the first warms up
                places[name] += taken
                totals[name].append(Seconds(*(sum(part) for part in zip(*taken, strict=True))))
    ours = totals["ours"]
    print(f"\nbatch {case.batch} ({case.rows} rows), {case.precision}, {torch.get_num_threads()} threads, a place:")
    for name, taken in places.items():
        print(f"  {name:14s} {milliseconds(taken)}")
    print(f"  ours / bare          {ratio(ours, totals['bare'], 'at most 1.25')}")
    print(f"  transformers / ours  {ratio(totals['transformers'], ours, 'at least 1.3')}")
    if recomputed:
        step = case.count // recomputed
        full = case.no_cache([case.first + 1 + step // 2 + step * number for number in range(recomputed)])
        cached = [places["ours"][place - case.first - 1] for place in full]
        whole = sum(taken.wall for taken in full.values()) / sum(taken.wall for taken in cached)
        print(f"  no cache / ours      {whole:.1f} over {len(full)} of the same places; target at least 5")
    roof, middle = case.roofline(), median(taken.wall for taken in places["ours"])
    print(f"  roofline {1e3 * roof:.1f} ms: ours takes {middle / roof:.2f} times that")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="both if left out")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--first", type=int, default=112, help="places filled before the measured ones")
    parser.add_argument("--tokens", type=int, default=32, help="measured places")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recomputed", type=int, default=2, help="places measured without a cache; 0 for none")
    parser.add_argument("--compile", action="store_true", help="the blocks of ours")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.first < 1 or options.tokens < 2 or options.first + options.tokens + 2 > LENGTH:
        parser.error(f"--first and --tokens must leave two of the {LENGTH} places")
    torch.manual_seed(0)
    device = torch.device(options.device)
    backbone = llama_shape().eval().to(device)
    if options.compile:
        compile_for_sampling(backbone)
    for precision in [options.precision] if options.precision else ["32-true", "bf16-mixed"]:
        llama = transformers_llama(device, torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
        for batch in options.batch:
            case = Case(backbone, llama, batch, precision, options.first, options.tokens)
            measure(case, options.rounds, options.recomputed)


if __name__ == "__main__":
    main()
