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
