"""Images to latents."""

from collections.abc import Collection, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.networks.convolutional.layers import Layers, ResidualBlock, SpatialAttention
from discrete_lit.tokenizers.networks.convolutional.resampling import Downsampling, downsample


class Level(nn.Module):
    """Residual blocks at one resolution, each with attention after it or none, then a change of resolution or none."""

    def __init__(
        self, layers: Layers, in_channels: int, channels: int, blocks: int, attention: bool, resample: nn.Module | None
    ) -> None:
        super().__init__()
        widths = [in_channels, *[channels] * blocks]
        self.blocks = nn.ModuleList(ResidualBlock(layers, widths[i], widths[i + 1]) for i in range(blocks))
        self.attention = nn.ModuleList(SpatialAttention(layers, channels) for _ in range(blocks if attention else 0))
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: Tensor) -> Tensor:  # (B, in_channels, *grid) -> (B, channels, *resampled)
        for place, block in enumerate(self.blocks):
            x = block(x)
            if self.attention:
                x = self.attention[place](x)
        return self.resample(x)


def middle(layers: Layers, channels: int, blocks: int, attention: bool) -> nn.Sequential:
    """Residual blocks at the lowest resolution, with attention after the first."""
    made: list[nn.Module] = [ResidualBlock(layers, channels, channels) for _ in range(blocks)]
    if attention:
        made.insert(1, SpatialAttention(layers, channels))
    return nn.Sequential(*made)


class Encoder(nn.Module):
    """Residual blocks at each resolution, one halving between two resolutions."""

    def __init__(
        self,
        layers: Layers,
        in_channels: int,
        channels: int,
        widths: Sequence[int],
        blocks: int,
        attention_levels: Collection[int],
        middle_blocks: int,
        middle_attention: bool,
        downsampling: Downsampling,
        z_channels: int,
        out_kernel: int,
        latent_dim: int,
        latent_kernel: int | None,
    ) -> None:
        super().__init__()
        self.conv_in = layers.convolution(in_channels, channels, 3, layers.bias)
        self.levels = nn.ModuleList()
        current = channels
        for level, width in enumerate(widths):
            halve = downsample(downsampling, layers, width) if level < len(widths) - 1 else None
            self.levels.append(Level(layers, current, width, blocks, level in attention_levels, halve))
            current = width
        self.middle = middle(layers, current, middle_blocks, middle_attention)
        self.norm_out = layers.norm(current)
        self.conv_out = layers.convolution(current, z_channels, out_kernel)
        self.to_latents = nn.Identity()
        if latent_kernel is not None:
            self.to_latents = layers.convolution(z_channels, latent_dim, latent_kernel)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, *size) -> (B, latent_dim, *grid)
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)
        return self.to_latents(self.conv_out(F.silu(self.norm_out(x))))
