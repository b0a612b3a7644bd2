"""What the encoder and the decoder are made of: convolution, normalisation, residual block, attention."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Layers:
    """How every layer of a network is made."""

    dims: int
    """Axes of the grid: 1, 2 or 3. Of three, the first is time."""
    causal: bool
    """No frame sees a later one."""
    norm_groups: int
    bias: bool
    """Of the convolutions inside residual blocks."""
    shortcut: Literal["input", "output"]

    def convolution(self, in_channels: int, out_channels: int, kernel: int, bias: bool = True) -> nn.Module:
        """Of stride 1, to a grid of the same size."""
        kind = CausalConvolution if self.causal else CONVOLUTIONS[self.dims]
        return kind(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)

    def norm(self, channels: int, affine: bool = True) -> nn.Module:
        kind = FrameGroupNorm if self.causal else nn.GroupNorm
        return kind(self.norm_groups, channels, eps=1e-6, affine=affine)


def frames_as_batch(x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B T, C, H, W)
    return x.transpose(1, 2).flatten(0, 1)


def batch_as_frames(x: Tensor, batch: int) -> Tensor:  # (B T, C, H, W) -> (B, C, T, H, W)
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def repeat_first_frame(x: Tensor, count: int) -> Tensor:
    """Put `count` copies of the first frame before a clip `(B, C, T, H, W)`.

    A clip starts as if it had stood still before, so that a first frame is encoded as an image of its own.
    """
    return F.pad(x, (0, 0, 0, 0, count, 0), mode="replicate") if count else x


class CausalConvolution(nn.Conv3d):
    """A 3-D convolution that looks back in time only (Yu et al., "Language Model Beats Diffusion", 2024, sec. 3.2)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, padding: int = 0, **options: bool | int
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, padding, padding), **options)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:  # (B, in, T, H, W) -> (B, out, T, H, W)
        return super().forward(repeat_first_frame(input, self.kernel_size[0] - 1))


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm of every frame by itself: statistics over a clip would tell the first frames of the last."""

    def forward(self, input: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C, T, H, W)
        return batch_as_frames(super().forward(frames_as_batch(input)), len(input))


class ResidualBlock(nn.Module):
    """GroupNorm, swish, 3-wide convolution, twice; a 1-wide shortcut where the channels change.

    `shortcut="output"` is MaskGIT's: where the channels change, the shortcut reads what the two convolutions gave, and
    the block's input is not added.
    """

    def __init__(self, layers: Layers, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = layers.norm(in_channels)
        self.conv1 = layers.convolution(in_channels, out_channels, 3, layers.bias)
        self.norm2 = layers.norm(out_channels)
        self.conv2 = layers.convolution(out_channels, out_channels, 3, layers.bias)
        self.shortcut = nn.Identity()
        self.shortcut_of_output = in_channels != out_channels and layers.shortcut == "output"
        if in_channels != out_channels:
            shortcut_channels = out_channels if self.shortcut_of_output else in_channels
            self.shortcut = layers.convolution(shortcut_channels, out_channels, 1, layers.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, in, *grid) -> (B, out, *grid)
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.shortcut(hidden if self.shortcut_of_output else x) + hidden


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, of each frame where time is causal, with 1-wide projections."""

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.frames_apart = layers.causal
        self.norm = layers.norm(channels)
        self.query_key_value = layers.convolution(channels, 3 * channels, 1)
        self.out = layers.convolution(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, *grid)
        projected = self.query_key_value(self.norm(x))
        projected = frames_as_batch(projected) if self.frames_apart else projected
        query, key, value = projected.flatten(2).unflatten(1, (3, 1, -1)).transpose(3, 4).unbind(1)  # (B, 1, N, c)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(2, 3).flatten(1, 2)  # (B, c, N)
        if self.frames_apart:
            return x + self.out(batch_as_frames(mixed.unflatten(2, x.shape[3:]), len(x)))
        return x + self.out(mixed.reshape(x.shape))


class AdaptiveNorm(nn.Module):
    """GroupNorm whose gain and offset are read off the codes (Yu et al., 2024, sec. 3.2).

    The gain comes from the deviation over the grid, with Bessel's correction, of each channel of the codes; the offset
    from their mean.
    """

    def __init__(self, layers: Layers, channels: int, code_dim: int) -> None:
        super().__init__()
        self.norm = layers.norm(channels, affine=False)
        self.gain = nn.Linear(code_dim, channels)
        self.offset = nn.Linear(code_dim, channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:  # (B, c, *grid), (B, code_dim, *lowest) -> (B, c, *grid)
        positions = codes.flatten(2)
        gain = self.gain((positions.var(dim=2) + 1e-6).sqrt())
        offset = self.offset(positions.mean(dim=2))
        shape = (*gain.shape, *(1,) * (x.dim() - 2))
        return gain.reshape(shape) * self.norm(x) + offset.reshape(shape)
