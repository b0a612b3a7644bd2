"""The contract between a model of whole latents or images and its network, which reads noisy ones.

A generator describes its latents (`LatentLayout`) and is given a `DenoisingNetwork`: `DiT` or `UNet`. What the output
means, and in which units time is counted, is the generator's; `discrete_lit.diffusion.gaussian` says what there is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.execution import count_flops


@dataclass(frozen=True, kw_only=True)
class LatentLayout:
    """The latents that a generator models; it asks for a network by calling `backbone(layout)`.

    Attributes:
        channels: C.
        grid: (H, W).
        outputs: channels that the network makes: C, or 2 C with a learned variance.
        num_classes: labels lie in [0, num_classes); the null label is `num_classes`.
        context_channels: of a grid that the network is conditioned on beside the label; None without one.
        vectors: number n and width E of vectors in no spatial order that it attends to; None without any.
    """

    channels: int
    grid: tuple[int, int]
    outputs: int
    num_classes: int
    context_channels: int | None = None
    vectors: tuple[int, int] | None = None

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.num_classes


class DenoisingNetwork(nn.Module, ABC):
    """A network from noisy latents, their time and a label to a prediction for each channel and place.

    Args:
        layout: the latents.
    """

    def __init__(self, layout: LatentLayout) -> None:
        super().__init__()
        self.layout = layout
        self._flops: dict[int, int] = {}

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        time: Tensor,
        labels: Tensor,
        context: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> Tensor:
        """Map noisy latents to `(B, outputs, H, W)`.

        Args:
            x: `(B, C, H, W)`.
            time: `(B,)` float, how noisy each is, in the units that the generator chose.
            labels: `(B,)` int64 in [0, num_classes], the null label included.
            context: `(B, context_channels, h, w)`, of a layout that has one: a grid of any size, whose nearest vector
                each place is given.
            vectors: `(B, n, E)`, of a layout that has them: every place can attend to every one.

        Raises:
            ValueError: another shape, or a context or vectors where the layout has none.
        """

    @abstractmethod
    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the blocks. They are also compiled one by one."""

    def flops(self, batch: int) -> int:
        """Count the floating-point operations of a forward pass over B latents, by `count_flops`, once for each B."""
        if batch not in self._flops:
            self._flops[batch] = count_flops(self, lambda network: network.eval()._pass(batch))
        return self._flops[batch]

    def _pass(self, batch: int) -> Callable[[], Tensor]:
        layout, weight = self.layout, next(self.parameters())
        x = torch.zeros(batch, layout.channels, *layout.grid, device=weight.device, dtype=weight.dtype)
        context = None
        if layout.context_channels is not None:
            context = torch.zeros(batch, layout.context_channels, 1, 1, device=weight.device, dtype=weight.dtype)
        vectors = None if layout.vectors is None else x.new_zeros(batch, *layout.vectors)
        zeros = torch.zeros(batch, device=weight.device)
        return partial(self, x, zeros, zeros.long(), context, vectors)

    def _check_input(
        self, x: Tensor, time: Tensor, labels: Tensor, context: Tensor | None, vectors: Tensor | None
    ) -> None:
        layout = self.layout
        if tuple(x.shape[1:]) != (layout.channels, *layout.grid):
            raise ValueError(
                f"the latents have the shape {tuple(x.shape)}, this {type(self).__name__} reads "
                f"(B, {layout.channels}, {layout.grid[0]}, {layout.grid[1]})"
            )
        if time.shape != x.shape[:1] or labels.shape != x.shape[:1]:
            raise ValueError(
                f"a time and a label are needed for each of {len(x)} latents, got {tuple(time.shape)} times and "
                f"{tuple(labels.shape)} labels"
            )
        channels = None if context is None else context.shape[1]
        if channels != layout.context_channels:
            raise ValueError(f"the context has {channels} channels, the layout has {layout.context_channels}")
        shape = None if vectors is None else tuple(vectors.shape[1:])
        if shape != layout.vectors:
            raise ValueError(f"the vectors are {shape} (number, width), the layout has {layout.vectors}")


def nearest_grid(context: Tensor, grid: tuple[int, int]) -> Tensor:
    """Give each place of a grid the nearest vector of another: `(B, E, h, w)` to `(B, E, *grid)`."""
    return context if tuple(context.shape[2:]) == grid else F.interpolate(context, size=grid, mode="nearest")
