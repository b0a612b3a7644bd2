"""Parameter groups and learning-rate schedules."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import cos, pi
from typing import Any

from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_DECAYED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def configure_optimizers(
    module: LightningModule,
    optimizer: OptimizerCallable | None,
    scheduler: LRSchedulerCallable | None,
    apart: Sequence[tuple[nn.Module, float]] = (),
) -> Any:
    """Lightning's `configure_optimizers` of one optimizer and a scheduler that steps after every batch.

    Weight decay acts on the weights of linear and convolution layers alone: never on biases, gains, embeddings,
    positions, start tokens and codebooks, as in RAR and minGPT (LlamaGen and nanoGPT decay embeddings too). Decay would
    shrink the rows of a table that a batch does not touch.

    Args:
        module: what is trained.
        optimizer: from parameter groups to an optimizer.
        scheduler: from an optimizer to a scheduler.
        apart: parts of the module with parameter groups of their own, and their learning rate as a multiple of the
            optimizer's.

    Raises:
        ValueError: no optimizer was given.
    """
    if optimizer is None:
        raise ValueError(
            f"{type(module).__name__} has no optimizer: set model.init_args.optimizer, "
            "for instance {class_path: torch.optim.AdamW, init_args: {lr: 3.0e-4}}"
        )
    matrices = {id(layer.weight) for layer in module.modules() if isinstance(layer, _DECAYED)}
    separate = {id(parameter) for part, _ in apart for parameter in part.parameters()}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in separate]
    groups, factors = [], []
    for parameters, factor in [(rest, 1.0), *((list(part.parameters()), factor) for part, factor in apart)]:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        groups += [
            {"params": [parameter for parameter in trained if id(parameter) in matrices]},
            {"params": [parameter for parameter in trained if id(parameter) not in matrices], "weight_decay": 0.0},
        ]
        factors += [factor, factor]
    built = optimizer(groups)
    for group, factor in zip(built.param_groups, factors, strict=True):
        group["lr"] *= factor
    if scheduler is None:
        return built
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler(built), "interval": "step"}}


class WarmupDecay(LambdaLR, ABC):
    """Linear warm-up to the optimizer's learning rate, the full rate for a while, then a fall to a share of it.

    Args:
        optimizer: given by the configuration.
        warmup_steps: batches until the full rate.
        total_steps: batches until the final rate, which stays from there on.
        min_lr_factor: the final rate as a share of the full one, in [0, 1].
        hold_steps: batches of the full rate behind the warm-up, before the fall.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        min_lr_factor: float = 0.0,
        hold_steps: int = 0,
    ) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"warmup_steps must lie in [0, total_steps), got {warmup_steps} of {total_steps}")
        if not 0 <= hold_steps < total_steps - warmup_steps:
            raise ValueError(
                f"hold_steps must lie in [0, total_steps - warmup_steps), got {hold_steps} of "
                f"{total_steps - warmup_steps}"
            )
        if not 0 <= min_lr_factor <= 1:
            raise ValueError(f"min_lr_factor must lie in [0, 1], got {min_lr_factor}")
        first = warmup_steps + hold_steps

        def share(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = min(1.0, max(step - first, 0) / (total_steps - first))
            return min_lr_factor + (1 - min_lr_factor) * self.fall(progress)

        super().__init__(optimizer, share)

    @abstractmethod
    def fall(self, progress: float) -> float:
        """From 1 at the beginning of the fall, `progress` 0, to 0 at its end, `progress` 1."""


class WarmupCosine(WarmupDecay):
    """Linear warm-up to the optimizer's learning rate, the full rate for a while, then half a cosine to a share."""

    def fall(self, progress: float) -> float:
        return (1 + cos(pi * progress)) / 2


class WarmupLinear(WarmupDecay):
    """Linear warm-up to the optimizer's learning rate, the full rate for a while, then a line to a share (VAR)."""

    def fall(self, progress: float) -> float:
        return 1 - progress
