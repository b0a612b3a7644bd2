"""What a step of the diffusion samplers costs beside its network call.

    OMP_NUM_THREADS=2 python benchmarks/diffusion_samplers.py
    OMP_NUM_THREADS=2 python benchmarks/diffusion_samplers.py --vocab_size 16384 --batch 1

The network is SEDD's shape: 24 blocks of width 768, 12 heads, a condition of 128, with sequences of 256 tokens. One arm
runs it forward. The other arms draw with a stand-in that gives random logits at no cost, so that what is left is all
that a sampler does: levels, random numbers, heads, jumps, draws; by the pass, steps that need none included.

Measured on 22 November 2026, 2 threads on 2 cores of an Intel Xeon that did nothing else, K = 1,024, batch 4: 0.1% to
0.5% of the network call, 1.2% to 2.2% for the score, rate and forward-backward steps of the uniform process.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from side_by_side.published_shapes import sedd_shape
from side_by_side.timing import Seconds, alternate, milliseconds, ratio
from torch import Tensor

from discrete_lit.backbones import SequenceLayout
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import (
    AbsorbingProcess,
    ForwardProcess,
    Head,
    HybridProcess,
    LeaveOneOutHead,
    LogLinearSchedule,
    ScoreHead,
    UniformProcess,
)
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.samplers import (
    AncestralSampler,
    EulerSampler,
    FirstHittingSampler,
    PredictorCorrectorSampler,
    RemaskingSampler,
    Sampler,
    TauLeapingSampler,
)

LENGTH, TARGET, STEPS = 256, 0.05, 8
MASKS, UNIFORM, HYBRID = AbsorbingProcess, UniformProcess, HybridProcess
CASES: dict[str, tuple[Sampler, Callable[[int], ForwardProcess], Head]] = {
    "ancestral, masks": (AncestralSampler(steps=STEPS), MASKS, LeaveOneOutHead()),
    "ancestral, masks, top-p 0.9": (AncestralSampler(steps=STEPS, top_p=0.9), MASKS, LeaveOneOutHead()),
    "ancestral, masks, scores": (AncestralSampler(steps=STEPS, guidance_law="score"), MASKS, ScoreHead()),
    "ancestral, uniform": (AncestralSampler(steps=STEPS), UNIFORM, LeaveOneOutHead()),
    "ancestral, hybrid": (AncestralSampler(steps=STEPS), HYBRID, LeaveOneOutHead()),
    "analytic, uniform": (
        AncestralSampler(steps=STEPS, guidance_law="score"),
        UNIFORM,
        ScoreHead(scale_by_noise=False, mask_output=False),
    ),
    "Euler, masks": (EulerSampler(steps=STEPS), MASKS, LeaveOneOutHead()),
    "Euler, uniform": (
        EulerSampler(steps=STEPS, guidance_law="score"),
        UNIFORM,
        ScoreHead(scale_by_noise=False, mask_output=False),
    ),
    "tau-leaping, uniform": (TauLeapingSampler(steps=STEPS), UNIFORM, LeaveOneOutHead()),
    "first-hitting, masks": (FirstHittingSampler(), MASKS, LeaveOneOutHead()),
    "remasking, masks": (RemaskingSampler(steps=STEPS), MASKS, LeaveOneOutHead()),
    "Gibbs, uniform": (PredictorCorrectorSampler("gibbs", steps=STEPS), UNIFORM, LeaveOneOutHead()),
    "forward-backward, uniform": (PredictorCorrectorSampler(steps=STEPS), UNIFORM, LeaveOneOutHead()),
}


class RecordedNetwork(torch.nn.Module):
    """Gives the same logits at every pass."""

    grid_vocab = None

    def __init__(self, layout: SequenceLayout, batch: int, device: torch.device) -> None:
        super().__init__()
        self.layout = layout
        self.logits = torch.randn(batch, LENGTH, layout.outputs, device=device)

    def forward(self, *_: Any) -> Tensor:
        return self.logits

    def new_cache(self, labels: Tensor) -> None:
        return None

    def flops(self, *_: Any) -> int:
        return 0

    cache_flops = flops


def network_pass(vocab_size: int, batch: int, device: torch.device) -> Callable[[], object]:
    network = sedd_shape(vocab_size).to(device)
    tokens = torch.randint(vocab_size, (batch, LENGTH), device=device)
    labels, time = torch.zeros(batch, dtype=torch.int64, device=device), torch.ones(batch, device=device)
    return lambda: network(tokens, labels, time=time)


class Draw:
    """A draw of a sampler; it notes its passes."""

    def __init__(self, name: str, vocab_size: int, batch: int, device: torch.device) -> None:
        self.sampler, make, head = CASES[name]
        process = make(vocab_size)
        layout = SequenceLayout(
            vocab_size,
            (16, 16),
            num_classes=1000,
            attention="bidirectional",
            mask_token=process.masks,
            timed=True,
            mask_output=head.mask_output,
        )
        self.network = RecordedNetwork(layout, batch, device)
        self.denoiser = Denoiser(process=process, schedule=LogLinearSchedule(), head=head, time_input="total_noise")
        self.labels = torch.zeros(batch, dtype=torch.int64, device=device)
        self.random = CounterRandom(0, torch.arange(batch, device=device))
        self.passes = 1

    def __call__(self) -> None:
        output = self.sampler(self.network, self.labels, self.random, denoiser=self.denoiser)  # type: ignore[arg-type]
        self.passes = output.sequential_passes


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=1024, help="K")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, batch = options.vocab_size, options.batch
    draws = {name: Draw(name, size, batch, device) for name in CASES}
    taken = alternate({"network": network_pass(size, batch, device), **draws}, options.rounds)
    threads = torch.get_num_threads()
    print(f"K {size}, {batch} sequences of {LENGTH} tokens, {threads} threads, {device}, {options.rounds} rounds")
    print(f"  {'network':28s} {milliseconds(taken['network'])}")
    for name, draw in draws.items():
        steps = [Seconds(whole.wall / draw.passes, whole.processor / draw.passes) for whole in taken[name]]
        wanted = f"at most {TARGET}" if size == 1024 else ""
        print(f"  {name:28s} {milliseconds(steps)} a pass; / network {ratio(steps, taken['network'], wanted)}")


if __name__ == "__main__":
    main()
