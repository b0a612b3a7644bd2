"""Clips as files that people play, and as still pictures: GIF by Pillow, MP4 by PyAV, and strips of frames."""

import io
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

# Browsers slow down frames of a GIF that are shorter than two hundredths of a second.
_SHORTEST_FRAME = 20


def has_av() -> bool:
    """Whether PyAV is installed, which MP4 needs."""
    return find_spec("av") is not None


def gif_bytes(frames: np.ndarray, *, frame_rate: float) -> bytes:
    """Encode a clip as an animated GIF that repeats for ever.

    Grey frames keep every level; of colour frames each has the 256 colours that Pillow chooses. Equal successive frames
    become one that is shown longer.

    Args:
        frames: uint8 `(T, H, W, C)` of 1, 3 or 4 channels.
        frame_rate: frames a second, at most 50; each is shown for a whole number of hundredths of a second.

    Raises:
        ValueError: another kind of array, or a frame rate out of its range.
    """
    _check(frames)
    if not 0 < frame_rate <= 1000 / _SHORTEST_FRAME:
        raise ValueError(f"frame_rate of a GIF must lie in (0, {1000 // _SHORTEST_FRAME}], got {frame_rate}")
    first, *rest = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    buffer = io.BytesIO()
    duration = round(100 / frame_rate) * 10
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    return buffer.getvalue()


def mp4_bytes(frames: np.ndarray, *, frame_rate: float) -> bytes:
    """Encode a clip as an MP4 with H.264, whose sides are made even by repeating the last row and column.

    Args:
        frames: uint8 `(T, H, W, C)` of 1, 3 or 4 channels; transparency is dropped.
        frame_rate: frames a second.

    Raises:
        ValueError: PyAV is not installed, or another kind of array.
    """
    _check(frames)
    if not has_av():
        raise ValueError("MP4 files are written by PyAV: pip install 'discrete-lit[video]'")
    import av

    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    colours = np.ascontiguousarray(np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames[..., :3])
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1000))
        stream.height, stream.width = colours.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "12"}
        for frame in colours:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def film_strips(clips: np.ndarray) -> np.ndarray:
    """Put the frames of each clip beside one another, and the clips below one another: uint8 `(N H, T W, C)`.

    Args:
        clips: uint8 `(N, T, H, W, C)`.
    """
    count, frames, height, width, channels = clips.shape
    return clips.transpose(0, 2, 1, 3, 4).reshape(count * height, frames * width, channels)


def clips_side_by_side(clips: np.ndarray, columns: int) -> np.ndarray:
    """Put clips on a grid, `(N, T, H, W, C)` to one clip `(T, rows H, columns W, C)`, filled up with black."""
    count = len(clips)
    missing = -count % columns
    filled = np.concatenate((clips, np.zeros((missing, *clips.shape[1:]), dtype=clips.dtype)))
    rows = filled.reshape(-1, columns, *clips.shape[1:])  # (rows, columns, T, H, W, C)
    row_count, _, frames, height, width, channels = rows.shape
    return rows.transpose(2, 0, 3, 1, 4, 5).reshape(frames, row_count * height, columns * width, channels)


def _check(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (1, 3, 4) or not len(frames):
        raise ValueError(
            f"a clip is uint8 (T, H, W, C) of 1, 3 or 4 channels, got {frames.dtype} {tuple(frames.shape)}"
        )
