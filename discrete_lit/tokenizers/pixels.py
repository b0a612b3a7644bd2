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

from discrete_lit.core.bounded_reading import open_array
from discrete_lit.core.images import ImageSize, check_channels, from_uint8, height_and_width
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
            channels; otherwise those of a pixel stand next to one another.
        image_channels: C of the images: 1 for grey ones, which have one token a pixel, 3 for RGB.

    Raises:
        ValueError: fewer than two levels; `grey` of other than RGB images, whose luma is not defined.
    """

    ordered_ids = True
    level_values: Tensor
    luma: Tensor

    def __init__(self, levels: int = 256, *, grey: bool = False, image_channels: int = 3) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        if image_channels < 1 or (grey and image_channels != 3):
            raise ValueError(
                f"image_channels must be at least 1, and 3 with grey, the luma of RGB; got {image_channels}, {grey=}"
            )
        self.vocab_size = levels
        self.grey = grey
        self.image_channels = image_channels
        # In the state, so that the fingerprint tells two of these tokenizers apart.
        self.register_buffer("level_values", torch.arange(levels) / ((levels - 1) / 2) - 1)
        self.register_buffer("luma", torch.tensor(_LUMA if grey else ()))

    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        size = height_and_width(image_size)
        return size if self._one_token else (*size, self.image_channels)

    @property
    def _one_token(self) -> bool:
        """Whether a pixel is one token."""
        return self.grey or self.image_channels == 1

    def coding_state(self) -> dict[str, Tensor]:
        """The levels and the luma's weights; the number of channels where it is not three."""
        channels = {} if self.image_channels == 3 else {"image_channels": torch.tensor(self.image_channels)}
        return {**super().coding_state(), **channels}

    def encode(self, images: Tensor) -> Tensor:
        """Turn images `(B, C, H, W)` in [-1, 1] into ids `(B, H, W, C)`, or `(B, H, W)` of one channel or with `grey`.

        Raises:
            ValueError: another shape, or pixels that are not finite numbers.
        """
        check_channels(images, self.image_channels, "this PixelLevels")
        self.check_images(images)
        values = rearrange(at_least_float32(images), "b c h w -> b h w c")
        if self.grey:
            values = (values * self.luma.to(values.dtype)).sum(dim=-1)
        elif self._one_token:
            values = values[..., 0]
        return values.add(1).mul((self.vocab_size - 1) / 2).round().clamp(0, self.vocab_size - 1).long()

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the values of the levels, `(B, 1, *token_shape)`, of ids `(B, *token_shape)`."""
        self.check_tokens(tokens)
        return self.level_values[tokens][:, None]

    def decode(self, tokens: Tensor) -> Tensor:
        values = self.embed(tokens)  # (B, 1, H, W) or (B, 1, H, W, C)
        if self._one_token:
            return values.expand(-1, self.image_channels, -1, -1)
        return rearrange(values, "b 1 h w c -> b c h w")


class ColourPalette(FullPrecision, Tokenizer):
    """Make a token of each pixel: the nearest (Euclidean in RGB, or in any number C of channels) of K colours.

    A checkpoint of this tokenizer carries its colours, not the name of their file.

    Args:
        palette: the colours `(K, C)`, or a `.npy` file of them: floats in [-1, 1] (ImageGPT's file is one), or uint8.
            `colour_clusters` finds those of a data set.

    Raises:
        ValueError: no such file, or an array of another shape or range.
    """

    palette: Tensor

    def __init__(self, palette: str | Sequence[Sequence[float]]) -> None:
        super().__init__()
        colours = _read_palette(palette) if isinstance(palette, str) else np.asarray(palette, dtype=np.float32)
        given = repr(palette) if isinstance(palette, str) else "the given list"
        if colours.ndim != 2 or not colours.size:
            raise ValueError(
                f"palette: {given} holds an array of shape {colours.shape}; (K, 3) is needed, or (K, C) of images "
                "with C channels"
            )
        if not (np.abs(colours) <= 1).all():
            raise ValueError(f"palette: {given} holds colours outside [-1, 1], and is not of type uint8")
        self.register_buffer("palette", torch.from_numpy(colours.astype(np.float32)))
        self.vocab_size = len(colours)
        self.image_channels = colours.shape[1]
        described = {"class_path": "discrete_lit.tokenizers.ColourPalette", "init_args": {"palette": colours.tolist()}}
        self.save_hyperparameters(described, logger=False)

    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        return height_and_width(image_size)

    def encode(self, images: Tensor) -> Tensor:
        """Turn images `(B, C, H, W)` in [-1, 1] into ids `(B, H, W)`.

        Raises:
            ValueError: another shape, or pixels that are not finite numbers.
        """
        check_channels(images, self.image_channels, "this ColourPalette")
        self.check_images(images)
        batch, _, height, width = images.shape
        pixels = rearrange(images.to(self.palette.dtype), "b c h w -> (b h w) c")
        return nearest_codes(pixels, self.palette).reshape(batch, height, width)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the colours `(B, C, H, W)` of ids `(B, H, W)`."""
        self.check_tokens(tokens)
        return rearrange(self.palette[tokens], "b h w c -> b c h w")

    def decode(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)


def _read_palette(path: str) -> np.ndarray:
    """Read the `(K, C)` float32 colours of a `.npy` file, uint8 ones brought to [-1, 1]."""
    if not Path(path).is_file():
        raise ValueError(f"palette: no file {path!r}")
    try:
        colours = open_array(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"palette: {path!r} is not an array of numbers written by numpy.save: {error}") from error
    if colours.dtype.kind not in "fiu":
        raise ValueError(f"palette: {path!r} holds {colours.dtype}, accepted: real numbers")
    if colours.dtype == np.uint8:
        return from_uint8(torch.from_numpy(colours)).numpy()
    return colours.astype(np.float32)


def colour_clusters(images: Tensor, colours: int, seed: int = 0) -> Tensor:
    """Find the palette `(K, C)` in [-1, 1] of images by k-means; `numpy.save` writes it for `ColourPalette`.

    Args:
        images: `(B, C, H, W)` in [-1, 1]; a few hundred are enough. Pixels that are not finite numbers are left out.
        colours: K; no more than there are pixels.
        seed: of the first centres.

    Raises:
        ValueError: images of another shape, or fewer pixels than colours.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have the shape (B, C, H, W), got {tuple(images.shape)}")
    pixels, everyone = gather_finite(rearrange(images.float(), "b c h w -> (b h w) c"))
    if not 1 <= colours <= len(everyone):
        raise ValueError(f"colours must lie in [1, {len(everyone)}], the number of pixels, got {colours}")
    return kmeans_codes(pixels, everyone, size=colours, normalize=False, seed=seed)
