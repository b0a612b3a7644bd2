"""Attention weights of chosen blocks, recorded while a network runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from discrete_lit.backbones.blocks import Attention, Block


def attention_of_blocks(network: Any) -> dict[int, Attention]:
    """List the self-attention of a network's blocks by their number; those that are no `Block` are left out.

    Args:
        network: a `Backbone`, a `SegmentTransformer`, or anything else with `fsdp_units`.
    """
    blocks = enumerate(network.fsdp_units())
    return {number: block.attention for number, block in blocks if isinstance(block, Block)}


@contextmanager
def recorded_weights(
    attentions: Mapping[int, Attention], rows_of: Callable[[int], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """Record the attention weights of the first pass inside, by number.

    The pass must have no cache. Compiled blocks run uncompiled inside, so that what was compiled stays as it is.

    Args:
        attentions: by number.
        rows_of: called with the elements n of the pass; gives `(B, Q)` int64, the rows that are asked for.

    Yields:
        A dictionary that the pass fills with `(B, heads, Q, n)`, see `Attention.weights`.
    """
    recorded: dict[int, Tensor] = {}

    def recording(number: int) -> Callable[..., None]:
        def record(attention: Attention, arguments: tuple[Any, ...]) -> None:
            if number in recorded:
                return
            x, rotary, mask, causal, cache = arguments
            assert cache is None, "attention weights are those of a pass without a cache"
            recorded[number] = attention.weights(x, rotary, mask, causal, rows=rows_of(x.shape[1]).to(x.device))

        return record

    handles = [each.register_forward_pre_hook(recording(number)) for number, each in attentions.items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield recorded
    finally:
        for handle in handles:
            handle.remove()
