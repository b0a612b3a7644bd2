"""Each sampler beside a tiny backbone that it serves."""

from random import Random
from typing import Any, NamedTuple

import torch

from discrete_lit.backbones import FactorisedHead, MaskedBitHead, SequenceLayout, Transformer
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import ArccosSchedule, CosineSchedule, LinearSchedule, SquareSchedule
from discrete_lit.samplers import (
    BARSampler,
    HaltonConfidenceSampler,
    HaltonSampler,
    MaskBitSampler,
    MaskGITSampler,
    NextScaleSampler,
    OpenMAGVIT2Sampler,
    RandARSampler,
    RandomOrderSampler,
    RasterSampler,
    Sampler,
    SamplerOutput,
    SubTokenSettings,
    TiTokSampler,
)
from discrete_lit.tokenizers.quantizers.multi_scale import MultiScaleResidualQuantizer
from helpers.random_weights import randomise

MASKED = SequenceLayout(5, (2, 3), num_classes=2, attention="bidirectional", mask_token=True)
BITS = SequenceLayout(4, (3,), num_classes=2, attention="bidirectional", mask_token=True, sub_tokens=2)
CAUSAL = SequenceLayout(5, (2, 3), num_classes=2, attention="causal")
ANY_ORDER = SequenceLayout(5, (2, 3), num_classes=2, attention="causal", any_order=True)
SCALES = SequenceLayout(5, (5,), num_classes=2, attention="block_causal", scales=(1, 4), input_dim=3)
PARTS = SequenceLayout(6, (2, 3), num_classes=2, attention="causal")
ANY_ORDER_PARTS = SequenceLayout(6, (2, 3), num_classes=2, attention="causal", any_order=True)
CODES = SequenceLayout(8, (2, 3), num_classes=2, attention="causal")
TWO_PARTS = {"token_embedding": "parts", "place_head": lambda block, size: FactorisedHead(block, size, sizes=(2, 3))}
THREE_BITS = {
    "token_embedding": "bits",
    "place_head": lambda block, size: MaskedBitHead(block, size, width=12, depth=1),
}

CASES: dict[str, tuple[type[Sampler], SequenceLayout, dict[str, Any]]] = {
    "maskgit": (MaskGITSampler, MASKED, {"steps": 4}),
    "titok": (TiTokSampler, MASKED, {"steps": 4}),
    "maskbit": (MaskBitSampler, BITS, {"steps": 4}),
    "halton": (HaltonSampler, MASKED, {"steps": 4}),
    "halton_older": (HaltonSampler, MASKED, {"steps": 4, "variant": "older", "roll": True}),
    "halton_confidence": (HaltonConfidenceSampler, MASKED, {"steps": 4}),
    "random_order": (RandomOrderSampler, MASKED, {"steps": 4}),
    "raster": (RasterSampler, CAUSAL, {}),
    "any_order": (RasterSampler, ANY_ORDER, {"order": "random"}),
    "next_scale": (NextScaleSampler, SCALES, {}),
    "parts": (RasterSampler, PARTS, {}),
    "bits": (RasterSampler, CODES, {}),
    "open_magvit2": (OpenMAGVIT2Sampler, ANY_ORDER_PARTS, {"order": "random", "parts": [SubTokenSettings()] * 2}),
    "bar": (BARSampler, CODES, {"bit_counts": (1, 2)}),
    "randar": (RandARSampler, ANY_ORDER, {"order": "random", "steps": 4}),
}
# What the backbone of a case has that is not in its layout.
SWITCHES: dict[str, dict[str, Any]] = {
    "parts": TWO_PARTS,
    "bits": THREE_BITS,
    "open_magvit2": TWO_PARTS,
    "bar": THREE_BITS,
    "randar": {"positions": "rope_2d", "position_instructions": True},
}


class Case(NamedTuple):
    """A sampler class with a backbone in eval mode."""

    name: str
    sampler: type[Sampler]
    backbone: Transformer
    settings: dict[str, Any]
    quantizer: MultiScaleResidualQuantizer | None

    @property
    def length(self) -> int:
        return self.backbone.layout.length

    @property
    def switches(self) -> dict[str, Any]:
        return SWITCHES.get(self.name, {})

    @property
    def keeps_prefixes_alone(self) -> bool:
        return self.sampler.attention == "causal" and self.settings.get("order") != "random"

    def build(self, **settings: Any) -> Sampler:
        if self.sampler is OpenMAGVIT2Sampler:
            own = {name: settings.pop(name) for name in SubTokenSettings.__dataclass_fields__ if name in settings}
            settings["parts"] = [
                SubTokenSettings(**own),
                SubTokenSettings(guidance_scale=own.get("guidance_scale", 1.0)),
            ]
        return self.sampler(**{**self.settings, **settings})

    def random_sampler(self, choose: Random, **fixed: Any) -> Sampler:
        settings: dict[str, Any] = {
            "temperature": choose.choice([0.05, 0.7, 1.0, 3.0, 50.0]),
            "top_k": choose.choice([None, 1, 2, 4, 99]),
            "top_p": choose.choice([None, 0.01, 0.5, 0.99, 1.0]),
            "guidance_scale": choose.choice([-1.0, 0.0, 1.0, 1.5, 12.0]),
            "guidance_schedule": choose.choice(["constant", "linear", "scale_linear", "cosine", "power_cosine"]),
            "guidance_power": choose.choice([0.0, 0.5, 2.5]),
            "guidance_interval": choose.choice([None, (0, 1), (1, 2)]),
        }
        if "steps" in self.settings:
            settings["steps"] = choose.randint(2, self.length)
        if self.name in ("maskgit", "titok", "maskbit", "halton_confidence", "bar"):
            settings["choice_temperature"] = choose.choice([0.0, 4.5, 1e6])
        if self.name in ("maskgit", "titok", "maskbit", "halton_confidence"):
            settings["temperature_annealing"] = choose.choice([True, False])
        if self.name in ("maskgit", "titok", "maskbit", "halton_confidence", "random_order"):
            schedules = [None, CosineSchedule(), ArccosSchedule(), LinearSchedule(), SquareSchedule()]
            settings["mask_schedule"] = choose.choice(schedules)
        return self.build(**{**settings, **fixed})

    @torch.no_grad()
    def draw(
        self, sampler: Sampler, labels: torch.Tensor, indices: torch.Tensor, seed: int = 0, **arguments: Any
    ) -> SamplerOutput:
        random = CounterRandom(seed, indices)
        return sampler(self.backbone, labels, random, quantizer=self.quantizer, **arguments)


def build_backbone(layout: SequenceLayout, spread: float = 0.6, **switches: Any) -> Transformer:
    """Two blocks of width 16 with random weights, in eval mode."""
    if layout.sub_tokens > 1:
        switches["token_embedding"] = "bits"
    backbone = randomise(Transformer(layout, width=16, depth=2, heads=2, **switches), spread)
    if backbone.place_head is not None:
        randomise(backbone.place_head, spread / 3)  # its conditions and inputs multiply
    return backbone.eval()


def build_quantizer(vocab_size: int) -> MultiScaleResidualQuantizer:
    """Scales 1 and 2 with random codes and convolutions, in eval mode."""
    return randomise(MultiScaleResidualQuantizer(vocab_size, 3, scales=(1, 2)), 0.6).eval()
