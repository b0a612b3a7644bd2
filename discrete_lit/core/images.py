"""The one conversion between images as the networks see them and images as they are stored and measured."""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Convert float images in [-1, 1] of any shape to uint8 in 0..255: clamp, then round to the nearest.

    Used before every metric, so that two numbers never differ by how pixels were quantised.
    """
    return images.float().add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Convert uint8 images in 0..255 of any shape to float32 in [-1, 1]; `to_uint8` gives them back exactly."""
    return images.float().div(127.5).sub(1)
