"""The 30,000 images of Fashion-MNIST that come with the project."""

import io
import os
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from discrete_lit.core.files import content_sha256
from discrete_lit.data.sources.source import Entry, Source

EMBEDDED_SHA256 = "fb45dadc5cae695accb1481b9c5fe4cbef586532655446b55765488783755f2f"
PADDING = 2
# In the order of the classes.
_NOUNS = (
    "t-shirt",
    "pair of trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
# The mean of the pixels that are not black, in 0..255: limits that cut the training images into about three thirds.
TONES = ((127.5, "dark"), (170.5, "grey"), (256.0, "bright"))
_SENTENCES = ("a photo of a {tone} {noun}", "this {noun} is {tone}", "{noun}, {tone}")


class EmbeddedSet(Source):
    """The Fashion-MNIST of `data/fashion_mnist.npz`: 20,000 training images and all 10,000 test images.

    The training images are the first 2,000 of each class. Images are grey, 28x28, padded with black to 32x32 and given
    as PNG. Keys are `train-00000` and so on: the number is the row in the file.
    Source: Xiao, Rasul and Vollgraf, 2017, https://arxiv.org/abs/1708.07747; MIT licence.

    Args:
        file: path of `fashion_mnist.npz`.
        split: `train` or `test`.
        captions: give each image three sentences that say its class and how bright it is: "a photo of a dark coat".

    Raises:
        ValueError: `file` is missing or is not, byte for byte, the file that comes with the project.
    """

    def __init__(
        self, file: str | os.PathLike[str], split: Literal["train", "test"], *, captions: bool = False
    ) -> None:
        self._has_captions = captions
        path = Path(file)
        if not path.is_file():
            raise ValueError(
                f"there is no file {path}; give the path of data/fashion_mnist.npz in the project's checkout"
            )
        content = path.read_bytes()
        digest = content_sha256(content)
        if digest != EMBEDDED_SHA256:
            raise ValueError(
                f"{path} has SHA-256 {digest}, expected {EMBEDDED_SHA256}: restore it with `git checkout` or make it "
                "again with data/fashion_mnist.py"
            )
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            self._images = arrays[f"{split}_images"]
            labels = arrays[f"{split}_labels"].tolist()
            classes = arrays["classes"].tolist()
        size = self._images[0].nbytes
        entries = [Entry(f"{split}-{row:05d}", "png", label, size) for row, label in enumerate(labels)]
        super().__init__(f"Fashion-MNIST {split}, {path.name} sha256:{digest}", classes=classes, entries=entries)

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.pad(self._images[index], PADDING)).save(buffer, "PNG")
        return buffer.getvalue()

    def fingerprint(self) -> str:
        # All images have one size, so the entries alone would not tell one file from another.
        own = content_sha256(EMBEDDED_SHA256 + super().fingerprint())
        return content_sha256([own, *_SENTENCES, *_NOUNS, str(TONES)]) if self._has_captions else own

    def captions(self, index: int) -> tuple[str, ...]:
        if not self._has_captions:
            return ()
        tone, label = tone_of(self._images[index]), self.entries[index].label
        assert label is not None
        return tuple(sentence.format(tone=tone, noun=_NOUNS[label]) for sentence in _SENTENCES)


def tone_of(pixels: np.ndarray, black: int = 0) -> str:
    """Call a picture dark, grey or bright, as its caption does.

    Args:
        pixels: uint8, of any shape.
        black: the brightest pixel that is background. That of the data is 0; that of drawn pictures only nearly.
    """
    shown = pixels[pixels > black]
    brightness = float(shown.mean()) if shown.size else 0.0
    return next(name for limit, name in TONES if brightness < limit)
