"""What samplers of several tokens a pass add to the passes of the network that they need.

    OMP_NUM_THREADS=2 python benchmarks/parallel_sampling.py
    OMP_NUM_THREADS=2 python benchmarks/parallel_sampling.py --precision bf16-mixed --batch 8

MaskGIT's confidence in 8 steps and the Halton order in 32, over a bidirectional network of 12 blocks of width 768, 256
tokens of 16,384 ids; and VAR's next-scale sampling over its published 256-pixel scales (680 tokens of 4,096 ids) with a
network of VAR's kind, 12 blocks of width 768. All with guidance. The bare arm runs the network alone on inputs of the
same shapes: a forward pass for each step, over 2 B sequences, with the cache that the sampler has. Arms take turns.

Measured on 22 November 2026, 2 threads on 2 cores of an Intel Xeon that did nothing else, batch 1, 2 to 9 rounds: in
float32 MaskGIT 1.05, Halton 0.99 and next scale 0.92 times the bare passes; in bf16 MaskGIT 1.07 (quartiles 1.04 to
1.14), Halton 1.07 (1.02 to 1.15), next scale 1.04 (1.02 to 1.06).
"""

import argparse

import torch
from side_by_side.passes import bare_passes
from side_by_side.published_shapes import autocast, llama_shape, var_shape
from side_by_side.timing import alternate, milliseconds, ratio

from discrete_lit.backbones import Transformer
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import HaltonSampler, MaskGITSampler, NextScaleSampler, Sampler
from discrete_lit.tokenizers.quantizers.multi_scale import MultiScaleResidualQuantizer

PATCHES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
CASES: dict[str, Sampler] = {
    "MaskGIT 8": MaskGITSampler(steps=8, guidance_scale=3.0),
    "Halton 32": HaltonSampler(steps=32, guidance_scale=2.0),
    "next scale": NextScaleSampler(guidance_scale=2.5, top_k=900, top_p=0.96),
}


def measure(name: str, backbone: Transformer, batch: int, precision: str, rounds: int) -> None:
    device, sampler = next(backbone.parameters()).device, CASES[name]
    labels = torch.arange(batch, device=device)
    random = CounterRandom(0, labels)
    layout = backbone.layout
    quantizer = None
    if layout.input_dim is not None:
        quantizer = (
            MultiScaleResidualQuantizer(layout.vocab_size, layout.input_dim, scales=PATCHES_256).eval().to(device)
        )
    with autocast(device, precision):
        drawn = sampler(backbone, labels, random, quantizer=quantizer)
        taken = alternate(
            {
                "sampler": lambda: sampler(backbone, labels, random, quantizer=quantizer),
                "bare": bare_passes(backbone, labels, drawn.sequential_passes),
            },
            rounds,
        )
    print(f"\n{name}: batch {batch}, {precision}, {torch.get_num_threads()} threads, {drawn.sequential_passes} passes")
    for arm, times in taken.items():
        print(f"  {arm:8s} {milliseconds(times)}")
    print(f"  sampler / bare {ratio(taken['sampler'], taken['bare'], 'at most 1.1')}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="both if left out")
    parser.add_argument("--sampler", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    for name in options.sampler:
        backbone = var_shape(PATCHES_256, 12) if name == "next scale" else llama_shape("bidirectional")
        backbone = backbone.eval().to(options.device)
        for precision in [options.precision] if options.precision else ["32-true", "bf16-mixed"]:
            measure(name, backbone, options.batch, precision, options.rounds)


if __name__ == "__main__":
    main()
