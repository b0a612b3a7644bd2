"""Handwritten digits put together to pictures that a sentence describes: places, and sums."""

import csv
import gzip
import io
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from discrete_lit.core.files import content_sha256
from discrete_lit.data.sources.source import Entry, Source

Composition = Literal["beside", "around", "sum"]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SIDE, _LEVELS = 8, 16
# (b - a) mod 10 of the pairs that are held out: a fifth of all, the pair and its mirror image together, and every digit
# as often as any other, at either place.
_HELD_OUT = (3, 7)
_PLACES = {"beside": ("left of",), "around": ("left of", "right of", "above", "below"), "sum": ("+",)}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_TRAINING_DIGITS = 0.8
_DIGITS_SHA256 = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"


class DigitCompositions(Source):
    """Two of scikit-learn's 1,797 handwritten digits in one grey picture, with sentences that say what it shows.

    - `beside`, 8 x 16 pixels: "three left of seven", and "seven right of three".
    - `around`, 16 x 16: the same at the four places, "above" and "below" too.
    - `sum`, 8 x 16: the caption "2+3" is of a picture of the sum, whose digits are right-aligned.

    A fifth of the 100 pairs are held out, (b - a) mod 10 in {3, 7}: a pair with its mirror image, and every digit as
    often as any other. `train` has the first four fifths of the digits in the other pairs; `validation` the last fifth
    in the same pairs; and `test` the last fifth in the held-out pairs, which no training picture shows. Pixels have the
    17 levels of the digits, k in 0..16 as round(255 k / 16).
    The label is the relation of the digits: one class of "beside" and "sum", four of "around".
    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (CC BY 4.0), in the package
    scikit-learn.

    Args:
        split: `train`, `validation` or `test`.
        composition: `beside`, `around` or `sum`.
        count: pictures; each pair, and each place, equally often.
        seed: decides which of the digits' images a picture takes.
        thought: of sums, end the caption with the result, "2+3=5".
        file: scikit-learn's `digits.csv.gz`; that of the installed package by default, which is not imported.

    Raises:
        ValueError: no such file, or another one; a setting that is not known; a thought of anything but sums.
    """

    def __init__(
        self,
        split: Literal["train", "validation", "test"],
        composition: Composition = "beside",
        *,
        count: int = 20_000,
        seed: int = 0,
        thought: bool = False,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        if composition not in _PLACES or split not in ("train", "validation", "test"):
            raise ValueError(
                f"split={split!r}, composition={composition!r}: accepted are train, validation, test, and "
                f"{', '.join(_PLACES)}"
            )
        if count < 1:
            raise ValueError(f"count is {count}; it must be at least 1")
        if thought and composition != "sum":
            raise ValueError(f"thought is of sums; composition is {composition!r}")
        images, labels = read_digits(file)
        first = round(_TRAINING_DIGITS * len(images))
        mine = slice(0, first) if split == "train" else slice(first, None)
        self._images = [images[mine][labels[mine] == digit] for digit in range(10)]
        self._pairs = [(a, b) for a in range(10) for b in range(10) if held_out(a, b) == (split == "test")]
        self.composition, self._seed, self._thought, self._split = composition, seed, thought, split
        self._places = _PLACES[composition]
        height = 2 * _SIDE if composition == "around" else _SIDE
        entries = [
            Entry(f"{split}-{index:06d}", "png", index // len(self._pairs) % len(self._places), height * 2 * _SIDE)
            for index in range(count)
        ]
        classes = list(self._places) if composition == "around" else [composition]
        description = f"scikit-learn's digits, {composition}, {split}, seed {seed}{', thought' if thought else ''}"
        super().__init__(description, classes=classes, entries=entries)

    def read(self, index: int) -> bytes:
        a, b = self._pairs[index % len(self._pairs)]
        if self.composition == "sum":
            pixels = self._row(index, [int(digit) for digit in str(a + b)])
        elif self.entries[index].label in (0, 1):
            beside = self._row(index, [a, b] if self.entries[index].label == 0 else [b, a])
            pixels = np.pad(beside, ((_SIDE // 2,) * 2, (0, 0))) if self.composition == "around" else beside
        else:
            drawn = [self._digit(index, place, digit) for place, digit in enumerate((a, b))]
            stacked = np.concatenate(drawn if self.entries[index].label == 2 else drawn[::-1])
            pixels = np.pad(stacked, ((0, 0), (_SIDE // 2,) * 2))
        buffer = io.BytesIO()
        Image.fromarray(np.round(pixels * (255 / _LEVELS)).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    def captions(self, index: int) -> tuple[str, ...]:
        a, b = self._pairs[index % len(self._pairs)]
        if self.composition == "sum":
            return (f"{a}+{b}={a + b}",) if self._thought else (f"{a}+{b}",)
        place = self._places[self.entries[index].label or 0]
        return f"{WORDS[a]} {place} {WORDS[b]}", f"{WORDS[b]} {_OPPOSITE[place]} {WORDS[a]}"

    def fingerprint(self) -> str:
        return content_sha256([super().fingerprint(), self.description, _DIGITS_SHA256])

    def _row(self, index: int, digits: Sequence[int]) -> np.ndarray:
        """Digits beside one another, `(8, 16)`, a single one at the right."""
        images = [self._digit(index, place, digit) for place, digit in enumerate(digits)]
        return np.concatenate([np.zeros((_SIDE, _SIDE * (2 - len(images)))), *images], axis=1)

    def _digit(self, index: int, place: int, digit: int) -> np.ndarray:
        """One of the images of a digit, the same for the same (seed, split, picture, place)."""
        number = int(content_sha256(f"{self._seed} {self._split} {self.composition} {index} {place}")[:12], 16)
        return self._images[digit][number % len(self._images[digit])]


def held_out(a: int, b: int) -> bool:
    """Tell whether the pair of digits (a, b) is one that only `test` shows."""
    return (b - a) % 10 in _HELD_OUT


def read_digits(file: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read the digits of scikit-learn: images `(1797, 8, 8)` in 0..16, labels `(1797,)`.

    Raises:
        ValueError: no such file, or another one.
    """
    if file is None:
        found = find_spec("sklearn")
        if found is None or not found.submodule_search_locations:
            raise ValueError(
                "the digits come with scikit-learn: pip install scikit-learn, or give `file`, the "
                "sklearn/datasets/data/digits.csv.gz of its wheel"
            )
        file = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no {path}; give the digits.csv.gz of scikit-learn")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if content_sha256(content) != _DIGITS_SHA256:
        raise ValueError(f"{path} holds other data than the digits.csv.gz of scikit-learn")
    rows = np.array([[float(value) for value in row] for row in csv.reader(io.StringIO(content.decode()))])
    return rows[:, :-1].reshape(-1, _SIDE, _SIDE), rows[:, -1].astype(np.int64)
