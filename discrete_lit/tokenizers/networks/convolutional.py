"""The convolutional autoencoder of VQGAN, in one to three dimensions, and its variants.

VQGAN: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, table 7. Depth-to-space, adaptive
norms and causal time are MAGVIT-v2's: Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual
Generation", 2024. `ConvAutoencoder` lists the settings of LlamaGen, VAR, Open-MAGVIT2, IBQ, MaskGIT and MaskBit.

    encoder: conv_in -> levels (residual blocks, attention, halving) -> middle -> norm, conv_out -> to_latents
    decoder: from_codes -> conv_in -> middle -> levels (residual blocks, attention, doubling) -> norm, conv_out
"""

from collections.abc import Collection, Sequence
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.images import ImageSize, clip_size, height_and_width
from discrete_lit.core.modules import at_least_float32
from discrete_lit.tokenizers.networks.grid_layers import (
    ClipStart,
    Downsampling,
    Layers,
    Upsampling,
    downsample,
    frames_as_batch,
    upsample,
)
from discrete_lit.tokenizers.networks.network import Autoencoder


class ConvAutoencoder(Autoencoder):
    """Encode and decode images by convolutions: residual blocks at each resolution, one halving between two.

    The defaults are VQGAN's. LlamaGen's has `z_channels: 256`; VAR's `channels: 160` and `latent_kernel: 3`;
    Open-MAGVIT2's `blocks: 4`, `decoder_blocks: 4`, `middle_blocks: 4`, `attention: false`, `bias: false`,
    `encoder_out_kernel: 1`, `latent_kernel: null`, `downsampling: symmetric`, `upsampling: depth_to_space` and
    `adaptive_norm: true`; IBQ's `blocks: 4`; MaskGIT's `decoder_blocks: 2`, `attention: false`, `bias: false`,
    `shortcut: output`, `encoder_out_kernel: 1`, `latent_kernel: null`, `downsampling: average` and `pixels: unit`;
    MaskBit's the same with `downsampling: right`; KL-16's `decoder_attention: []`.

    Args:
        code_dim: D of the codes that the decoder takes; a tokenizer gives it.
        latent_dim: width of the encoder's latents; `code_dim` by default. A tokenizer gives it.
        image_channels: C of the images.
        out_channels: of the decoder's outputs, where a loss takes more than the pixels themselves; C by default.
        channels: width of the first convolution.
        multipliers: width of each resolution as a multiple of `channels`; n of them down-sample by 2^(n-1).
        decoder_multipliers: the decoder's, as many; `multipliers` by default.
        blocks: residual blocks at each resolution of the encoder.
        decoder_blocks: at each resolution of the decoder; one more than in the encoder by default, as in the paper.
        middle_blocks: residual blocks at the lowest resolution, after the encoder's and before the decoder's levels.
        attention: self-attention after each block of these resolutions, counted from the full one, 0, and in the
            middle; true is the lowest resolution and the middle, `[]` the middle alone, false none at all.
        decoder_attention: the decoder's; `attention` by default.
        norm_groups: groups of every GroupNorm; must divide every width.
        bias: of the convolutions inside residual blocks and of the encoder's first one. The others always have it.
        shortcut: where a block's channels change, its shortcut reads the block's input, or its output (MaskGIT's).
        z_channels: width between the encoder's last convolution and the one to the latents, and between the one from
            the codes and the decoder's first; `latent_dim` and `code_dim` by default.
        encoder_out_kernel: of the encoder's last convolution.
        latent_kernel: of the convolutions to the latents and from the codes; null for none.
        downsampling: a convolution of stride 2 padded at the right and bottom alone or on all sides, or an average.
        upsampling: nearest neighbour and a convolution, or a convolution whose channels become neighbours.
        adaptive_norm: before each resolution of the decoder, GroupNorm with gain and offset read off the codes.
        dropout: of the hidden units of each residual block, in training; 0.05 in vaex.
        pixels: what encoder and decoder work on, `"signed"` for [-1, 1] or `"unit"` for [0, 1]; images at this class's
            boundary are in [-1, 1] always.
        dims: axes of the images: 1 for signals (B, C, L), 2, or 3 for volumes and clips (B, C, T, H, W).
        causal: with three axes, no frame sees a later one: convolutions look back only, norms and attention see one
            frame. The first frame is alone, so 1 + t frames become 1 + t / 2^k with k halvings of time, and an image
            (B, C, H, W) is coded as a clip of one frame. `"convolutions"`: norms and attention see all frames, so that
            the codes of a frame do depend on later ones, as in Open-MAGVIT2's published video tokenizer.
        frames: with three axes, T, for `grid`, where its size does not say it; as many as the side of square images by
            default. Causal networks need it there.
        time_levels: with three axes, the levels behind which time is halved too, counted from the full resolution, 0;
            all n-1 by default. Open-MAGVIT2's are `[1, 2]` of 0 to 2: 17 x 128 x 128 becomes 5 x 16 x 16.
        clip_start: with a causal time, what stands before the first frame: copies of it, or zeros (Open-MAGVIT2).
        with_decoder: false for an encoder alone, which makes tokens and no images (Chameleon's port).

    Raises:
        ValueError: settings that do not fit together.
    """

    def __init__(
        self,
        code_dim: int,
        latent_dim: int | None = None,
        *,
        image_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_multipliers: Sequence[int] | None = None,
        blocks: int = 2,
        decoder_blocks: int | None = None,
        middle_blocks: int = 2,
        attention: bool | Sequence[int] = True,
        decoder_attention: bool | Sequence[int] | None = None,
        norm_groups: int = 32,
        bias: bool = True,
        shortcut: Literal["input", "output"] = "input",
        z_channels: int | None = None,
        encoder_out_kernel: Literal[1, 3] = 3,
        latent_kernel: Literal[1, 3] | None = 1,
        downsampling: Downsampling = "right",
        upsampling: Upsampling = "nearest",
        adaptive_norm: bool = False,
        dropout: float = 0.0,
        pixels: Literal["signed", "unit"] = "signed",
        dims: Literal[1, 2, 3] = 2,
        causal: bool | Literal["convolutions"] = False,
        frames: int | None = None,
        time_levels: Sequence[int] | None = None,
        clip_start: ClipStart = "repeat",
        with_decoder: bool = True,
    ) -> None:
        super().__init__()
        latent_dim = code_dim if latent_dim is None else latent_dim
        decoder_multipliers = multipliers if decoder_multipliers is None else decoder_multipliers
        decoder_attention = attention if decoder_attention is None else decoder_attention
        widths = [channels * multiplier for multiplier in multipliers]
        decoder_widths = [channels * multiplier for multiplier in decoder_multipliers]
        every_width = [channels, *widths, *decoder_widths]
        if not widths or min(every_width) < 1 or norm_groups < 1 or any(width % norm_groups for width in every_width):
            raise ValueError(
                f"norm_groups={norm_groups} must divide every width of the network, each at least 1, got "
                f"{sorted(set(every_width)) if widths else []}"
            )
        if len(widths) != len(decoder_widths):
            raise ValueError(
                f"decoder_multipliers={list(decoder_multipliers)} must be as many as multipliers={list(multipliers)}"
            )
        if latent_kernel is None and z_channels is not None:
            raise ValueError(f"z_channels={z_channels} needs a latent_kernel: without one the latents are z")
        if (causal or not (frames is None and time_levels is None and clip_start == "repeat")) and dims != 3:
            raise ValueError(f"causal, frames, time_levels and clip_start need dims=3, got dims={dims}")
        if causal not in (True, False, "convolutions") or clip_start not in ("repeat", "zeros"):
            raise ValueError(
                f"causal={causal!r} must be true, false or 'convolutions', and clip_start={clip_start!r} 'repeat' or "
                "'zeros'"
            )
        halvings = range(len(widths) - 1)
        halves_time = set(halvings if time_levels is None else time_levels)
        if not halves_time <= set(halvings):
            raise ValueError(
                f"time_levels={sorted(halves_time)} must be among the levels that are halved, {list(halvings)}"
            )
        if not min(blocks, middle_blocks, 1 if decoder_blocks is None else decoder_blocks) >= 1:
            raise ValueError(f"there must be at least one block: {blocks=}, {decoder_blocks=}, {middle_blocks=}")
        self.image_channels = image_channels
        self.dims = dims
        self.modality = "video" if dims == 3 else "image"
        self.causal = bool(causal)
        self.frames = frames
        self.pixels = pixels
        self.downsampling = 2 ** (len(widths) - 1)
        self.time_downsampling = 2 ** len(halves_time)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout of ConvAutoencoder must lie in [0, 1), got {dropout}")
        layers = Layers(
            dims=dims,
            causal=self.causal,
            frames_apart=causal is True,
            norm_groups=norm_groups,
            bias=bias,
            shortcut=shortcut,
            dropout=dropout,
            clip_start=clip_start,
        )
        self.encoder = Encoder(
            layers,
            in_channels=image_channels,
            channels=channels,
            widths=widths,
            blocks=blocks,
            attention_levels=_levels("attention", attention, len(widths)),
            middle_blocks=middle_blocks,
            middle_attention=attention is not False,
            downsampling=downsampling,
            time_levels=halves_time,
            z_channels=z_channels or latent_dim,
            out_kernel=encoder_out_kernel,
            latent_dim=latent_dim,
            latent_kernel=latent_kernel,
        )
        self.decoder = None
        if not with_decoder:
            return
        self.decoder = Decoder(
            layers,
            code_dim=code_dim,
            code_kernel=latent_kernel,
            z_channels=z_channels or code_dim,
            widths=decoder_widths,
            blocks=blocks + 1 if decoder_blocks is None else decoder_blocks,
            attention_levels=_levels("decoder_attention", decoder_attention, len(widths)),
            middle_blocks=middle_blocks,
            middle_attention=decoder_attention is not False,
            upsampling=upsampling,
            time_levels=halves_time,
            adaptive_norm=adaptive_norm,
            out_channels=image_channels if out_channels is None else out_channels,
        )

    @property
    def last_layer(self) -> Tensor:
        # Without a decoder nothing is trained, and the precision is that of the encoder.
        return self.last_encoder_layer if self.decoder is None else cast(nn.Conv2d, self.decoder.conv_out).weight

    @property
    def last_encoder_layer(self) -> Tensor:
        return cast(nn.Conv2d, self.encoder.conv_out).weight

    def grid(self, image_size: ImageSize) -> tuple[int, ...]:
        if self.dims == 3 and isinstance(image_size, list | tuple) and len(image_size) == 3:
            frames, *size = clip_size(image_size)
            return (self._latent_frames(frames), *map(self._latent_side, size))
        size = height_and_width(image_size)
        grid = tuple(self._latent_side(side) for side in size)
        if self.dims == 2:
            return grid
        if self.dims == 1:
            if size[0] != size[1]:
                raise ValueError(f"image_size={list(size)}: signals (dims=1) have a length alone, give one number")
            return grid[:1]
        if self.frames is None and self.causal:
            raise ValueError(
                "the grid of a causal network depends on the length of its clips: set frames, or give the size as "
                "[frames, height, width]"
            )
        if self.frames is None and size[0] != size[1]:
            raise ValueError(f"image_size={list(size)}: how many frames the clips have is not known: set frames")
        return (self._latent_frames(self.frames or size[0]), *grid)

    def _latent_side(self, size: int) -> int:
        if size < 1 or size % self.downsampling:
            raise ValueError(f"image_size={size} is not a multiple of the down-sampling {self.downsampling}")
        return size // self.downsampling

    def _latent_frames(self, frames: int) -> int:
        rest = frames - self.causal
        if frames < 1 or rest % self.time_downsampling:
            accepted = f"{'1 + ' if self.causal else ''}a multiple of the down-sampling {self.time_downsampling}"
            raise ValueError(f"a clip of {frames} frames does not fit this network: its length must be {accepted}")
        return self.causal + rest // self.time_downsampling

    def encode(self, images: Tensor) -> Tensor:
        single = self._is_image(images)
        if not single and images.ndim != 2 + self.dims:
            expected = {1: "(B, C, L)", 2: "(B, C, H, W)", 3: "(B, C, T, H, W)"}[self.dims]
            raise ValueError(f"this network (dims={self.dims}) encodes {expected}, got {tuple(images.shape)}")
        if self.dims == 3 and not single:
            self._latent_frames(images.shape[2])
        for side in images.shape[2:] if single else images.shape[2 + (self.dims == 3) :]:
            self._latent_side(side)
        if self.pixels == "unit":
            images = (images + 1) / 2
        return self.encoder(images[:, :, None])[:, :, 0] if single else self.encoder(self._layout(images))

    def _is_image(self, x: Tensor) -> bool:
        """Whether a network of causal clips is given an image, or its latents: a clip of one frame."""
        return self.causal and x.ndim == 4

    def decode(self, latents: Tensor) -> Tensor:
        if self.decoder is None:
            raise ValueError("this network is an encoder alone (with_decoder=false): it makes no images")
        single = self._is_image(latents)
        outputs = self.decoder(latents[:, :, None])[:, :, 0] if single else self.decoder(self._layout(latents))
        return outputs * 2 - 1 if self.pixels == "unit" else outputs

    def _layout(self, x: Tensor) -> Tensor:
        # The memory layout that the bf16 convolutions of oneDNN and cuDNN want.
        return x.contiguous(memory_format=torch.channels_last) if self.dims == 2 else x


def _levels(name: str, attention: bool | Sequence[int], count: int) -> set[int]:
    """The numbers of the resolutions with attention, 0 for the full one."""
    levels = ({count - 1} if attention else set()) if isinstance(attention, bool) else set(attention)
    if not levels <= set(range(count)):
        raise ValueError(f"{name}={sorted(levels)} must be levels between 0, the full resolution, and {count - 1}")
    return levels


class Encoder(nn.Module):
    """Encode images to latents: residual blocks at each resolution, one halving between two resolutions."""

    def __init__(
        self,
        layers: Layers,
        *,
        in_channels: int,
        channels: int,
        widths: Sequence[int],
        blocks: int,
        attention_levels: Collection[int],
        middle_blocks: int,
        middle_attention: bool,
        downsampling: Downsampling,
        time_levels: Collection[int] = (),
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
            halve = None
            if level < len(widths) - 1:
                halve = downsample(downsampling, layers, width, time=level in time_levels)
            self.levels.append(
                Level(
                    layers,
                    in_channels=current,
                    channels=width,
                    blocks=blocks,
                    attention=level in attention_levels,
                    resample=halve,
                )
            )
            current = width
        self.middle = middle(layers, current, blocks=middle_blocks, attention=middle_attention)
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


class Decoder(nn.Module):
    """Decode codes to images: residual blocks at each resolution, one doubling between two resolutions.

    `levels` runs from the lowest resolution up.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        code_dim: int,
        code_kernel: int | None,
        z_channels: int,
        widths: Sequence[int],
        blocks: int,
        attention_levels: Collection[int],
        middle_blocks: int,
        middle_attention: bool,
        upsampling: Upsampling,
        time_levels: Collection[int],
        adaptive_norm: bool,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.from_codes = nn.Identity()
        if code_kernel is not None:
            self.from_codes = layers.convolution(code_dim, z_channels, code_kernel)
        current = widths[-1]
        self.conv_in = layers.convolution(z_channels, current, 3)
        self.middle = middle(layers, current, blocks=middle_blocks, attention=middle_attention)
        self.levels = nn.ModuleList()
        self.adaptive_norms = nn.ModuleList()
        for level in reversed(range(len(widths))):
            if adaptive_norm:
                self.adaptive_norms.append(AdaptiveNorm(layers, current, code_dim=z_channels))
            double = None
            if level > 0:
                double = upsample(upsampling, layers, widths[level], time=level - 1 in time_levels)
            self.levels.append(
                Level(
                    layers,
                    in_channels=current,
                    channels=widths[level],
                    blocks=blocks,
                    attention=level in attention_levels,
                    resample=double,
                )
            )
            current = widths[level]
        self.norm_out = layers.norm(current)
        self.conv_out = layers.convolution(current, out_channels, 3)

    def forward(self, codes: Tensor) -> Tensor:  # (B, code_dim, *grid) -> (B, out_channels, *size)
        z = self.from_codes(codes)
        x = self.middle(self.conv_in(z))
        for number, level in enumerate(self.levels):
            if self.adaptive_norms:
                x = self.adaptive_norms[number](x, z)
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Apply the residual blocks of one resolution, attention after each or none, then change the resolution or not."""

    def __init__(
        self,
        layers: Layers,
        *,
        in_channels: int,
        channels: int,
        blocks: int,
        attention: bool,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[channels] * blocks]
        self.blocks = nn.ModuleList(ResidualBlock(layers, widths[i], out_channels=widths[i + 1]) for i in range(blocks))
        self.attention = nn.ModuleList(SpatialAttention(layers, channels) for _ in range(blocks if attention else 0))
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: Tensor) -> Tensor:  # (B, in_channels, *grid) -> (B, channels, *resampled)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.attention:
                x = self.attention[number](x)
        return self.resample(x)


def middle(layers: Layers, channels: int, *, blocks: int, attention: bool) -> nn.Sequential:
    """Make the residual blocks at the lowest resolution, with attention after the first."""
    made: list[nn.Module] = [ResidualBlock(layers, channels, out_channels=channels) for _ in range(blocks)]
    if attention:
        made.insert(1, SpatialAttention(layers, channels))
    return nn.Sequential(*made)


class ResidualBlock(nn.Module):
    """Add to its input GroupNorm, swish and 3-wide convolution, twice; a 1-wide shortcut where the channels change.

    `shortcut="output"` is MaskGIT's: where the channels change, the shortcut reads what the two convolutions gave, and
    the block's input is not added.
    """

    def __init__(self, layers: Layers, in_channels: int, *, out_channels: int) -> None:
        super().__init__()
        self.norm1 = layers.norm(in_channels)
        self.conv1 = layers.convolution(in_channels, out_channels, 3, layers.bias)
        self.norm2 = layers.norm(out_channels)
        self.conv2 = layers.convolution(out_channels, out_channels, 3, layers.bias)
        self.dropout = layers.dropout
        self.shortcut = nn.Identity()
        self.shortcut_of_output = in_channels != out_channels and layers.shortcut == "output"
        if in_channels != out_channels:
            shortcut_channels = out_channels if self.shortcut_of_output else in_channels
            self.shortcut = layers.convolution(shortcut_channels, out_channels, 1, layers.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, in, *grid) -> (B, out, *grid)
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.dropout(F.silu(self.norm2(hidden)), self.dropout, self.training))
        return self.shortcut(hidden if self.shortcut_of_output else x) + hidden


class SpatialAttention(nn.Module):
    """Add to its input self-attention of one head over all positions (of each frame, where time is causal)."""

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.frames_apart = layers.frames_apart
        self.norm = layers.norm(channels)
        self.query_key_value = layers.convolution(channels, 3 * channels, 1)
        self.out = layers.convolution(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, *grid)
        projected = self.query_key_value(self.norm(x))
        if self.frames_apart:
            projected = frames_as_batch(projected)
        query, key, value = rearrange(projected, "b (qkv c) ... -> qkv b 1 (...) c", qkv=3)
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, 1, N, c), or (B T, 1, h w, c)
        if self.frames_apart:
            return x + self.out(rearrange(mixed, "(b t) 1 (h w) c -> b c t h w", b=len(x), h=x.shape[3]))
        return x + self.out(rearrange(mixed, "b 1 n c -> b c n").reshape(x.shape))


class AdaptiveNorm(nn.Module):
    """Apply a GroupNorm whose gain and offset are read off the codes (MAGVIT-v2: Yu et al., 2024, sec. 3.2).

    The gain comes from the deviation over the grid, with Bessel's correction, of each channel of the codes (0 on a grid
    of one position); the offset from their mean. Where frames are apart, a frame has those of the codes that it is
    decoded from.
    """

    def __init__(self, layers: Layers, channels: int, *, code_dim: int) -> None:
        super().__init__()
        self.frames_apart = layers.frames_apart
        self.norm = layers.norm(channels, affine=False)
        self.gain = nn.Linear(code_dim, channels)
        self.offset = nn.Linear(code_dim, channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:  # (B, c, *grid), (B, code_dim, *lowest) -> (B, c, *grid)
        grid = "b d t h w -> b t (h w) d" if self.frames_apart else "b d ... -> b (...) d"
        positions = at_least_float32(rearrange(codes, grid))
        # A single position deviates from nothing; with the correction it would be 0 / 0.
        variance = positions.var(dim=-2, correction=min(1, positions.shape[-2] - 1))
        gain = self.gain((variance + 1e-6).sqrt().to(codes.dtype))  # (B, c), or (B, t, c)
        offset = self.offset(positions.mean(dim=-2).to(codes.dtype))
        return self._laid_out(gain, x) * self.norm(x) + self._laid_out(offset, x)

    def _laid_out(self, values: Tensor, x: Tensor) -> Tensor:
        if not self.frames_apart:
            return values.reshape(*values.shape, *(1,) * (x.dim() - 2))
        # The first frame is alone; those behind share the codes evenly.
        shared = (x.shape[2] - 1) // max(1, values.shape[1] - 1) or 1
        return values.repeat_interleave(shared, dim=1)[:, shared - 1 :].movedim(1, 2)[..., None, None]
