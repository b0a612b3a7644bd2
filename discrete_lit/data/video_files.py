"""A video file to the frames of a clip: which frames, decoded one by one.

GIFs are read by Pillow, everything else by PyAV (the extra `video`). A clip is `frames` consecutive frames; with a
`frame_rate`, the frames that are on the screen at that many instants a second, so that files of any rate, and of a
variable one, are shown at one speed.

A file says itself what it is, by its first bytes: a container is opened as what it is and as nothing else, for
FFmpeg also reads play lists, which name other files.
"""

import bisect
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from PIL import Image, ImageSequence

from discrete_lit.core.images import MOST_PIXELS
from discrete_lit.core.moving_pictures import has_av
from discrete_lit.data.clips import clip_start
from discrete_lit.data.media import UndecodableSample
from discrete_lit.data.transforms import MODES, to_mode

# Frames whose times differ by less than this are evenly spaced: files round times to thousandths, GIFs to hundredths.
_UNEVEN = 1.5
# Of a second; times are compared after rounding.
_ROUNDING = 1e-4


def read_frames(
    data: bytes, frames: int, *, frame_rate: float | None, uniform: float | None, image_channels: int
) -> list[Image.Image]:
    """Decode the frames of one clip.

    Args:
        data: the file.
        frames: T, how many.
        frame_rate: instants a second of which the frames are taken; None takes every frame of the file.
        uniform: decides where the clip begins, in [0, 1); None takes the middle.
        image_channels: 1 for grey, 3 for RGB, 4 for RGBA.

    Returns:
        T Pillow images of mode L, RGB or RGBA.

    Raises:
        UndecodableSample: not a video that is read, one that is cut short or damaged, a shorter one, or without a
            `frame_rate` one whose frames are not evenly spaced.
        ValueError: PyAV is needed and not installed.
    """
    reader: FrameReader = GifReader(data) if data[:6] in (b"GIF87a", b"GIF89a") else ContainerReader(data)
    try:
        times = reader.times()
        shown = _shown(times, frame_rate)
        if len(shown) < frames:
            at = "" if frame_rate is None else f" at {frame_rate:g} frames a second"
            raise UndecodableSample(f"it has {len(shown)} frames{at}, and clips have {frames}")
        start = clip_start(len(shown), frames, uniform=uniform)
        wanted = shown[start : start + frames]
        decoded = reader.frames(sorted(set(wanted)), MODES[image_channels])
        return [decoded[number] for number in wanted]
    except UndecodableSample:
        raise
    # Broken files raise almost anything.
    except Exception as error:
        raise UndecodableSample(f"{type(error).__name__}: {error}") from error


def _shown(times: Sequence[float], frame_rate: float | None) -> Sequence[int]:
    """The numbers of the frames that are taken in turn, of frames that begin at `times`, the last of which is the end.

    Raises:
        UndecodableSample: frames of uneven length are to be taken one by one.
    """
    count = len(times) - 1
    if frame_rate is not None:
        instants = int((times[-1] - times[0]) * frame_rate + _ROUNDING)
        return [
            bisect.bisect_right(times, times[0] + number / frame_rate + _ROUNDING, hi=count) - 1
            for number in range(max(instants, 1))
        ]
    lengths = [end - begin for begin, end in pairwise(times[:-1])]
    if lengths and max(lengths) > _UNEVEN * min(lengths) + _ROUNDING:
        raise UndecodableSample(
            f"its frames are {1000 * min(lengths):.0f} to {1000 * max(lengths):.0f} ms apart (a variable frame rate): "
            "set frame_rate to take them at even times"
        )
    return range(count)


class FrameReader(ABC):
    """Read a file of frames: when each is shown, and those that are asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @abstractmethod
    def times(self) -> list[float]:
        """The seconds at which the frames begin, in order, and the end of the last."""

    @abstractmethod
    def frames(self, wanted: Sequence[int], mode: str) -> dict[int, Image.Image]:
        """Decode the frames of these numbers, which rise, to a mode of Pillow."""


class GifReader(FrameReader):
    """Read an animated GIF by Pillow."""

    def times(self) -> list[float]:
        # A file that is cut off has fewer frames, and says nothing.
        if not self.data.rstrip(b"\0\r\n").endswith(b";"):
            raise UndecodableSample("the GIF is cut short: its end is missing")
        times = [0.0]
        with Image.open(io.BytesIO(self.data), formats=["GIF"]) as image:
            _check_size(image.width, image.height)
            for frame in ImageSequence.Iterator(image):
                times.append(times[-1] + (frame.info.get("duration") or 100) / 1000)
        return times

    def frames(self, wanted: Sequence[int], mode: str) -> dict[int, Image.Image]:
        found: dict[int, Image.Image] = {}
        with Image.open(io.BytesIO(self.data), formats=["GIF"]) as image:
            for number in wanted:
                image.seek(number)
                # A copy: the next frame is drawn over this one.
                found[number] = to_mode(image.copy(), mode)
        return found


_CONTAINERS = {"mp4": "an ISO base media file", "matroska": "a Matroska file", "avi": "an AVI file"}


class ContainerReader(FrameReader):
    """Read the first video stream of an MP4, QuickTime, WebM, Matroska or AVI file by PyAV.

    Raises:
        UndecodableSample: the bytes are none of these.
        ValueError: PyAV is not installed.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.container = container_of(data)
        if not has_av():
            raise ValueError("videos other than GIFs are read by PyAV: pip install 'discrete-lit[video]'")
        self._begins: list[int] = []

    def times(self) -> list[float]:
        with self._opened() as container:
            stream = self._stream(container)
            _check_size(stream.codec_context.width, stream.codec_context.height)
            packets = [packet for packet in container.demux(stream) if packet.pts is not None and packet.size]
            self._begins = sorted(packet.pts for packet in packets)
            if len(self._begins) < stream.frames or not self._begins:
                raise UndecodableSample(
                    f"{_CONTAINERS[self.container]} that is cut short: {len(self._begins)} of {stream.frames} frames"
                )
            last = max(packets, key=lambda packet: packet.pts)
            even = (last.pts - self._begins[0]) / max(1, len(self._begins) - 1) or 1
            ends = last.pts + (last.duration or even)
            return [float(time * stream.time_base) for time in (*self._begins, ends)]

    def frames(self, wanted: Sequence[int], mode: str) -> dict[int, Image.Image]:
        number_of = {begin: number for number, begin in enumerate(self._begins)}
        left, found = set(wanted), {}
        with self._opened() as container:
            stream = self._stream(container)
            for frame in container.decode(stream):
                number = number_of.get(frame.pts)
                if number not in left:
                    continue
                if frame.is_corrupt:
                    raise UndecodableSample(f"its frame {number} is damaged")
                pixels = frame.to_ndarray(format="rgba" if mode == "RGBA" else "rgb24")
                found[number] = to_mode(Image.fromarray(pixels), mode)
                left.remove(number)
                if not left:
                    return found
        raise UndecodableSample(f"{_CONTAINERS[self.container]} that is cut short: frame {min(left)} is missing")

    def _opened(self) -> Any:
        import av
        from av.error import FFmpegError

        try:
            return av.open(io.BytesIO(self.data), mode="r", format=self.container)
        except FFmpegError as error:
            raise UndecodableSample(
                f"{_CONTAINERS[self.container]} that is damaged or cut short: {error.strerror}"
            ) from error

    @staticmethod
    def _stream(container: Any) -> Any:
        if not container.streams.video:
            raise UndecodableSample("it has no video stream")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the loader has workers of its own
        return stream


def container_of(data: bytes) -> str:
    """Name the format of a video file by its first bytes, as FFmpeg does.

    Raises:
        UndecodableSample: none that is read.
    """
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    raise UndecodableSample(f"its first bytes, {data[:12]!r}, are of no video that is read")


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        raise UndecodableSample(f"its frames are {width}x{height} pixels; at most {MOST_PIXELS:,} pixels are decoded")
