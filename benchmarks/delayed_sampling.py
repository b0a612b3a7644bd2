"""A step of MusicGen's delay pattern, drawing and guidance included, against the passes of its network alone.

    OMP_NUM_THREADS=1 python benchmarks/delayed_sampling.py
    OMP_NUM_THREADS=1 python benchmarks/delayed_sampling.py --precision bf16-mixed --batch 8

Four books of 2,048 codes, 12 blocks of width 768 (half of MusicGen-small's 24 of 1,024), 47 frames in 50 passes, with
guidance, so 2 B rows in each. The bare arm makes the same passes of the same network with its cache, on codes that are
there, and takes nothing from their logits. Both include the making of the cache.

Measured on 29 November 2026, 1 thread on 2 cores of an AMD EPYC with avx512_bf16 that did nothing else, `--rounds 3`:
1.05 times the passes in float32, and 0.61 times in bf16-mixed, where a sampler brings the weights to bfloat16 once, and
passes by themselves each time.
"""

import argparse
from collections.abc import Callable

import torch
from side_by_side.published_shapes import autocast
from side_by_side.timing import alternate, milliseconds, ratio

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import DelaySampler

BOOKS, CODES, FRAMES = 4, 2048, 47


def network() -> Transformer:
    """The backbone of a `DelayedAutoregressive` of this shape, at random weights."""
    torch.manual_seed(0)
    delays = tuple(range(BOOKS))
    layout = SequenceLayout(
        CODES,
        (FRAMES + BOOKS - 1,),
        num_classes=10,
        attention="causal",
        mask_token=True,
        sub_tokens=BOOKS,
        delays=delays,
    )
    return Transformer(layout, width=768, depth=12, heads=12, positions="sinusoidal", conditioning="added").eval()


def arms(backbone: Transformer, batch: int, top_k: int) -> dict[str, Callable[[], object]]:
    """The sampler's call, and the passes that it makes."""
    labels = torch.arange(batch)
    sampler, random = DelaySampler(guidance_scale=3.0, top_k=top_k), CounterRandom(0, labels)
    layout = backbone.layout
    drawn = torch.randint(CODES, (2 * batch, layout.positions * BOOKS))
    condition = Condition(labels=labels).with_null(null_label=layout.null_label, null_id=backbone.grid_vocab)

    def bare() -> None:
        cache = backbone.new_cache(condition)
        backbone(drawn[:, :0], condition, cache, None)
        for position in range(1, layout.positions):
            backbone(drawn[:, (position - 1) * BOOKS : position * BOOKS], condition, cache, None)

    return {"sampler": lambda: sampler(backbone, labels, random), "passes": bare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="both if left out")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--top_k", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    backbone = network()
    for precision in [options.precision] if options.precision else ["32-true", "bf16-mixed"]:
        with torch.inference_mode(), autocast(torch.device("cpu"), precision):
            taken = alternate(arms(backbone, options.batch, options.top_k), options.rounds)
        steps = backbone.layout.positions
        print(f"\nbatch {options.batch}, {precision}, {torch.get_num_threads()} threads, {steps} passes")
        for arm, times in taken.items():
            print(f"  {arm:8s} {milliseconds(times)}")
        print(f"  sampler / passes {ratio(taken['sampler'], taken['passes'], 'at most 1.1')}")


if __name__ == "__main__":
    main()
