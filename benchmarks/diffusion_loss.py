"""What the losses of discrete diffusion cost beside the network's own forward and backward pass, and their peak memory.

    python benchmarks/diffusion_loss.py
    python benchmarks/diffusion_loss.py --vocab_size 16384 --rounds 5

The network is SEDD's shape: 24 blocks of width 768, 12 heads, a condition of 128, here with one sequence of 256 tokens.
One arm runs it forward, and backward from a given gradient of its logits. The other arms are all that a training step
adds to it: the level of noise, the noisy tokens, the loss of given logits and the gradient of the logits. Memory is
measured in processes of their own with 8 sequences, in tensors of the size of the logits, the logits themselves not
counted; for the loss of a chain of T steps also with a thousand times as many steps.

Measured on 22 November 2026, 2 threads on 2 cores of an Intel Xeon that did nothing else: at most 0.2% of the network's
passes at K = 1,024 and 1.7% at K = 16,384; 1.99 to 2.43 tensors, 2.25 with T = 1,000 and 2.37 with T = 1,000,000.
"""

import argparse
from collections.abc import Callable

import torch
from side_by_side.memory import in_own_process, peak_of
from side_by_side.published_shapes import sedd_shape
from side_by_side.timing import alternate, milliseconds, ratio
from torch import Tensor

from discrete_lit.diffusion import (
    AbsorbingProcess,
    ForwardProcess,
    Head,
    LeaveOneOutHead,
    LogLinearSchedule,
    PosteriorHead,
    ScoreHead,
    UniformProcess,
)
from discrete_lit.diffusion.losses import (
    ContinuousBound,
    DiffusionLoss,
    DiscreteFlowMatching,
    DiscreteTimeBound,
    MaskedCrossEntropy,
    ScoreEntropy,
)

LENGTH, TARGETS, MEMORY_TARGET, MEMORY_BATCH = 256, {1024: 0.10, 16_384: 0.20}, 3, 8
CASES: dict[str, tuple[DiffusionLoss, Head, Callable[[int], ForwardProcess]]] = {
    "masked cross-entropy": (MaskedCrossEntropy(), LeaveOneOutHead(), AbsorbingProcess),
    "score entropy, masks": (ScoreEntropy(), ScoreHead(), AbsorbingProcess),
    "score entropy, uniform": (ScoreEntropy(), ScoreHead(scale_by_noise=False, mask_output=False), UniformProcess),
    "continuous bound, uniform": (ContinuousBound(), LeaveOneOutHead(), UniformProcess),
    "bound of 1,000 steps, uniform": (DiscreteTimeBound(1000), LeaveOneOutHead(), UniformProcess),
    "flow matching, uniform": (DiscreteFlowMatching(), PosteriorHead(), UniformProcess),
}
MANY_STEPS = (DiscreteTimeBound(1_000_000), LeaveOneOutHead(), UniformProcess)


class LossStep:
    """What a step adds to the network, on logits of `batch` sequences."""

    def __init__(
        self, case: tuple[DiffusionLoss, Head, Callable[[int], ForwardProcess]], vocab_size: int, batch: int
    ) -> None:
        self.loss, self.head, process = case
        self.process = process(vocab_size)
        outputs = vocab_size + int(self.head.mask_output)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.logits = torch.randn(batch, LENGTH, outputs, device=device, requires_grad=True)
        self.tokens = torch.randint(vocab_size, (batch, LENGTH), device=device)
        # Half of the tokens are noise, whatever the batch.
        self.times = torch.full((batch, 1), 0.5, dtype=torch.float64, device=device)
        self.uniforms = torch.rand(batch, LENGTH, dtype=torch.float64, device=device)

    def __call__(self) -> None:
        level = self.loss.level(LogLinearSchedule(), self.times, LENGTH)
        states = self.loss.corrupt(self.process, self.tokens, level, self.uniforms)
        values = self.loss(self.logits, self.tokens, head=self.head, states=states, process=self.process, level=level)
        torch.autograd.grad(values.mean(), self.logits)


def network_step(vocab_size: int) -> Callable[[], None]:
    """The network's own passes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = sedd_shape(vocab_size).to(device)
    tokens: Tensor = torch.randint(vocab_size, (1, LENGTH), device=device)
    labels, time = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, device=device)
    upstream = torch.randn(1, LENGTH, vocab_size, device=device)

    def run() -> None:
        network(tokens, labels, time=time).backward(upstream)
        network.zero_grad()

    return run


def peak_tensors(name: str, vocab_size: int) -> int:
    """Bytes held at most during the step of a loss above what was held before it."""
    case = MANY_STEPS if name == "many" else CASES[name]
    LossStep(case, 16, 1)()  # the libraries' own buffers
    return peak_of(LossStep(case, vocab_size, MEMORY_BATCH))


def measure(vocab_size: int, rounds: int) -> None:
    arms: dict[str, Callable[[], object]] = {"network": network_step(vocab_size)}
    arms |= {name: LossStep(case, vocab_size, 1) for name, case in CASES.items()}
    taken = alternate(arms, rounds)
    print(f"\nK {vocab_size}, {LENGTH} tokens, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"  {'network':30s} {milliseconds(taken['network'])}")
    for name in CASES:
        wanted = f"at most {TARGETS[vocab_size]}"
        print(f"  {name:30s} {milliseconds(taken[name])}; / network {ratio(taken[name], taken['network'], wanted)}")


def measure_memory(vocab_size: int) -> None:
    print(f"\nMemory at K {vocab_size} in tensors of the logits' size (target at most {MEMORY_TARGET})")
    size = 4 * MEMORY_BATCH * LENGTH * vocab_size
    for name in (*CASES, "many"):
        memory = in_own_process(peak_tensors, name, vocab_size) / size
        print(f"  {'bound of 1,000,000 steps' if name == 'many' else name:30s} {memory:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, choices=sorted(TARGETS), help="K; both if left out")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    for vocab_size in [options.vocab_size] if options.vocab_size else TARGETS:
        measure(vocab_size, options.rounds)
    measure_memory(max(TARGETS))


if __name__ == "__main__":
    main()
