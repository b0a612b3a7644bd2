"""An image file to a square of 8-bit RGB: decoding, and the crops of training and of evaluation.

Decoding follows the rules that published figures were made with, unless one would destroy the picture:

- EXIF orientation is ignored, as every published ImageNet pipeline does; `apply_exif` honours it.
- Grey is repeated over the three channels. CMYK is converted by Pillow, which knows Adobe's inverted files.
- Transparency is dropped, not composited: that is what `convert("RGB")` does in the published pipelines, and
  there is no background colour that is right for every set.
- 16-bit grey is scaled to 8 bits by 255/65535; Pillow's own conversion would clip it to white. 16-bit colour is
  reduced by Pillow itself, which keeps the high byte.
- Of an animation the first frame is taken.

There are three crops: a random one for training, drawn for the sample; the centre, on which published figures are
evaluated; and ten of one image. All shrink an image with ADM's filter, so that a tokenizer is trained on the pixels
that it is measured on.
"""

import io
import math
import os
import warnings

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError, features

_BOX, _BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC

# Named, because Pillow also opens formats by starting another program (EPS).
_AVIF = ("AVIF",) if features.check("avif") else ()
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", *_AVIF)

IMAGE_EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "tga"]
    + ["avif"] * len(_AVIF)
)
UNREADABLE_EXTENSIONS = frozenset(["heic", "heif", "jxl", "avif", "dng", "cr2", "nef", "arw", "psd"]) - IMAGE_EXTENSIONS
"""Pictures that are not read, which whoever has them must be told of."""

IMAGE_BYTES_VARIABLE = "DISCRETE_LIT_MAX_IMAGE_MEGABYTES"
"""The environment variable of the largest image file, in units of 10^6 bytes."""
_DEFAULT_MEGABYTES = 256


class UndecodableImage(ValueError):
    """The bytes are not an image that can be read completely."""


def image_bytes_limit() -> int:
    """Bytes of the largest image file that is read; what claims more would fill the memory before it is refused.

    Raises:
        ValueError: the environment variable is no positive number.
    """
    given = os.environ.get(IMAGE_BYTES_VARIABLE, str(_DEFAULT_MEGABYTES))
    try:
        limit = int(float(given) * 1e6)
    except (ValueError, OverflowError):
        limit = 0
    if limit < 1:
        raise ValueError(f"the environment variable {IMAGE_BYTES_VARIABLE} is {given!r}; it must be a positive number")
    return limit


def decode_image(data: bytes, apply_exif: bool = False) -> Image.Image:
    """Decode an image file.

    Args:
        data: the file's bytes.
        apply_exif: turn the picture as its EXIF orientation says.

    Returns:
        A Pillow image of mode RGB.

    Raises:
        UndecodableImage: the bytes are no image, are cut short, or hold values without a defined range.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata in files that it reads correctly; a truncated picture raises.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_jpeg_size(image, len(data))
                image.load()
                if apply_exif:
                    image = ImageOps.exif_transpose(image)
                return _to_rgb(image)
    except UnidentifiedImageError as error:
        kind = "not one that is read"
        if data[4:8] == b"ftyp":  # ISO base media, of which HEIC is one, whatever the file's name says.
            kind = f"{data[8:12].decode('ascii', 'replace')!r}, which Pillow does not read here"
        raise UndecodableImage(f"cannot identify the image: its format is {kind}") from error
    # Broken files raise almost anything: OSError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, ...
    except Exception as error:
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Cut out ADM's evaluation crop (`center_crop_arr` of Dhariwal and Nichol, "Diffusion Models Beat GANs", 2021).

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
    """Cut out the centre and the four corners of an image and of its mirror image, as LlamaGen and RAR do for tokens.

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
    *,
    minimum_crop: float = 1.0,
    flip: bool = True,
) -> np.ndarray:
    """Cut out the training crop: resize, take a random square, mirror half of the images.

    Args:
        image: mode RGB.
        size: side of the result in pixels.
        randomness: numbers in [0, 1) that decide, in order, the scale, the row, the column and the mirroring.
        minimum_crop: the smallest fraction of the shorter side that the square may cover. 1.0 resizes the shorter side
            to `size` (VQGAN, MaskGIT); 0.8 resizes it to between `size` and `size / 0.8` (`random_crop_arr` of ADM, as
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
    pixels = np.asarray(_resized_square(image, width, height, left, top, size))
    return pixels[:, ::-1] if flip and mirror < 0.5 else pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_16_to_rgb(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey_16_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{image.mode} pixels outside 0..65535")
    grey = np.empty(values.shape, dtype=np.uint8)
    # Row by row: wider copies of the whole picture would take gigabytes of the largest that Pillow accepts.
    for row, wide in zip(grey, values, strict=True):
        row[:] = (wide.astype(np.int64) * 255 + 32767) // 65535
    return Image.fromarray(grey).convert("RGB")


def _check_jpeg_size(image: Image.Image, size: int) -> None:
    """Refuse a header that claims more pixels than its bytes can code; libjpeg would fill them with grey.

    A block of 8x8 values takes at least one bit, and two (its mean, and that there is no more) where it is coded at
    once (ITU T.81, annexes F and G).
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or "arithmetic" in image.info:
        return
    widest, highest = max(layer[1] for layer in image.layer), max(layer[2] for layer in image.layer)
    blocks = sum(
        math.ceil(image.width * layer[1] / widest / 8) * math.ceil(image.height * layer[2] / highest / 8)
        for layer in image.layer
    )
    bits = blocks if image.info.get("progressive") else 2 * blocks
    if bits > 8 * size:
        raise ValueError(f"its header claims {image.width}x{image.height} pixels, for which {size:,} bytes are too few")


def _halved(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), _BOX)
    return image


def _scaled_size(image: Image.Image, size: int) -> tuple[int, int]:
    scale = size / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _resized_square(image: Image.Image, width: int, height: int, left: int, top: int, size: int) -> Image.Image:
    """Cut a square out of `image` resized to `(width, height)`, without computing the rest."""
    if (width, height) == image.size:
        return image.crop((left, top, left + size, top + size))
    across, down = image.width / width, image.height / height
    # Rounding must not put the square outside the image.
    right, bottom = min((left + size) * across, image.width), min((top + size) * down, image.height)
    return image.resize((size, size), _BICUBIC, box=(left * across, top * down, right, bottom))
