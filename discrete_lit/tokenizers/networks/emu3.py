"""The autoencoder of Emu3 (Wang et al., "Next-Token Prediction is All You Need", 2024), for images and clips.

    encoder: each frame by VQGAN's encoder, then halvings and residual blocks over time
    decoder: residual blocks and doublings over time, then each frame by VQGAN's decoder, with norms read off the codes

An image is a clip of as many equal frames as one grid of codes stands for, and the first frame of what is decoded. The
decoder's norms are those of MoVQ (Zheng et al., "MoVQ: Modulating Quantized Vectors for High-Fidelity Image
Generation", NeurIPS 2022), with a gain and an offset at each position.
"""

from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.images import ImageSize, height_and_width
from discrete_lit.tokenizers.networks.convolutional import Encoder
from discrete_lit.tokenizers.networks.grid_layers import Layers, Upsample
from discrete_lit.tokenizers.networks.network import Autoencoder


class Emu3Autoencoder(Autoencoder):
    """Encode and decode images, or clips `(B, C, T, H, W)`, whose grid then is `(T / frames, h, w)`.

    Args:
        code_dim: D of the codes that the decoder takes; a tokenizer gives it.
        latent_dim: width of the latents, the same.
        image_channels: C of the images.
        channels: width of the first convolution.
        multipliers: width of each resolution as a multiple of `channels`; n of them down-sample by 2^(n-1).
        blocks: residual blocks at each resolution of the encoder; the decoder's have one more.
        attention: resolutions with self-attention after each block, counted from the full one, 0; in the middle it is
            always there.
        frames: of a clip that become one grid of codes, a power of two.
        norm_groups: groups of every GroupNorm; must divide every width.

    Raises:
        ValueError: settings that do not fit together.
    """

    def __init__(
        self,
        code_dim: int,
        latent_dim: int | None = None,
        *,
        image_channels: int = 3,
        channels: int = 256,
        multipliers: Sequence[int] = (1, 2, 2, 4),
        blocks: int = 2,
        attention: Sequence[int] = (3,),
        frames: int = 4,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        if not widths or min(widths) < 1 or any(width % norm_groups for width in (channels, *widths)):
            raise ValueError(f"norm_groups={norm_groups} must divide every width of the network, got {widths}")
        if latent_dim not in (None, code_dim) or blocks < 1 or not set(attention) <= set(range(len(widths))):
            raise ValueError(
                f"latents are as wide as codes, there is at least one block, and attention={list(attention)} are "
                f"levels between 0 and {len(widths) - 1}; got latent_dim={latent_dim}, code_dim={code_dim}, "
                f"blocks={blocks}"
            )
        if frames < 1 or frames & (frames - 1):
            raise ValueError(f"frames={frames} must be a power of two")
        self.image_channels, self.frames = image_channels, frames
        self.downsampling = 2 ** (len(widths) - 1)
        self.pixels = "signed"
        layers = Layers(
            dims=2, causal=False, frames_apart=False, norm_groups=norm_groups, bias=True, shortcut="input", dropout=0.0
        )
        halvings = frames.bit_length() - 1
        self.encoder = Encoder(
            layers,
            in_channels=image_channels,
            channels=channels,
            widths=widths,
            blocks=blocks,
            attention_levels=set(attention),
            middle_blocks=2,
            middle_attention=True,
            downsampling="right",
            z_channels=code_dim,
            out_kernel=3,
            latent_dim=code_dim,
            latent_kernel=None,
        )
        self.halvings = nn.ModuleList(TimeConvolution(code_dim, (4, 3, 3), stride=2) for _ in range(halvings))
        self.encoder_time = nn.ModuleList(TimeBlock(code_dim) for _ in range(blocks))
        self.to_latents = TimeConvolution(code_dim, (3, 1, 1))
        self.from_codes = TimeConvolution(code_dim, (3, 1, 1))
        self.decoder_time = nn.ModuleList(TimeBlock(code_dim) for _ in range(blocks))
        self.doublings = nn.ModuleList(TimeConvolution(code_dim, (3, 3, 3)) for _ in range(halvings))
        self.decoder = CodeNormDecoder(
            layers,
            code_dim=code_dim,
            widths=widths,
            blocks=blocks + 1,
            attention_levels=set(attention),
            out_channels=image_channels,
        )

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    @property
    def last_encoder_layer(self) -> Tensor:
        return self.to_latents.conv.weight

    def grid(self, image_size: ImageSize) -> tuple[int, int]:
        height, width = (self._side(side) for side in height_and_width(image_size))
        return height, width

    def _side(self, size: int) -> int:
        if size < 1 or size % self.downsampling:
            raise ValueError(f"image_size={size} is not a multiple of the down-sampling {self.downsampling}")
        return size // self.downsampling

    def encode(self, images: Tensor) -> Tensor:
        for side in images.shape[-2:]:
            self._side(side)
        return self.latents(self.between(images))

    def between(self, images: Tensor) -> Tensor:
        """Encode images, or clips, to `(B, code_dim, t, h, w)`, before the last convolution over time."""
        clips = repeat(images, "b c h w -> b c t h w", t=self.frames) if images.ndim == 4 else images
        count = clips.shape[2]
        if count % self.frames:
            raise ValueError(f"a clip has {count} frames, which is no multiple of {self.frames}")
        z = rearrange(self.encoder(rearrange(clips, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=count)
        for halve in self.halvings:
            z = F.silu(halve(z))
        for block in self.encoder_time:
            z = block(z)
        return z

    def latents(self, z: Tensor) -> Tensor:
        """Make the latents of what `between` gave: `(B, code_dim, h, w)` of images, where t is 1."""
        latents = self.to_latents(z)
        return latents[:, :, 0] if latents.shape[2] == 1 else latents

    def decode(self, latents: Tensor) -> Tensor:
        image = latents.ndim == 4
        codes = latents[:, :, None] if image else latents
        count = len(codes)
        # The codes take the same way over time as what is decoded: the norms read them frame by frame.
        both = torch.cat((self.from_codes(codes), codes))
        for block in self.decoder_time:
            both = block(both)
        for convolution in self.doublings:
            both = F.silu(convolution(both.repeat_interleave(2, dim=2)))
        z, codes = (rearrange(part, "b c t h w -> (b t) c h w") for part in both.chunk(2))
        clips = rearrange(self.decoder(z, codes), "(b t) c h w -> b c t h w", b=count)
        return clips[:, :, 0] if image else clips


class TimeConvolution(nn.Module):
    """Convolve a clip; two frames of zeros stand before the first, none behind the last.

    Args:
        channels: of what comes and goes.
        kernel: along time, height and width.
        stride: along time.
    """

    def __init__(self, channels: int, kernel: tuple[int, int, int], *, stride: int = 1) -> None:
        super().__init__()
        self.padding = (*(side // 2 for side in (kernel[2], kernel[2], kernel[1], kernel[1])), 2, 0)
        self.conv = nn.Conv3d(channels, channels, kernel, stride=(stride, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, c, T, h, w) -> (B, c, T / stride, h, w)
        return self.conv(F.pad(x, self.padding))


class TimeBlock(nn.Module):
    """Add to its input BatchNorm, swish and a convolution over a clip, twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm3d(channels), nn.BatchNorm3d(channels)
        self.conv1, self.conv2 = (TimeConvolution(channels, (3, 3, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class CodeNorm(nn.Module):
    """GroupNorm with a gain and an offset at each position, read off the code there (MoVQ)."""

    def __init__(self, layers: Layers, channels: int, *, code_dim: int) -> None:
        super().__init__()
        self.norm = layers.norm(channels)
        self.gain = nn.Conv2d(code_dim, channels, 1)
        self.offset = nn.Conv2d(code_dim, channels, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:  # (B, c, h, w), (B, code_dim, h', w') -> (B, c, h, w)
        codes = F.interpolate(codes, size=x.shape[-2:], mode="nearest")
        return self.norm(x) * self.gain(codes) + self.offset(codes)


class CodeNormBlock(nn.Module):
    """Add to its input a norm of the codes, swish and a convolution, twice; a 1-wide shortcut where channels change."""

    def __init__(self, layers: Layers, channels: int, *, out_channels: int, code_dim: int) -> None:
        super().__init__()
        self.norm1 = CodeNorm(layers, channels, code_dim=code_dim)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = CodeNorm(layers, out_channels, code_dim=code_dim)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x, codes)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden, codes)))


class CodeNormAttention(nn.Module):
    """Add to its input self-attention of one head over all positions, behind a norm of the codes."""

    def __init__(self, layers: Layers, channels: int, *, code_dim: int) -> None:
        super().__init__()
        self.norm = CodeNorm(layers, channels, code_dim=code_dim)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        query, key, value = rearrange(
            self.query_key_value(self.norm(x, codes)), "b (qkv c) h w -> qkv b 1 (h w) c", qkv=3
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(rearrange(mixed, "b 1 n c -> b c n").reshape(x.shape))


class CodeNormDecoder(nn.Module):
    """Decode frames: blocks at each resolution, from the lowest up, all of whose norms read the codes."""

    def __init__(
        self,
        layers: Layers,
        *,
        code_dim: int,
        widths: Sequence[int],
        blocks: int,
        attention_levels: set[int],
        out_channels: int,
    ) -> None:
        super().__init__()

        def block(channels: int, out: int) -> CodeNormBlock:
            return CodeNormBlock(layers, channels, out_channels=out, code_dim=code_dim)

        def attention(channels: int) -> CodeNormAttention:
            return CodeNormAttention(layers, channels, code_dim=code_dim)

        current = widths[-1]
        self.conv_in = nn.Conv2d(code_dim, current, 3, padding=1)
        self.middle = nn.ModuleList((block(current, current), attention(current), block(current, current)))
        self.levels = nn.ModuleList()
        for level in reversed(range(len(widths))):
            width = widths[level]
            made = nn.ModuleDict()
            made["blocks"] = nn.ModuleList(block(current if number == 0 else width, width) for number in range(blocks))
            made["attention"] = nn.ModuleList(
                attention(width) for _ in range(blocks if level in attention_levels else 0)
            )
            made["resample"] = nn.Identity() if level == 0 else Upsample(layers, width)
            self.levels.append(made)
            current = width
        self.norm_out = CodeNorm(layers, current, code_dim=code_dim)
        self.conv_out = nn.Conv2d(current, out_channels, 3, padding=1)

    def forward(self, z: Tensor, codes: Tensor) -> Tensor:  # (B, code_dim, h, w) twice -> (B, C, H, W)
        x = self.conv_in(z)
        for module in self.middle:
            x = module(x, codes)
        for level in self.levels:
            parts = cast(nn.ModuleDict, level)
            attention = cast(nn.ModuleList, parts["attention"])
            for number, block in enumerate(cast(nn.ModuleList, parts["blocks"])):
                x = block(x, codes)
                if len(attention):
                    x = attention[number](x, codes)
            x = parts["resample"](x)
        return self.conv_out(F.silu(self.norm_out(x, codes)))
