"""Image files of any kind to 8-bit RGB.

The rules, each the one that published figures were made with unless it would destroy the picture:

- EXIF orientation is ignored, as every published ImageNet pipeline does; `apply_exif` honours it.
- Grey is repeated over the three channels. CMYK is converted by Pillow, which knows Adobe's inverted files.
- Transparency is dropped, not composited: that is what `convert("RGB")` does in the published pipelines, and
  there is no background colour that is right for every set.
- 16-bit grey is scaled to 8 bits by 255/65535; Pillow's own conversion would clip it to white. 16-bit colour is
  reduced by Pillow itself, which keeps the high byte.
- Of an animation the first frame is taken.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

# Named, because Pillow also opens formats by starting another program (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA")

IMAGE_EXTENSIONS = frozenset(
    ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "tga"]
)


class UndecodableImage(ValueError):
    """The bytes are not an image that can be read completely."""


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
                image.load()
                if apply_exif:
                    image = ImageOps.exif_transpose(image)
                return _to_rgb(image)
    # Broken files raise almost anything: OSError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, ...
    except Exception as error:
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_16_to_rgb(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey_16_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{image.mode} pixels outside 0..65535")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
