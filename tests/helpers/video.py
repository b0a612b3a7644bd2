"""Clips for tests: a square that moves over a known background, and files of them."""

from pathlib import Path

import numpy as np

from discrete_lit.core.moving_pictures import gif_bytes, mp4_bytes


def moving_square(frames: int, side: int = 16, channels: int = 1, start: int = 0) -> np.ndarray:
    """A clip uint8 `(T, side, side, channels)` whose frame t has a bright square of 4 pixels at column t + start.

    The level of the first 4 x 4 pixels counts the frames: 8 t.
    """
    clip = np.full((frames, side, side, channels), 32, dtype=np.uint8)
    for number, frame in enumerate(clip):
        left = (number + start) % (side - 4)
        frame[6:10, left : left + 4] = 224
        frame[:4, :4] = 8 * number
    return clip


def write_videos(folder: Path, *, count: int = 6, frames: int = 8, frame_rate: float = 10.0, kind: str = "gif") -> Path:
    """`folder` with two classes of `count` clips in all."""
    encode = {"gif": gif_bytes, "mp4": mp4_bytes}[kind]
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(moving_square(frames, start=number), frame_rate=frame_rate))
    return folder
