"""Compiled training."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from discrete_lit.backbones.backbone import compile_blocks
from discrete_lit.generators import Generator


class Compile(Callback):
    """Compiles the blocks of a generator's backbone in place, for training, validation and the samples drawn there.

    Parameters keep their names: a checkpoint of a compiled run is one of an uncompiled run, and either goes on from the
    other's.

    Args:
        backend: of `torch.compile`.
        mode: of `torch.compile`.
    """

    def __init__(self, backend: str = "inductor", mode: str | None = None) -> None:
        self.options: dict[str, Any] = {"backend": backend, "mode": mode}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Generator):
            raise ValueError(f"Compile compiles the backbone of a Generator, this is a {type(pl_module).__name__}")
        compile_blocks(pl_module.backbone, **self.options)
