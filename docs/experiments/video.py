"""The picture of docs/experiments/video.md: strips of frames of the clips that docs/video.md's commands make.

    python docs/experiments/video.py

reads `runs/quickstart_video`, and writes docs/experiments/video.png: real clips of validation with what the tokenizer
makes of them, their first three frames continued, and their middle filled in; then samples of each digit.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import discrete_lit
from discrete_lit.core.images import to_uint8
from discrete_lit.core.moving_pictures import film_strips
from discrete_lit.data import TokenArrays, VideoClips

RUN = Path("runs/quickstart_video")
DIGITS, GAP, SCALE = (0, 1, 2, 3, 4), 4, 2


def real_clips(count: int) -> torch.Tensor:
    """The first clips of validation: uint8 `(count, 1, 9, 16, 16)`."""
    shards = {split: str(RUN / "shards" / split) for split in ("train", "validation")}
    data = VideoClips(
        **shards, image_size=(9, 16, 16), image_channels=1, frame_rate=10, batch_size=count, num_workers=0
    )
    return to_uint8(next(iter(data.evaluation_loader("validation", 0, 1)))["video"])


def strips(clips: np.ndarray) -> np.ndarray:
    """Strips `(N H, T W)` of clips `(N, T, H, W, 1)`, with lines between frames and between clips."""
    framed = np.pad(clips, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=96)
    return film_strips(framed)[..., 0]


def drawn(folder: str, rows: Sequence[int]) -> np.ndarray:
    with np.load(RUN / folder / "samples.npz") as file:
        return strips(file["arr_0"][list(rows)])


def beside(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Put blocks of one height side by side, white between them."""
    gap = np.full((len(blocks[0]), GAP), 255, dtype=np.uint8)
    parts = [part for block in blocks for part in (block, gap)]
    return np.concatenate(parts[:-1], axis=1)


def main() -> None:
    torch.set_num_threads(1)
    rows = list(DIGITS)
    clips = real_clips(len(rows))
    tokenizer = discrete_lit.load(RUN / "tokenizer" / "checkpoints" / "last.ckpt")
    tokens = next(
        iter(
            TokenArrays(None, str(RUN / "tokens" / "validation"), batch_size=len(rows)).evaluation_loader(
                "validation", 0, 1
            )
        )
    )
    with torch.no_grad():
        made = to_uint8(tokenizer.decode(tokens["tokens"])).movedim(1, -1).numpy()
    top = beside(
        [strips(clips.movedim(1, -1).numpy()), strips(made), drawn("continued", rows), drawn("filled_in", rows)]
    )
    samples = [
        drawn("autoregressive", rows),
        drawn("autoregressive", [5, 6, 7, 8, 9]),
        drawn("masked", rows),
        drawn("masked", [5, 6, 7, 8, 9]),
    ]
    whole = np.concatenate((top, np.full((GAP, top.shape[1]), 255, dtype=np.uint8), beside(samples)))
    whole = whole.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    Image.fromarray(whole).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
