"""Clips of video in folders and shards, and the files that they are in."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.video import moving_square, write_videos
from PIL import Image

from discrete_lit.core.images import from_uint8
from discrete_lit.core.moving_pictures import gif_bytes, mp4_bytes
from discrete_lit.data import VideoClips
from discrete_lit.data.loaders import TooManyBadSamples
from discrete_lit.data.media import UndecodableSample
from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import MovingDigits, VideoFolders, digit_compositions
from discrete_lit.data.video_files import read_frames


def make_data(train: Path, **settings: Any) -> VideoClips:
    usual = {"image_size": (4, 16, 16), "batch_size": 2, "num_workers": 0, "image_channels": 1}
    return VideoClips(str(train), **(usual | settings))


def read(data: bytes, frames: int = 3, **settings: Any) -> np.ndarray:
    usual: dict[str, Any] = {"frame_rate": None, "uniform": 0.0, "image_channels": 1}
    return np.stack([np.asarray(frame) for frame in read_frames(data, frames, **(usual | settings))])


def counted(clip: np.ndarray) -> list[int]:
    """The numbers of the frames, which their first pixels tell."""
    return [round(int(frame.reshape(*frame.shape[:2], -1)[0, 0, 0]) / 8) for frame in clip]


# Files.


@pytest.mark.parametrize("encode", [gif_bytes, mp4_bytes])
def test_consecutive_frames_from_anywhere_in_a_file(encode: Any) -> None:
    data = encode(moving_square(10, side=32), frame_rate=10)
    for uniform, first in ((0.0, 0), (0.5, 4), (0.999, 7), (None, 3)):
        assert counted(read(data, uniform=uniform)) == [first, first + 1, first + 2]
    assert read(data, image_channels=3).shape == (3, 32, 32, 3)
    assert read(data, image_channels=4).shape == (3, 32, 32, 4)


@pytest.mark.parametrize("encode", [gif_bytes, mp4_bytes])
def test_frames_at_another_rate(encode: Any) -> None:
    data = encode(moving_square(8, side=32), frame_rate=10)
    assert counted(read(data, 4, frame_rate=5)) == [0, 2, 4, 6]
    assert counted(read(data, 8, frame_rate=20)) == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(UndecodableSample, match="it has 4 frames at 5 frames a second, and clips have 5"):
        read(data, 5, frame_rate=5)


def variable_gif() -> bytes:
    first, *rest = [Image.fromarray(frame[..., 0]) for frame in moving_square(4)]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=[100, 300, 100, 100])
    return buffer.getvalue()


def variable_mp4() -> bytes:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height = stream.width = 32
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "1"}
        stream.codec_context.time_base = Fraction(1, 10)
        for frame, time in zip(moving_square(4, side=32, channels=3), (0, 1, 4, 5), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("make", [variable_gif, variable_mp4])
def test_a_variable_frame_rate_needs_times(make: Any) -> None:
    with pytest.raises(UndecodableSample, match=r"100 to 300 ms apart \(a variable frame rate\): set frame_rate"):
        read(make())
    assert counted(read(make(), 6, frame_rate=10)) == [0, 1, 1, 1, 2, 3]


def test_a_video_of_one_frame() -> None:
    for data in (gif_bytes(moving_square(1), frame_rate=10), mp4_bytes(moving_square(1, side=32), frame_rate=10)):
        assert counted(read(data, 1)) == [0]
        with pytest.raises(UndecodableSample, match="it has 1 frames, and clips have 3"):
            read(data)


def test_files_that_are_cut_short_or_are_no_video() -> None:
    gif, mp4 = gif_bytes(moving_square(8), frame_rate=10), mp4_bytes(moving_square(8, side=32), frame_rate=10)
    for data in (gif[: len(gif) // 2], mp4[: len(mp4) // 2], mp4[:40]):
        with pytest.raises(UndecodableSample, match="cut short"):
            read(data, 8)
    picture = io.BytesIO()
    Image.fromarray(moving_square(1)[0, ..., 0]).save(picture, "PNG")
    for data in (picture.getvalue(), b"", b"#EXTM3U\nfile:///etc/passwd\n"):
        with pytest.raises(UndecodableSample, match="are of no video that is read"):
            read(data)


def test_damaged_frames_are_no_pictures() -> None:
    data = bytearray(mp4_bytes(np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), np.uint8), frame_rate=10))
    start = data.find(b"mdat") + 1200
    data[start : start + 4000] = bytes(4000)
    with pytest.raises(UndecodableSample):
        read(bytes(data), 6)


# The DataModule.


@pytest.fixture(params=["folder", "shards"])
def clips(request: pytest.FixtureRequest, tmp_path: Path, digits: Path) -> Path:
    """Clips of eight frames or more, 16x16: of two classes in folders, or of ten in shards."""
    if request.param == "folder":
        return write_videos(tmp_path / "clips", count=7)
    write_shards(
        MovingDigits("train", count=7, frames=8, file=digits), tmp_path / "shards", split="train", samples_per_shard=3
    )
    return tmp_path / "shards"


def test_batches_of_clips(clips: Path) -> None:
    data = make_data(clips, frame_rate=10)
    batches = list(data.evaluation_loader("train", 0, 1))
    assert [len(batch["video"]) for batch in batches] == [2, 2, 2, 1]
    assert batches[0]["video"].shape == (2, 1, 4, 16, 16) and batches[0]["video"].dtype == torch.uint8
    floats = data.on_after_batch_transfer(batches[0], 0)["video"]
    assert torch.equal(floats, from_uint8(batches[0]["video"])) and floats.is_contiguous()
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(7))
    assert all(0 <= int(label) < data.num_classes for batch in batches for label in batch["label"])


def test_training_resumes_exactly(clips: Path) -> None:
    """Every crop in time and space is a function of (seed, epoch, key)."""

    def loader(**settings: Any) -> Any:
        data = make_data(clips, image_size=(4, 8, 8), minimum_crop=0.5, flip=True, frame_rate=10, **settings)
        return data.training_loader(0, 1)

    for settings in ({}, {"image_share": 0.5}):
        first = loader(**settings)
        epochs = [list(first), list(first)]
        again = loader(**settings)
        batches = iter(again)
        next(batches)
        state = again.state_dict()
        resumed = loader(**settings)
        resumed.load_state_dict(state)
        for batch, expected in zip(list(resumed) + list(resumed), epochs[0][1:] + epochs[1], strict=True):
            assert batch.keys() == expected.keys() and batch["key"] == expected["key"]
            for name in {"video", "image"} & batch.keys():
                assert torch.equal(batch[name], expected[name])
    by_key = [dict(zip(batch["key"], batch.get("video", ()), strict=False)) for batch in epochs[0] + epochs[1]]
    assert len(by_key) > 2


def test_crops_in_time_differ_between_epochs(tmp_path: Path) -> None:
    folder = write_videos(tmp_path, count=2, frames=30)
    loader = make_data(folder, crop="center").training_loader(0, 1)
    starts = {float(clip[0, 0, 0, 0]) for _ in range(6) for batch in loader for clip in batch["video"]}
    assert len(starts) > 4
    for batch in loader:
        counts = (batch["video"][:, 0, :, 0, 0] / 8).round()
        assert (counts.diff(dim=1) == 1).all()


def test_images_between_clips_are_their_frames(tmp_path: Path) -> None:
    folder = write_videos(tmp_path, count=6)
    images = make_data(folder, crop="center", image_share=1.0).training_loader(0, 1)
    whole = make_data(folder, crop="center").training_loader(0, 1)
    for batch, expected in zip(images, whole, strict=True):
        assert "video" not in batch and batch["image"].shape == (2, 1, 16, 16)
        for image, clip in zip(batch["image"], expected["video"], strict=True):
            assert any(torch.equal(image, frame) for frame in clip.unbind(1))


def test_odd_sizes_and_other_channels(tmp_path: Path) -> None:
    for name, (height, width, channels) in {"odd": (17, 23, 3), "grey": (31, 15, 1)}.items():
        clip = np.random.default_rng(0).integers(0, 255, (5, height, width, channels), dtype=np.uint8)
        for kind, encode in (("gif", gif_bytes), ("mp4", mp4_bytes)):
            (tmp_path / f"{name}.{kind}").write_bytes(encode(clip, frame_rate=10))
    for channels in (1, 3, 4):
        (batch,) = make_data(tmp_path, image_channels=channels, batch_size=4, image_size=(4, 9, 13)).training_loader(
            0, 1
        )
        assert batch["video"].shape == (4, channels, 4, 9, 13)
    with pytest.raises(ValueError, match="image_channels is 2"):
        make_data(tmp_path, image_channels=2)


def test_bad_files_are_counted(tmp_path: Path) -> None:
    folder = write_videos(tmp_path, count=6)
    (folder / "class0" / "0.gif").write_bytes(gif_bytes(moving_square(2), frame_rate=10))
    with pytest.raises(TooManyBadSamples, match="it has 2 frames, and clips have 4"):
        list(make_data(folder).training_loader(0, 1))
    batches = list(make_data(folder, max_bad_fraction=0.5).training_loader(0, 1))
    assert len(batches) == 3 and all("class0/0.gif" not in batch["key"] for batch in batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 16}, r"the size of a clip of frames is \[frames, height, width\]"),
        ({"image_size": (0, 16, 16)}, "each at least 1"),
        ({"frame_rate": 0.0}, "frame_rate is 0.0; it must be in"),
        ({"image_share": 1.5}, "image_share is 1.5"),
        ({"crop": "dall_e"}, "of clips it is 'random' or 'center'"),
        ({"minimum_crop": 0.9, "maximum_crop": 0.8}, "they must rise"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(tmp_path, **settings)


def test_folders_without_clips(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no videos in"):
        make_data(tmp_path).training_loader(0, 1)


def test_videos_in_shards(tmp_path: Path) -> None:
    """Written from folders of any kind of video, and read as the folders are."""
    folder = write_videos(tmp_path / "clips", count=4, kind="mp4")
    manifest = write_shards(VideoFolders(folder), tmp_path / "shards", split="train", shuffle_seed=None)
    assert manifest["count"] == 4 and manifest["classes"] == ["class0", "class1"]
    (found,) = make_data(tmp_path / "shards", batch_size=4).evaluation_loader("train", 0, 1)
    (expected,) = make_data(folder, batch_size=4).evaluation_loader("train", 0, 1)
    assert torch.equal(found["video"], expected["video"]) and torch.equal(found["label"], expected["label"])
    with pytest.raises(ValueError, match="one is a folder of videos and the other shards"):
        make_data(folder, validation=str(tmp_path / "shards")).training_loader(0, 1)


# Moving digits.


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of the form of scikit-learn's: ten images of each digit, of which each is told by its levels."""
    import gzip

    from discrete_lit.core.files import content_sha256

    rows = [",".join(map(str, [digit + 1] * 63 + [image + 1, digit])) for image in range(10) for digit in range(10)]
    content = "\n".join(rows).encode()
    monkeypatch.setattr(digit_compositions, "_DIGITS_SHA256", content_sha256(content))
    (tmp_path / "digits.csv.gz").write_bytes(gzip.compress(content))
    return tmp_path / "digits.csv.gz"


def test_digits_move_in_a_straight_line_and_bounce(digits: Path) -> None:
    source = MovingDigits("train", count=40, frames=20, side=14, file=digits)
    images = set()
    for index in range(40):
        clip = source.clip(index)
        assert source.entries[index].label == index % 10
        assert np.array_equal(read(source.read(index), 20, frame_rate=10)[..., None], clip)
        places = []
        for frame in clip[..., 0]:
            (top, left), digit = found_in(frame)
            assert np.all(digit.flatten()[:63] == round(255 * (index % 10 + 1) / 16))
            images.add(int(digit[7, 7]))
            places.append((top, left))
        steps = np.abs(np.diff(np.array(places), axis=0))
        assert steps.max() in (1, 2) and (np.array(places) >= 0).all() and (np.array(places) <= 6).all()
    held_out = MovingDigits("validation", count=40, file=digits)
    others = {int(found_in(held_out.clip(index)[0, ..., 0])[1][7, 7]) for index in range(40)}
    assert len(images) > 4 and others == {round(255 * 9 / 16)} and not images & others


def found_in(frame: np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
    """Where the digit is in a frame, and the digit."""
    rows, columns = frame.any(axis=1).nonzero()[0], frame.any(axis=0).nonzero()[0]
    assert len(rows) == len(columns) == 8
    top, left = int(rows[0]), int(columns[0])
    return (top, left), frame[top : top + 8, left : left + 8]


def test_moving_digits_out_of_range(digits: Path) -> None:
    for settings, message in (
        ({"side": 8}, "side above 8"),
        ({"count": 0}, "at least 1"),
        ({"split": "new"}, "split="),
    ):
        with pytest.raises(ValueError, match=message):
            MovingDigits(**{"split": "train", "file": digits, **settings})
