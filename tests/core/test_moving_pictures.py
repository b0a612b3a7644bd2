import io

import numpy as np
import pytest
from helpers.video import moving_square
from PIL import Image, ImageSequence

from discrete_lit.core.moving_pictures import clips_side_by_side, film_strips, gif_bytes, mp4_bytes


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_plays_the_frames_at_their_rate(channels: int) -> None:
    clip = moving_square(5, channels=channels)
    with Image.open(io.BytesIO(gif_bytes(clip, frame_rate=10))) as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        assert image.info["duration"] == 100 and image.info["loop"] == 0
    assert np.array_equal(np.stack(frames), np.broadcast_to(clip, (*clip.shape[:3], 3)))


def test_an_mp4_plays_the_frames_at_their_rate() -> None:
    av = pytest.importorskip("av")
    clip = moving_square(6, side=17)
    with av.open(io.BytesIO(mp4_bytes(clip, frame_rate=5))) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == 5
    assert np.stack(frames).shape == (6, 18, 18, 3)
    assert np.abs(np.stack(frames)[:, :17, :17].astype(int) - clip.astype(int)).mean() < 4


def test_clips_on_a_strip_and_on_a_grid() -> None:
    clips = np.stack([moving_square(3, side=8, start=start) for start in range(3)])
    strips = film_strips(clips)
    assert strips.shape == (24, 24, 1)
    assert np.array_equal(strips[8:16, 16:24], clips[1, 2])
    playing = clips_side_by_side(clips, 2)
    assert playing.shape == (3, 16, 16, 1)
    assert np.array_equal(playing[1, 8:, :8], clips[2, 1]) and not playing[:, 8:, 8:].any()


@pytest.mark.parametrize("write", [gif_bytes, mp4_bytes])
def test_what_is_no_clip(write) -> None:
    for clip in (np.zeros((0, 4, 4, 1), np.uint8), np.zeros((2, 4, 4, 2), np.uint8), np.zeros((2, 4, 4, 3))):
        with pytest.raises(ValueError, match="a clip is uint8"):
            write(clip, frame_rate=10)
    with pytest.raises(ValueError, match=r"frame_rate of a GIF must lie in \(0, 50\], got 60"):
        gif_bytes(moving_square(2), frame_rate=60)
