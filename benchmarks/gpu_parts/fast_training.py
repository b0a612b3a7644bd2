"""How fast transformers train, as a share of the matrix rate, beside x-transformers' time and memory.

A step is the generator's loss in bfloat16 autocast, the backward pass, and the recipe's AdamW. Its operations are three
times those of the forward pass's products; what is computed again, or with more products for precision, adds none.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from side_by_side.floors import ADAM_BYTES, Work, training_flops
from side_by_side.memory import peak_of
from side_by_side.peers import x_transformer
from side_by_side.published_shapes import LlamaSizes, autocast, sizes_of
from side_by_side.recipes import make_generator
from side_by_side.timing import repeated, timed
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import Generator
from gpu_parts.part import Measurement, Peer, Setting, part
from gpu_parts.speed import against, compile_backbone, measurement, uncompile

PRECISION = torch.bfloat16
PEER = "x-transformers"
# Name: recipe, changes of its backbone, sequences. The first and the last are LlamaGen's kind, which x-transformers has
# too, without dropout, as it has none; of its own the recipe has 12 blocks of the first.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "24 x 768": ("llamagen_b_imagenet256", {"dropout": 0.0, "depth": 24}, 64),
    "VAR-d16": ("var_d16_imagenet256", {}, 32),
    "24 x 1024": ("llamagen_b_imagenet256", {"dropout": 0.0, "depth": 24, "width": 1024, "heads": 16}, 64),
}


@part("training", kind="fast", seconds=77, what="training steps of transformers: tokens a second, MFU, memory")
def training(setting: Setting) -> Iterator[Measurement]:
    for name, (recipe, changes, batch) in CASES.items():
        changes = {"dropout": 0.0} if setting.tiny else changes
        generator = make_generator(recipe, device=setting.device, tiny=setting.tiny, backbone=changes)
        yield from training_steps(setting, name, generator, 2 if setting.tiny else batch)
        del generator


class Steps:
    """Training steps on the same random tokens.

    Args:
        optimizer: of what is trained.
        loss: computes the loss; called in autocast.
        device: of all of it.
    """

    def __init__(self, optimizer: Optimizer, loss: Callable[[], Tensor], device: torch.device) -> None:
        self.optimizer, self.loss, self.device = optimizer, loss, device

    def __call__(self) -> None:
        self.make_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def make_gradients(self) -> None:
        """Make the passes forward and backward."""
        with autocast(self.device, "bf16-mixed"):
            loss = self.loss()
        loss.backward()

    @property
    def fused(self) -> bool:
        """Whether the optimizer is one kernel for all weights."""
        return all(group.get("fused") for group in self.optimizer.param_groups)


def our_steps(generator: Generator, batch: int, device: torch.device) -> Steps:
    """The steps of a generator in training mode, with the loss and the optimizer that training has."""
    generator.train()
    shape = (batch, *generator.token_shape)
    tokens = torch.randint(generator.vocab_size, shape, device=device)
    labels = torch.arange(batch, device=device) % generator.num_classes
    configured = generator.configure_optimizers()
    optimizer = configured if isinstance(configured, Optimizer) else configured["optimizer"]
    dropped = labels % 10 == 0
    random = CounterRandom(0, labels)
    return Steps(optimizer, lambda: generator.loss(tokens, labels, random, dropped=dropped)[0], device)


def peer_steps(sizes: LlamaSizes, batch: int, device: torch.device) -> Steps:
    """The steps of `x-transformers`' decoder of a size, with fused AdamW."""
    torch.manual_seed(0)
    with torch.device(device):
        network = x_transformer(sizes).train()
    tokens = torch.randint(sizes.codes, (batch, sizes.length), device=device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    return Steps(optimizer, lambda: F.cross_entropy(network(tokens).flatten(0, 1).float(), tokens.flatten()), device)


def measure_peer(sizes: LlamaSizes, batch: int, device: torch.device, repeats: int) -> tuple[float, float]:
    """Seconds of a step of `x-transformers`' decoder, and the MB that it takes above weights and moments."""
    steps = peer_steps(sizes, batch, device)
    return repeated(steps, repeats=repeats, warmup=2).median, peak_of(steps) / 2**20


def training_steps(setting: Setting, name: str, generator: Generator, batch: int) -> Iterator[Measurement]:
    """Measure a generator's steps compiled and as written, the peer's, the optimizer's, and their memory."""
    device, backbone, layout = setting.device, generator.backbone, generator.backbone.layout
    repeats = 1 if setting.tiny else 5
    steps = our_steps(generator, batch, device)
    tokens = batch * layout.length
    read = layout.length - (1 if layout.attention != "bidirectional" else 0)
    least = Work(flops=training_flops(backbone, batch, read)).seconds(
        bandwidth=setting.machine.bandwidth, rate=setting.machine.rate(PRECISION)
    )
    parameters = sum(parameter.numel() for parameter in generator.parameters() if parameter.requires_grad)
    case = f"{name}, {parameters / 1e6:.0f}M, batch {batch}, {layout.length} tokens, bf16"

    eager = repeated(steps, repeats=repeats, warmup=2)
    eager_memory = peak_of(steps) / 2**20
    compile_backbone(backbone, setting)
    compiling = timed(steps).wall
    compiled = repeated(steps, repeats=repeats, warmup=1)
    memory = peak_of(steps) / 2**20
    steps.make_gradients()
    optimizing, fused = repeated(steps.optimizer.step, repeats=repeats), steps.fused
    uncompile(backbone)
    torch.compiler.reset()

    del steps  # its moments take memory
    theirs, note = None, ""
    if layout.attention == "causal":
        theirs, note = against("x_transformers", PEER, lambda: measure_peer(sizes_of(backbone), batch, device, repeats))

    for arm, taken in (("compiled", compiled), ("eager", eager)):
        notes = (f"first step {compiling:.0f} s" if arm == "compiled" else "", note)
        yield measurement(
            setting,
            f"training step, {arm}",
            case,
            taken,
            amount=tokens,
            unit="tokens/s",
            least=least,
            least_of="three times the forward products at the measured bfloat16 rate: the share is the MFU",
            peer=None if theirs is None else (f"{PEER}, eager", theirs[0]),
            share=0.45 if arm == "compiled" else None,
            note="; ".join(text for text in notes if text),
        )
    for arm, value in (("compiled", memory), ("eager", eager_memory)):
        judged = arm == "compiled" and theirs is not None
        yield Measurement(
            name=f"memory of a step, {arm}",
            case=case,
            value=value,
            unit="MB",
            better="lower",
            peer=None if theirs is None else Peer(name=f"{PEER}, eager", value=theirs[1]),
            target="no more than the peer" if judged else "",
            met=setting.met(value <= theirs[1]) if theirs is not None and judged else None,
            note="; ".join(text for text in ("at most, above weights and moments", note) if text),
        )
    yield measurement(
        setting,
        f"optimizer step, AdamW{', fused' if fused else ''}",
        case,
        optimizing,
        least=ADAM_BYTES * parameters / setting.machine.bandwidth,
        least_of="weights, gradients and moments read, all but gradients written, at the measured bandwidth",
    )
