"""What next-scale sampling costs at 256 and 512 pixels: time for each token, which hardly grows with the scales.

    OMP_NUM_THREADS=2 python benchmarks/next_scale_cost.py

VAR's network of depth 16 with its published scales of 256 pixels (680 tokens) and those that VAR has for 512 pixels
(2,240 tokens), random weights, guidance, one image. With the cache each token passes through the network once; without,
every scale would compute those before it again, as many times as many tokens as are printed.

Measured on 22 November 2026, 2 threads on 2 cores of an Intel Xeon while its host was busy,
bf16, 2 rounds: 3.29 times the tokens at 512 pixels take 2.6 times the processor time (2.9 times by the clock,
quartiles 1.7 to 4.2): 6.1 and 5.2 ms a token. The scales are ten in both.
"""

import argparse
from itertools import accumulate
from statistics import median

import torch
from side_by_side.published_shapes import autocast, var_shape
from side_by_side.timing import alternate, milliseconds, ratio

from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import NextScaleSampler, SamplerOutput
from discrete_lit.tokenizers.quantizers.multi_scale import MultiScaleResidualQuantizer

PATCHES = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="bf16-mixed")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, sampler = torch.device(options.device), NextScaleSampler(guidance_scale=2.5, top_k=900, top_p=0.96)
    label = torch.zeros(1, dtype=torch.int64, device=device)
    outputs: dict[str, SamplerOutput] = {}

    def arm(size: int):
        backbone = var_shape(PATCHES[size], options.depth).eval().to(device)
        quantizer = MultiScaleResidualQuantizer(4096, 32, scales=PATCHES[size]).eval().to(device)

        def run() -> None:
            with autocast(device, options.precision):
                outputs[str(size)] = sampler(backbone, label, CounterRandom(0, label), quantizer=quantizer)

        return run

    taken = alternate({str(size): arm(size) for size in PATCHES}, options.rounds)
    print(f"\ndepth {options.depth}, one image, {options.precision}, {torch.get_num_threads()} threads")
    each = {}
    for size, patches in PATCHES.items():
        times, output = taken[str(size)], outputs[str(size)]
        counts = [side * side for side in patches]
        tokens, again = sum(counts), sum(accumulate(counts)) / sum(counts)
        each[size] = median(time.wall for time in times) / tokens
        print(f"  {size} pixels {milliseconds(times)}; {tokens} tokens in {len(patches)} scales", end="; ")
        print(f"{1e3 * each[size]:.2f} ms and {output.flops / tokens / 1e9:.3f} GFLOP a token", end="; ")
        print(f"without a cache {again:.2f} times as many tokens")
    tokens = {size: sum(side * side for side in patches) for size, patches in PATCHES.items()}
    print(f"  tokens 512 / 256: {tokens[512] / tokens[256]:.3f}")
    print(f"  time   512 / 256: {ratio(taken['512'], taken['256'])}; of each token {each[512] / each[256]:.3f}")


if __name__ == "__main__":
    main()
