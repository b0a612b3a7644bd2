"""Write the clips of `discrete-lit sample` as strips of frames, and as files that play."""

from pathlib import Path

import numpy as np
from PIL import Image

from discrete_lit.core.files import atomic_write
from discrete_lit.core.moving_pictures import clips_side_by_side, film_strips, gif_bytes, has_av, mp4_bytes

_MOST_STRIPS, _MOST_PLAYING, _COLUMNS = 10, 100, 10


def write_clips(folder: Path, clips: np.ndarray, *, columns: int, frame_rate: float) -> None:
    """Write `grid.png`, `samples.gif` and, where PyAV is installed, `samples.mp4`.

    `grid.png` has a row for each of the first ten clips, its frames from left to right. The others play the first
    hundred clips side by side, with one for each label in a row where there are at most twenty.

    Args:
        folder: where to.
        clips: uint8 `(N, T, H, W, C)`; of other numbers of channels than 1, 3 and 4 the first is shown.
        columns: labels that the samples cycle through.
        frame_rate: of the files that play.
    """
    shown = clips[:_MOST_PLAYING]
    shown = shown if shown.shape[-1] in (1, 3, 4) else shown[..., :1]
    strips = film_strips(shown[:_MOST_STRIPS])
    with atomic_write(folder / "grid.png") as file:
        Image.fromarray(strips[..., 0] if strips.shape[-1] == 1 else strips).save(file, "PNG")
    wide = columns if _COLUMNS // 2 <= columns <= 2 * _COLUMNS else _COLUMNS
    playing = clips_side_by_side(np.asarray(shown), min(wide, len(shown)))
    with atomic_write(folder / "samples.gif") as file:
        file.write(gif_bytes(playing, frame_rate=frame_rate))
    if has_av():
        with atomic_write(folder / "samples.mp4") as file:
            file.write(mp4_bytes(playing, frame_rate=frame_rate))
