"""FSQ and LFQ in training, forward and backward, against vector-quantize-pytorch.

    python benchmarks/lattice_quantizers.py
    python benchmarks/lattice_quantizers.py --rounds 60 --threads 1

Both arms get the same latents and the same gradient of the codes, and compute codes, ids and, for LFQ, the commitment
and both entropy terms with their gradient. The arms alternate every pass, so that they meet the same state of the
machine; the processor time of this process stands beside the wall clock. Before anything is timed, their codes and ids
must be equal, their losses and gradients equal to rounding.

The package holds the probability of every code for every vector: 64 vectors at 2^18 take 64 MB for each of its tensors,
8,192 would take 8 GB, so the last line is our time alone. Its logarithm stops at a probability of 1e-5; for the
comparison of values, and for it alone, that floor is lowered.

Measured on 22 November 2026 with torch 2.14.1 and vector-quantize-pytorch 1.32.0, 2 threads on 2 cores of an Intel Xeon
that did nothing else, wall clock of 40 passes: FSQ 1.75 and 2.06 times as fast at 2^16 (8,192 and 65,536 vectors), 1.77
and 1.91 times at 2^18; LFQ 111 times as fast at 2^16 and 92 times at 2^18; 253 ms for 8,192 vectors at 2^18.
"""

import argparse
from collections.abc import Callable
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, lookup_free_quantization

from discrete_lit.tokenizers.quantizers import FiniteScalarQuantizer, LookupFreeQuantizer, Quantizer

TARGET = 1.5


class Case(NamedTuple):
    """What is timed: both quantizers, and how many vectors."""

    name: str
    ours: Quantizer
    theirs: nn.Module
    vectors: int


def cases() -> list[Case]:
    made = []
    for size, levels in (("2^16 (64,000)", [8, 8, 8, 5, 5, 5]), ("2^18", [8] * 6)):
        for vectors in (8192, 65536):
            made.append(Case(f"FSQ {size}", FiniteScalarQuantizer(levels, formula="atanh"), FSQ(levels), vectors))
    for bits, vectors in ((16, 256), (18, 64)):
        ours = LookupFreeQuantizer(bits, bit_order="first_most_significant")
        theirs = LFQ(dim=bits, entropy_loss_weight=0.1, commitment_loss_weight=0.25)
        made.append(Case(f"LFQ 2^{bits}", ours, theirs, vectors))
    return [case._replace(ours=case.ours.train(), theirs=case.theirs.train()) for case in made]


def training_pass(quantizer: nn.Module, latents: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, ids, the sum of the quantizer's losses, and the gradient of the latents."""
    latents = latents.detach().requires_grad_()
    made: Any = quantizer(latents)
    if isinstance(quantizer, Quantizer):
        codes, ids, losses = made.z_q, made.tokens, list(made.losses.values())
    else:
        codes, ids, *losses = made
    loss = torch.stack(losses).sum() if losses else codes.new_zeros(())
    (gradient,) = torch.autograd.grad(loss + (codes * weights).sum(), latents)
    return codes, ids, loss, gradient


def check(case: Case, latents: Tensor, weights: Tensor) -> None:
    published = lookup_free_quantization.log
    lookup_free_quantization.log = lambda value, eps=1e-38: value.clamp(min=eps).log()
    try:
        ours, theirs = (training_pass(arm, latents, weights) for arm in (case.ours, case.theirs))
    finally:
        lookup_free_quantization.log = published
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)
    assert torch.equal(ours[1], theirs[1].long()), case.name
    torch.testing.assert_close(ours[2:], theirs[2:], rtol=1e-4, atol=1e-4)


def clocks(run: Callable[[], Any]) -> tuple[float, float]:
    start = perf_counter(), process_time()
    run()
    return perf_counter() - start[0], process_time() - start[1]


def measure(case: Case, rounds: int) -> None:
    latents = torch.randn(1, case.vectors, case.ours.dim)
    weights = torch.randn_like(latents)
    check(case, latents, weights)
    seconds: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for number in range(rounds + 2):
        theirs = clocks(lambda: training_pass(case.theirs, latents, weights))
        ours = clocks(lambda: training_pass(case.ours, latents, weights))
        if number >= 2:
            seconds.append((theirs, ours))
    for place, clock in enumerate(("wall clock", "processor time")):
        low, middle, high = quantiles([theirs[place] / ours[place] for theirs, ours in seconds], n=4)
        print(
            f"{case.name:18s} {case.vectors:6d} vectors, {clock:14s}: "
            f"theirs {1e3 * median(theirs[place] for theirs, _ in seconds):8.2f} ms, "
            f"ours {1e3 * median(ours[place] for _, ours in seconds):8.2f} ms; "
            f"{middle:.2f} times as fast (quartiles {low:.2f} to {high:.2f}; target {TARGET})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="passes of each arm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.rounds < 4:
        parser.error("--rounds must be at least 4")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.rounds} passes")
    for case in cases():
        measure(case, options.rounds if case.name.startswith("FSQ") else max(4, options.rounds // 8))
    alone = LookupFreeQuantizer(18).train()
    latents, weights = torch.randn(1, 8192, 18), torch.randn(1, 8192, 18)
    times = [clocks(lambda: training_pass(alone, latents, weights))[0] for _ in range(7)][2:]
    print(f"LFQ 2^18             8192 vectors, ours alone: {1e3 * median(times):.0f} ms wall clock")


if __name__ == "__main__":
    main()
