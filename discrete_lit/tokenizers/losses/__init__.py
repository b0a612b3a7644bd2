"""What an autoencoder is trained for: pixels, perception, and a discriminator's judgement. Plain PyTorch."""

from discrete_lit.tokenizers.losses.objective import Objective
from discrete_lit.tokenizers.losses.pixels import PixelLoss

__all__ = ["Objective", "PixelLoss"]
