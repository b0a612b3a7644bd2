"""Images as the networks see them and as they are stored, measured and shown: their values, their size, their channels.

Values are float in [-1, 1] at every module's boundary, and uint8 in storage and on the way to the device. A size is
one number where images are square, and (height, width) in general. Channels are any number where a network alone
decides; what knows pictures (files, LPIPS, features of networks that saw colour) takes 1, grey, 3, RGB, or 4, RGBA.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what prepares data knows sizes, and starts at once
    from collections.abc import Mapping

    from torch import Tensor

MOST_PIXELS = 2**26
"""The most pixels of an image that goes through a network, 8192 x 8192: 800 MB of RGB in float32."""

ImageSize = int | tuple[int, ...]
"""The size of images in pixels, as settings give it: the side of a square, or height and width (`[H, W]` in YAML).
That of clips is a list too: `[samples]` of a waveform, `[frames, H, W]` of a video."""


MODALITIES = ("image", "audio", "video")
"""The kinds of samples, by the names that they have in batches."""


def to_uint8(images: Tensor) -> Tensor:
    """Convert float images in [-1, 1] of any shape to uint8 in 0..255: clamp, then round to the nearest.

    Used before every metric, so that two numbers never differ by how pixels were quantised.
    """
    return images.float().add(1).mul(127.5).clamp(0, 255).round().byte()


def from_uint8(images: Tensor) -> Tensor:
    """Convert uint8 images in 0..255 of any shape to float32 in [-1, 1]; `to_uint8` gives them back exactly."""
    import torch  # here, for what prepares data knows sizes, and starts at once

    # In place: on a CPU each new tensor of a batch's size costs more than the arithmetic. Divided by a tensor: of a
    # number CUDA takes the reciprocal, and 111 of the 256 values would be others than a CPU's.
    return images.to(torch.float32, copy=True).div_(torch.full((), 127.5, device=images.device)).sub_(1)


def pixels_as_floats(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the uint8 pixels of a batch into float32 in [-1, 1], as every module takes them; all else stays as it is.

    Loaders give bytes: a quarter of the memory between their workers and the device, and of the transfer. DataModules
    call this behind the transfer, as does whoever takes batches from their loaders.
    """
    import torch  # see `from_uint8`

    pixels = {name: batch[name] for name in MODALITIES if name in batch and batch[name].dtype == torch.uint8}
    # Loaders leave the colours of a pixel together, which takes them less time.
    return {**batch, **{name: from_uint8(values.contiguous()) for name, values in pixels.items()}}


def height_and_width(image_size: ImageSize, setting: str = "image_size") -> tuple[int, int]:
    """Give H and W of a size in pixels, which may also be a list of two.

    Args:
        image_size: the side of a square, or H and W.
        setting: what the user calls it, for the message.

    Raises:
        ValueError: neither one nor two integers, one below 1, or more pixels than any memory is for.
    """
    sides = tuple(image_size) if isinstance(image_size, list | tuple) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides) or min(sides) < 1:
        given = list(image_size) if isinstance(image_size, tuple) else image_size
        raise ValueError(
            f"{setting}={given}: it must be the side of square images, or [height, width], each at least 1"
        )
    height, width = sides
    if height * width > MOST_PIXELS:
        raise ValueError(f"{setting}={image_size}: images of more than {MOST_PIXELS:,} pixels are not made here")
    return height, width


def normal_size(image_size: ImageSize, setting: str = "image_size") -> ImageSize:
    """Give a size in the one form in which sizes are kept and compared: an int for a square, else `(H, W)`.

    The size of a clip, one number in a list or three, stays a tuple: `(samples,)` or `(frames, H, W)`.

    Raises:
        ValueError: what `height_and_width` raises, and the same of the sizes of clips.
    """
    if isinstance(image_size, list | tuple) and len(image_size) in (1, 3):
        if not all(isinstance(side, int) and side >= 1 for side in image_size) or prod(image_size) > MOST_PIXELS:
            raise ValueError(
                f"{setting}={list(image_size)}: the size of a clip is [samples] or [frames, height, width], each at "
                f"least 1, and together at most {MOST_PIXELS:,}"
            )
        return tuple(image_size)
    height, width = height_and_width(image_size, setting)
    return height if height == width else (height, width)


def clip_size(image_size: ImageSize, setting: str = "image_size") -> tuple[int, int, int]:
    """Give the frames, H and W of the size of a clip.

    Raises:
        ValueError: another number of numbers, one below 1, or a clip that no memory is for.
    """
    size = normal_size(image_size, setting)
    if isinstance(size, int) or len(size) != 3:
        raise ValueError(f"{setting}={image_size}: the size of a clip of frames is [frames, height, width]")
    frames, height, width = size
    return frames, height, width


def frames_of(clips: Tensor) -> Tensor:
    """Give the frames of clips `(B, C, T, H, W)` as images `(B T, C, H, W)`; images `(B, C, H, W)` stay as they are."""
    return clips.transpose(1, 2).flatten(0, 1) if clips.ndim == 5 else clips


def size_of(images: Tensor) -> tuple[int, int]:
    """Give (H, W) of images `(..., H, W)`."""
    height, width = images.shape[-2:]
    return height, width


def size_text(image_size: ImageSize) -> str:
    """Write a size for people, height first: `32x48`."""
    if isinstance(image_size, list | tuple) and len(image_size) != 2:
        return "x".join(map(str, image_size))
    return "x".join(map(str, height_and_width(image_size)))


def check_channels(images: Tensor, image_channels: int, what: str) -> None:
    """Raise a ValueError unless images `(B, C, ...)` are floats, with as many channels as a network was made for.

    Args:
        images: of a batch.
        image_channels: C of the network.
        what: names the network, for the message.
    """
    if not images.is_floating_point():
        raise ValueError(
            f"the images are {images.dtype}, and {what} takes floats in [-1, 1]: "
            "discrete_lit.core.images.pixels_as_floats makes them of the bytes that a loader gives"
        )
    if images.shape[1] != image_channels:
        raise ValueError(
            f"the images have {images.shape[1]} channels (shape {tuple(images.shape)}), and {what} was made for "
            f"{image_channels}: set image_channels of the data (1 grey, 3 RGB, 4 RGBA) or of the network, so that both "
            "are the same"
        )


def to_rgb(images: Tensor, what: str) -> Tensor:
    """Give three channels to what knows colour images alone: grey is repeated, RGBA is laid over white.

    The colour of a transparent pixel is then white, as it is seen, and not what the file happens to hold behind it.

    Args:
        images: `(B, C, H, W)` with C 1, 3 or 4; uint8, or float in about [-1, 1]. Differentiable.
        what: needs colour images, for the message.

    Raises:
        ValueError: another number of channels.
    """
    channels = images.shape[1]
    if channels not in (1, 3, 4):
        raise ValueError(
            f"{what} sees colour images: three channels, or one (grey, repeated) or four (RGBA, laid over white); got "
            f"{channels}"
        )
    if channels == 4:
        if not images.is_floating_point():
            return to_uint8(to_rgb(from_uint8(images), what))
        opacity = (images[:, 3:] + 1) / 2
        return images[:, :3] * opacity + (1 - opacity)
    return images.expand(-1, 3, *images.shape[2:])


def displayable(images: Tensor) -> Tensor:
    """Give images `(B, C, H, W)` that can be shown: with 1, 3 or 4 channels as they are, else the first, as grey."""
    return images if images.shape[1] in (1, 3, 4) else images[:, :1]
