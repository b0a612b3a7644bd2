"""Losses between pixels."""

from typing import Literal

PixelLoss = Literal["l1", "l2"]
"""Mean absolute or mean squared error of pixels in [-1, 1]."""
