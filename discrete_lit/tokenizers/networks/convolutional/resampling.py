"""Halving and doubling the grid.

Where time is causal, 1 + 2t frames become 1 + t and 1 + t become 1 + 2t: the first frame stays alone.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.networks.convolutional.layers import CONVOLUTIONS, Layers, repeat_first_frame

Downsampling = Literal["right", "symmetric", "average"]
Upsampling = Literal["nearest", "depth_to_space"]


class Downsample(nn.Module):
    """A 3-wide convolution of stride 2 on a grid padded by one.

    `"right"` pads the end of each axis, as taming and TensorFlow's "same" padding do; `"symmetric"` both ends, of which
    an even size uses the first.
    """

    def __init__(self, layers: Layers, channels: int, padding: Literal["right", "symmetric"]) -> None:
        super().__init__()
        self.causal = layers.causal
        axis = (0, 1) if padding == "right" else (1, 1)
        self.padding = axis * (layers.dims - layers.causal)
        self.conv = CONVOLUTIONS[layers.dims](channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, *grid / 2)
        return self.conv(F.pad(repeat_first_frame(x, 2) if self.causal else x, self.padding))


class AveragePool(nn.Module):
    """The mean of each two, four or eight neighbours."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.causal = layers.causal
        self.pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[layers.dims]

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, *grid / 2)
        return self.pool(repeat_first_frame(x, 1) if self.causal else x, 2)


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a 3-wide convolution."""

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.causal = layers.causal
        self.conv = layers.convolution(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, 2 * *grid)
        larger = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(larger[:, :, 1:] if self.causal else larger)


class DepthToSpace(nn.Module):
    """A 3-wide convolution to 2^dims as many channels, which become the neighbours of a grid of twice the size.

    The channels are ordered (place in the block, channel): depth-column-row, unlike `PixelShuffle`.
    """

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.causal = layers.causal
        self.dims = layers.dims
        self.conv = layers.convolution(channels, channels * 2**layers.dims, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, 2 * *grid)
        deep = self.conv(x)
        grid, axes = deep.shape[2:], range(self.dims)
        blocks = deep.reshape(len(deep), *(2,) * self.dims, -1, *grid)  # (B, 2, ..., c, *grid)
        place = [axis + side for axis in axes for side in (2 + self.dims, 1)]  # grid axis, then its two neighbours
        larger = blocks.permute(0, 1 + self.dims, *place).reshape(len(deep), -1, *(2 * side for side in grid))
        return larger[:, :, 1:] if self.causal else larger


def downsample(kind: Downsampling, layers: Layers, channels: int) -> nn.Module:
    return AveragePool(layers) if kind == "average" else Downsample(layers, channels, kind)


def upsample(kind: Upsampling, layers: Layers, channels: int) -> nn.Module:
    return {"nearest": Upsample, "depth_to_space": DepthToSpace}[kind](layers, channels)
