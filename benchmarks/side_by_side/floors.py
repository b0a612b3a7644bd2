"""The least work of a computation: bytes that must move and operations that must be done, counted on its shapes.

No version runs faster than the larger of bytes over bandwidth and operations over the matrix rate. Bytes are those of
weights and caches, each read once a pass; activations, which could stay on the chip, are left out, and so is
elementwise arithmetic.
"""

from dataclasses import dataclass

import torch
from torch import nn

from discrete_lit.backbones import Backbone, Transformer
from discrete_lit.backbones.layers import Linear

# Optimizer steps of Adam read parameter, gradient and two moments, and write all but the gradient, in float32.
ADAM_BYTES = 7 * 4


@dataclass(frozen=True)
class Work:
    """Bytes that move and floating-point operations, 2 for a multiplication and an addition; they add up."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, *, bandwidth: float, rate: float) -> float:
        """The least time at a bandwidth in bytes a second and a matrix rate in operations a second."""
        return max(self.bytes / bandwidth, self.flops / rate)


def weight_bytes(backbone: Backbone, dtype: torch.dtype) -> int:
    """Count the bytes of the matrices that a cached pass reads once each, whatever its rows.

    The linear layers with their biases: in `dtype`, those of the logits in float32, which they are computed in. Left
    out are tables, of which a pass reads single rows, gains, and modulations of the label alone, which the cache holds.

    Args:
        backbone: of any kind; a tied head's table counts as the logits' matrix.
        dtype: of the products.
    """
    assert isinstance(backbone, Transformer)
    held_by_cache = set()
    if backbone.modulated and backbone.condition_positions is None and not backbone.layout.timed:
        for name, module in backbone.named_modules():
            if "modulation" in name:
                held_by_cache |= {id(each) for each in module.modules()}
    total = 0
    for module in backbone.modules():
        if isinstance(module, nn.Linear) and id(module) not in held_by_cache:
            size = dtype.itemsize if not isinstance(module, Linear) or module.autocast else 4
            total += size * sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if backbone.tied:
        total += 4 * backbone.width * backbone.layout.outputs
    return total


def cache_bytes(backbone: Backbone, rows: int, elements: int, dtype: torch.dtype) -> int:
    """Count the bytes of the keys and values of the first `elements` of `rows` sequences, in all layers."""
    assert isinstance(backbone, Transformer)
    return 2 * backbone.depth * rows * backbone.heads * backbone.head_dim * elements * dtype.itemsize


def decoding(backbone: Backbone, rows: int, dtype: torch.dtype) -> list[Work]:
    """Count the work of each of the N passes that draw N tokens one after another on a key-value cache.

    A pass reads the weights once and the keys and values of all elements so far, its own among them.

    Args:
        backbone: causal.
        rows: sequences in each pass; with guidance two for each image.
        dtype: of products and cache.
    """
    assert isinstance(backbone, Transformer)
    weights, starts, passes = weight_bytes(backbone, dtype), backbone.starts, []
    for token in range(backbone.layout.length):
        read, filled = (0, 0) if token == 0 else (1, starts + token - 1)
        moved = weights + cache_bytes(backbone, rows, starts + token, dtype)
        passes.append(Work(moved, backbone.flops(rows, read, filled)))
    return passes


def decoding_seconds(backbone: Backbone, rows: int, dtype: torch.dtype, *, bandwidth: float, rate: float) -> float:
    """The least time of `decoding`: each pass waits for the token of the one before, so their floors add up."""
    return sum(work.seconds(bandwidth=bandwidth, rate=rate) for work in decoding(backbone, rows, dtype))


def training_flops(backbone: Backbone, batch: int, tokens: int) -> int:
    """Count the operations of a training step's products: three times the forward pass's, nothing twice.

    Args:
        backbone: in any mode.
        batch: sequences.
        tokens: that each of them reads.
    """
    return 3 * backbone.flops(batch, tokens)


def nearest_code_work(latents: int, codes: int, dim: int) -> Work:
    """Count the search for the nearest of K codes of width D: one product of all pairs; ids are 8 bytes.

    Distances, which could stay on the chip, are not counted as bytes.
    """
    return Work(4 * dim * (latents + codes) + 8 * latents, 2 * latents * codes * dim)


def joint_entropy_work(latents: int, bits: int) -> Work:
    """Count the batch entropy of 2^bits codes over n latents in training: one product of halves, and two for gradients.

    Its two factors `(n, 2^(bits / 2))` are float32, written and read once each way.
    """
    first, second = 2 ** (bits // 2), 2 ** (bits - bits // 2)
    return Work(4 * 4 * latents * (first + second), 3 * 2 * latents * first * second)
