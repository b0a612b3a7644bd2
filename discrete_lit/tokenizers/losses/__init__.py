"""Losses that train an image autoencoder: of pixels, of perception, and against a discriminator. Plain PyTorch."""

from discrete_lit.tokenizers.losses.adversarial import AdversarialLoss
from discrete_lit.tokenizers.losses.objective import Objective, PixelLoss
from discrete_lit.tokenizers.losses.perceptual import LPIPS, PerceptualLoss, TimmFeatures

__all__ = ["LPIPS", "AdversarialLoss", "Objective", "PerceptualLoss", "PixelLoss", "TimmFeatures"]
