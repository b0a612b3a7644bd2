"""The picture of docs/experiments/video.md, and a measure of its clips that needs no training.

    python docs/experiments/video.py measure    # prints a table
    python docs/experiments/video.py picture    # writes docs/experiments/video.png

Both read `runs/quickstart_video`, which the commands of docs/video.md make. The picture has real clips of validation,
their first three frames continued, and their middle filled in; then samples by digit. The table says which digit clips
show to their nearest neighbour: each frame is compared with every digit of training at every place, and the digit that
most frames show is the clip's.
"""

import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from discrete_lit.core.moving_pictures import film_strips
from discrete_lit.data.sources.digit_compositions import read_digits
from discrete_lit.data.sources.moving_digits import MovingDigits

RUN = Path("runs/quickstart_video")
FILE = RUN / "sklearn/datasets/data/digits.csv.gz"
FRAMES, SIDE, LEVELS = 9, 8, 16
FIRST = (16 - FRAMES) // 2  # evaluation takes the middle of the sixteen frames
TRAINING_SHARE = 0.8  # of the digits' images, as in MovingDigits
DIGITS, GAP, SCALE = 5, 4, 2
SETS = {
    "autoregressive, by digit": "autoregressive",
    "masked, by digit": "masked",
    "autoregressive, continued": "continued",
    "masked, filled in": "filled_in",
}


def real_clips(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first clips of validation, in the order of their shards: uint8 `(count, 9, 16, 16)`, and their digits."""
    shards = sorted((RUN / "shards" / "validation").glob("*.tar"))
    names = [name for shard in shards for name in tarfile.open(shard).getnames() if name.endswith(".gif")]
    numbers = np.array([int(name.removesuffix(".gif").rpartition("-")[2]) for name in names[:count]])
    source = MovingDigits("validation", count=len(names), file=FILE)
    clips = np.stack([source.clip(number)[FIRST : FIRST + FRAMES, ..., 0] for number in numbers.tolist()])
    return clips, numbers % 10


def drawn(folder: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(RUN / folder / "samples.npz") as file:
        return file["arr_0"][..., 0], file["labels"]


def nearest_digits(clips: np.ndarray) -> np.ndarray:
    """The digit of each clip, `(N,)`, of clips `(N, T, H, W)`."""
    images, labels = read_digits(FILE)
    count = round(TRAINING_SHARE * len(images))
    known, digits = (images[:count].reshape(count, -1) / LEVELS).astype(np.float32), labels[:count]
    norms, found = (known**2).sum(axis=1), []
    for clip in (clips / 255).astype(np.float32):
        windows = np.lib.stride_tricks.sliding_window_view(clip, (SIDE, SIDE), axis=(1, 2))
        # The squared distance of a frame from a digit at a place, but for what the frame alone adds.
        distances = norms - 2 * windows.reshape(-1, SIDE * SIDE) @ known.T
        nearest = distances.reshape(len(clip), -1).argmin(axis=1) % count
        found.append(np.bincount(digits[nearest], minlength=10).argmax())
    return np.array(found)


def psnr_by_frame(clips: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """The mean PSNR of each frame in decibels, `(T,)`; of equal frames that of an error of half a level."""
    errors = ((clips.astype(float) - originals) ** 2).mean(axis=(2, 3)) / 255**2
    return (-10 * np.log10(np.maximum(errors, (0.5 / 255) ** 2))).mean(axis=0)


def measure() -> None:
    print("| clips | count | nearest digit is right | PSNR by frame |\n|:--|--:|--:|:--|")
    count = len(drawn("continued")[0])
    originals, labels = real_clips(count)
    print(f"| real clips of validation | {count} | {np.mean(nearest_digits(originals) == labels):.1%} | |")
    for name, folder in SETS.items():
        clips, shown = drawn(folder)
        by_frame = ""
        if folder in ("continued", "filled_in"):
            by_frame = ", ".join(f"{value:.1f}" for value in psnr_by_frame(clips, originals))
        print(f"| {name} | {len(clips)} | {np.mean(nearest_digits(clips) == shown):.1%} | {by_frame} |")


def strips(clips: np.ndarray) -> np.ndarray:
    """Strips of frames of clips `(N, T, H, W)`, with lines between frames and between clips."""
    framed = np.pad(clips, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=96)
    return film_strips(framed[..., None])[..., 0]


def beside(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Put blocks of one height side by side, white between them."""
    gap = np.full((len(blocks[0]), GAP), 255, dtype=np.uint8)
    parts = [part for block in blocks for part in (block, gap)]
    return np.concatenate(parts[:-1], axis=1)


def picture() -> None:
    top = [real_clips(DIGITS)[0], *(drawn(folder)[0][:DIGITS] for folder in ("continued", "filled_in"))]
    of_each, masked = drawn("autoregressive")[0], drawn("masked")[0]
    bottom = [of_each[:DIGITS], of_each[DIGITS : 2 * DIGITS], masked[:DIGITS]]
    rows = [beside([strips(clips) for clips in row]) for row in (top, bottom)]
    between = np.full((GAP, rows[0].shape[1]), 255, dtype=np.uint8)
    whole = np.concatenate((rows[0], between, rows[1])).repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    Image.fromarray(whole).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    {"measure": measure, "picture": picture}[sys.argv[1]]()
