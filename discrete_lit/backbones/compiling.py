"""Compilation in place: the blocks of a backbone keep their names, so checkpoints do not change."""

from typing import Any

from discrete_lit.backbones.backbone import Backbone


def compile_blocks(backbone: Backbone, **options: Any) -> None:
    """Compile each block of a backbone on its own, by `torch.nn.Module.compile`.

    The blocks are alike, so the compiler works through one of them, not through all; what it makes serves the others.

    Args:
        backbone: changed in place; its parameters and their names stay.
        options: of `torch.compile`.
    """
    for block in backbone.shards():
        block.compile(**options)


def compile_for_sampling(backbone: Backbone) -> None:
    """`compile_blocks` with the least work between two blocks, for passes over few rows.

    Args:
        backbone: changed in place, on the device that it samples on.
    """
    on_processor = next(backbone.parameters()).device.type == "cpu"
    compile_blocks(backbone, options={"cpp_wrapper": on_processor})
