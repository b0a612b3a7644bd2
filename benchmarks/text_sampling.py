"""What it costs to draw what a text says, beside what a class says.

    OMP_NUM_THREADS=2 python benchmarks/text_sampling.py
    OMP_NUM_THREADS=2 python benchmarks/text_sampling.py --words 77 --batch 8 --precision bf16-mixed

Networks of 12 blocks of width 768 that attend to the vectors of a text (width 768) in each block, beside the same ones
that read a class: token by token over 256 tokens, with a cache; MaskGIT in 8 steps over 256 tokens; DiT-B/2 in 4 steps
of Euler over latents of 4 x 32 x 32, by attention, and with the text in front of the patches. All with guidance; the
text's vectors are there, as those of a frozen encoder that was run once. Attention to a text is two matrix products
more for each token beside the six of its block's attention and MLP, so that the time that the same operations take is
the floor: the ratio of the operations of both is printed beside that of their times. Arms take turns.
"""

import argparse
from collections.abc import Callable

import torch
from side_by_side.published_shapes import CLASSES, WIDTH, autocast, dit_shape, llama_shape
from side_by_side.timing import alternate, milliseconds, ratio
from torch import Tensor

from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.solvers import Euler
from discrete_lit.samplers import GuidedSolver, MaskGITSampler, RasterSampler
from discrete_lit.samplers.sampler import SamplerOutput

CASES = ("token by token", "MaskGIT 8", "DiT, attention", "DiT, in front")
Draw = Callable[[], SamplerOutput]


def tokens(name: str, context: Condition | None, random: CounterRandom, labels: Tensor, *, words: bool) -> Draw:
    """A draw of 256 tokens."""
    causal = name == "token by token"
    backbone = llama_shape("causal" if causal else "bidirectional", context_dim=WIDTH if words else None)
    backbone = backbone.eval().to(labels.device)
    sampler = RasterSampler(guidance_scale=2.0) if causal else MaskGITSampler(steps=8, guidance_scale=3.0)
    given = context if words and context is not None else labels
    return lambda: sampler(backbone, given, random)


def latents(name: str, context: Condition, random: CounterRandom, labels: Tensor, *, words: bool) -> Draw:
    """A draw of latents in four steps."""
    settings = {"context_dim": WIDTH, "context_input": "cross" if name.endswith("attention") else "prefix"}
    network = dit_shape(num_classes=CLASSES, **(settings if words else {}))
    network = network.eval().to(labels.device)
    sampler = GuidedSolver(Euler(4), guidance_scale=2.0)
    valid, vectors = context.valid(), context.context
    assert vectors is not None
    given = {"text": vectors, "text_mask": valid} if words else {}
    null = {"text": vectors, "text_mask": torch.zeros_like(valid)} if words else {}
    denoiser = GaussianDenoiser(RectifiedPath(), prediction="velocity")
    return lambda: sampler(
        network, labels, random, denoiser=denoiser, network_time=lambda t: 1000 * t, given=given, null=null
    )


def measure(name: str, *, batch: int, words: int, precision: str, device: torch.device, rounds: int) -> None:
    labels = torch.arange(batch, device=device)
    random = CounterRandom(0, labels)
    vectors = torch.randn(batch, words, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(batch, words, dtype=torch.bool, device=device)
    context = Condition(labels=labels, context=vectors, context_mask=mask)
    make = latents if name.startswith("DiT") else tokens
    arms = {arm: make(name, context, random, labels, words=arm == "text") for arm in ("text", "class")}
    with autocast(device, precision):
        operations = {arm: draw().flops for arm, draw in arms.items()}
        taken = alternate(arms, rounds)
    floor = operations["text"] / operations["class"]
    print(f"\n{name}: batch {batch}, {words} words, {precision}, {torch.get_num_threads()} threads, {device}")
    for arm, times in taken.items():
        print(f"  {arm:6s} {milliseconds(times)}, {operations[arm] / 1e9:,.1f} GFLOPs/image")
    target = f"at most {1.05 * floor:.3f}, 1.05 times the ratio of the operations, {floor:.3f}"
    print(f"  text / class {ratio(taken['text'], taken['class'], target)}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="both if left out")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--words", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    for name in options.case:
        for precision in [options.precision] if options.precision else ["32-true", "bf16-mixed"]:
            measure(
                name,
                batch=options.batch,
                words=options.words,
                precision=precision,
                device=torch.device(options.device),
                rounds=options.rounds,
            )


if __name__ == "__main__":
    main()
