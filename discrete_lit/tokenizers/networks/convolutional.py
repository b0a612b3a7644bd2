"""The convolutional autoencoder of VQGAN (Esser et al., "Taming Transformers", 2021, table 7)."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.networks.autoencoder import Autoencoder


class ResidualBlock(nn.Module):
    """GroupNorm, swish, 3x3 convolution, twice; a 1x1 shortcut where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, in, h, w) -> (B, out, h, w)
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.shortcut(x) + hidden


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, with 1x1 projections."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, c, h, w) -> (B, c, h, w)
        batch, channels, height, width = x.shape
        projected = self.query_key_value(self.norm(x)).reshape(batch, 3, 1, channels, height * width)
        query, key, value = projected.transpose(3, 4).unbind(1)  # (B, 1, hw, c)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.transpose(2, 3).reshape(x.shape))


class Downsample(nn.Module):
    """3x3 convolution of stride 2 on an image padded by one at the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, c, h, w) -> (B, c, h/2, w/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, c, h, w) -> (B, c, 2h, 2w)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvAutoencoder(Autoencoder):
    """Residual blocks at each resolution, one halving between two resolutions.

    Args:
        code_dim: D of the codes that the decoder takes; a tokenizer gives it.
        latent_dim: width of the encoder's latents; `code_dim` by default. A tokenizer gives it.
        in_channels: C of the images.
        channels: width at full resolution.
        multipliers: width of each resolution as a multiple of `channels`; n of them make a 2^(n-1)x down-sampling.
        blocks: residual blocks at each resolution of the encoder; the decoder has one more, as in the paper.
        attention: self-attention after each block of the lowest resolution and in the middle.
        norm_groups: groups of every GroupNorm; must divide every width.
    """

    def __init__(
        self,
        code_dim: int,
        latent_dim: int | None = None,
        in_channels: int = 3,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        attention: bool = True,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        latent_dim = code_dim if latent_dim is None else latent_dim
        widths = [channels * multiplier for multiplier in multipliers]
        if not widths or any(width % norm_groups for width in widths):
            raise ValueError(f"norm_groups={norm_groups} must divide every width of the network, got {widths}")
        self.in_channels = in_channels
        self.downsampling = 2 ** (len(widths) - 1)
        lowest = widths[-1]

        encoder: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
        current = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            for _ in range(blocks):
                encoder.append(ResidualBlock(current, width, norm_groups))
                current = width
                if last and attention:
                    encoder.append(SpatialAttention(width, norm_groups))
            if not last:
                encoder.append(Downsample(width))
        encoder += [
            *self._middle(lowest, attention, norm_groups),
            nn.GroupNorm(norm_groups, lowest, eps=1e-6),
        ]
        encoder += [nn.SiLU(), nn.Conv2d(lowest, latent_dim, 3, padding=1), nn.Conv2d(latent_dim, latent_dim, 1)]
        self.encoder = nn.Sequential(*encoder)

        decoder: list[nn.Module] = [
            nn.Conv2d(code_dim, code_dim, 1),
            nn.Conv2d(code_dim, lowest, 3, padding=1),
        ]
        decoder += self._middle(lowest, attention, norm_groups)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                decoder.append(ResidualBlock(current, width, norm_groups))
                current = width
                if level == len(widths) - 1 and attention:
                    decoder.append(SpatialAttention(width, norm_groups))
            if level > 0:
                decoder.append(Upsample(width))
        decoder += [
            nn.GroupNorm(norm_groups, current, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(current, in_channels, 3, padding=1),
        ]
        self.decoder = nn.Sequential(*decoder)

    @property
    def last_layer(self) -> Tensor:
        return cast(nn.Conv2d, self.decoder[-1]).weight

    @staticmethod
    def _middle(width: int, attention: bool, norm_groups: int) -> list[nn.Module]:
        between = [SpatialAttention(width, norm_groups)] if attention else []
        return [ResidualBlock(width, width, norm_groups), *between, ResidualBlock(width, width, norm_groups)]

    def grid(self, image_size: int) -> tuple[int, ...]:
        if image_size < 1 or image_size % self.downsampling:
            raise ValueError(f"image_size={image_size} is not a multiple of the down-sampling {self.downsampling}")
        return (image_size // self.downsampling,) * 2

    def encode(self, images: Tensor) -> Tensor:
        for side in images.shape[2:]:
            self.grid(side)
        # The memory layout that oneDNN's and cuDNN's bf16 convolutions want.
        return self.encoder(images.contiguous(memory_format=torch.channels_last))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents.contiguous(memory_format=torch.channels_last))
