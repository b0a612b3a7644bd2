"""Networks of published sizes with random weights."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from discrete_lit.backbones import Backbone, DiT, LatentLayout, SequenceLayout, Transformer


@dataclass(frozen=True, kw_only=True)
class LlamaSizes:
    """Sizes of a causal transformer with SwiGLU, RMSNorm and rotary positions; `hidden` is the MLP's inner width."""

    width: int
    depth: int
    heads: int
    hidden: int
    codes: int = 16_384
    length: int = 256


LLAMAGEN_B = LlamaSizes(width=768, depth=12, heads=12, hidden=2048)
WIDTH, DEPTH, HEADS, HIDDEN = LLAMAGEN_B.width, LLAMAGEN_B.depth, LLAMAGEN_B.heads, LLAMAGEN_B.hidden
CODES, CLASSES = LLAMAGEN_B.codes, 1000


def llama_shape(
    attention: str = "causal", sizes: LlamaSizes = LLAMAGEN_B, *, context_dim: int | None = None
) -> Transformer:
    """LlamaGen's kind, by default its B: 12 blocks of width 768, rotary positions, 256 tokens of 16,384 ids.

    With a `context_dim` its blocks attend to vectors of that width too.
    """
    side = round(sizes.length**0.5)
    layout = SequenceLayout(
        sizes.codes,
        (side, side),
        num_classes=CLASSES,
        attention=attention,  # type: ignore[arg-type]
        mask_token=attention == "bidirectional",
    )
    return Transformer(
        layout,
        width=sizes.width,
        depth=sizes.depth,
        heads=sizes.heads,
        mlp_hidden=sizes.hidden,
        mlp="swiglu",
        norm="rms",
        bias=False,
        positions="rope_1d",
        context_dim=context_dim,
    )


def sizes_of(backbone: Backbone) -> LlamaSizes:
    """The sizes of a transformer of LlamaGen's kind that comes nearest to a backbone.

    Depth, width and heads are the same, and so is the number of weights in the blocks, but for a rounding of the MLP's
    width to a multiple of 64.
    """
    assert isinstance(backbone, Transformer)
    width, depth = backbone.width, backbone.depth
    weights = sum(parameter.numel() for parameter in backbone.blocks.parameters() if parameter.ndim == 2)
    hidden = 64 * round((weights / depth - 4 * width**2) / (3 * width) / 64)
    return LlamaSizes(
        width=width,
        depth=depth,
        heads=backbone.heads,
        hidden=max(hidden, 64),
        codes=backbone.layout.vocab_size,
        length=backbone.layout.length,
    )


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """That of Lightning's `precision`: `32-true` or `bf16-mixed`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def var_shape(patches: tuple[int, ...], depth: int) -> Transformer:
    """VAR's of a depth, which is 16 at the least as published: width and heads grow with it."""
    scales = tuple(side * side for side in patches)
    layout = SequenceLayout(
        4096, (sum(scales),), num_classes=CLASSES, attention="block_causal", scales=scales, input_dim=32
    )
    return Transformer(
        layout,
        width=64 * depth,
        depth=depth,
        heads=depth,
        mlp="gelu_tanh",
        conditioning="prefix_adaln",
        qk_norm="unit",
        attention_bias="query_value",
    )


def sedd_shape(vocab_size: int) -> Transformer:
    """That of "Discrete Diffusion for Image Generation": 24 timed blocks of width 768, 256 tokens."""
    layout = SequenceLayout(
        vocab_size, (16, 16), num_classes=CLASSES, attention="bidirectional", mask_token=True, timed=True
    )
    return Transformer(
        layout,
        width=768,
        depth=24,
        heads=12,
        mlp="gelu_tanh",
        norm_epsilon=1e-5,
        norm_affine=True,
        norm_bias=False,
        positions="rope_1d",
        conditioning="adaln",
        condition_width=128,
        attention_bias="none",
        out_bias=False,
    )


def dit_shape(*, context_channels: int | None = None, num_classes: int = CLASSES, **settings: Any) -> DiT:
    """DiT-B/2's: 12 modulated blocks of width 768 over 256 patches of latents of 4 x 32 x 32; settings of `DiT`."""
    layout = LatentLayout(
        channels=4, grid=(32, 32), outputs=4, num_classes=num_classes, context_channels=context_channels
    )
    return DiT(layout, width=768, depth=12, heads=12, **settings)
