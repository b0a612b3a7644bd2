"""Pictures: headers that lie, sizes that fill the memory, modes, several frames, what is none, and what is cut."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

from bad_input.case import Case
from discrete_lit.data import ImageFolder

LARGE = 13_000
NOISE = np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def read_folder(apply_exif: bool = False, image_channels: int = 3) -> np.ndarray:
    """The one picture of a folder as uint8 `(H, W, C)`."""
    settings = {"apply_exif": apply_exif, "image_channels": image_channels, "max_bad_fraction": 0.0}
    data = ImageFolder("images", image_size=8, batch_size=1, num_workers=0, **settings)
    (batch,) = data.evaluation_loader("train", 0, 1)
    image = batch["image"][0].movedim(0, -1).numpy()
    assert image.shape == (8, 8, image_channels) and image.dtype == np.uint8
    return image


def picture(
    name: str, content: bytes | Callable[[], bytes], refused: str | None = None, file: str = "0.png", **more: Any
) -> Case:
    """A folder with one picture, which is read at 8x8."""
    settings = more.pop("settings", {})

    def craft(folder: Path) -> None:
        (folder / "images").mkdir()
        (folder / "images" / file).write_bytes(content() if callable(content) else content)

    return Case(
        name=f"picture: {name}", craft=craft, read=lambda folder: read_folder(**settings), refused=refused, **more
    )


def no_picture(name: str, content: bytes | Callable[[], bytes], file: str = "0.png", **more: Any) -> Case:
    return picture(name, content, file, file, **more)


def shows(expected: np.ndarray, tolerance: int = 0) -> Callable[[np.ndarray], bool]:
    """Whether these pixels, uint8 `(8, 8, 3)`, were read."""
    return lambda found: int(np.abs(found.astype(int) - expected).max()) <= tolerance


def flat(*colour: int, tolerance: int = 0) -> Callable[[np.ndarray], bool]:
    return shows(np.broadcast_to(np.array(colour), (8, 8, len(colour))), tolerance)


def large(mode: str, colour: Any, kind: str = "PNG", side: int = LARGE, **settings: Any) -> Callable[[], bytes]:
    return lambda: saved(Image.new(mode, (side, side), colour), kind, **settings)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, depth: int, colour: int, data: bytes, *more: bytes) -> bytes:
    """A PNG with a header of one's own."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_claiming(side: int, **settings: Any) -> bytes:
    """A JPEG of 64x64 whose header claims more."""
    data = bytearray(saved(Image.new("RGB", (64, 64), (10, 200, 30)), "JPEG", **settings))
    at = data.index(b"\xff\xc2" if settings.get("progressive") else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def text_bomb() -> bytes:
    """A PNG with a compressed comment of 200 MB."""
    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 * 2**20), 1))
    return png_of(8, 8, 8, 2, zlib.compress(b"".join(b"\0" + row.tobytes() for row in NOISE)), comment)


def frames(kind: str, count: int) -> bytes:
    images = [Image.fromarray(np.roll(NOISE, number, 0)) for number in range(count)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return saved(images[0], kind, save_all=True, append_images=images[1:], **lossless)


def with_comment() -> bytes:
    information = PngImagePlugin.PngInfo()
    information.add_text("Comment", "x" * 1000)
    return saved(Image.fromarray(NOISE), "PNG", pnginfo=information)


GREY16 = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
OF_16_BITS = ((GREY16.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)[..., None].repeat(3, 2)
TURNED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[:, ::-1],
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
    8: lambda p: p.swapaxes(0, 1)[::-1],
}


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(NOISE), "PNG", exif=exif.tobytes())


def palette() -> bytes:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return saved(image, "PNG", transparency=1)


PALETTE = np.eye(3, dtype=np.uint8)[np.arange(64).reshape(8, 8) % 3] * 255

LARGE_ONES = [
    picture("16 bits of 13,000^2", large("I;16", 65535), right=flat(255, 255, 255), quick=False),
    picture("32 bits of 13,000^2", large("I", 65535, "TIFF"), "0.tif", "0.tif", right=flat(255, 255, 255), quick=False),
    picture("floats of 13,000^2", large("F", 0.5, "TIFF"), "0.tif", "0.tif", quick=False),
    picture("RGB of 13,000^2", large("RGB", (9, 99, 199)), right=flat(9, 99, 199), quick=False),
    picture("RGBA of 13,000^2", large("RGBA", (9, 99, 199, 0)), "0.png", right=flat(9, 99, 199), quick=False),
    picture("LA of 13,000^2", large("LA", (77, 0)), "0.png", right=flat(77, 77, 77), quick=False),
    picture("a palette of 13,000^2", large("P", 0), right=flat(0, 0, 0), quick=False),
    picture("bits of 13,000^2", large("1", 1), right=flat(255, 255, 255), quick=False),
    picture("bits of 20,000^2", large("1", 1, side=20_000), "0.png", quick=False),
    picture(
        "grey of 13,000^2 as RGBA",
        large("L", 5),
        settings={"image_channels": 4},
        refused="0.png",
        right=flat(5, 5, 5, 255),
        quick=False,
    ),
    picture(
        "JPEG of 13,000^2", large("RGB", (128, 128, 128), "JPEG"), right=flat(128, 128, 128, tolerance=1), quick=False
    ),
    picture(
        "progressive JPEG of 13,000^2",
        large("RGB", (128, 128, 128), "JPEG", progressive=True),
        "0.png",
        right=flat(128, 128, 128, tolerance=1),
        quick=False,
    ),
    picture(
        "CMYK JPEG of 13,000^2",
        large("CMYK", (0, 0, 0, 0), "JPEG"),
        "0.png",
        right=flat(255, 255, 255, tolerance=1),
        quick=False,
    ),
    picture(
        "JPEG 2000 of 8,000^2",
        large("RGB", (128, 128, 128), "JPEG2000", side=8000),
        "0.png",
        right=flat(128, 128, 128, tolerance=1),
        quick=False,
    ),
    picture(
        "WebP of 13,000^2",
        large("RGB", (128, 128, 128), "WEBP", method=0),
        "0.png",
        right=flat(128, 128, 128, tolerance=3),
        quick=False,
    ),
    picture(
        "LZW of 13,000^2 in one strip",
        large("RGB", (1, 2, 3), "TIFF", compression="tiff_lzw", strip_size=2**31 - 1),
        "0.png",
        right=flat(1, 2, 3),
        quick=False,
    ),
    picture("GIF of 13,000^2", large("P", 0, "GIF"), "0.png", right=flat(0, 0, 0), quick=False),
    picture(
        "a million by one",
        lambda: saved(Image.new("RGB", (1_000_000, 1), (1, 2, 3)), "PNG"),
        right=flat(1, 2, 3),
        quick=False,
    ),
    picture(
        "one by sixty thousand",
        lambda: saved(Image.new("RGB", (1, 60_000), (1, 2, 3)), "JPEG", quality=95),
        right=flat(1, 2, 3, tolerance=4),
    ),
    no_picture("a PNG that claims 2^31 - 1", png_of(2**31 - 1, 2**31 - 1, 8, 2, zlib.compress(bytes(100)))),
    no_picture("a PNG that claims 13,000^2", png_of(LARGE, LARGE, 8, 2, zlib.compress(bytes(100))), quick=False),
    no_picture(
        "a PNG that claims 13,000^2 of 16 bits", png_of(LARGE, LARGE, 16, 0, zlib.compress(bytes(100))), quick=False
    ),
    no_picture("a PNG of no pixels", png_of(0, 0, 8, 2, zlib.compress(b""))),
    no_picture("a JPEG that claims 13,000^2", jpeg_claiming(LARGE)),
    no_picture("a progressive JPEG that claims 13,000^2", jpeg_claiming(LARGE, progressive=True)),
    no_picture("a JPEG that claims 65,535^2", jpeg_claiming(65_535)),
    no_picture(
        "a GIF that claims 65,535^2",
        b"GIF89a"
        + struct.pack("<HH", 65_535, 65_535)
        + b"\xf0\0\0"
        + bytes(6)
        + b","
        + struct.pack("<HHHH", 0, 0, 65_535, 65_535)
        + b"\0\x02\x02L\x01\0;",
    ),
    no_picture(
        "a BMP that claims 2^31",
        b"BM" + bytes(8) + struct.pack("<IIiiHH", 54, 40, 2**31 - 1, -(2**31), 1, 24) + bytes(40),
        "0.bmp",
    ),
    no_picture("a PPM that claims 10^10", b"P6 100000 100000 255\n" + bytes(100), "0.ppm"),
    no_picture("a PPM of 10^9 digits", b"P6 " + b"9" * 10**6 + b" 1 255\n", "0.ppm"),
    no_picture(
        "a TGA that claims 65,535^2", b"\0\0\x02" + bytes(9) + struct.pack("<HHBB", 65_535, 65_535, 24, 0), "0.tga"
    ),
    no_picture("a comment of 200 MB", text_bomb, quick=False),
]

MODES = [
    picture("RGB", saved(Image.fromarray(NOISE), "PNG"), right=shows(NOISE)),
    picture("a comment", with_comment, right=shows(NOISE)),
    picture("grey of 16 bits", saved(Image.fromarray(GREY16), "PNG"), right=shows(OF_16_BITS)),
    picture("grey of 16 bits in a TIFF", saved(Image.fromarray(GREY16), "TIFF"), file="0.tif", right=shows(OF_16_BITS)),
    picture("a palette with transparency", palette, right=shows(PALETTE)),
    picture("grey with opacity", saved(Image.new("LA", (8, 8), (50, 0)), "PNG"), right=flat(50, 50, 50)),
    picture("bits", saved(Image.new("1", (8, 8), 1), "PNG"), right=flat(255, 255, 255)),
    picture(
        "CMYK",
        saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100),
        right=flat(255, 0, 0, tolerance=4),
        file="0.jpg",
    ),
    picture(
        "Lab",
        saved(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF"),
        "0.tif",
        "0.tif",
        right=flat(119, 119, 119, tolerance=12),
    ),
    picture(
        "YCbCr",
        saved(Image.new("YCbCr", (8, 8), (128, 128, 128)), "JPEG"),
        right=flat(128, 128, 128, tolerance=1),
        file="0.jpg",
    ),
    no_picture("floats", saved(Image.new("F", (8, 8), 0.5), "TIFF"), "0.tif"),
    no_picture("negative numbers", saved(Image.fromarray(np.full((8, 8), -5, np.int32)), "TIFF"), "0.tif"),
    no_picture("numbers above 16 bits", saved(Image.fromarray(np.full((8, 8), 10**6, np.int32)), "TIFF"), "0.tif"),
    *(
        picture(f"EXIF orientation {number}", oriented(number), right=shows(turn(NOISE)), settings={"apply_exif": True})
        for number, turn in TURNED.items()
    ),
    picture("EXIF orientation 6, not asked for", oriented(6), right=shows(NOISE)),
    picture("EXIF orientation 200", oriented(200), right=shows(NOISE), settings={"apply_exif": True}),
    picture(
        "EXIF of noise",
        saved(Image.fromarray(NOISE), "PNG", exif=b"Exif\0\0" + bytes(range(64))),
        "0.png",
        right=shows(NOISE),
        settings={"apply_exif": True},
    ),
    picture("an animated GIF", lambda: frames("GIF", 50), right=lambda found: found.shape == (8, 8, 3), file="0.gif"),
    picture("an animated PNG", lambda: frames("PNG", 50), right=shows(NOISE)),
    picture("an animated WebP", lambda: frames("WEBP", 50), right=shows(NOISE), file="0.webp"),
    picture("a TIFF of fifty pages", lambda: frames("TIFF", 50), right=shows(NOISE), file="0.tif"),
]


def broken_crc() -> bytes:
    data = bytearray(saved(Image.fromarray(NOISE), "PNG"))
    data[data.index(b"IDAT") + 10] ^= 0xFF
    return bytes(data)


KINDS = {
    "PNG": "png",
    "JPEG": "jpg",
    "WEBP": "webp",
    "GIF": "gif",
    "TIFF": "tif",
    "BMP": "bmp",
    "PPM": "ppm",
    "JPEG2000": "jp2",
}
NONE = [
    *(
        no_picture(
            f"a {kind} cut to {share:.0%}",
            (whole := saved(Image.fromarray(np.tile(NOISE, (8, 8, 1))), kind))[: int(len(whole) * share)],
            f"0.{extension}",
        )
        for kind, extension in KINDS.items()
        for share in (0.05, 0.6)
    ),
    no_picture("a flipped bit of a PNG", broken_crc),
    no_picture("empty", b""),
    no_picture("text", b"no image at all"),
    no_picture("HTML", b"<!DOCTYPE html><html>404</html>", "0.jpg"),
    no_picture("SVG", b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>"),
    no_picture("HEIC", b"\0\0\0\x18ftypheic" + bytes(64), "0.jpg"),
    no_picture(
        "EPS that runs a program", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch canary) (w) file\n"
    ),
    no_picture("PDF", b"%PDF-1.4\n" + bytes(100)),
    no_picture("a pickle", b"cposix\nsystem\n(S'touch canary'\ntR."),
    no_picture("a numpy array", b"\x93NUMPY\x01\0" + bytes(100)),
    no_picture("a signature alone", b"\x89PNG\r\n\x1a\n"),
    no_picture("a Windows icon", saved(Image.new("RGB", (16, 16)), "ICO")),
    no_picture("a DDS", saved(Image.new("RGB", (16, 16)), "DDS")),
]


def folder_case(name: str, craft: Callable[[Path], Any], refused: str | None, **more: Any) -> Case:
    return Case(name=f"folder: {name}", craft=craft, read=lambda folder: read_folder(), refused=refused, **more)


def beside(name: str, make: Callable[[Path], Any], *, good: bool = True) -> Callable[[Path], None]:
    """A folder with a good picture and something else."""

    def craft(folder: Path) -> None:
        images = folder / "images"
        images.mkdir()
        if good:
            Image.fromarray(NOISE).save(images / "a.png")
        make(images / name)

    return craft


FOLDERS = [
    folder_case("a pipe", beside("b.png", os.mkfifo), None, right=shows(NOISE)),
    folder_case(
        "a link to /dev/zero", beside("b.png", lambda path: path.symlink_to("/dev/zero")), None, right=shows(NOISE)
    ),
    folder_case(
        "a link to nothing", beside("b.png", lambda path: path.symlink_to("nothing")), None, right=shows(NOISE)
    ),
    folder_case(
        "a link to the folder itself", beside("b", lambda path: path.symlink_to(".")), "images", right=shows(NOISE)
    ),
    folder_case("a folder named as a picture", beside("b.png", Path.mkdir), "images", right=shows(NOISE)),
    folder_case("a name that is no UTF-8", beside("\udcff.png", lambda path: path.write_bytes(b"x")), "\\udcff.png"),
    folder_case(
        "an escape sequence for a name", beside("\x1b[2J\nerror.png", lambda path: path.write_bytes(b"x")), "error.png"
    ),
    folder_case("nothing", beside("b", Path.mkdir, good=False), "images"),
    folder_case("a pipe alone", beside("b.png", os.mkfifo, good=False), "images"),
    folder_case("a file in its place", lambda folder: (folder / "images").write_text("x"), "images"),
    folder_case("missing", lambda folder: None, "images"),
]

assert not ImageFile.LOAD_TRUNCATED_IMAGES
CASES = [*LARGE_ONES, *MODES, *NONE, *FOLDERS]
