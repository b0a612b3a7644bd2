"""Handwritten digits that move across a black square and bounce off its sides: clips of ten classes."""

import os
from typing import Literal

import numpy as np

from discrete_lit.core.files import content_sha256
from discrete_lit.core.moving_pictures import gif_bytes
from discrete_lit.data.sources.digit_compositions import read_digits
from discrete_lit.data.sources.source import Entry, Source

SPLITS = ("train", "validation", "test")
_SIDE, _LEVELS = 8, 16
_VELOCITIES = [(down, right) for down in range(-2, 3) for right in range(-2, 3) if down or right]
# Of the digits' images, those of train, of validation and of test.
_PARTS = (0.8, 0.1, 0.1)
FRAME_RATE = 10.0
"""Frames a second of the GIFs."""


class MovingDigits(Source):
    """One of scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, moving in a straight line in a black square.

    The digit begins anywhere, moves by up to two pixels a frame in each direction, and bounces off the sides, as those
    of Moving MNIST (Srivastava et al., "Unsupervised Learning of Video Representations using LSTMs", 2015). The label
    is the digit, each equally often. Train, validation and test have other images of digits. Clips are grey GIFs of 17
    levels, 10 frames a second; where a bounce leaves two frames equal, Pillow stores one that is shown twice as long,
    so they are read with `frame_rate: 10`.
    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (CC BY 4.0), in the package
    scikit-learn.

    Args:
        split: `train`, `validation` or `test`.
        count: clips.
        frames: of a clip.
        side: of the square in pixels, above 8.
        seed: decides image, place and velocity of each clip.
        file: scikit-learn's `digits.csv.gz`; that of the installed package by default, which is not imported.

    Raises:
        ValueError: no such file, or another one; a setting out of its range.
    """

    def __init__(
        self,
        split: Literal["train", "validation", "test"],
        *,
        count: int = 4000,
        frames: int = 16,
        side: int = 16,
        seed: int = 0,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not known, accepted: {', '.join(SPLITS)}")
        if count < 1 or frames < 1 or side <= _SIDE:
            raise ValueError(
                f"count and frames must be at least 1 and side above {_SIDE}, got count={count}, frames={frames}, "
                f"side={side}"
            )
        images, labels = read_digits(file)
        ends = np.round(np.cumsum((0.0, *_PARTS)) * len(images)).astype(int)
        part = SPLITS.index(split)
        mine = slice(ends[part], ends[part + 1])
        self._images = [images[mine][labels[mine] == digit] for digit in range(10)]
        self._words = f"{seed} {split}"
        self.frames, self.side = frames, side
        entries = [Entry(f"{split}-{index:06d}", "gif", index % 10, frames * side * side) for index in range(count)]
        super().__init__(
            f"moving digits of scikit-learn, {split}, {frames} frames of {side}x{side}, seed {seed}",
            classes=[str(digit) for digit in range(10)],
            entries=entries,
        )

    def read(self, index: int) -> bytes:
        return gif_bytes(self.clip(index), frame_rate=FRAME_RATE)

    def clip(self, index: int) -> np.ndarray:
        """Simulate a clip: uint8 `(T, H, W, 1)`, the same for the same (seed, split, index)."""
        images, room = self._images[index % 10], self.side - _SIDE
        digest = content_sha256(f"{self._words} {index}")
        image, top, left, speed = (int(digest[start : start + 12], 16) for start in (0, 12, 24, 36))
        digit = np.round(images[image % len(images)] * (255 / _LEVELS)).astype(np.uint8)
        start, velocity = np.array((top, left)) % (room + 1), np.array(_VELOCITIES[speed % len(_VELOCITIES)])
        # A point that bounces between 0 and the room follows a triangular wave.
        places = room - np.abs((start + velocity * np.arange(self.frames)[:, None]) % (2 * room) - room)
        clip = np.zeros((self.frames, self.side, self.side, 1), dtype=np.uint8)
        for frame, (top, left) in zip(clip, places, strict=True):
            frame[top : top + _SIDE, left : left + _SIDE, 0] = digit
        return clip

    def fingerprint(self) -> str:
        return content_sha256([super().fingerprint(), self.description])
