"""Every sampler with a tiny backbone that it serves, guidance and filters on, behind what a generator has: `draw`.

For tests of what holds for a draw as a whole: that nothing in it waits for the host, and that it can be recorded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discrete_lit.backbones import BinaryFlowHead, SequenceLayout, Transformer
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import CosineSchedule, TruncatedNormalSchedule
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.diffusion.solvers import EulerMaruyama
from discrete_lit.samplers import BinaryFlowSampler, DelaySampler, Sampler, SamplerOutput
from helpers import diffusion_cases, sampler_cases
from helpers.sampler_cases import Case, build_backbone, build_quantizer

GUIDED = {"guidance_scale": 2.0, "guidance_schedule": "linear", "temperature": 0.9, "top_k": 4, "top_p": 0.95}
# Settings of the diffusion samplers, beside guidance: those that take another way through the loop.
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "score": {"guidance_law": "score", "temperature": 1.0, "top_k": None, "top_p": None},
    "transition": {"guidance_law": "transition", "temperature": 1.0, "top_k": None, "top_p": None},
    "argmax": {"clean_up": "argmax", "grid": CosineSchedule()},
    "normal": {"grid": TruncatedNormalSchedule(lowest=0.0)},
}
WAYS_OF = [("ancestral", "absorbing"), ("euler", "uniform")]
# These take the ways of the same sampler with other noise.
ALIKE = {
    *(("euler", "hybrid"), ("tau", "hybrid"), ("gibbs", "hybrid"), ("forward_backward", "gaussian")),
    *(("euler", "gidd"), ("tau", "gidd"), ("gibbs", "gidd"), ("forward_backward", "gidd")),
    *(("self_correction", "uniform"), ("self_correction", "hybrid"), ("self_correction", "gaussian")),
}


@dataclass
class Drawer:
    """Draws as a generator does, from a backbone alone."""

    backbone: Transformer
    sampler: Sampler
    quantizer: Any = None
    denoiser: Denoiser | None = None

    @torch.no_grad()
    def draw(
        self, labels: Tensor, random: CounterRandom, sampler: Sampler | None = None, **arguments: Any
    ) -> SamplerOutput:
        return (sampler or self.sampler)(
            self.backbone, labels, random, quantizer=self.quantizer, denoiser=self.denoiser, **arguments
        )


def names() -> list[str]:
    """The name of each case, and of each way through the loops of diffusion."""
    found = [*sampler_cases.CASES, "adaln", "fixed_order", "delayed", "binary_flow", "binary_flow_in_blocks"]
    found += [f"{sampler}-{process}" for sampler, process in diffusion_cases.CASES if (sampler, process) not in ALIKE]
    found += [f"{sampler}-{process}-{way}" for sampler, process in WAYS_OF for way in WAYS if way]
    return [*found, "ancestral-gaussian-score_head", "ancestral-hybrid-score_head", "tau-gaussian"]


def bit_backbone(block_size: int, spread: float = 0.3, **switches: Any) -> Transformer:
    """A tiny backbone that predicts three bits of each of six positions, in blocks."""
    layout = SequenceLayout(8, (2, 3), num_classes=2, attention="causal", block_size=block_size)

    def head(block: Any, size: int) -> BinaryFlowHead:
        solver = EulerMaruyama(4, last_step=0.05, last_drift="velocity")
        return BinaryFlowHead(block, size, width=16, depth=2, modulations=1, block_size=block_size, solver=solver)

    given: dict[str, Any] = {"class_slots": 2, "token_embedding": "bits_mlp", "hidden_positions": True, **switches}
    return build_backbone(layout, spread, place_head=head, **given)


def make_drawer(name: str) -> Drawer:
    """The case of a name."""
    if name == "adaln":
        backbone = build_backbone(sampler_cases.MASKED, conditioning="adaln", norm="rms", qk_norm="full_rms")
        return Drawer(backbone, sampler_cases.MaskGITSampler(steps=3, **GUIDED))
    if name == "fixed_order":
        backbone = build_backbone(sampler_cases.ANY_ORDER, conditioning="prefix_adaln", target_positions=True)
        return Drawer(backbone, sampler_cases.RasterSampler(order=(3, 1, 2, 0, 5, 4), **GUIDED))
    if name == "delayed":
        layout = SequenceLayout(
            8, (4,), num_classes=2, attention="causal", mask_token=True, sub_tokens=2, delays=(0, 1)
        )
        return Drawer(build_backbone(layout), DelaySampler(**GUIDED))
    if name.startswith("binary_flow"):
        size = 3 if name.endswith("in_blocks") else 1
        return Drawer(bit_backbone(size), BinaryFlowSampler(guidance_scale=2.0, null_rows="own"))
    if name in sampler_cases.CASES:
        sampler, layout, settings = sampler_cases.CASES[name]
        quantizer = build_quantizer(layout.vocab_size) if layout.scales else None
        backbone = build_backbone(layout, **sampler_cases.SWITCHES.get(name, {}))
        guided = {key: value for key, value in GUIDED.items() if name != "open_magvit2" or "schedule" not in key}
        return Drawer(backbone, Case(name, sampler, backbone, settings, quantizer).build(**guided), quantizer)
    sampler, process, way = (*name.split("-"), "")[:3]
    settings = {**GUIDED, "steps": 3}
    head, schedule = "cavity", None
    if "nucleus" in diffusion_cases.SAMPLERS[sampler][1]:
        settings["top_p"] = None
    if way == "score_head":
        head, settings["guidance_law"] = "score", "score"
        way = "score"
    if (sampler, process) == ("tau", "gaussian"):
        schedule = diffusion_cases.FiniteNoise()
    backbone, denoiser = diffusion_cases.make_model(diffusion_cases.PROCESSES[process], head, schedule)
    return Drawer(backbone, diffusion_cases.build(sampler, **{**settings, **WAYS[way]}), denoiser=denoiser)
