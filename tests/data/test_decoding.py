import io
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from discrete_lit.data import transforms
from discrete_lit.data.transforms import IMAGE_EXTENSIONS, UNREADABLE_EXTENSIONS, UndecodableImage, decode_image


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def decoded(data: bytes, **settings: Any) -> np.ndarray:
    image = decode_image(data, **settings)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_is_unchanged(image_bytes: Callable[..., bytes]) -> None:
    pixels = np.random.RandomState(5).randint(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(image_bytes(5)), pixels)


def test_grey_is_repeated() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2))


def test_black_and_white_becomes_0_and_255() -> None:
    bits = Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("1")
    np.testing.assert_array_equal(decoded(encoded(bits))[..., 0], np.eye(8, dtype=np.uint8) * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    wide = np.array([[0, 128, 129, 257], [300, 32768, 65407, 65535]], dtype=np.uint16)
    pixels = decoded(encoded(Image.fromarray(wide), kind))
    # 65535 / 255 = 257 exactly.
    np.testing.assert_array_equal(pixels[..., 0], np.round(wide / 257).astype(np.uint8))
    assert pixels[..., 0].tolist() == [[0, 0, 1, 1], [1, 128, 255, 255]]


def test_32_bit_values_outside_16_bits_and_floats_are_refused() -> None:
    with pytest.raises(UndecodableImage, match="outside"):
        decode_image(encoded(Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "TIFF"))
    with pytest.raises(UndecodableImage, match="floating"):
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"))


def test_alpha_is_dropped_and_not_composited() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 4), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(pixels))), pixels[..., :3])
    grey_alpha = Image.fromarray(pixels[..., :2])
    assert grey_alpha.mode == "LA"
    np.testing.assert_array_equal(decoded(encoded(grey_alpha)), np.repeat(pixels[..., :1], 3, 2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_other_channels_that_are_asked_for(mode: str) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 4), dtype=np.uint8)
    source = Image.fromarray(pixels)
    wide = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = wide if mode == "I;16" else source.convert(mode)
    data = encoded(image)
    grey, colour = decode_image(data, image_channels=1), decode_image(data, image_channels=4)
    assert grey.mode == "L" and colour.mode == "RGBA"
    if mode == "I;16":
        np.testing.assert_array_equal(np.asarray(grey), pixels[..., 0])
    else:
        np.testing.assert_array_equal(np.asarray(grey), np.asarray(image.convert("RGB").convert("L")))
    np.testing.assert_array_equal(np.asarray(colour)[..., :3], decoded(data))
    opacity = {
        "LA": pixels[..., 3],
        "RGBA": pixels[..., 3],
        "P": np.asarray(source.convert("P").convert("RGBA"))[..., 3],
    }
    np.testing.assert_array_equal(np.asarray(colour)[..., 3], opacity.get(mode, np.full((8, 8), 255)))


def test_the_transparency_of_a_palette_is_its_fourth_channel() -> None:
    palette = Image.new("P", (2, 1))
    palette.putdata([0, 1])
    palette.putpalette([10, 20, 30, 40, 50, 60])
    data = encoded(palette, transparency=1)
    assert np.asarray(decode_image(data, image_channels=4)).tolist() == [[[10, 20, 30, 255], [40, 50, 60, 0]]]
    assert decode_image(data, image_channels=1).mode == "L"


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
def test_a_palette_is_looked_up(transparency: Any) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 0]], dtype=np.uint8), mode=None)
    palette = Image.new("P", (2, 2))
    palette.putdata(list(np.asarray(image).ravel()))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    settings = {} if transparency is None else {"transparency": transparency}
    pixels = decoded(encoded(palette, **settings))
    assert pixels.tolist() == [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [10, 20, 30]]]


def test_cmyk_jpeg_keeps_its_colours() -> None:
    colours = [(250, 20, 30), (20, 240, 40), (30, 60, 220), (255, 255, 255), (0, 0, 0)]
    for colour in colours:
        image = Image.new("RGB", (16, 16), colour).convert("CMYK")
        pixels = decoded(encoded(image, "JPEG", quality=95)).astype(int)
        assert np.abs(pixels - colour).max() <= 6


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded(data)[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_ignored_unless_it_is_asked_for() -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: the stored picture is to be turned clockwise.
    data = encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)
    ignored, honoured = decoded(data), decoded(data, apply_exif=True)
    assert ignored.shape == (8, 16, 3) and honoured.shape == (16, 8, 3)
    assert ignored[:, :6].min() > 240 and ignored[:, 10:].max() < 15
    assert honoured[:6].min() > 240 and honoured[10:].max() < 15


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), kind)
    decode_image(data)
    with pytest.raises(UndecodableImage):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(UndecodableImage):
        decode_image(data)


def test_a_format_that_would_start_another_program_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", refuse)
    data = encoded(Image.new("RGB", (4, 4)), "EPS")
    with pytest.raises(AssertionError, match="Ghostscript"):
        Image.open(io.BytesIO(data)).load()
    with pytest.raises(UndecodableImage, match="cannot identify"):
        decode_image(data)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read() -> None:
    assert "avif" in IMAGE_EXTENSIONS
    pixels = decoded(encoded(Image.new("RGB", (16, 16), (250, 20, 30)), "AVIF", quality=95)).astype(int)
    assert np.abs(pixels - (250, 20, 30)).max() <= 6


def test_what_is_heic_under_another_name_is_named() -> None:
    with pytest.raises(UndecodableImage, match="its format is 'heic', which Pillow does not read here"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(UndecodableImage, match="its format is not one that is read"):
        decode_image(b"text")
    assert "heic" in UNREADABLE_EXTENSIONS and not UNREADABLE_EXTENSIONS & IMAGE_EXTENSIONS


def with_claimed_size(data: bytes, side: int) -> bytes:
    """A JPEG whose header says another size than the picture has."""
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        if marker in data:
            start = data.index(marker) + 5
            return data[:start] + side.to_bytes(2, "big") * 2 + data[start + 4 :]
    raise AssertionError("no frame header")


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("grey", [False, True])
def test_a_jpeg_that_claims_more_than_its_bytes_can_hold_is_refused(settings: dict[str, Any], grey: bool) -> None:
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise.convert("L") if grey else noise, "JPEG", **settings)
    assert decode_image(with_claimed_size(data, 65)).size == (65, 65)  # Nothing tells it from a damaged picture.
    with pytest.raises(UndecodableImage, match=r"claims 13000x13000 pixels, for which .* bytes are too few"):
        decode_image(with_claimed_size(data, 13000))


@pytest.mark.parametrize("settings", [{}, {"optimize": True}, {"progressive": True}, {"subsampling": 2, "quality": 1}])
@pytest.mark.parametrize("size", [(1, 1), (7, 1000), (2048, 2048)])
def test_the_emptiest_jpeg_is_read(settings: dict[str, Any], size: tuple[int, int]) -> None:
    for mode in ("RGB", "L", "CMYK"):
        assert decode_image(encoded(Image.new(mode, size), "JPEG", **settings)).size == size


def test_large_16_bit_pictures_take_no_copies_of_eight_bytes() -> None:
    data = encoded(Image.fromarray(np.full((2000, 3000), 40000, dtype=np.uint16)), "PNG")
    tracemalloc.start()
    image = decode_image(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert image.getpixel((1, 1)) == (156, 156, 156)
    assert peak < 30e6  # What numpy holds of 6 million pixels: 2 bytes and 1 byte each, and Pillow's own copies.


def test_threads_that_decode_leave_the_filters_of_warnings_as_they_were() -> None:
    """Each begins inside another and ends behind it, as no stack of filters can."""
    filters = list(warnings.filters)
    both = threading.Barrier(2, timeout=30)

    def first() -> None:
        with transforms._silence:
            both.wait()  # the second may come in
            both.wait()  # it is in
        both.wait()  # the first is out

    def second() -> None:
        both.wait()
        with transforms._silence:
            both.wait()
            both.wait()
            assert warnings.filters[0][0] == "ignore"

    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(first), pool.submit(second)]:
            result.result()
    assert list(warnings.filters) == filters
