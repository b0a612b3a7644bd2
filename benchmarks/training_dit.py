"""A training step of DiT-B/2: ours, and that of `diffusers`' DiTTransformer2DModel of the same shape.

    OMP_NUM_THREADS=2 python benchmarks/training_dit.py
    OMP_NUM_THREADS=2 python benchmarks/training_dit.py --precision bf16-mixed --batch 16

12 modulated blocks of width 768 over the 256 patches of latents of 4 x 32 x 32, 1,000 classes and the null one, whose
dropout is drawn outside. A step is the forward pass, the squared error of the noise, the backward pass and AdamW. The
arms take turns, and their ratio by processor time is the one that other programs disturb least. Each block of
`diffusers` has an embedding of time and class of its own, as that model is made; `--shared` lets all use the first's,
as DiT's authors do, so that both networks have the same weights.

The peak memory of a step is what torch's allocator gave at most, counted allocation by allocation, beside the weights
and the optimizer's state. Beside it stand the bytes that autograd keeps for the backward pass, once for each storage.

Measured on 30 November 2026, 2 threads on 2 cores of an AMD EPYC with avx512_bf16 that did nothing else, `--rounds 6
--precision 32-true`: 1.07 times as fast (quartiles 1.05 to 1.08; on other days 1.08), with 751 MB at most in the
place of 1,254. With `--rounds 5 --precision bf16-mixed`, twice: 1.00 and 1.02 times, with 750 MB at most in the place
of 1,138, of which autograd keeps 740 in the place of 625: here norms, and attention that is trained, are in float32.
"""

import argparse
from statistics import median

import torch
from side_by_side.memory import allocated_peak, saved_bytes
from side_by_side.peers import diffusers_dit
from side_by_side.published_shapes import autocast, dit_shape
from side_by_side.timing import alternate, milliseconds, ratio
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones import DiT

CHANNELS, SIDE = 4, 32


class TrainingStep:
    """Makes a step with a network: forward pass, loss, backward pass, AdamW."""

    def __init__(self, arm: str, batch: int, precision: str, device: torch.device, *, shared: bool) -> None:
        torch.manual_seed(0)
        self.network = (dit_shape() if arm == "ours" else diffusers_dit(shared=shared)).train().to(device)
        with torch.no_grad():  # where training starts at 0, gradients would be 0 too
            for parameter in self.network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)
        self.precision = precision
        self.x, self.noise = torch.randn(2, batch, CHANNELS, SIDE, SIDE, device=device).unbind()
        self.times = torch.randint(1000, (batch,), device=device)
        self.labels = torch.arange(batch, device=device)

    def loss(self) -> Tensor:
        with autocast(self.x.device, self.precision):
            if isinstance(self.network, DiT):
                output = self.network(self.x, self.times.float(), self.labels)
            else:
                output = self.network(self.x, timestep=self.times, class_labels=self.labels).sample
        return F.mse_loss(output.float(), self.noise)

    def __call__(self) -> float:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def measure(options: argparse.Namespace, precision: str) -> None:
    device, batch, shared = torch.device(options.device), options.batch, options.shared
    arms = {arm: TrainingStep(arm, batch, precision, device, shared=shared) for arm in ("ours", "diffusers")}
    taken = alternate(arms, options.rounds)
    print(f"\nbatch {batch}, {precision}, {torch.get_num_threads()} threads, {device}, {options.rounds} rounds")
    for arm, step in arms.items():
        speed = batch / median(time.wall for time in taken[arm])
        kept = saved_bytes(step.loss, step.network)
        step.optimizer.zero_grad()
        peak = allocated_peak(step)
        count = sum(parameter.numel() for parameter in step.network.parameters())
        print(
            f"  {arm:10s} {milliseconds(taken[arm])}, {speed:6.2f} images/s, {count:,} parameters, "
            f"{kept / 2**20:.1f} MB kept for the backward pass, {peak / 2**20:.1f} MB at most"
        )
    print(f"  diffusers / ours {ratio(taken['diffusers'], taken['ours'], 'at least 1.1')}; memory no higher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="both if left out")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shared", action="store_true", help="one embedding of time and class for all of their blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for precision in [options.precision] if options.precision else ["32-true", "bf16-mixed"]:
        measure(options, precision)


if __name__ == "__main__":
    main()
