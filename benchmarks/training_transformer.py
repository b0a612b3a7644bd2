"""A training step of the transformer: ours, and `x-transformers`' of the same shape.

    OMP_NUM_THREADS=2 python benchmarks/training_transformer.py
    OMP_NUM_THREADS=2 python benchmarks/training_transformer.py --precision bf16-mixed --batch 16

LlamaGen-B's shape: 12 causal blocks of width 768 with SwiGLU, RMSNorm and rotary positions, 256 tokens of 16,384 ids.
A step is the forward pass, the cross-entropy, the backward pass and AdamW. The arms take turns. The share of the peak
is that of the network's products (three times the forward pass's, and no more where something is computed again) at
the measured speed of a large matrix product in the same precision. Then the peak memory of a step is measured, above
the weights: the median of three processes for each arm.

Measured on 22 November 2026, 2 threads on 2 cores of an Intel Xeon that did nothing else, 4 rounds: in float32 at batch
4 1.10 times the tokens/s of x-transformers, 85% of the peak, 1,375 against 2,313 MB; in bf16 at batch 8 1.27 times, 54%
of the peak, 1,794 against 2,364 MB, and at batch 16 1.24 times, 51%, 3,298 against 4,609 MB. The peak itself was
measured as 183, 557 and 619 GFLOP/s. The head multiplies in float32, its gradients in bf16. `F.rms_norm` in place of
our own gradients: 1.07 times in float32, 1.19 and 1.15 in bf16.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from side_by_side.machine import matmul_peak
from side_by_side.memory import in_own_process, peak_of
from side_by_side.peers import x_transformer
from side_by_side.published_shapes import CODES, autocast, llama_shape
from side_by_side.timing import alternate, milliseconds, ratio
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH = 256
ARMS = ("ours", "x-transformers")


def training_step(arm: str, batch: int, precision: str, device: torch.device) -> tuple[nn.Module, Callable[[], float]]:
    """The network, and what makes a step with it and gives the loss."""
    torch.manual_seed(0)
    network = (llama_shape() if arm == "ours" else x_transformer()).train().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(CODES, (batch, LENGTH), device=device)
    labels = torch.arange(batch, device=device)

    def logits() -> Tensor:
        # Ours reads the class and all tokens but the last; theirs as many places.
        return network(tokens[:, :-1], labels) if arm == "ours" else network(tokens)

    def step() -> float:
        with autocast(device, precision):
            loss = F.cross_entropy(logits().flatten(0, 1).float(), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return network, step


def step_memory(arm: str, batch: int, precision: str, device: str) -> int:
    """Bytes held at most during a step above what was held before it."""
    return peak_of(training_step(arm, batch, precision, torch.device(device))[1])


def measure(batch: int, precision: str, device: torch.device, rounds: int) -> None:
    made = {arm: training_step(arm, batch, precision, device) for arm in ARMS}
    taken = alternate({arm: step for arm, (_, step) in made.items()}, rounds)
    print(f"\nbatch {batch}, {precision}, {torch.get_num_threads()} threads")
    for arm, times in taken.items():
        speed = batch * LENGTH / median(time.wall for time in times)
        parameters = sum(parameter.numel() for parameter in made[arm][0].parameters())
        # What the allocator keeps differs between processes.
        peaks = [in_own_process(step_memory, arm, batch, precision, str(device)) for _ in range(3)]
        memory = median(peaks) / 2**20
        print(f"  {arm:15s} {milliseconds(times)}, {speed:7.0f} tokens/s, {parameters:,} parameters, {memory:.0f} MB")
    print(f"  x-transformers / ours {ratio(taken['x-transformers'], taken['ours'], 'at least 1.1')}")
    flops = 3 * made["ours"][0].flops(batch, LENGTH - 1)  # type: ignore[operator]
    peak = matmul_peak(device, torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    share = flops / median(time.wall for time in taken["ours"]) / peak
    print(f"  ours: {share:.1%} of {peak / 1e9:.0f} GFLOP/s; target at least 50%; memory no higher than theirs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="both if left out")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for precision in [options.precision] if options.precision else ["32-true", "bf16-mixed"]:
        measure(options.batch, precision, torch.device(options.device), options.rounds)


if __name__ == "__main__":
    main()
