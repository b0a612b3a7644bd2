"""Losses that train an image autoencoder: of pixels, perception, a discriminator, of latents. Plain PyTorch."""

from discrete_lit.tokenizers.losses.adversarial import AdversarialLoss
from discrete_lit.tokenizers.losses.alignment import AlignmentLoss
from discrete_lit.tokenizers.losses.objective import Objective, PixelLoss
from discrete_lit.tokenizers.losses.perceptual import LPIPS, PerceptualLoss, TimmFeatures, TorchvisionLogits

__all__ = [
    "LPIPS",
    "AdversarialLoss",
    "AlignmentLoss",
    "Objective",
    "PerceptualLoss",
    "PixelLoss",
    "TimmFeatures",
    "TorchvisionLogits",
]
