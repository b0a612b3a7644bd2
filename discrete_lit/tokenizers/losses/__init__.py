"""Losses that train an autoencoder: of pixels or samples, perception, a discriminator, of latents. Plain PyTorch."""

from discrete_lit.tokenizers.losses.adversarial import AdversarialLoss
from discrete_lit.tokenizers.losses.alignment import AlignmentLoss
from discrete_lit.tokenizers.losses.audio_objective import AudioObjective, GradientBalancer
from discrete_lit.tokenizers.losses.objective import Objective, PixelLoss
from discrete_lit.tokenizers.losses.perceptual import LPIPS, PerceptualLoss, TimmFeatures, TorchvisionLogits
from discrete_lit.tokenizers.losses.spectrogram_discriminator import (
    MultiScaleSTFTDiscriminator,
    SpectrogramAdversarialLoss,
)

__all__ = [
    "LPIPS",
    "AdversarialLoss",
    "AlignmentLoss",
    "AudioObjective",
    "GradientBalancer",
    "MultiScaleSTFTDiscriminator",
    "Objective",
    "PerceptualLoss",
    "PixelLoss",
    "SpectrogramAdversarialLoss",
    "TimmFeatures",
    "TorchvisionLogits",
]
