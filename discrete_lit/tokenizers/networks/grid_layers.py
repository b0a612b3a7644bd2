"""Layers of convolutional autoencoders on grids of one to three axes, and how they halve and double a grid.

`Layers` makes convolutions and norms. Of three axes the first may be a causal time (MAGVIT-v2: Yu et al., "Language
Model Beats Diffusion: Tokenizer is Key to Visual Generation", 2024, sec. 3.2): then 1 + 2t frames are halved to 1 + t
and doubled back, so that the first frame stays alone. A level may also leave time as it is, and halve the rest.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Downsampling = Literal["right", "symmetric", "average"]
Upsampling = Literal["nearest", "depth_to_space"]
ClipStart = Literal["repeat", "zeros"]
"""The frames that causal convolutions see before the first one: copies of it, or zeros."""

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The settings that every layer of a network has in common."""

    dims: int
    """Axes of the grid: 1, 2 or 3. Of three, the first is time."""
    causal: bool
    """Convolutions and halvings see no later frame."""
    frames_apart: bool
    """Norms and attention see one frame each."""
    norm_groups: int
    """Groups of every GroupNorm."""
    bias: bool
    """The convolutions inside residual blocks have one."""
    shortcut: Literal["input", "output"]
    """The input of a residual block's shortcut where the channels change."""
    dropout: float
    """The probability of dropout of the hidden units of residual blocks."""
    clip_start: ClipStart = "repeat"
    """The frames before the first one, where time is causal."""

    def convolution(self, in_channels: int, out_channels: int, kernel: int, bias: bool = True) -> nn.Module:
        """Make a convolution of stride 1, to a grid of the same size."""
        if self.causal:
            return CausalConvolution(in_channels, out_channels, kernel, bias=bias, start=self.clip_start)
        return CONVOLUTIONS[self.dims](in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)

    def norm(self, channels: int, affine: bool = True) -> nn.Module:
        """Make a GroupNorm, of each frame by itself where frames are apart."""
        kind = FrameGroupNorm if self.frames_apart else nn.GroupNorm
        return kind(self.norm_groups, channels, eps=1e-6, affine=affine)


# Halving and doubling the grid.


def downsample(kind: Downsampling, layers: Layers, channels: int, *, time: bool = True) -> nn.Module:
    """Make the layer that halves the grid; with `time=False`, all axes but the first of three."""
    if kind == "average":
        return AveragePool(layers, time=time)
    return Downsample(layers, channels, padding=kind, time=time)


def upsample(kind: Upsampling, layers: Layers, channels: int, *, time: bool = True) -> nn.Module:
    """Make the layer that doubles the grid; with `time=False`, all axes but the first of three."""
    return {"nearest": Upsample, "depth_to_space": DepthToSpace}[kind](layers, channels, time=time)


def _factors(layers: Layers, time: bool) -> tuple[int, ...]:
    """By how much each axis shrinks or grows."""
    return tuple(1 if layers.dims == 3 and axis == 0 and not time else 2 for axis in range(layers.dims))


class Downsample(nn.Module):
    """Halve the grid by a 3-wide convolution of stride 2 on a grid padded by one.

    `"right"` pads the end of each axis, as taming and TensorFlow's "same" padding do; `"symmetric"` both ends, of which
    an even size uses the first. Time that stays as it is is padded at both ends, or before its start where it is
    causal.
    """

    def __init__(
        self, layers: Layers, channels: int, *, padding: Literal["right", "symmetric"], time: bool = True
    ) -> None:
        super().__init__()
        self.causal = layers.causal
        self.start: ClipStart = layers.clip_start
        axis = (0, 1) if padding == "right" else (1, 1)
        self.padding = axis * (layers.dims - layers.causal)
        if layers.dims == 3 and not (time or layers.causal):
            self.padding = (*self.padding[:-2], 1, 1)
        self.conv = CONVOLUTIONS[layers.dims](channels, channels, 3, stride=_factors(layers, time))

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, *grid / 2)
        return self.conv(F.pad(before_first_frame(x, 2, self.start) if self.causal else x, self.padding))


class AveragePool(nn.Module):
    """Halve the grid by the mean of each two, four or eight neighbours."""

    def __init__(self, layers: Layers, *, time: bool = True) -> None:
        super().__init__()
        self.missing = int(layers.causal and time)
        self.start: ClipStart = layers.clip_start
        self.factors = _factors(layers, time)
        self.pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[layers.dims]

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, *grid / 2)
        return self.pool(before_first_frame(x, self.missing, self.start), self.factors)


class Upsample(nn.Module):
    """Double the grid by nearest neighbour, then a 3-wide convolution."""

    def __init__(self, layers: Layers, channels: int, *, time: bool = True) -> None:
        super().__init__()
        self.causal = layers.causal and time
        self.factors = [float(factor) for factor in _factors(layers, time)]
        self.conv = layers.convolution(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, 2 * *grid)
        larger = F.interpolate(x, scale_factor=self.factors, mode="nearest")
        return self.conv(larger[:, :, 1:] if self.causal else larger)


DEPTH_TO_SPACE = {
    1: "b (i c) l -> b c (l i)",
    2: "b (i j c) h w -> b c (h i) (w j)",
    3: "b (i j k c) t h w -> b c (t i) (h j) (w k)",
}


class DepthToSpace(nn.Module):
    """Double the grid by a 3-wide convolution to 2^dims as many channels, which become neighbours.

    The channels are ordered (neighbour, channel): depth-column-row, unlike `PixelShuffle`. Of the two frames that the
    first one becomes the second is kept; in Open-MAGVIT2, whose clips start with zeros, the first.
    """

    def __init__(self, layers: Layers, channels: int, *, time: bool = True) -> None:
        super().__init__()
        self.dims = layers.dims
        self.factors = dict(zip("ijk", _factors(layers, time), strict=False))
        self.conv = layers.convolution(channels, channels * prod(self.factors.values()), 3)
        self.dropped: int | None = None
        if layers.causal and time:
            self.dropped = 0 if layers.clip_start == "repeat" else 1

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, 2 * *grid)
        larger = rearrange(self.conv(x), DEPTH_TO_SPACE[self.dims], **self.factors)
        if self.dropped is None:
            return larger
        return larger[:, :, 1:] if self.dropped == 0 else torch.cat((larger[:, :, :1], larger[:, :, 2:]), dim=2)


# Clips.


def frames_as_batch(x: Tensor) -> Tensor:
    """Make every frame a row of the batch."""
    return rearrange(x, "b c t h w -> (b t) c h w")


def batch_as_frames(x: Tensor, batch: int) -> Tensor:
    """Make clips of `batch` equal parts of the rows: the inverse of `frames_as_batch`."""
    return rearrange(x, "(b t) c h w -> b c t h w", b=batch)


def before_first_frame(x: Tensor, count: int, start: ClipStart) -> Tensor:
    """Put `count` frames before a clip `(B, C, T, H, W)`: copies of the first, or zeros.

    With copies a clip starts as if it had stood still before, and a still one has still latents.
    """
    if not count:
        return x
    return F.pad(x, (0, 0, 0, 0, count, 0), mode="replicate" if start == "repeat" else "constant")


class CausalConvolution(nn.Conv3d):
    """Convolve clips, looking back in time only (MAGVIT-v2: Yu et al., 2024, sec. 3.2).

    Args:
        in_channels, out_channels: channels.
        kernel: frames, height and width of the kernel, or one size for all three; the grid of each frame keeps its size
            where the kernel's is odd.
        stride: of the three axes.
        bias: whether it has one.
        start: the frames before the first one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int, int],
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        bias: bool = True,
        start: ClipStart = "repeat",
    ) -> None:
        size = (kernel, kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, (size[1] - 1) // 2, (size[2] - 1) // 2)
        super().__init__(in_channels, out_channels, size, stride=stride, padding=padding, bias=bias)
        self.start: ClipStart = start

    def forward(self, input: Tensor) -> Tensor:  # (B, in, T, H, W) -> (B, out, T', H', W')
        return super().forward(before_first_frame(input, self.kernel_size[0] - 1, self.start))


class FrameGroupNorm(nn.GroupNorm):
    """Normalise every frame by itself: statistics over a clip would tell the first frames of the last."""

    def forward(self, input: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C, T, H, W)
        return batch_as_frames(super().forward(frames_as_batch(input)), len(input))
