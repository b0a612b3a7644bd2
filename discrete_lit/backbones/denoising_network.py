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
from discrete_lit.backbones.layers import Linear


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
        context_dim: E, width of the vectors of a text that it attends to; None where it is given none.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, layout: LatentLayout, *, context_dim: int | None = None) -> None:
        super().__init__()
        if context_dim is not None and context_dim < 1:
            raise ValueError(f"context_dim must be at least 1, got {context_dim}")
        self.layout = layout
        self.context_dim = context_dim
        self._flops: dict[tuple[int, int], int] = {}

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        time: Tensor,
        labels: Tensor,
        context: Tensor | None = None,
        vectors: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Map noisy latents to `(B, outputs, H, W)`.

        Args:
            x: `(B, C, H, W)`.
            time: `(B,)` float, how noisy each is, in the units that the generator chose.
            labels: `(B,)` int64 in [0, num_classes], the null label included.
            context: `(B, context_channels, h, w)`, of a layout that has one: a grid of any size, whose nearest vector
                each place is given.
            vectors: `(B, n, E)`, of a layout that has them: every place can attend to every one.
            text: `(B, M, context_dim)`, the context of a `Condition`, of a network that attends to one; M may change
                from call to call.
            text_mask: `(B, M)` bool, which vectors of the text are valid; all if None. A sequence without a valid one
                attends to a learned vector in their place.

        Raises:
            ValueError: another shape; a context or vectors where the layout has none; or a text that the network does
                not read, or none where it does.
        """

    @abstractmethod
    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the blocks. They are also compiled one by one."""

    def flops(self, batch: int, text: int = 0) -> int:
        """Count the floating-point operations of a forward pass over B latents, by `count_flops`, once for each shape.

        Args:
            batch: B.
            text: M, vectors of the text of each.
        """
        key = batch, text
        if key not in self._flops:
            self._flops[key] = count_flops(self, lambda network: network.eval()._pass(*key))
        return self._flops[key]

    def _pass(self, batch: int, text: int) -> Callable[[], Tensor]:
        layout, weight = self.layout, next(self.parameters())
        x = torch.zeros(batch, layout.channels, *layout.grid, device=weight.device, dtype=weight.dtype)
        context = None
        if layout.context_channels is not None:
            context = torch.zeros(batch, layout.context_channels, 1, 1, device=weight.device, dtype=weight.dtype)
        vectors = None if layout.vectors is None else x.new_zeros(batch, *layout.vectors)
        zeros = torch.zeros(batch, device=weight.device)
        given = mask = None
        if self.context_dim is not None:
            given, mask = x.new_zeros(batch, text, self.context_dim), zeros.bool()[:, None].expand(-1, text)
        return partial(self, x, zeros, zeros.long(), context, vectors, given, mask)

    def _check_input(
        self,
        x: Tensor,
        time: Tensor,
        labels: Tensor,
        context: Tensor | None,
        vectors: Tensor | None,
        text: Tensor | None,
        text_mask: Tensor | None,
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
        if (None if text is None else text.shape[-1]) != self.context_dim or (text is not None and text.ndim != 3):
            raise ValueError(
                f"the text is {None if text is None else tuple(text.shape)}, this {type(self).__name__} "
                + ("was made without context_dim" if self.context_dim is None else f"reads (B, M, {self.context_dim})")
            )
        if text_mask is not None and (text is None or text_mask.shape != text.shape[:2]):
            raise ValueError(
                f"the text_mask is {tuple(text_mask.shape)} for a text of {None if text is None else tuple(text.shape)}"
            )


def nearest_grid(context: Tensor, grid: tuple[int, int]) -> Tensor:
    """Give each place of a grid the nearest vector of another: `(B, E, h, w)` to `(B, E, *grid)`."""
    return context if tuple(context.shape[2:]) == grid else F.interpolate(context, size=grid, mode="nearest")


class TextInFront(nn.Module):
    """Embed the vectors of a text, and a learned one that stands for no text, to be put beside other vectors.

    Args:
        context_dim: E, of the text's vectors.
        width: D, of what they become.
    """

    def __init__(self, context_dim: int, width: int) -> None:
        super().__init__()
        self.embedding = Linear(context_dim, width)
        self.null = nn.Parameter(torch.zeros(1, context_dim))

    def forward(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map `(B, M, E)` to `(B, M + 1, D)`, the null vector last, and say which of these are seen: `(B, M + 1)` bool.

        Args:
            text: the vectors.
            mask: `(B, M)` bool, which are valid; all if None. The null vector is seen where none is.
        """
        rows = torch.cat((text.to(self.null.dtype), self.null.expand(len(text), 1, -1)), dim=1)
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return self.embedding(rows), torch.cat((mask, ~mask.any(dim=1, keepdim=True)), dim=1)
