"""A convolutional autoencoder that works at low resolution: it halves the grid before it computes anything.

The networks of VQGAN spend most of their operations at full resolution. Here a strided convolution of the pixels comes
first, and the decoder makes pixels of channels (Shi et al., "Real-Time Single Image and Video Super-Resolution Using an
Efficient Sub-Pixel Convolutional Neural Network", 2016) where VQGAN's still convolves. For small images and small
machines: residual blocks stand where a grid has few positions, and BatchNorm, which needs no statistics when a trained
network runs, takes the place of GroupNorm.

    encoder: (SiLU), 4x4 convolution of stride 2, residual blocks; once for each halving -> norm, SiLU, 1x1
    decoder: 3x3, residual blocks -> (norm, SiLU, 1x1, pixel shuffle, residual blocks) for each doubling -> SiLU, 3x3
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.images import ImageSize, height_and_width
from discrete_lit.core.modules import FullPrecision
from discrete_lit.tokenizers.networks.network import Autoencoder


class LowResolutionAutoencoder(Autoencoder):
    """Encode images by strided convolutions and residual blocks, and decode them by residual blocks and pixel shuffles.

    Widths and blocks are listed from the highest resolution down: the encoder's begin at 1/2, the decoder's at 1/1. n
    halvings take n of the encoder's and n + 1 of the decoder's. Every residual branch is 0 at the start (its last
    convolution is), so a new network is the linear one around them.

    With several ranks, `trainer.sync_batchnorm: true` gives the norms the statistics of all of them together. With
    accumulated gradients the norms see a micro-batch at a time. Where an exponential moving average of the weights is
    kept, it holds a moving average of the running means and variances too.

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
        self.image_channels = image_channels
        self.downsampling = 2 ** len(widths)
        self.border = border
        self.border_value = border_value
        latent_dim = code_dim if latent_dim is None else latent_dim

        layers: list[nn.Module] = []
        for level, (before, width) in enumerate(pairwise((image_channels, *widths))):
            layers += [nn.SiLU()] if level else []
            layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            layers += [PreActivationBlock(width, block_kernel) for _ in range(blocks[level])]
        self.encoder = nn.Sequential(*layers, BatchNorm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], latent_dim, 1))

        layers = [nn.Conv2d(code_dim, decoder_widths[-1], 3, padding=1)]
        for level in reversed(range(len(decoder_widths))):
            width = decoder_widths[level]
            layers += [PreActivationBlock(width, kernels[level]) for _ in range(decoder_blocks[level])]
            if level:
                to_neighbours = nn.Conv2d(width, 4 * decoder_widths[level - 1], 1)
                layers += [BatchNorm(width), nn.SiLU(), to_neighbours, nn.PixelShuffle(2)]
        out_channels = image_channels if out_channels is None else out_channels
        self.conv_out = nn.Conv2d(decoder_widths[0], out_channels, 3, padding=1)
        self.decoder = nn.Sequential(*layers, nn.SiLU())

    @property
    def last_layer(self) -> Tensor:
        return self.conv_out.weight

    def grid(self, image_size: ImageSize) -> tuple[int, ...]:
        return tuple(self._latent_side(side) for side in height_and_width(image_size))

    def _latent_side(self, size: int) -> int:
        inside = size - 2 * self.border
        if inside < 1 or inside % self.downsampling:
            without = f" without its border of {self.border}" if self.border else ""
            raise ValueError(f"image_size={size}{without} is not a multiple of the down-sampling {self.downsampling}")
        return inside // self.downsampling

    def encode(self, images: Tensor) -> Tensor:
        for side in images.shape[2:]:
            self._latent_side(side)
        inside = images
        if self.border:
            inside = images[:, :, self.border : -self.border, self.border : -self.border]
        # The memory layout that the convolutions of oneDNN and cuDNN want.
        return self.encoder(inside.contiguous(memory_format=torch.channels_last))

    def decode(self, latents: Tensor) -> Tensor:
        outputs = self.conv_out(self.decoder(latents.contiguous(memory_format=torch.channels_last)))
        return F.pad(outputs, (self.border,) * 4, value=self.border_value) if self.border else outputs


class PreActivationBlock(nn.Module):
    """Add to its input norm, SiLU, 3x3 convolution, SiLU, convolution; the last one is 0 at the start.

    (The order of He et al., "Identity Mappings in Deep Residual Networks", 2016, with one norm. The start at 0 is that
    of Zhang, Dauphin and Ma, "Fixup Initialization", 2019.)

    Args:
        channels: c.
        kernel: size of the second convolution.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:  # (B, c, h, w) -> (B, c, h, w)
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class BatchNorm(FullPrecision, nn.BatchNorm2d):
    """BatchNorm whose gains, offsets and running statistics are in float32 at least (Ioffe and Szegedy, 2015)."""


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
