"""Tokenizers without a network, for generators on pixels: an id is a pixel's level, or its colour among a few.

`PixelLevels` are the levels of the Image Transformer (Parmar et al., 2018) and of D3PM (Austin et al., 2021),
`ColourPalette` the colour clusters of ImageGPT (Chen et al., "Generative Pretraining from Pixels", 2020), which
`colour_clusters` finds. There is nothing to train: a generator names one as its `tokenizer`, and for
`discrete-lit tokenize` a checkpoint is written by

    save(instantiate({"class_path": "discrete_lit.tokenizers.PixelLevels", "init_args": {"grey": True}}), "grey.ckpt")

of `discrete_lit.checkpoints`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.core.images import from_uint8
from discrete_lit.core.modules import FullPrecision, at_least_float32
from discrete_lit.tokenizers.quantizers.codebook import gather_finite, kmeans_codes
from discrete_lit.tokenizers.quantizers.nearest import nearest_codes
from discrete_lit.tokenizers.tokenizer import Tokenizer

# Weights of red, green and blue in ITU-R BT.601's luma, by which Pillow makes grey images too.
_LUMA = (0.299, 0.587, 0.114)


class PixelLevels(FullPrecision, Tokenizer):
    """Make a token of each channel of each pixel, its value rounded to one of L levels.

    With 256 levels uint8 images come back as they were.

    Args:
        levels: L, at least 2; level l stands for the value 2 l / (L - 1) - 1.
        grey: one token a pixel, the level of its luma (0.299 R + 0.587 G + 0.114 B), which decodes to three equal
            channels; otherwise the three of a pixel stand next to one another.

    Raises:
        ValueError: fewer than two levels.
    """

    ordered_ids = True
    level_values: Tensor
    luma: Tensor

    def __init__(self, levels: int = 256, *, grey: bool = False) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.vocab_size = levels
        self.grey = grey
        # In the state, so that the fingerprint tells two of these tokenizers apart.
        self.register_buffer("level_values", torch.arange(levels) / ((levels - 1) / 2) - 1)
        self.register_buffer("luma", torch.tensor(_LUMA if grey else ()))

    def token_shape(self, image_size: int) -> tuple[int, ...]:
        _check_size(image_size)
        return (image_size, image_size) if self.grey else (image_size, image_size, 3)

    def encode(self, images: Tensor) -> Tensor:
        """Turn images `(B, 3, H, W)` in [-1, 1] into ids `(B, H, W, 3)`, or `(B, H, W)` with `grey`.

        Raises:
            ValueError: another shape, or pixels that are not finite numbers.
        """
        _check_shape(images)
        self.check_images(images)
        values = rearrange(at_least_float32(images), "b c h w -> b h w c")
        if self.grey:
            values = (values * self.luma.to(values.dtype)).sum(dim=-1)
        return values.add(1).mul((self.vocab_size - 1) / 2).round().clamp(0, self.vocab_size - 1).long()

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the values of the levels, `(B, 1, *token_shape)`, of ids `(B, *token_shape)`."""
        self.check_tokens(tokens)
        return self.level_values[tokens][:, None]

    def decode(self, tokens: Tensor) -> Tensor:
        values = self.embed(tokens)  # (B, 1, H, W) or (B, 1, H, W, 3)
        return values.expand(-1, 3, -1, -1) if self.grey else rearrange(values, "b 1 h w c -> b c h w")


class ColourPalette(FullPrecision, Tokenizer):
    """Make a token of each pixel: the nearest (Euclidean in RGB) of K colours.

    A checkpoint of this tokenizer carries its colours, not the name of their file.

    Args:
        palette: the colours `(K, 3)`, or a `.npy` file of them: floats in [-1, 1] (ImageGPT's file is one), or uint8.
            `colour_clusters` finds those of a data set.

    Raises:
        ValueError: no such file, or an array of another shape or range.
    """

    palette: Tensor

    def __init__(self, palette: str | Sequence[Sequence[float]]) -> None:
        super().__init__()
        colours = _read_palette(palette) if isinstance(palette, str) else np.asarray(palette, dtype=np.float32)
        given = repr(palette) if isinstance(palette, str) else "the given list"
        if colours.ndim != 2 or colours.shape[1] != 3 or not len(colours):
            raise ValueError(f"palette: {given} holds an array of shape {colours.shape}; (K, 3) is needed")
        if not (np.abs(colours) <= 1).all():
            raise ValueError(f"palette: {given} holds colours outside [-1, 1], and is not of type uint8")
        self.register_buffer("palette", torch.from_numpy(colours.astype(np.float32)))
        self.vocab_size = len(colours)
        described = {"class_path": "discrete_lit.tokenizers.ColourPalette", "init_args": {"palette": colours.tolist()}}
        self.save_hyperparameters(described, logger=False)

    def token_shape(self, image_size: int) -> tuple[int, ...]:
        _check_size(image_size)
        return (image_size, image_size)

    def encode(self, images: Tensor) -> Tensor:
        """Turn images `(B, 3, H, W)` in [-1, 1] into ids `(B, H, W)`.

        Raises:
            ValueError: another shape, or pixels that are not finite numbers.
        """
        _check_shape(images)
        self.check_images(images)
        batch, _, height, width = images.shape
        pixels = rearrange(images.to(self.palette.dtype), "b c h w -> (b h w) c")
        return nearest_codes(pixels, self.palette).reshape(batch, height, width)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the colours `(B, 3, H, W)` of ids `(B, H, W)`."""
        self.check_tokens(tokens)
        return rearrange(self.palette[tokens], "b h w c -> b c h w")

    def decode(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)


def _read_palette(path: str) -> np.ndarray:
    """Read the `(K, 3)` float32 colours of a `.npy` file, uint8 ones brought to [-1, 1]."""
    if not Path(path).is_file():
        raise ValueError(f"palette: no file {path!r}")
    try:
        colours = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"palette: {path!r} is not an array of numbers written by numpy.save: {error}") from error
    if colours.dtype == np.uint8:
        return from_uint8(torch.from_numpy(colours)).numpy()
    return colours.astype(np.float32)


def colour_clusters(images: Tensor, colours: int, seed: int = 0) -> Tensor:
    """Find the palette `(K, 3)` in [-1, 1] of images by k-means; `numpy.save` writes it for `ColourPalette`.

    Args:
        images: `(B, 3, H, W)` in [-1, 1]; a few hundred are enough. Pixels that are not finite numbers are left out.
        colours: K; no more than there are pixels.
        seed: of the first centres.

    Raises:
        ValueError: images of another shape, or fewer pixels than colours.
    """
    _check_shape(images)
    pixels, everyone = gather_finite(rearrange(images.float(), "b c h w -> (b h w) c"))
    if not 1 <= colours <= len(everyone):
        raise ValueError(f"colours must lie in [1, {len(everyone)}], the number of pixels, got {colours}")
    return kmeans_codes(pixels, everyone, size=colours, normalize=False, seed=seed)


def _check_shape(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have the shape (B, 3, H, W), got {tuple(images.shape)}")


def _check_size(image_size: int) -> None:
    if image_size < 1:
        raise ValueError(f"image_size must be positive, got {image_size}")
