"""An image file to 8-bit pixels of one size: decoding, and the crops of training and of evaluation.

Decoding follows the rules that published figures were made with, unless one would destroy the picture:

- EXIF orientation is ignored, as every published ImageNet pipeline does; `apply_exif` honours it.
- The mode is RGB unless grey (one channel) or RGBA (four) is asked for. In RGB grey is repeated over the three
  channels; colour becomes grey by ITU-R BT.601's luma. CMYK is converted by Pillow, which knows Adobe's inverted files.
- Transparency is dropped, not composited, unless it is asked for as the fourth channel: that is what `convert("RGB")`
  does in the published pipelines, and there is no background colour that is right for every set. Where RGBA is resized,
  colours weigh by their opacity, as Pillow does it.
- 16-bit grey is scaled to 8 bits by 255/65535; Pillow's own conversion would clip it to white. 16-bit colour is
  reduced by Pillow itself, which keeps the high byte.
- Of an animation the first frame is taken.

There are five crops: three random ones for training, drawn for the sample, of a resized image, of a random part of it,
or as DALL-E cuts; the centre, on which published figures are evaluated; and ten of one image. All but the random part,
which is torchvision's as MaskBit uses it, and DALL-E's shrink an image with ADM's filter, so that a tokenizer is
trained on the pixels that it is measured on.

A size is the side of a square, or (height, width): then the image is scaled to cover that box, and cut to it.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError, features

from discrete_lit.core.images import ImageSize, height_and_width, normal_size
from discrete_lit.core.variables import positive_number
from discrete_lit.data.media import MediaKind, UndecodableSample
from discrete_lit.data.torch_image import TorchImage, decode_jpeg, plain_jpeg_size

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


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of each number of channels that images are decoded to."""

_ORIENTATION = 0x0112  # the EXIF tag

# A resized picture of more pixels than this many times those that are cut out of it is not made as a whole.
_LARGEST_EXCESS = 16


# Bytes that decoding one picture may take, and for each byte that its file may have; those of a pixel in RGB, and of
# one that is halved, in width and then in height.
_MOST_DECODED, _DECODED_OF_A_BYTE, _CONVERTED, _HALVED = 5 * 2**28, 5, 4, 3


Picture = Image.Image | TorchImage
"""A decoded picture that crops are cut out of: by Pillow, or by faster code."""


class UndecodableImage(UndecodableSample):
    """The bytes are not an image that can be read completely."""


IMAGES = MediaKind("image", IMAGE_EXTENSIONS, unreadable=UNREADABLE_EXTENSIONS)
"""Image files."""


def image_bytes_limit() -> int:
    """Bytes of the largest image file that is read; what claims more would fill the memory before it is refused.

    Raises:
        ValueError: the environment variable is no positive number.
    """
    return math.ceil(positive_number(IMAGE_BYTES_VARIABLE, _DEFAULT_MEGABYTES) * 1e6)


def decode_image(data: bytes, apply_exif: bool = False, *, image_channels: int = 3) -> Image.Image:
    """Decode an image file.

    Args:
        data: the file's bytes.
        apply_exif: turn the picture as its EXIF orientation says.
        image_channels: 1 for grey, 3 for RGB, 4 for RGBA.

    Returns:
        A Pillow image of mode L, RGB or RGBA.

    Raises:
        UndecodableImage: the bytes are no image, are cut short, or hold values without a defined range.
    """
    with _opened(data, MODES[image_channels]) as image:
        return _loaded(image, apply_exif, MODES[image_channels])


def decode_image_fast(
    data: bytes, apply_exif: bool = False, *, image_channels: int = 3, covered: tuple[int, int] | None = None
) -> Image.Image | TorchImage:
    """Decode an image file for training, by faster code than `decode_image` where that gives nearly the same.

    JPEG files of three colours are decoded by torchvision, to the same pixels. One that crops will halve is decoded at
    half, a quarter or an eighth of its size (libjpeg's scaled inverse cosine transform in place of ADM's box filter).
    What is read otherwise is read as ever, and all but pictures with opacity are resized by torch, see `TorchImage`.

    Args:
        data, apply_exif, image_channels: as for `decode_image`.
        covered: height and width that the decoded picture still has to cover; None decodes at full size.

    Raises:
        UndecodableImage: as `decode_image`.
    """
    mode = MODES[image_channels]
    # Pillow takes a twentieth of the time to open a file.
    plain = plain_jpeg_size(data) if mode == "RGB" and not apply_exif else None
    if plain is not None and not _is_halved(plain, covered):
        with _silence:  # torchvision warns of plans for its decoders
            decoded = decode_jpeg(data)
        if decoded is not None:
            return decoded
    with _opened(data, mode) as image:
        turned = apply_exif and image.getexif().get(_ORIENTATION, 1) != 1
        if image.format == "JPEG" and image.mode == mode == "RGB" and not turned:
            whole = image.size
            if covered is not None and _is_halved((image.height, image.width), covered):
                image.draft(mode, (covered[1], covered[0]))
            if image.size == whole and (decoded := decode_jpeg(data)) is not None:
                return decoded
        picture = _loaded(image, apply_exif, mode)
        return picture if mode == "RGBA" else TorchImage(_pixels(picture))


def _is_halved(size: tuple[int, int], covered: tuple[int, int] | None) -> bool:
    """Tell whether half of a height and width still covers what is needed of them."""
    return covered is not None and size[0] >= 2 * covered[0] and size[1] >= 2 * covered[1]


def _loaded(image: Image.Image, apply_exif: bool, mode: str) -> Image.Image:
    image.load()
    return to_mode(ImageOps.exif_transpose(image) if apply_exif else image, mode)


class _Silence:
    """Ignores warnings while anything is inside, in any number of threads.

    The filters are the process's: what one thread's `warnings.catch_warnings` puts back may be another's.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._filters = Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_silence = _Silence()


@contextmanager
def _opened(data: bytes, mode: str) -> Iterator[Image.Image]:
    """Open an image file that will be brought to a mode; only its header is read yet."""
    try:
        # Pillow warns of odd metadata in files that it reads correctly; a truncated picture raises.
        with _silence, Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_jpeg_size(image, len(data))
            _check_memory(image, mode)
            yield image
    except UnidentifiedImageError as error:
        kind = "not one that is read"
        if data[4:8] == b"ftyp":  # ISO base media, of which HEIC is one, whatever the file's name says.
            kind = f"{data[8:12].decode('ascii', 'replace')!r}, which Pillow does not read here"
        raise UndecodableImage(f"cannot identify the image: its format is {kind}") from error
    # Broken files raise almost anything: OSError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, ...
    except Exception as error:
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error


def center_crop(image: Picture, size: ImageSize) -> np.ndarray:
    """Cut out ADM's evaluation crop (`center_crop_arr` of Dhariwal and Nichol, "Diffusion Models Beat GANs", 2021).

    Halve with a box filter while the shorter side is at least twice `size`, resize the shorter side to `size` with a
    bicubic filter, rows before columns, cut out the centre. With a height and a width the same is done to the side that
    decides how far the image must be scaled to cover them.

    Returns:
        uint8 `(H, W, C)`; the image itself where it already has that size.
    """
    height, width = height_and_width(size)
    image = _halved(image, height, width)
    wide, high = _scaled_size(image, height, width)
    left, top = (wide - width) // 2, (high - height) // 2
    # Of a long thin picture only what is cut out is computed: the rest could fill the memory. The pixels are the same
    # but for the rounding of Pillow's filter, which is why everything else keeps to ADM's order.
    if _wastes(image, wide, high, part=width * height):
        return _pixels(_resized_part(image, wide, high, left=left, top=top, height=height, width=width))
    if _is_filtered_by_rows(image):  # the columns that are cut off need no second pass
        image = image.resize((wide, image.height), _BICUBIC).crop((left, 0, left + width, image.height))
        wide, left = width, 0
    return _pixels(_resize(image, (wide, high)))[top : top + height, left : left + width]


def ten_crops(image: Picture, size: ImageSize, scale: float) -> np.ndarray:
    """Cut out the centre and the four corners of an image and of its mirror image, as LlamaGen and RAR do for tokens.

    The image is first cut to its `center_crop` of `size` times `scale`, rounded down.

    Args:
        image: of any mode with 8 bits.
        size: of the results in pixels.
        scale: at least 1; LlamaGen's and RAR's 1.1, LlamaGen's second 1.05.

    Returns:
        uint8 `(10, H, W, C)`.
    """
    height, width = height_and_width(size)
    larger = center_crop(image, (int(height * scale), int(width * scale)))
    bottom, right = larger.shape[0] - height, larger.shape[1] - width
    corners = [(round(bottom / 2), round(right / 2)), (0, 0), (0, right), (bottom, 0), (bottom, right)]
    views = (larger, larger[:, ::-1])
    return np.stack([view[top : top + height, left : left + width] for view in views for top, left in corners])


def random_crop(
    image: Picture,
    size: ImageSize,
    randomness: tuple[float, float, float, float],
    *,
    minimum_crop: float = 1.0,
    maximum_crop: float = 1.0,
    flip: bool = True,
) -> np.ndarray:
    """Cut out the training crop: resize, take a random square (or rectangle), mirror half of the images.

    Args:
        image: of any mode with 8 bits.
        size: of the result in pixels.
        randomness: numbers in [0, 1) that decide, in order, the scale, the row, the column and the mirroring.
        minimum_crop: the smallest fraction of the shorter side that the square may cover. 1.0 resizes the shorter side
            to `size` (VQGAN, MaskGIT); 0.8 resizes it to between `size` and `size / 0.8` (`random_crop_arr` of ADM, as
            used by LlamaGen). With a height and a width, the side that decides the scale.
        maximum_crop: the largest; the same as the smallest always resizes to the same size, as VAR to 288 for 256.
        flip: mirror the image left to right with probability 1/2.

    Returns:
        uint8 `(H, W, C)`; without `flip`, the image itself where it already has that size.
    """
    height, width = height_and_width(size)
    scale, row, column, mirror = randomness
    side = min(height, width)
    shortest, longest = math.ceil(side / maximum_crop), math.ceil(side / minimum_crop)
    enlarged = shortest + int(scale * (longest - shortest + 1))
    covered = round(height * enlarged / side), round(width * enlarged / side)
    image = _halved(image, *covered)
    wide, high = _scaled_size(image, *covered)
    top, left = int(row * (high - height + 1)), int(column * (wide - width + 1))
    pixels = _pixels(_resized_part(image, wide, high, left=left, top=top, height=height, width=width))
    return mirrored(pixels) if flip and mirror < 0.5 else pixels


def mirrored(pixels: np.ndarray) -> np.ndarray:
    """Turn uint8 `(..., W, C)` left to right; by torch, which takes a tenth of the time of NumPy's copy."""
    import torch  # here, for what only reads pictures starts without it

    return torch.from_numpy(np.require(pixels, requirements="W")).flip(-2).numpy()


# Tries of a random part before the centre is taken, as in torchvision.
_TRIES = 10


def random_part(
    width: int,
    height: int,
    draw: Callable[[int], tuple[float, float, float, float]],
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw a part of an image by the law of torchvision's `RandomResizedCrop` (Szegedy et al., "Going Deeper with
    Convolutions", 2015, section 6).

    Ten times an area is drawn, uniform in fractions of the image's, and a ratio of width to height, uniform in its
    logarithm. The first rectangle of these that fits lies anywhere in the image; where none fits, the part is the
    largest centre whose ratio is allowed. So a square of at least 0.8 of the area of an image of 500 x 375 pixels,
    which has no room for it, is always the centre, and its side the shorter side.

    Args:
        width, height: of the image in pixels.
        draw: numbers in [0, 1) for each try: the area, the ratio, the row and the column.
        area: smallest and largest fraction.
        aspect: smallest and largest ratio.

    Returns:
        Left, top, width and height of the part in pixels.
    """
    for attempt in range(_TRIES):
        of_area, of_aspect, row, column = draw(attempt)
        pixels = width * height * (area[0] + of_area * (area[1] - area[0]))
        ratio = math.exp(math.log(aspect[0]) + of_aspect * (math.log(aspect[1]) - math.log(aspect[0])))
        wide, high = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return int(column * (width - wide + 1)), int(row * (height - high + 1)), wide, high
    wide, high = width, height
    if width / height < aspect[0]:
        high = round(width / aspect[0])
    elif width / height > aspect[1]:
        wide = round(height * aspect[1])
    return (width - wide) // 2, (height - high) // 2, wide, high


def random_resized_crop(
    image: Picture,
    size: ImageSize,
    draw: Callable[[int], tuple[float, float, float, float]],
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Cut out a random part of an image and resize it with a bicubic filter, as torchvision's `RandomResizedCrop` does.

    Args:
        image: of any mode with 8 bits.
        size: of the result in pixels.
        draw, area, aspect: see `random_part`; the defaults are torchvision's, MaskBit's are (0.8, 1) and (1, 1).

    Returns:
        uint8 `(H, W, C)`.
    """
    height, width = height_and_width(size)
    left, top, wide, high = random_part(*image.size, draw, area=area, aspect=aspect)
    return _pixels(_resize(image.crop((left, top, left + wide, top + high)), (width, height)))


def dall_e_crop(image: Picture, size: ImageSize, randomness: tuple[float, float, float, float]) -> np.ndarray:
    """Cut out the training crop of DALL-E's transformer, which VQ-Diffusion takes too.

    The largest square of the image, at most 1/8 of what is left over away from its centre, is resized to between `size`
    and 9/8 of it, but not enlarged beyond `size`; of that a random square is cut out (Ramesh et al., "Zero-Shot
    Text-to-Image Generation", 2021, appendix B).

    Args:
        image: of any mode with 8 bits.
        size: of the result in pixels; a square.
        randomness: numbers in [0, 1) that decide, in order, the place of the largest square, the side that it is
            resized to, the row and the column.

    Returns:
        uint8 `(H, W, C)`.

    Raises:
        ValueError: a size that is no square.
    """
    side, other = height_and_width(size)
    if side != other:
        raise ValueError(f"the crop 'dall_e' is a square, and image_size is {normal_size(size)}")
    place, scale, row, column = randomness
    shorter = min(image.size)
    rest = max(image.size) - shorter
    least, most = 3 * rest // 8, max(3 * rest // 8 + 1, 5 * rest // 8)  # `most` is not reached
    start = least + int(place * (most - least))
    left, top = (start, 0) if image.width > image.height else (0, start)
    largest = max(min(shorter, round(9 / 8 * side)), side)
    enlarged = side + int(scale * (largest - side + 1))
    square = _resize(image.crop((left, top, left + shorter, top + shorter)), (enlarged, enlarged))
    top, left = int(row * (enlarged - side + 1)), int(column * (enlarged - side + 1))
    return _pixels(square)[top : top + side, left : left + side]


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Bring a Pillow image to mode L, RGB or RGBA by the rules of this module.

    Raises:
        ValueError: floating-point pixels, or 16-bit ones out of their range.
    """
    if image.mode.startswith("I"):
        image = _grey_16_to_8(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode == "P":
        # A palette of colours and their opacity, of which "L" would know nothing.
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    # `convert` would copy what is there already. The metadata of a TIFF is read from its file, which is closed then.
    return image if image.mode == mode and image.format != "TIFF" else image.convert(mode)


def _grey_16_to_8(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{image.mode} pixels outside 0..65535")
    grey = np.empty(values.shape, dtype=np.uint8)
    # Row by row: wider copies of the whole picture would take gigabytes of the largest that Pillow accepts.
    for row, wide in zip(grey, values, strict=True):
        row[:] = (wide.astype(np.int64) * 255 + 32767) // 65535
    return Image.fromarray(grey)


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


def _check_memory(image: Image.Image, mode: str) -> None:
    """Refuse a picture that would take more than 1.3 gigabytes while it is decoded and brought to its mode.

    Some decoders keep more than the pixels: OpenJPEG 32 bits of each channel, libjpeg all coefficients of a picture
    that comes in several passes, and others a whole strip, tile or frame.
    """
    channels = len(image.getbands())
    held = 4 if channels > 1 or image.mode in ("I", "F") else 2
    decoder = {"JPEG2000": 8 * channels, "WEBP": 8, "AVIF": 8, "TIFF": 2 * channels}.get(image.format or "", 0)
    if image.info.get("progressive"):
        decoder = 2 * channels
    # Pillow multiplies colours by their opacity in another copy before it resizes them. What has its mode already is
    # not copied, but halved: first its width.
    converted = 2 * _CONVERTED if mode == "RGBA" else _CONVERTED
    if mode == "RGB" == image.mode and image.format != "TIFF":
        converted = _HALVED
    needed = (held + decoder + converted) * image.width * image.height
    most = max(_MOST_DECODED, _DECODED_OF_A_BYTE * image_bytes_limit())
    if needed > most:
        raise ValueError(
            f"its {image.width}x{image.height} pixels take {needed:,} bytes to decode, at most {most:,} are spent; "
            f"see {IMAGE_BYTES_VARIABLE}"
        )


def _pixels(image: Picture) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _is_filtered_by_rows(image: Picture) -> bool:
    """Tell whether rows and columns may be filtered by two calls.

    Pillow multiplies colours by their opacity before the first pass, and divides after the last; torch has one order.
    """
    return not isinstance(image, TorchImage) and image.mode != "RGBA"


def _resize(
    image: Picture,
    size: tuple[int, int],
    resample: Image.Resampling = _BICUBIC,
    *,
    box: tuple[float, float, float, float] | None = None,
) -> Picture:
    """Resize a box of an image: filter its rows, round, filter its columns, as Pillow did when figures were published.

    From 13.0 on it begins with the columns where that is cheaper, and rounds otherwise.
    """
    if isinstance(image, TorchImage):
        assert box is None
        return image.resize(size, resample)
    left, top, right, bottom = box or (0, 0, *image.size)
    if not _is_filtered_by_rows(image):
        return image.resize(size, resample, box=(left, top, right, bottom))
    # The rows that the filter reaches: two of the coarser picture's on each side.
    reach = 2 * max(1.0, (bottom - top) / size[1]) + 1
    first, last = max(0, math.floor(top - reach)), min(image.height, math.ceil(bottom + reach))
    if last - first < image.height:
        image, top, bottom = image.crop((0, first, image.width, last)), top - first, bottom - first
    rows = image.resize((size[0], image.height), resample, box=(left, 0, right, image.height))
    return rows.resize(size, resample, box=(0, top, size[0], bottom))


def _halved(image: Picture, height: int, width: int) -> Picture:
    while image.width >= 2 * width and image.height >= 2 * height:
        image = _resize(image, (image.width // 2, image.height // 2), _BOX)
    return image


def _scaled_size(image: Picture, height: int, width: int) -> tuple[int, int]:
    """The width and height of an image that is scaled to just cover a box."""
    scale = max(width / image.width, height / image.height)
    return round(image.width * scale), round(image.height * scale)


def _wastes(image: Picture, wide: int, high: int, *, part: int) -> bool:
    """Tell whether an image resized to `(wide, high)` would be far larger than itself and the part that is wanted."""
    return wide * high > max(image.width * image.height, _LARGEST_EXCESS * part)


def _resized_part(image: Picture, wide: int, high: int, *, left: int, top: int, height: int, width: int) -> Picture:
    """Cut a box out of `image` resized to `(wide, high)`, without computing the rest."""
    if (wide, high) == image.size:
        return image.crop((left, top, left + width, top + height))
    if isinstance(image, TorchImage):
        if not _wastes(image, wide, high, part=width * height):  # torch cuts no box out
            return image.resize((wide, high), _BICUBIC).crop((left, top, left + width, top + height))
        image = image.by_pillow()
    across, down = image.width / wide, image.height / high
    # Rounding must not put the box outside the image.
    right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
    return _resize(image, (width, height), box=(left * across, top * down, right, bottom))
