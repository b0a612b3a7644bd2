"""Crops: one for training, keyed to the sample, the one that published figures are evaluated on, and ten of one image.

All shrink an image with ADM's filter, so that a tokenizer is trained on the pixels that it is measured on.
"""

import math

import numpy as np
from PIL import Image

_BOX, _BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's evaluation crop (`center_crop_arr` of Dhariwal and Nichol, "Diffusion Models Beat GANs", 2021).

    Halve with a box filter while the shorter side is at least twice `size`, resize the shorter side to `size` with a
    bicubic filter, cut out the centre.

    Returns:
        uint8 `(size, size, 3)`; the image itself where it already has that size.
    """
    image = _halved(image, size)
    pixels = np.asarray(image.resize(_scaled_size(image, size), _BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def ten_crops(image: Image.Image, size: int, scale: float) -> np.ndarray:
    """The centre and the four corners of an image, then of its mirror image, as LlamaGen and RAR cache tokens of.

    The image is first cut to the square `center_crop` of side `int(size * scale)`.

    Args:
        image: mode RGB.
        size: side of the results in pixels.
        scale: at least 1; LlamaGen's and RAR's 1.1, LlamaGen's second 1.05.

    Returns:
        uint8 `(10, size, size, 3)`.
    """
    square = center_crop(image, int(size * scale))
    far = len(square) - size
    middle = round(far / 2)
    corners = [(middle, middle), (0, 0), (0, far), (far, 0), (far, far)]
    views = (square, square[:, ::-1])
    return np.stack([view[top : top + size, left : left + size] for view in views for top, left in corners])


def random_crop(
    image: Image.Image,
    size: int,
    randomness: tuple[float, float, float, float],
    minimum_crop: float = 1.0,
    flip: bool = True,
) -> np.ndarray:
    """The training crop: resize, cut out a random square, mirror half of the images.

    Args:
        image: mode RGB.
        size: side of the result in pixels.
        randomness: numbers in [0, 1) that decide, in order, the scale, the row, the column and the mirroring.
        minimum_crop: the smallest part of the shorter side that the square may cover. 1.0 resizes the shorter side to
            `size` (VQGAN, MaskGIT); 0.8 resizes it to between `size` and `size / 0.8` (`random_crop_arr` of ADM, as
            used by LlamaGen).
        flip: mirror the image left to right with probability 1/2.

    Returns:
        uint8 `(size, size, 3)`; without `flip`, the image itself where it already has that size.
    """
    scale, row, column, mirror = randomness
    longest = math.ceil(size / minimum_crop)
    shorter_side = size + int(scale * (longest - size + 1))
    image = _halved(image, shorter_side)
    width, height = _scaled_size(image, shorter_side)
    top, left = int(row * (height - size + 1)), int(column * (width - size + 1))
    pixels = np.asarray(_resized_part(image, width, height, left, top, size))
    return pixels[:, ::-1] if flip and mirror < 0.5 else pixels


def _halved(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), _BOX)
    return image


def _scaled_size(image: Image.Image, size: int) -> tuple[int, int]:
    scale = size / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _resized_part(image: Image.Image, width: int, height: int, left: int, top: int, size: int) -> Image.Image:
    """A square of `image` resized to `(width, height)`, without computing the rest."""
    if (width, height) == image.size:
        return image.crop((left, top, left + size, top + size))
    across, down = image.width / width, image.height / height
    # Rounding must not put the square outside the image.
    right, bottom = min((left + size) * across, image.width), min((top + size) * down, image.height)
    return image.resize((size, size), _BICUBIC, box=(left * across, top * down, right, bottom))
