"""The transformer autoencoder of ViT-VQGAN (Yu et al., "Vector-quantized Image Modeling with Improved VQGAN", 2022).

    images -> patches -> transformer -> tanh head -> latents      codes -> transformer -> tanh head -> patches -> images

`TransformerBlocks` and what stands below it are TiTok's too.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.blocks import Block, BlockSettings
from discrete_lit.backbones.embeddings import grid_coordinates, sine_cosine_table
from discrete_lit.backbones.layers import Norm
from discrete_lit.core.images import ImageSize, height_and_width, normal_size, size_of
from discrete_lit.tokenizers.networks.network import Autoencoder

# The epsilon of every LayerNorm, as in the published networks.
_EPSILON = 1e-5


@dataclass(frozen=True)
class TransformerSize:
    """The size of a transformer encoder or decoder.

    Attributes:
        width: D of the sequence; a multiple of `heads`.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_hidden: inner width of the MLPs; 4 x width by default.
    """

    width: int
    depth: int
    heads: int = field(kw_only=True)
    mlp_hidden: int | None = field(default=None, kw_only=True)

    @property
    def hidden(self) -> int:
        """Inner width of the MLPs."""
        return 4 * self.width if self.mlp_hidden is None else self.mlp_hidden


class ViTAutoencoder(Autoencoder):
    """Encode and decode images by transformers over their patches.

    The head of the encoder projects its output to the few channels of `latent_dim` directly: the paper's factorised
    codes.

    Args:
        code_dim: D of the codes that the decoder takes; a tokenizer gives it.
        latent_dim: width of the encoder's latents; `code_dim` by default. A tokenizer gives it.
        encoder, decoder: sizes. The paper's small, base and large have 512, 768 and 1280 wide sequences with 8, 12 and
            32 blocks and 8, 12 and 16 heads.
        patch_size: side of a patch in pixels.
        image_channels: C of the images.
        out_channels: what the decoder gives; C by default.
        positions: fixed sines and cosines of row and column, or learned vectors.
        image_size: of the images, a side or `[H, W]`, for learned positions alone, which fit no other.

    Raises:
        ValueError: a width that the heads do not divide, learned positions without an image size.
    """

    def __init__(
        self,
        code_dim: int,
        latent_dim: int | None = None,
        *,
        encoder: TransformerSize,
        decoder: TransformerSize,
        patch_size: int = 8,
        image_channels: int = 3,
        out_channels: int | None = None,
        positions: Literal["sine_cosine", "learned"] = "sine_cosine",
        image_size: ImageSize | None = None,
    ) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.patch_size = patch_size
        if positions == "learned" and image_size is None:
            raise ValueError("positions='learned' need image_size, the size of the images in pixels")
        self.image_size: tuple[int, int] | None = None
        learned = self.grid(image_size) if positions == "learned" and image_size is not None else None
        if learned is not None and image_size is not None:
            self.image_size = height_and_width(image_size)
        latent_dim = code_dim if latent_dim is None else latent_dim
        out_channels = image_channels if out_channels is None else out_channels

        self.patch_embedding = nn.Conv2d(image_channels, encoder.width, patch_size, stride=patch_size)
        self.encoder_positions = PatchPositions(encoder.width, learned)
        self.encoder = nn.Sequential(
            TransformerBlocks(encoder),
            layer_norm(encoder.width),
            tanh_head(encoder.width, encoder.hidden, latent_dim),
        )
        self.code_embedding = nn.Linear(code_dim, decoder.width)
        self.decoder_positions = PatchPositions(decoder.width, learned)
        self.decoder = nn.Sequential(
            TransformerBlocks(decoder),
            layer_norm(decoder.width),
            tanh_head(decoder.width, decoder.hidden, out_channels * patch_size**2),
        )
        initialise(self)

    @property
    def last_layer(self) -> Tensor:
        return cast(nn.Linear, cast(nn.Sequential, self.decoder[-1])[-1]).weight

    def grid(self, image_size: ImageSize) -> tuple[int, int]:
        grid = patch_grid(image_size, self.patch_size)
        if self.image_size is not None:
            check_learned_size(image_size, self.image_size)
        return grid

    def encode(self, images: Tensor) -> Tensor:
        height, width = self.grid(size_of(images))
        patches = rearrange(self.patch_embedding(images), "b d h w -> b (h w) d")
        latents = self.encoder(self.encoder_positions(patches, (height, width)))
        return rearrange(latents, "b (h w) d -> b d h w", h=height)

    def decode(self, latents: Tensor) -> Tensor:
        height, width = latents.shape[2:]
        embedded = self.code_embedding(rearrange(latents, "b d h w -> b (h w) d"))
        patches = self.decoder(self.decoder_positions(embedded, (height, width)))
        return F.pixel_shuffle(rearrange(patches, "b (h w) d -> b d h w", h=height), self.patch_size)

    def hidden_layers(self) -> Iterable[nn.Module]:
        return transformer_blocks(self)


def patch_grid(image_size: ImageSize, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patches of images of a size.

    Raises:
        ValueError: a side that is not a multiple of the patch's.
    """
    height, width = height_and_width(image_size)
    for side in (height, width):
        if side % patch_size:
            raise ValueError(f"image_size={side} is not a multiple of patch_size={patch_size}")
    return height // patch_size, width // patch_size


def check_learned_size(image_size: ImageSize, learned: ImageSize) -> None:
    """Raise a ValueError unless images have the size that learned positions are of."""
    if normal_size(image_size) != normal_size(learned):
        raise ValueError(
            f"image_size={normal_size(image_size)}: the learned positions of this network are those of "
            f"{normal_size(learned)} pixels"
        )


class PatchPositions(nn.Module):
    """Add the embedding of its position to each patch: fixed sines and cosines of row and column, or learned vectors.

    The sines and cosines of each grid are computed once. They are no buffer: they are no state of the network.

    Args:
        width: D.
        learned: the grid of the learned vectors, which fit no other; by default sines and cosines, which fit any.

    Raises:
        ValueError: a width that rows and columns cannot share.
    """

    def __init__(self, width: int, learned: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.width = width
        self.learned = learned
        self.table = None
        if learned is not None:
            self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(prod(learned), width), std=0.02))
        else:
            sine_cosine_table(grid_coordinates((1, 1)), width)  # refuses the width
        self._made: dict[tuple[tuple[int, int], torch.device, torch.dtype], Tensor] = {}

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # (B, h w, D) -> (B, h w, D)
        if self.table is None:
            return x + self._sines(grid, x)
        if grid != self.learned:
            raise ValueError(f"the learned positions are those of a grid {self.learned}, got {grid}")
        return x + self.table.to(x.dtype)

    def _sines(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Give the sines and cosines `(h w, D)` of a grid, on the device and in the precision of `like`."""
        key = (grid, like.device, like.dtype)
        if key not in self._made:
            # Made in validation, they serve training too.
            with torch.inference_mode(False), torch.no_grad():
                table = sine_cosine_table(grid_coordinates(grid), self.width, dtype=torch.float64)
                self._made[key] = table.to(like.device, like.dtype)
        return self._made[key]


def transformer_blocks(module: nn.Module) -> list[Block]:
    """List the transformer blocks of a network."""
    return [block for block in module.modules() if isinstance(block, Block)]


class TransformerBlocks(nn.Module):
    """Apply pre-norm blocks in which every position sees every other, with LayerNorm, GELU and biases.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        if size.heads < 1 or size.width % size.heads:
            raise ValueError(f"width={size.width} is not a multiple of heads={size.heads}")
        self.blocks = nn.ModuleList(
            Block(
                BlockSettings(
                    width=size.width,
                    heads=size.heads,
                    head_dim=size.width // size.heads,
                    mlp_hidden=size.hidden,
                    norm_epsilon=_EPSILON,
                )
            )
            for _ in range(size.depth)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, n, D) -> (B, n, D)
        for block in self.blocks:
            x = block(x)
        return x


def layer_norm(width: int) -> Norm:
    """Make a LayerNorm of the same kind as those in the blocks."""
    return Norm(width, "layer", epsilon=_EPSILON)


def tanh_head(width: int, hidden: int, out: int) -> nn.Sequential:
    """Make two linear layers with a tanh between them, the last ones of these networks."""
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))


def initialise(network: nn.Module) -> None:
    """Draw normal weights of deviation 0.02, truncated at -2 and 2, and set biases to zero, as ViT does."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
