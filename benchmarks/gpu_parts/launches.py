"""How many operators a draw starts on a GPU, and how often the host waits for it, counted on a CPU.

    python benchmarks/gpu_parts/launches.py

The networks are those of the recipes, with their blocks, switches and samplers, but eight channels a head and a small
grid: an operator is started once, however large it is. Operators are those that `torch.profiler` sees and that have a
kernel on a GPU, without views and memory, in bfloat16 by autocast and on the ways that a draw takes on a GPU. Each
starts one kernel, as a rule; a few, such as sorts, start two or three. An autoregressive draw is counted over 8 and
over 16 tokens, one of diffusion over 8 and over 16 steps, and goes on along that line, since each step takes the same
operators. The host's waits are counted over tensors without data that say they are on a GPU.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from discrete_lit import samplers
from discrete_lit.backbones import Backbone, SequenceLayout, Transformer, cpu_kernels, execution
from discrete_lit.core.random import CounterRandom
from discrete_lit.core.synchronisation import Checks, HostWaits, noting
from discrete_lit.diffusion import LogSinSchedule
from discrete_lit.diffusion.parameterization import Denoiser, ScoreHead
from discrete_lit.diffusion.processes import AbsorbingProcess
from discrete_lit.samplers import Sampler
from discrete_lit.tokenizers.quantizers.multi_scale import MultiScaleResidualQuantizer

RECIPES = Path(__file__).parents[2] / "lightning_configs" / "generators"
TOKENS, CLASSES, VOCABULARY = 256, 10, 32
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# What only makes memory or names it, beside views, which say so in their schema.
NOTHING = (
    "empty",
    "new_empty",
    "resize",
    "detach",
    "lift",
    "item",
    "_local_scalar_dense",
    "is_nonzero",
    "_unsafe_view",
)

FAMILIES = ("RAR-B", "LlamaGen-B", "MaskGIT", "VAR-d16", "SEDD-186M")

Draw = Callable[[Any, torch.Tensor, torch.Tensor], Any]


def launches(families: Sequence[str] = FAMILIES) -> list[dict[str, Any]]:
    """Count the operators and the waits of a draw of one image.

    Args:
        families: some of `FAMILIES`.

    Returns:
        A row for each network: `family`, its name; `steps`, the passes that follow one another; `operators a draw`;
        `operators a step`, those of one step more; `synchronisations`, in the loop and before it, and of the question
        at the end whether all went well.
    """
    rows = []
    for family in families:
        recipe, make, steps = _RECIPES_OF[family]
        settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
        if steps is None:
            backbone, draw = make(settings, 16)
            operators, steps = _operators(backbone, draw)
            a_step = operators / steps
        else:
            (few, first), (more, second) = (_operators(*make(settings, count)) for count in (8, 16))
            a_step = (more - few) / (second - first)
            operators = few + (steps - first) * a_step
        in_loop, at_end = _waits(*make(settings, 8, depth=2))
        rows.append(
            {
                "family": family,
                "steps": steps,
                "operators a draw": round(operators),
                "operators a step": round(a_step),
                "synchronisations": f"{in_loop} + {at_end}",
            }
        )
    return rows


# The networks of the recipes, and how they are drawn from: `draw(backbone, labels, indices)`.


def _backbone(settings: dict[str, Any], layout: SequenceLayout, depth: int | None) -> Transformer:
    switches = dict(settings["backbone"]["init_args"])
    switches |= {"width": 8 * switches["heads"], "depth": depth or switches["depth"]}
    return Transformer(layout, **switches).eval()


def _sampler(settings: dict[str, Any], **changes: Any) -> Sampler:
    given = settings["sampler"]
    return getattr(samplers, given["class_path"])(**{**given.get("init_args", {}), **changes})


def _draw(sampler: Sampler, **arguments: Any) -> Draw:
    return lambda backbone, labels, indices: sampler(backbone, labels, CounterRandom(0, indices), **arguments)


def _autoregressive(settings: dict[str, Any], tokens: int, depth: int | None = None) -> tuple[Transformer, Draw]:
    layout = SequenceLayout(
        VOCABULARY, (2, tokens // 2), num_classes=CLASSES, attention="causal", any_order="order" in settings
    )
    return _backbone(settings, layout, depth), _draw(_sampler(settings))


def _masked(settings: dict[str, Any], tokens: int, depth: int | None = None) -> tuple[Transformer, Draw]:
    layout = SequenceLayout(
        VOCABULARY, (4, tokens // 4), num_classes=CLASSES, attention="bidirectional", mask_token=True
    )
    return _backbone(settings, layout, depth), _draw(_sampler(settings))


def _next_scale(settings: dict[str, Any], tokens: int, depth: int | None = None) -> tuple[Transformer, Draw]:
    quantizer = MultiScaleResidualQuantizer(VOCABULARY, 4, scales=SCALES).eval()
    layout = SequenceLayout(
        VOCABULARY,
        (sum(quantizer.lengths),),
        num_classes=CLASSES,
        attention="block_causal",
        scales=tuple(quantizer.lengths),
        input_dim=4,
    )
    # A part of the ids, as 900 of 4,096 are.
    backbone, sampler = _backbone(settings, layout, depth), _sampler(settings, top_k=VOCABULARY // 4)
    backbone.quantizer = quantizer  # goes where the backbone goes

    def draw(network: Any, labels: torch.Tensor, indices: torch.Tensor) -> Any:
        return sampler(network, labels, CounterRandom(0, indices), quantizer=network.quantizer)

    return backbone, draw


def _diffusion(settings: dict[str, Any], steps: int, depth: int | None = None) -> tuple[Transformer, Draw]:
    layout = SequenceLayout(
        VOCABULARY,
        (4, 4),
        num_classes=CLASSES,
        attention="bidirectional",
        mask_token=True,
        timed=True,
        mask_output=True,
    )
    denoiser = Denoiser(
        process=AbsorbingProcess(VOCABULARY),
        schedule=LogSinSchedule(),
        head=ScoreHead(),
        time_input=settings["time_input"],
    )
    return _backbone(settings, layout, depth), _draw(_sampler(settings, steps=steps), denoiser=denoiser)


# The recipe of a family, what makes its network, and its steps where they are counted along a line.
_RECIPES_OF: dict[str, tuple[str, Callable[..., tuple[Transformer, Draw]], int | None]] = {
    "RAR-B": ("rar_b_imagenet256", _autoregressive, TOKENS),
    "LlamaGen-B": ("llamagen_b_imagenet256", _autoregressive, TOKENS),
    "MaskGIT": ("maskgit_imagenet256", _masked, None),
    "VAR-d16": ("var_d16_imagenet256", _next_scale, None),
    "SEDD-186M": ("sedd_absorb", _diffusion, 128),
}


# Counting.


@torch.no_grad()
def _operators(backbone: Backbone, draw: Draw) -> tuple[int, int]:
    """The operators of a draw, and its passes."""
    labels, indices = torch.zeros(1, dtype=torch.int64), torch.arange(1)
    with ExitStack() as stack:
        # A CPU's packed weights out, the casts of a GPU in.
        stack.enter_context(patch.object(cpu_kernels, "_SWITCH", "0"))
        stack.enter_context(patch.object(execution, "casting_pays", lambda device: True))
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False))
        draw(backbone, labels, indices)  # what is made once
        stack.enter_context(noting(Checks(blind=True)))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            output = draw(backbone, labels, indices)
    started = sum(_started(event) for event in profiled.events() or () if event.cpu_parent is None)
    return started, output.sequential_passes


def _started(event: Any) -> int:
    """How many operators an event of the profiler starts: one, or those below it if it is made of others on a GPU."""
    kind = _kind(event.name)
    return sum(_started(child) for child in event.cpu_children) if kind is None else kind


@cache
def _kind(name: str) -> int | None:
    """1 for an operator with a kernel, 0 for one that starts nothing, None for one that is made of others."""
    space, _, operator = name.partition("::")
    packet = getattr(torch.ops.aten, operator, None) if space == "aten" else None
    if packet is None:
        return None
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    overloads = [each for each in overloads if torch._C._dispatch_has_kernel(each.name())]

    def registered(key: str) -> bool:
        return any(torch._C._dispatch_has_kernel_for_dispatch_key(each.name(), key) for each in overloads)

    if registered("CompositeImplicitAutograd") and not registered("CUDA"):
        return None
    returned = [each.alias_info for overload in overloads for each in overload._schema.returns]
    names_memory = any(alias is not None and not alias.is_write for alias in returned)
    return 0 if names_memory or operator.startswith(NOTHING) else 1


@torch.no_grad()
def _waits(backbone: Backbone, draw: Draw) -> tuple[int, int]:
    """How often a draw waits for a GPU before its end, and there."""
    asked: list[int] = []
    with (
        patch.object(Checks, "raise_noted", lambda checks, flags=None: asked.append(checks.flags().numel())),
        FakeTensorMode(allow_non_fake_inputs=True),
        HostWaits() as waits,
    ):
        network = execution.outline(backbone, device="cuda")
        draw(network, torch.zeros(1, dtype=torch.int64, device="cuda"), torch.arange(1, device="cuda"))
    return len(waits.seen), sum(flags > 0 for flags in asked)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Lay out rows as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([f"{value}" for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown(launches()))
