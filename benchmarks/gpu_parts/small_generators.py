"""One generator of each family with random weights, small enough to be drawn from hundreds of times."""

from collections.abc import Callable
from typing import Any

import torch
from helpers.precision_cases import convolutional
from helpers.random_weights import randomise

from discrete_lit.backbones import FactorisedHead, SequenceLayout, Transformer
from discrete_lit.diffusion import LogLinearSchedule, ScoreHead
from discrete_lit.diffusion.losses import ScoreEntropy
from discrete_lit.generators import Autoregressive, DiscreteDiffusion, Generator, Masked, NextScale
from discrete_lit.samplers import (
    AncestralSampler,
    DiffusionSampler,
    FirstHittingSampler,
    HaltonSampler,
    MaskGITSampler,
    NextScaleSampler,
    OpenMAGVIT2Sampler,
    RasterSampler,
    Sampler,
    SubTokenSettings,
)
from discrete_lit.tokenizers import MultiScaleVQ, TokenGrid
from gpu_parts.part import Setting

CLASSES = 10
TINY_CODES, CODES = 16, 1024


def _network(setting: Setting, **switches: Any) -> Callable[[SequenceLayout], Transformer]:
    size = {"width": 32, "depth": 2, "heads": 2} if setting.tiny else {"width": 256, "depth": 4, "heads": 4}
    return lambda layout: Transformer(layout, **size, **switches)


def _on_grid(setting: Setting, kind: Callable[..., Generator], **settings: Any) -> Generator:
    tokenizer = TokenGrid(TINY_CODES, (2, 3)) if setting.tiny else TokenGrid(CODES, (8, 8))
    return kind(tokenizer=tokenizer, image_size=16, num_classes=CLASSES, **settings)


def _next_scale(setting: Setting) -> Generator:
    codes, scales = (TINY_CODES, (1, 2, 4)) if setting.tiny else (CODES, (1, 2, 3, 4, 6, 8))
    # Half the side in codes.
    tokenizer = randomise(MultiScaleVQ(convolutional, codes, code_dim=8, scales=scales), 0.3)
    switches: dict[str, Any] = {"conditioning": "prefix_adaln", "attention_bias": "query_value", "qk_norm": "unit"}
    return NextScale(
        tokenizer=tokenizer, image_size=2 * scales[-1], num_classes=CLASSES, backbone=_network(setting, **switches)
    )


def _parts(block: Any, vocab_size: int) -> FactorisedHead:
    return FactorisedHead(block, vocab_size, sizes=(4, vocab_size // 4), depth=1)


_LLAMAGEN: dict[str, Any] = {
    **{"norm": "rms", "mlp": "swiglu", "bias": False, "positions": "rope_2d", "start_rotation": "zero"}
}
_RAR: dict[str, Any] = {
    **{"conditioning": "prefix_adaln", "target_positions": True, "condition_positions": True, "qk_norm": "layer"}
}
_TIMED: dict[str, Any] = {"conditioning": "adaln", "positions": "rope_1d"}
# The generator, and a sampler of it.
FAMILIES: dict[str, tuple[Callable[[Setting], Generator], Callable[[], Sampler]]] = {
    "autoregressive, LlamaGen": (
        lambda setting: _on_grid(setting, Autoregressive, backbone=_network(setting, **_LLAMAGEN)),
        lambda: RasterSampler(guidance_scale=2.0, top_k=8),
    ),
    "autoregressive, RAR": (
        lambda setting: _on_grid(setting, Autoregressive, order="random_annealed", backbone=_network(setting, **_RAR)),
        lambda: RasterSampler(guidance_scale=4.0, guidance_schedule="power_cosine"),
    ),
    "masked": (
        lambda setting: _on_grid(setting, Masked, backbone=_network(setting)),
        lambda: MaskGITSampler(steps=4, guidance_scale=2.0),
    ),
    "next scale": (_next_scale, lambda: NextScaleSampler(guidance_scale=2.5, top_k=8, top_p=0.95)),
    "diffusion": (
        lambda setting: _on_grid(
            setting,
            DiscreteDiffusion,
            backbone=_network(setting, **_TIMED),
            schedule=LogLinearSchedule(),
            head=ScoreHead(),
            loss=ScoreEntropy(),
            time_input="total_noise",
        ),
        lambda: DiffusionSampler(steps=4, guidance_scale=2.0),
    ),
    "autoregressive, sub-tokens": (
        lambda setting: _on_grid(
            setting,
            Autoregressive,
            backbone=_network(setting, token_embedding="parts", place_head=_parts, norm="rms", mlp="swiglu"),
        ),
        lambda: OpenMAGVIT2Sampler(parts=[SubTokenSettings(guidance_scale=2.0), SubTokenSettings(top_k=3)]),
    ),
    "masked, Halton": (
        lambda setting: _on_grid(setting, Masked, backbone=_network(setting, conditioning="adaln", norm="rms")),
        lambda: HaltonSampler(steps=4, guidance_scale=1.5),
    ),
    "diffusion, ancestral": (
        lambda setting: _on_grid(setting, DiscreteDiffusion, backbone=_network(setting, **_TIMED), time_input="time"),
        lambda: AncestralSampler(steps=4),
    ),
    "diffusion, first hitting": (
        lambda setting: _on_grid(setting, DiscreteDiffusion, backbone=_network(setting, **_TIMED), time_input="time"),
        lambda: FirstHittingSampler(),
    ),
}
ONE_OF_EACH = ("autoregressive, LlamaGen", "masked", "next scale", "diffusion")


def small_generator(name: str, setting: Setting, dtype: torch.dtype = torch.float32) -> tuple[Generator, Sampler]:
    """A generator in eval mode with random weights that are the same on every device, and a sampler of it."""
    torch.manual_seed(0)
    build, sampler = FAMILIES[name]
    generator = build(setting)
    # Logits of a deviation of about 2: some ids are far more probable than others, none is alone.
    randomise(generator.backbone, 0.2 if setting.tiny else 0.06)
    if generator.backbone.place_head is not None:
        randomise(generator.backbone.place_head, 0.1 if setting.tiny else 0.03)
    return generator.eval().to(device=setting.device, dtype=dtype), sampler()
