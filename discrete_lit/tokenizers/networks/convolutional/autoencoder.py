"""The convolutional autoencoder of VQGAN (Esser et al., "Taming Transformers", 2021, table 7) and of those after it."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from discrete_lit.tokenizers.networks.autoencoder import Autoencoder
from discrete_lit.tokenizers.networks.convolutional.decoder import Decoder
from discrete_lit.tokenizers.networks.convolutional.encoder import Encoder
from discrete_lit.tokenizers.networks.convolutional.layers import Layers
from discrete_lit.tokenizers.networks.convolutional.resampling import Downsampling, Upsampling


class ConvAutoencoder(Autoencoder):
    """Residual blocks at each resolution, one halving between two resolutions.

    The defaults are VQGAN's. LlamaGen's has `z_channels: 256`; VAR's `channels: 160` and `latent_kernel: 3`;
    Open-MAGVIT2's `blocks: 4`, `decoder_blocks: 4`, `middle_blocks: 4`, `attention: false`, `bias: false`,
    `encoder_out_kernel: 1`, `latent_kernel: null`, `downsampling: symmetric`, `upsampling: depth_to_space` and
    `adaptive_norm: true`; IBQ's `blocks: 4`; MaskGIT's `decoder_blocks: 2`, `attention: false`, `bias: false`,
    `shortcut: output`, `encoder_out_kernel: 1`, `latent_kernel: null`, `downsampling: average` and `pixels: unit`;
    MaskBit's the same with `downsampling: right`; KL-16's `decoder_attention: []`.

    Args:
        code_dim: D of the codes that the decoder takes; a tokenizer gives it.
        latent_dim: width of the encoder's latents; `code_dim` by default. A tokenizer gives it.
        in_channels: C of the images.
        out_channels: of the decoder's outputs, where a loss takes more than the pixels themselves; C by default.
        channels: width of the first convolution.
        multipliers: width of each resolution as a multiple of `channels`; n of them make a 2^(n-1)x down-sampling.
        decoder_multipliers: the decoder's, as many; `multipliers` by default.
        blocks: residual blocks at each resolution of the encoder.
        decoder_blocks: at each resolution of the decoder; one more than in the encoder by default, as in the paper.
        middle_blocks: residual blocks at the lowest resolution, after the encoder's and before the decoder's levels.
        attention: self-attention after each block of these resolutions, counted from the full one, 0, and in the
            middle; true is the lowest resolution, `[]` the middle alone, false none at all.
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
        pixels: what encoder and decoder work on, `"signed"` for [-1, 1] or `"unit"` for [0, 1]; images at this class's
            boundary are in [-1, 1] always.
        dims: axes of the images: 1 for signals (B, C, L), 2, or 3 for volumes and clips (B, C, T, H, W).
        causal: with three axes, no frame sees a later one: convolutions look back only, norms and attention see one
            frame. The first frame is alone, so 1 + t frames become 1 + t / 2^(n-1).
        frames: with three axes, T, for `grid`; as many as the side by default. Causal networks need it there.

    Raises:
        ValueError: settings that do not fit together.
    """

    def __init__(
        self,
        code_dim: int,
        latent_dim: int | None = None,
        in_channels: int = 3,
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
        pixels: Literal["signed", "unit"] = "signed",
        dims: Literal[1, 2, 3] = 2,
        causal: bool = False,
        frames: int | None = None,
    ) -> None:
        super().__init__()
        latent_dim = code_dim if latent_dim is None else latent_dim
        decoder_multipliers = multipliers if decoder_multipliers is None else decoder_multipliers
        decoder_attention = attention if decoder_attention is None else decoder_attention
        widths = [channels * multiplier for multiplier in multipliers]
        decoder_widths = [channels * multiplier for multiplier in decoder_multipliers]
        if not widths or any(width % norm_groups for width in [channels, *widths, *decoder_widths]):
            raise ValueError(f"norm_groups={norm_groups} must divide every width of the network, got {widths}")
        if len(widths) != len(decoder_widths):
            raise ValueError(
                f"decoder_multipliers={list(decoder_multipliers)} must be as many as multipliers={list(multipliers)}"
            )
        if latent_kernel is None and z_channels is not None:
            raise ValueError(f"z_channels={z_channels} needs a latent_kernel: without one the latents are z")
        if (causal or frames is not None) and dims != 3:
            raise ValueError(f"causal and frames need dims=3, got dims={dims}")
        if causal and adaptive_norm:
            raise ValueError("adaptive_norm reads all frames of the codes, which a causal network must not")
        if not min(blocks, middle_blocks, 1 if decoder_blocks is None else decoder_blocks) >= 1:
            raise ValueError(f"there must be at least one block: {blocks=}, {decoder_blocks=}, {middle_blocks=}")
        self.in_channels = in_channels
        self.dims = dims
        self.causal = causal
        self.frames = frames
        self.pixels = pixels
        self.downsampling = 2 ** (len(widths) - 1)
        layers = Layers(dims, causal, norm_groups, bias, shortcut)
        self.encoder = Encoder(
            layers,
            in_channels=in_channels,
            channels=channels,
            widths=widths,
            blocks=blocks,
            attention_levels=_levels("attention", attention, len(widths)),
            middle_blocks=middle_blocks,
            middle_attention=attention is not False,
            downsampling=downsampling,
            z_channels=z_channels or latent_dim,
            out_kernel=encoder_out_kernel,
            latent_dim=latent_dim,
            latent_kernel=latent_kernel,
        )
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
            adaptive_norm=adaptive_norm,
            out_channels=in_channels if out_channels is None else out_channels,
        )

    @property
    def last_layer(self) -> Tensor:
        return cast(nn.Conv2d, self.decoder.conv_out).weight

    def grid(self, image_size: int) -> tuple[int, ...]:
        side = self._latent_side(image_size)
        if self.dims < 3:
            return (side,) * self.dims
        if self.frames is None and self.causal:
            raise ValueError("the grid of a causal network depends on the length of its clips: set frames")
        return (self._latent_frames(self.frames or image_size), side, side)

    def _latent_side(self, size: int) -> int:
        if size < 1 or size % self.downsampling:
            raise ValueError(f"image_size={size} is not a multiple of the down-sampling {self.downsampling}")
        return size // self.downsampling

    def _latent_frames(self, frames: int) -> int:
        rest = frames - self.causal
        if frames < 1 or rest % self.downsampling:
            accepted = f"{'1 + ' if self.causal else ''}a multiple of the down-sampling {self.downsampling}"
            raise ValueError(f"a clip of {frames} frames does not fit this network: its length must be {accepted}")
        return self.causal + rest // self.downsampling

    def encode(self, images: Tensor) -> Tensor:
        if self.dims == 3:
            self._latent_frames(images.shape[2])
        for side in images.shape[2 + (self.dims == 3) :]:
            self._latent_side(side)
        if self.pixels == "unit":
            images = (images + 1) / 2
        return self.encoder(self._layout(images))

    def decode(self, latents: Tensor) -> Tensor:
        outputs = self.decoder(self._layout(latents))
        return outputs * 2 - 1 if self.pixels == "unit" else outputs

    def _layout(self, x: Tensor) -> Tensor:
        # The memory layout that oneDNN's and cuDNN's bf16 convolutions want.
        return x.contiguous(memory_format=torch.channels_last) if self.dims == 2 else x


def _levels(name: str, attention: bool | Sequence[int], count: int) -> set[int]:
    """The resolutions with attention, 0 the full one."""
    levels = ({count - 1} if attention else set()) if isinstance(attention, bool) else set(attention)
    if not levels <= set(range(count)):
        raise ValueError(f"{name}={sorted(levels)} must be levels between 0, the full resolution, and {count - 1}")
    return levels
