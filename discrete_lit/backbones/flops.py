"""What a pass of the transformer costs, counted from its shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

from discrete_lit.backbones.blocks import Block
from discrete_lit.backbones.cache import Cache
from discrete_lit.backbones.embedding import TokenTable

if TYPE_CHECKING:
    from discrete_lit.backbones.transformer import Transformer


def pass_flops(backbone: Transformer, batch: int, tokens: int, cache: Cache | None = None) -> int:
    """Floating-point operations of the matrix products of a forward pass, two for each multiplication and addition.

    As torch's `FlopCounterMode` counts: elementwise work is left out, and attention is counted in full, also where a
    mask hides half of it.

    Args:
        backbone: whose pass it is.
        batch: sequences B.
        tokens: input ids, or vectors, of each sequence.
        cache: as it is before the pass.
    """
    filled = 0 if cache is None else cache.filled
    elements = tokens // backbone.layout.parts + (backbone.starts if filled == 0 else 0)
    seen = elements + (filled if cache is not None and cache.holds_keys else 0)
    read = 0 if isinstance(backbone.token_embedding, TokenTable) else tokens // backbone.layout.parts
    predicted = elements - max(backbone.starts - int(backbone.causal) - filled, 0)
    block = cast(Block, backbone.blocks[0])  # all are alike
    attention = 4 * backbone.depth * elements * seen * backbone.heads * backbone.head_dim
    each = (
        linear_flops(backbone.token_embedding) * read
        + linear_flops(backbone.time_embedding)
        + backbone.depth * linear_flops(block.attention, block.mlp) * elements
        + linear_flops(backbone.skips) * elements
        + attention
        + linear_flops(backbone.head) * predicted
    )
    if backbone.tied:
        each += 2 * backbone.width * backbone.layout.outputs * predicted
    if cache is None or not cache.modulations:
        along = backbone.condition_positions is not None
        each += modulation_flops(backbone, elements if along else 1, predicted if along else 1)
    return batch * each


def cache_flops(backbone: Transformer, batch: int) -> int:
    """Those of `new_cache`, in the same way: the modulations of each label, where nothing else decides them."""
    if backbone.condition_positions is not None or backbone.layout.timed:
        return 0
    return batch * modulation_flops(backbone, 1, 1)


def modulation_flops(backbone: Transformer, elements: int, predicted: int) -> int:
    """Of the modulations of one sequence: of all blocks at `elements` places, of the head at `predicted` ones."""
    own = backbone.depth * linear_flops(cast(Block, backbone.blocks[0]).modulation)
    return (own + linear_flops(backbone.shared_modulation)) * elements + linear_flops(
        backbone.final_modulation
    ) * predicted


def linear_flops(*modules: nn.Module | None) -> int:
    """Of every linear layer inside, for one row."""
    layers = [layer for module in modules if module is not None for layer in module.modules()]
    return sum(2 * layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
