"""Arrays: npz files of samples, labels and moments; folders of tokens with their manifests and captions."""

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bad_input.case import Case
from discrete_lit.data import TokenArrays, TokenWriter
from discrete_lit.data.caption_file import CaptionFile
from discrete_lit.evaluation.image_sets import open_image_set
from discrete_lit.metrics.moments import Moments
from discrete_lit.tokenizers import ColourPalette

IMAGES = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def npy(header: str | bytes, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """An .npy file with a header of one's own."""
    text = header.encode() if isinstance(header, str) else header
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + content


def claims(shape: str, kind: str = "<i8", content: bytes = b"", order: bool = False) -> bytes:
    return npy(f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n", content)


def array(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values), allow_pickle=True)
    return buffer.getvalue()


def packed(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """An npz of these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def bomb(name: str, shape: tuple[int, ...], kind: str, **members: bytes) -> Callable[[], bytes]:
    """An npz with a member of zeros that its few bytes unpack to."""

    def make() -> bytes:
        buffer = io.BytesIO()
        size = int(np.prod(shape, dtype=object)) * np.dtype(kind).itemsize
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for other, content in members.items():
                archive.writestr(f"{other}.npy", content)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(claims(str(shape), kind))
                for _ in range(size // 2**22):
                    member.write(bytes(2**22))
                member.write(bytes(size % 2**22))
        return buffer.getvalue()

    return make


def encrypted() -> bytes:
    data = bytearray(packed(arr_0=array(IMAGES)))
    data[6] |= 1
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def unknown_compression() -> bytes:
    data = bytearray(packed(arr_0=array(IMAGES)))
    data[8] = 99
    data[data.rindex(b"PK\x01\x02") + 10] = 99
    return bytes(data)


def flipped() -> bytes:
    data = bytearray(packed(arr_0=array(IMAGES)))
    data[300] ^= 1
    return bytes(data)


def read_images() -> np.ndarray:
    """All pictures of `set.npz`, and that they have labels."""
    images = open_image_set("set.npz", 8)
    return np.stack([decode() for _, decode in images.stream()])


def samples(name: str, content: bytes | Callable[[], bytes], refused: str | None = "set.npz", **more: Any) -> Case:
    def craft(folder: Path) -> None:
        (folder / "set.npz").write_bytes(content() if callable(content) else content)

    return Case(name=f"npz: {name}", craft=craft, read=lambda folder: read_images(), refused=refused, **more)


def same(found: np.ndarray) -> bool:
    return bool((found == IMAGES).all())


PIXELS = array(IMAGES)
SAMPLES = [
    samples("whole", packed(arr_0=PIXELS), None, right=same),
    samples("compressed", packed(zipfile.ZIP_DEFLATED, arr_0=PIXELS), None, right=same),
    samples("empty", b""),
    samples("noise", np.random.RandomState(1).bytes(5000)),
    samples("a directory alone", packed()),
    samples("cut", packed(arr_0=PIXELS)[:-100]),
    samples("cut in front", packed(arr_0=PIXELS)[100:]),
    samples("a flipped bit", flipped()),
    samples("encrypted", encrypted()),
    samples("an unknown compression", unknown_compression()),
    samples("no images", packed(mu=array([1.0]))),
    samples("a member without a header", packed(arr_0=b"no array")),
    samples("a header cut", packed(arr_0=PIXELS[:20])),
    samples("a header of code", packed(arr_0=npy("__import__('os').system('touch canary')\n"))),
    samples("a header of a call", packed(arr_0=npy("{'descr': open('canary', 'w'), 'shape': ()}\n"))),
    samples("a header that is none", packed(arr_0=npy("((((((((((\n"))),
    samples("a header of 100 kB", packed(arr_0=npy("{" + " " * 60_000 + "}\n"))),
    samples("a header without a shape", packed(arr_0=npy("{'descr': '|u1', 'fortran_order': False}\n"))),
    samples("a header of version 9", packed(arr_0=npy("{}", version=b"\x09\x00"))),
    samples("pickled objects", packed(arr_0=array(np.array([{"a": 1}], dtype=object)))),
    samples("a shape beyond its bytes", packed(arr_0=claims("(1000000000, 8, 8, 3)", "|u1", bytes(768)))),
    samples("a shape of 2^70", packed(arr_0=claims(f"({2**70}, 8, 8, 3)", "|u1", bytes(768)))),
    samples("a negative shape", packed(arr_0=claims("(-4, 8, 8, 3)", "|u1", bytes(768)))),
    samples("a shape of text", packed(arr_0=claims("('4', 8, 8, 3)", "|u1", bytes(768)))),
    samples("a shape of fractions", packed(arr_0=claims("(4.0, 8, 8, 3)", "|u1", bytes(768)))),
    samples("10^18 rows of nothing", packed(arr_0=claims(f"({10**18}, 8, 8, 0)", "|u1"))),
    samples("Fortran's order", packed(arr_0=array(np.asfortranarray(IMAGES)))),
    samples("a type of no bytes", packed(arr_0=claims("(4, 8, 8, 3)", "|V0"))),
    samples("a type that is none", packed(arr_0=claims("(4, 8, 8, 3)", "banana", bytes(768)))),
    samples("a type of a gigabyte", packed(arr_0=claims("(4,)", "|S1000000000", bytes(768)))),
    samples("floats", packed(arr_0=array(IMAGES / 255.0))),
    samples("int64", packed(arr_0=array(IMAGES.astype(np.int64)))),
    samples("another size", packed(arr_0=array(np.zeros((4, 9, 9, 3), np.uint8)))),
    samples("two channels", packed(arr_0=array(np.zeros((4, 8, 8, 2), np.uint8)))),
    samples("channels first", packed(arr_0=array(np.zeros((4, 3, 8, 8), np.uint8)))),
    samples("one image", packed(arr_0=array(IMAGES[0]))),
    samples("4 GB of labels", bomb("labels", (2**29,), "<i8", arr_0=PIXELS), quick=False),
    samples("labels of text", packed(arr_0=PIXELS, labels=array(["a"] * 4))),
    samples("labels of fractions", packed(arr_0=PIXELS, labels=array([0.5] * 4))),
    samples("labels that are not numbers", packed(arr_0=PIXELS, labels=array([np.nan] * 4))),
    samples("negative labels", packed(arr_0=PIXELS, labels=array([0, 1, -2, 1]))),
    samples("labels of 2^64 - 1", packed(arr_0=PIXELS, labels=array(np.full(4, 2**64 - 1, np.uint64)))),
    samples("labels of dates", packed(arr_0=PIXELS, labels=array(np.zeros(4, "M8[s]")))),
    samples("five labels for four", packed(arr_0=PIXELS, labels=array([0] * 5))),
    samples("one label", packed(arr_0=PIXELS, labels=array(0))),
]


def moments(name: str, content: bytes | Callable[[], bytes], refused: str | None = "m.npz", **more: Any) -> Case:
    def craft(folder: Path) -> None:
        (folder / "m.npz").write_bytes(content() if callable(content) else content)

    return Case(
        name=f"moments: {name}", craft=craft, read=lambda folder: Moments.load("m.npz"), refused=refused, **more
    )


MU, SIGMA = array(np.zeros(3)), array(np.eye(3))
MOMENTS = [
    moments("whole", packed(mu=MU, sigma=SIGMA), None, right=lambda found: found.covariance.trace() == 3),
    moments("no covariance", packed(mu=MU)),
    moments("4 GB of a mean", bomb("mu", (2**29,), "<f8", sigma=SIGMA), quick=False),
    moments("4 GB of a covariance", bomb("sigma", (2**14, 2**15), "<f8", mu=MU), quick=False),
    *(
        moments(f"a covariance {name}", packed(mu=MU, sigma=array(value)))
        for name, value in {
            "of another size": np.eye(4),
            "of one dimension": np.ones(9),
            "that is negative": -np.eye(3),
            "that is not symmetric": np.triu(np.ones((3, 3))),
            "of complex numbers": np.eye(3).astype(complex),
            "of text": np.full((3, 3), "a"),
            "of dates": np.zeros((3, 3), "M8[s]"),
            "of booleans": np.eye(3).astype(bool),
            "that is not a number": np.full((3, 3), np.nan),
            "that is infinite": np.full((3, 3), np.inf),
            "of 1e308": np.eye(3) * 1e308,
        }.items()
    ),
    moments("a mean that is not a number", packed(mu=array(np.full(3, np.nan)), sigma=SIGMA)),
    moments("a mean of no dimension", packed(mu=array(0.0), sigma=SIGMA)),
    moments("a count of text", packed(mu=MU, sigma=SIGMA, count=array("many"))),
    moments("a negative count", packed(mu=MU, sigma=SIGMA, count=array(-5))),
    moments("an extractor of 1 GB", bomb("extractor", (), f"<U{2**28}", mu=MU, sigma=SIGMA), quick=False),
]


def token_folder(folder: Path, captions: bool = False) -> Path:
    """Eleven rows of six ids below 16, of three classes."""
    import torch

    path = folder / "tokens"
    settings: dict[str, Any] = {
        "count": 11,
        "token_shape": (2, 3),
        "vocab_size": 16,
        "image_size": 8,
        "num_classes": 3,
        "classes": ["ant", "bee", "cat"],
        "tokenizer": "a" * 64,
        "source": "noise",
        "captions": captions,
    }
    TokenWriter.create(path, **settings)
    writer, index = TokenWriter(path), torch.arange(11)
    texts = [[f"caption {row}"] for row in range(11)] if captions else None
    writer.write(index, (index[:, None, None] + torch.arange(6).reshape(2, 3)) % 16, index % 3, captions=texts)
    writer.close()
    TokenWriter.finalise(path)
    return path


def read_tokens() -> np.ndarray:
    """All ids of the folder, row by row."""
    data = TokenArrays("tokens", batch_size=4)
    return np.concatenate([batch["tokens"].numpy() for batch in data.evaluation_loader("train", 0, 1)])


def tokens(name: str, change: Callable[[Path], Any], refused: str | None, **more: Any) -> Case:
    def craft(folder: Path) -> None:
        change(token_folder(folder, captions=more_captions))

    more_captions = more.pop("captions", False)
    return Case(name=f"tokens: {name}", craft=craft, read=lambda folder: read_tokens(), refused=refused, **more)


def stating(**changes: Any) -> Callable[[Path], None]:
    """Change the manifest of an array."""

    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return change


def replaced(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content() if callable(content) else content)


def piped(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


EXPECTED = (np.arange(11)[:, None, None] + np.arange(6).reshape(2, 3)) % 16
IDS = EXPECTED.astype(np.uint16)
TOKENS = [
    tokens("whole", lambda folder: None, None, right=lambda found: bool((found == EXPECTED).all())),
    *(
        tokens(f"manifest with {name} {value!r}"[:80], stating(**{name: value}), "manifest.json")
        for name, value in (
            ("count", "11"),
            ("count", 11.0),
            ("count", True),
            ("count", None),
            ("count", -1),
            ("count", 0),
            ("token_shape", None),
            ("token_shape", "2x3"),
            ("token_shape", [2.0, 3.0]),
            ("token_shape", [-2, -3]),
            ("token_shape", [[2], 3]),
            ("vocab_size", 11.9),
            ("vocab_size", None),
            ("vocab_size", "16"),
            ("vocab_size", 0),
            ("vocab_size", 2**70),
            ("num_classes", None),
            ("num_classes", -3),
            ("num_classes", 2),
            ("num_classes", float("nan")),
            ("classes", "ant"),
            ("classes", [1, 2, 3]),
            ("classes", None),
            ("image_size", 0),
            ("image_size", "8"),
            ("image_size", []),
            ("image_size", [8, 8, 8, 8]),
            ("image_size", None),
            ("tokenizer", None),
            ("variants", 0),
            ("variants", "two"),
            ("format", "other"),
            ("format", None),
            ("token_shape", ...),
            ("vocab_size", ...),
            ("tokenizer", ...),
        )
    ),
    tokens("manifest with a billion rows", stating(count=10**9), "tokens.npy"),
    tokens("manifest with 10^18 rows", stating(count=10**18), "tokens.npy"),
    tokens("manifest with another shape", stating(token_shape=[3, 2]), "tokens.npy"),
    tokens("manifest with crops that are not there", stating(variants=2), "tokens.npy"),
    tokens("manifest with a smaller vocabulary", stating(vocab_size=3), "tokens.npy"),
    tokens("manifest that is null", replaced("manifest.json", b"null"), "manifest.json"),
    tokens("manifest that is a list", replaced("manifest.json", b"[]"), "manifest.json"),
    tokens("manifest 100,000 lists deep", replaced("manifest.json", b"[" * 100_000), "manifest.json"),
    tokens("manifest that is no UTF-8", replaced("manifest.json", b"\xff{}"), "manifest.json"),
    tokens("manifest that is a pipe", piped("manifest.json"), "tokens"),
    *(
        tokens(f"{name} {what}", replaced(name, content), name)
        for name in ("tokens.npy", "labels.npy")
        for what, content in {
            "that is empty": b"",
            "of text": b"no array",
            "that claims 2^50": claims(f"({2**50},)"),
            "that claims 2^70": claims(f"({2**70},)"),
            "with a negative shape": claims("(-11, 2, 3)"),
            "of a type that is none": claims("(11, 2, 3)", "banana"),
            "that is a zip": packed(a=PIXELS),
            "of pickled objects": array(np.array([{"a": 1}] * 11, dtype=object)),
            "with a header of code": npy("__import__('os').system('touch canary')\n"),
            "cut": (array(IDS) if name == "tokens.npy" else array(np.arange(11) % 3))[:-7],
            "with more than it claims": (array(IDS) if name == "tokens.npy" else array(np.arange(11) % 3)) + b"x" * 9,
        }.items()
    ),
    tokens("tokens.npy that is a pipe", piped("tokens.npy"), "tokens.npy"),
    tokens("labels.npy that is a pipe", piped("labels.npy"), "labels.npy"),
    tokens("tokens.npy that is not there", lambda folder: (folder / "tokens.npy").unlink(), "tokens.npy"),
    tokens("ids of floats", replaced("tokens.npy", array(IDS.astype(float))), "tokens.npy"),
    tokens("negative ids", replaced("tokens.npy", array(IDS.astype(np.int64) - 1)), "tokens.npy"),
    tokens("an id beyond the vocabulary", replaced("tokens.npy", array(IDS + 1)), "tokens.npy"),
    tokens("labels of text", replaced("labels.npy", array(["a"] * 11)), "labels.npy"),
    tokens("a label beyond the classes", replaced("labels.npy", array(np.full(11, 3))), "labels.npy"),
    tokens("a negative label", replaced("labels.npy", array(np.full(11, -1))), "labels.npy"),
]


def captions(name: str, change: Callable[[Path], Any], refused: str | None = "captions", **more: Any) -> Case:
    def craft(folder: Path) -> None:
        change(token_folder(folder, captions=True))

    def read(folder: Path) -> list[str]:
        file = CaptionFile(Path("tokens"), 11)
        return [file[row][0] for row in range(11)]

    return Case(name=f"captions: {name}", craft=craft, read=read, refused=refused, **more)


def line_of_captions(text: bytes) -> Callable[[Path], None]:
    """Put one line in the place of the first, and mend the starts."""

    def change(folder: Path) -> None:
        lines = [text + b"\n", *(folder / "captions.jsonl").read_bytes().splitlines(keepends=True)[1:]]
        (folder / "captions.jsonl").write_bytes(b"".join(lines))
        np.save(folder / "caption_starts.npy", np.cumsum([0, *map(len, lines)]))

    return change


CAPTIONS = [
    captions("whole", lambda folder: None, None, right=lambda found: found == [f"caption {row}" for row in range(11)]),
    captions("starts that claim 2^50", replaced("caption_starts.npy", claims(f"({2**50},)"))),
    captions("starts that are a pipe", piped("caption_starts.npy")),
    captions("starts of floats", replaced("caption_starts.npy", array(np.zeros(12)))),
    captions("starts that fall", replaced("caption_starts.npy", array(np.arange(12)[::-1].copy()))),
    captions("starts of noise", replaced("caption_starts.npy", b"\0" * 300)),
    captions("text that is not there", lambda folder: (folder / "captions.jsonl").unlink()),
    captions("text cut", lambda folder: os.truncate(folder / "captions.jsonl", 20)),
    *(
        captions(f"a line {name}", line_of_captions(text))
        for name, text in {
            "that is no JSON": b"caption 0",
            "of numbers": b"[1]",
            "of nothing": b"[]",
            "that is null": b"null",
            "that is no UTF-8": b'["\xff"]',
            "100,000 lists deep": b"[" * 100_000,
        }.items()
    ),
]


def palette(name: str, content: bytes, refused: str | None = "palette.npy", **more: Any) -> Case:
    def craft(folder: Path) -> None:
        (folder / "palette.npy").write_bytes(content)

    return Case(
        name=f"palette: {name}", craft=craft, read=lambda folder: ColourPalette("palette.npy"), refused=refused, **more
    )


PALETTES = [
    palette("whole", array(np.eye(3, dtype=np.uint8) * 255), None, right=lambda found: found.vocab_size == 3),
    palette("that claims 2^50", claims(f"({2**50}, 3)", "<f4")),
    palette("of text", array(["red", "green"])),
    palette("of pickled objects", array(np.array([{"a": 1}], dtype=object))),
    palette("empty", b""),
    palette("that is not a number", array(np.full((3, 3), np.nan, np.float32)), "palette"),
]

CASES = [*SAMPLES, *MOMENTS, *TOKENS, *CAPTIONS, *PALETTES]
