"""What MAR's head adds to its matrix products, and MAR's sampler to the passes of its networks.

    OMP_NUM_THREADS=2 python benchmarks/mar_sampling.py
    OMP_NUM_THREADS=2 python benchmarks/mar_sampling.py --precision bf16-mixed --images 8

The head of MAR-B, 6 blocks of width 1024 over vectors of 16 channels, draws in 100 steps of DDPM with guidance, for as
many places as a pass of the sampler has: 4, 16 and 64, each with its null. The bare arm makes the matrix products of
those steps alone, on weights and inputs of the same shapes. The sampler draws the 256 places of MAR-B's network, 12
blocks of width 768 in the encoder and in the decoder, in 64 passes; its bare arm makes the same passes of the network
and the same draws of the head, on inputs and noise that are there. A round of both takes minutes on a CPU; `--passes`
and `--steps` make fewer passes of the network, and steps of the head.

Measured on 28 November 2026, 1 thread of an AMD EPYC that had much other work, so by processor time, 3 rounds: the head
takes 1.18 times its products at 4 places, 1.21 times at 16. On 30 November, 2 threads of the same with nothing beside
them, `--rounds 2 --passes 16 --steps 25`: 1.18 times at 4, 1.16 at 16, 1.10 at 64, and the sampler takes 0.95 times its
passes.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from side_by_side.published_shapes import autocast
from side_by_side.timing import alternate, milliseconds, ratio
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones import MaskedAutoencoder, TokenDiffusionHead, VectorLayout
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.solvers import DDPM
from discrete_lit.samplers import MARSampler

CHANNELS, WIDTH, DEPTH, NETWORK, PLACES, CLASSES = 16, 1024, 6, 768, 256, 1000
GUIDANCE = 2.9


def head_of_mar(steps: int) -> TokenDiffusionHead:
    """The head of MAR-B with random weights, also where training starts at 0."""
    head = TokenDiffusionHead(CHANNELS, NETWORK, width=WIDTH, depth=DEPTH, solver=DDPM(steps))
    for parameter in head.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return head.eval()


class BareProducts:
    """The matrix products of a draw of the head: those of each step, and that of the condition, which is made once."""

    def __init__(self, head: TokenDiffusionHead, rows: int) -> None:
        self.steps = head.solver.steps
        network = head.network
        first = network.condition_projection.weight
        dtype = torch.bfloat16 if torch.is_autocast_enabled(first.device.type) else first.dtype
        blocks = [layer for block in network.blocks for layer in (block.expand, block.contract)]
        layers = [network.input_projection, *network.modulations, *blocks, network.final_modulation, network.output]
        self.weights = [layer.weight.detach().to(dtype) for layer in layers]
        self.inputs = [torch.randn(rows, weight.shape[1], device=first.device, dtype=dtype) for weight in self.weights]
        self.first = first.detach().to(dtype), torch.randn(rows, first.shape[1], device=first.device, dtype=dtype)

    def __call__(self) -> None:
        F.linear(self.first[1], self.first[0])
        for _ in range(self.steps):
            for rows, weight in zip(self.inputs, self.weights, strict=True):
                F.linear(rows, weight)


class CountedCalls:
    """Counts the evaluations of the head's network."""

    def __init__(self, head: TokenDiffusionHead) -> None:
        self.count = 0
        denoise = head.network.denoise

        def counted(*arguments: object, **settings: object) -> Tensor:
            self.count += 1
            return denoise(*arguments, **settings)  # type: ignore[arg-type]

        head.network.denoise = counted


def measure_head(head: TokenDiffusionHead, places: int, rounds: int) -> None:
    device = head.network.output.weight.device
    z = torch.randn(2 * places, NETWORK, device=device)
    random = CounterRandom(0, torch.arange(places, device=device)).ahead(head.solver.steps + 1)

    def noise(step: int) -> Tensor:
        return random.normal(Purpose.LATENT_NOISE, CHANNELS, step).float()

    draw = partial(head.sample, z, noise(0), noise=lambda step: noise(step + 1), guidance_scale=GUIDANCE)
    taken = alternate({"head": draw, "products": BareProducts(head, 2 * places)}, rounds)
    print(f"\nhead, {places} places with guidance, {head.solver.steps} steps")
    for arm, times in taken.items():
        print(f"  {arm:9s} {milliseconds(times)}")
    print(f"  head / products {ratio(taken['head'], taken['products'], 'at most 1.25')}")


class Passes:
    """The passes of both networks that a draw makes, on inputs of the same shapes that are there already."""

    def __init__(
        self, network: MaskedAutoencoder, head: TokenDiffusionHead, labels: Tensor, sampler: MARSampler
    ) -> None:
        self.network, self.head, self.labels = network, head, labels
        self.calls: list[tuple[Callable[..., Tensor], tuple[object, ...], dict[str, object]]] = []
        forward, sample = network.forward, head.sample

        def seen(kind: Callable[..., Tensor], *arguments: object, **settings: object) -> Tensor:
            if "noise" in settings:  # ready-made: the sampler draws it
                made = torch.randn_like(arguments[1])  # type: ignore[call-overload]
                self.calls.append((kind, arguments, {**settings, "noise": lambda step: made}))
            else:
                self.calls.append((kind, arguments, settings))
            return kind(*arguments, **settings)

        network.forward = partial(seen, forward)
        head.sample = partial(seen, sample)
        try:
            sampler(network, head, labels, CounterRandom(0, labels))
        finally:
            network.forward, head.sample = forward, sample

    def __call__(self) -> None:
        for kind, arguments, settings in self.calls:
            kind(*arguments, **settings)


def measure_sampler(head: TokenDiffusionHead, images: int, passes: int, rounds: int) -> None:
    device = head.network.output.weight.device
    network = MaskedAutoencoder(
        VectorLayout(dim=CHANNELS, grid=(PLACES,), num_classes=CLASSES), width=NETWORK, depth=12, heads=12, buffer=64
    )
    network = network.eval().to(device)
    labels = torch.arange(images, device=device)
    sampler = MARSampler(passes, guidance_scale=GUIDANCE)
    bare = Passes(network, head, labels, sampler)
    calls = CountedCalls(head)
    sampler(network, head, Condition(labels=labels), CounterRandom(0, labels))
    heads = sum(kind.__name__ == "sample" for kind, *_ in bare.calls)
    each_step = calls.count / heads / head.solver.steps  # of this draw: those that are timed count too
    taken = alternate(
        {"sampler": lambda: sampler(network, head, labels, CounterRandom(0, labels)), "passes": bare}, rounds, warmup=0
    )
    print(f"\nMAR-B, {images} images, {passes} passes, {head.solver.steps} steps of the head in each")
    print(f"  calls of the head's network in a step with guidance: {each_step:g}; target 1")
    for arm, times in taken.items():
        print(f"  {arm:9s} {milliseconds(times)}")
    print(f"  sampler / passes {ratio(taken['sampler'], taken['passes'], 'at most 1.1')}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument(
        "--places", type=int, nargs="*", default=[4, 16, 64], help="of a pass; none leaves the head out"
    )
    parser.add_argument("--images", type=int, default=1, help="of the sampler; 0 leaves it out")
    parser.add_argument("--passes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="of the head")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    head = head_of_mar(options.steps).to(device)
    print(f"{options.precision}, {torch.get_num_threads()} threads, {device}, {options.rounds} rounds")
    with autocast(device, options.precision):
        for places in options.places:
            measure_head(head, places, options.rounds)
        if options.images:
            measure_sampler(head, options.images, options.passes, options.rounds)


if __name__ == "__main__":
    main()
