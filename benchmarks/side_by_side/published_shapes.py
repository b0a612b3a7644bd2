"""Networks of published sizes with random weights."""

from contextlib import AbstractContextManager

import torch

from discrete_lit.backbones import SequenceLayout, Transformer

WIDTH, DEPTH, HEADS, HIDDEN, CODES, CLASSES = 768, 12, 12, 2048, 16_384, 1000


def llama_shape(attention: str = "causal") -> Transformer:
    """LlamaGen-B's: 12 blocks of width 768, SwiGLU, RMSNorm, rotary positions, 256 tokens of 16,384 ids."""
    layout = SequenceLayout(
        CODES,
        (16, 16),
        num_classes=CLASSES,
        attention=attention,  # type: ignore[arg-type]
        mask_token=attention == "bidirectional",
    )
    return Transformer(
        layout,
        width=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        mlp_hidden=HIDDEN,
        mlp="swiglu",
        norm="rms",
        bias=False,
        positions="rope_1d",
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
