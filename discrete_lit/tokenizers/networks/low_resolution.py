"""A convolutional autoencoder that works at low resolution: it halves the grid before it computes anything.

The networks of VQGAN spend most of their operations at full resolution. Here a strided convolution of the pixels comes
first, and the decoder makes pixels of channels (Shi et al., "Real-Time Single Image and Video Super-Resolution Using an
Efficient Sub-Pixel Convolutional Neural Network", 2016) where VQGAN's still convolves. For small images and small
machines: residual blocks stand where a grid has few positions, and BatchNorm, which needs no statistics when a trained
network runs, takes the place of GroupNorm.

    encoder: (SiLU), 4x4 convolution of stride 2, residual blocks; once for each halving -> norm, SiLU, 1x1
    decoder: 3x3, residual blocks -> (norm, SiLU, 1x1, pixel shuffle, residual blocks) for each doubling -> SiLU, 3x3

Of clips, the convolutions have three frames where they have more than one pixel, and look back only.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.images import ImageSize, clip_size, height_and_width
from discrete_lit.core.modules import FullPrecision
from discrete_lit.tokenizers.networks.grid_layers import CausalConvolution
from discrete_lit.tokenizers.networks.network import Autoencoder


class LowResolutionAutoencoder(Autoencoder):
    """Encode images by strided convolutions and residual blocks, and decode them by residual blocks and pixel shuffles.

    Widths and blocks are listed from the highest resolution down: the encoder's begin at 1/2, the decoder's at 1/1. n
    halvings take n of the encoder's and n + 1 of the decoder's. Every residual branch is 0 at the start (its last
    convolution is), so a new network is the linear one around them.

    With several ranks, `trainer.sync_batchnorm: true` gives the norms the statistics of all of them together. With
    accumulated gradients the norms see a micro-batch at a time. Where an exponential moving average of the weights is
    kept, it holds a moving average of the running means and variances too.

    With `time_levels` it codes clips `(B, C, T, H, W)` in MAGVIT-v2's way: no frame sees a later one, the first is
    alone, so that 1 + t frames become 1 + t / 2^k with k halvings of time, and an image is coded as a clip of one
    frame. In training the norms average over the frames of the batch as over its rows; a trained network's are
    constants.

    Args:
        code_dim: D of the codes that the decoder takes; a tokenizer gives it.
        latent_dim: width of the encoder's latents; `code_dim` by default. A tokenizer gives it.
        image_channels: C of the images.
        out_channels: of the decoder's outputs, where a loss takes more than the pixels themselves; C by default.
        widths: channels of the encoder at 1/2, 1/4, ... of the resolution.
        blocks: residual blocks of the encoder at each of them.
        decoder_widths: channels of the decoder at 1/1, 1/2, 1/4, ... of the resolution.
        decoder_blocks: residual blocks of the decoder at each of them.
        block_kernel: size of the second convolution of the residual blocks, whose first has 3: 1 or 3.
        decoder_block_kernels: the same of the decoder at each of its resolutions; `block_kernel` by default.
        border: pixels at each side that the network does not see: it crops them before encoding, and puts them back,
            filled with `border_value`, after decoding. For images that were padded to a round size.
        border_value: in [-1, 1]; -1 is black.
        time_levels: of clips, the halvings in which time is halved too, counted from the full resolution, 0; `[]` for
            none of them. None makes a network of images.

    Raises:
        ValueError: lists that do not fit together, or a setting out of its range.
    """

    def __init__(
        self,
        code_dim: int,
        latent_dim: int | None = None,
        *,
        image_channels: int = 3,
        out_channels: int | None = None,
        widths: Sequence[int] = (32, 96),
        blocks: Sequence[int] = (0, 1),
        decoder_widths: Sequence[int] = (16, 48, 128),
        decoder_blocks: Sequence[int] = (0, 1, 2),
        block_kernel: int = 1,
        decoder_block_kernels: Sequence[int] | None = None,
        border: int = 0,
        border_value: float = -1.0,
        time_levels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        kernels = [block_kernel] * len(decoder_widths) if decoder_block_kernels is None else decoder_block_kernels
        _check_levels(widths, blocks, decoder_widths, decoder_blocks, kernels)
        if {block_kernel, *kernels} - {1, 3}:
            raise ValueError(
                f"the second convolution of a residual block has the size 1 or 3, got block_kernel={block_kernel}, "
                f"decoder_block_kernels={list(kernels)}"
            )
        if border < 0 or not -1 <= border_value <= 1:
            raise ValueError(f"border={border} must be at least 0 and border_value={border_value} in [-1, 1]")
        halves_time = set(time_levels or ())
        if not halves_time <= set(range(len(widths))):
            raise ValueError(f"time_levels={sorted(halves_time)} must be among the halvings, 0 to {len(widths) - 1}")
        self.clips = time_levels is not None
        self.modality = "video" if self.clips else "image"
        self.image_channels = image_channels
        self.downsampling = 2 ** len(widths)
        self.time_downsampling = 2 ** len(halves_time)
        self.border = border
        self.border_value = border_value
        latent_dim = code_dim if latent_dim is None else latent_dim

        layers: list[nn.Module] = []
        for level, (before, width) in enumerate(pairwise((image_channels, *widths))):
            layers += [nn.SiLU()] if level else []
            layers.append(self._halving(before, width, time=level in halves_time))
            layers += [PreActivationBlock(width, block_kernel, clips=self.clips) for _ in range(blocks[level])]
        layers += [self._norm(widths[-1]), nn.SiLU(), _convolution(widths[-1], latent_dim, 1, clips=self.clips)]
        self.encoder = nn.Sequential(*layers)

        layers = [_convolution(code_dim, decoder_widths[-1], 3, clips=self.clips)]
        for level in reversed(range(len(decoder_widths))):
            width = decoder_widths[level]
            layers += [
                PreActivationBlock(width, kernels[level], clips=self.clips) for _ in range(decoder_blocks[level])
            ]
            if level:
                layers += self._doubling(width, decoder_widths[level - 1], time=level - 1 in halves_time)
        out_channels = image_channels if out_channels is None else out_channels
        self.conv_out = _convolution(decoder_widths[0], out_channels, 3, clips=self.clips)
        self.decoder = nn.Sequential(*layers, nn.SiLU())

    def _norm(self, channels: int) -> nn.Module:
        return (ClipBatchNorm if self.clips else BatchNorm)(channels)

    def _halving(self, in_channels: int, out_channels: int, *, time: bool) -> nn.Module:
        if self.clips:
            return CausalConvolution(in_channels, out_channels, (3, 4, 4), stride=(2 if time else 1, 2, 2))
        return nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)

    def _doubling(self, in_channels: int, out_channels: int, *, time: bool) -> list[nn.Module]:
        to_neighbours = _convolution(in_channels, (8 if time else 4) * out_channels, 1, clips=self.clips)
        shuffle = ClipShuffle(time=time) if self.clips else nn.PixelShuffle(2)
        return [self._norm(in_channels), nn.SiLU(), to_neighbours, shuffle]

    @property
    def last_layer(self) -> Tensor:
        return self.conv_out.weight  # type: ignore[return-value]

    def grid(self, image_size: ImageSize) -> tuple[int, ...]:
        if not self.clips:
            return tuple(self._latent_side(side) for side in height_and_width(image_size))
        frames, *size = clip_size(image_size)
        return (self._latent_frames(frames), *map(self._latent_side, size))

    def _latent_side(self, size: int) -> int:
        inside = size - 2 * self.border
        if inside < 1 or inside % self.downsampling:
            without = f" without its border of {self.border}" if self.border else ""
            raise ValueError(f"image_size={size}{without} is not a multiple of the down-sampling {self.downsampling}")
        return inside // self.downsampling

    def _latent_frames(self, frames: int) -> int:
        if frames < 1 or (frames - 1) % self.time_downsampling:
            raise ValueError(
                f"a clip of {frames} frames does not fit this network: its length must be 1 + a multiple of the "
                f"down-sampling {self.time_downsampling}"
            )
        return 1 + (frames - 1) // self.time_downsampling

    def encode(self, images: Tensor) -> Tensor:
        if not self.clips or images.ndim == 4:
            return self._encode(images[:, :, None])[:, :, 0] if self.clips else self._encode(images)
        if images.ndim != 5:
            raise ValueError(f"this network encodes clips (B, C, T, H, W) and images, got {tuple(images.shape)}")
        self._latent_frames(images.shape[2])
        return self._encode(images)

    def _encode(self, images: Tensor) -> Tensor:
        for side in images.shape[-2:]:
            self._latent_side(side)
        inside = images
        if self.border:
            inside = images[..., self.border : -self.border, self.border : -self.border]
        return self.encoder(self._layout(inside))

    def decode(self, latents: Tensor) -> Tensor:
        if self.clips and latents.ndim == 4:
            return self._decode(latents[:, :, None])[:, :, 0]
        return self._decode(latents)

    def _decode(self, latents: Tensor) -> Tensor:
        outputs = self.conv_out(self.decoder(self._layout(latents)))
        return F.pad(outputs, (self.border,) * 4, value=self.border_value) if self.border else outputs

    def _layout(self, x: Tensor) -> Tensor:
        # The memory layout that the convolutions of oneDNN and cuDNN want.
        return x.contiguous(memory_format=torch.channels_last_3d if self.clips else torch.channels_last)


class PreActivationBlock(nn.Module):
    """Add to its input norm, SiLU, 3x3 convolution, SiLU, convolution; the last one is 0 at the start.

    (The order of He et al., "Identity Mappings in Deep Residual Networks", 2016, with one norm. The start at 0 is that
    of Zhang, Dauphin and Ma, "Fixup Initialization", 2019.) Of clips the first convolution sees three frames, and the
    second one.

    Args:
        channels: c.
        kernel: size of the second convolution.
        clips: whether the grid has frames.
    """

    def __init__(self, channels: int, kernel: int, *, clips: bool = False) -> None:
        super().__init__()
        self.norm = (ClipBatchNorm if clips else BatchNorm)(channels)
        self.conv1 = _convolution(channels, channels, 3, clips=clips)
        self.conv2 = _convolution(channels, channels, kernel, clips=clips, frames=1)
        nn.init.zeros_(self.conv2.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:  # (B, c, *grid) -> (B, c, *grid)
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


def _convolution(
    in_channels: int, out_channels: int, kernel: int, *, clips: bool, frames: int | None = None
) -> nn.Module:
    """Make a convolution to a grid of the same size; of clips, over as many frames as pixels by default."""
    if clips:
        size = (kernel if frames is None else frames, kernel, kernel)
        return CausalConvolution(in_channels, out_channels, size)
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


class ClipShuffle(nn.Module):
    """Make pixels of channels, ordered as by `PixelShuffle`, and frames too; of the first frame's two, the second."""

    def __init__(self, *, time: bool) -> None:
        super().__init__()
        self.time = time

    def forward(self, x: Tensor) -> Tensor:  # (B, 4 c or 8 c, T, H, W) -> (B, c, T or 2 T - 1, 2 H, 2 W)
        larger = rearrange(x, "b (c i j k) t h w -> b c (t i) (h j) (w k)", i=2 if self.time else 1, j=2, k=2)
        return larger[:, :, 1:] if self.time else larger


class BatchNorm(FullPrecision, nn.BatchNorm2d):
    """BatchNorm whose gains, offsets and running statistics are in float32 at least (Ioffe and Szegedy, 2015)."""


class ClipBatchNorm(FullPrecision, nn.BatchNorm3d):
    """BatchNorm over the frames of a batch, as `BatchNorm` over its images."""


def _check_levels(
    widths: Sequence[int],
    blocks: Sequence[int],
    decoder_widths: Sequence[int],
    decoder_blocks: Sequence[int],
    kernels: Sequence[int],
) -> None:
    if not widths or min(*widths, *decoder_widths) < 1 or min(*blocks, *decoder_blocks) < 0:
        raise ValueError(
            f"widths={list(widths)} and decoder_widths={list(decoder_widths)} must be at least 1, and "
            f"blocks={list(blocks)} and decoder_blocks={list(decoder_blocks)} at least 0"
        )
    if len(blocks) != len(widths):
        raise ValueError(f"blocks={list(blocks)} must be as many as widths={list(widths)}")
    if len(decoder_widths) != len(widths) + 1:
        raise ValueError(
            f"decoder_widths={list(decoder_widths)} must be one more than widths={list(widths)}: from the full "
            "resolution down"
        )
    if not len(decoder_widths) == len(decoder_blocks) == len(kernels):
        raise ValueError(
            f"decoder_blocks={list(decoder_blocks)} and decoder_block_kernels={list(kernels)} must be as many as "
            f"decoder_widths={list(decoder_widths)}"
        )
