"""Losses between pixels."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

PixelLoss = Literal["l1", "l2", "logit_laplace"]
"""Mean absolute (`"l1"`) or mean squared (`"l2"`) error of pixels in [-1, 1], or the mean negative log-density of a
logit-Laplace distribution (`"logit_laplace"`, see `logit_laplace_loss`)."""

LOGIT_LAPLACE_MARGIN = 0.1


def pixel_loss(name: PixelLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of decoder outputs and images `(B, C, H, W)` that gives the scalar loss.

    Raises:
        ValueError: an unknown name.
    """
    losses = {"l1": F.l1_loss, "l2": F.mse_loss, "logit_laplace": logit_laplace_loss}
    if name not in losses:
        raise ValueError(f"reconstruction_loss must be one of {', '.join(losses)}, got {name!r}")
    return losses[name]


def logit_laplace_loss(outputs: Tensor, images: Tensor) -> Tensor:
    """Negative log-density of images under a logit-Laplace distribution for each pixel and channel; nats, mean.

    Ramesh et al., "Zero-Shot Text-to-Image Generation" (2021), appendix A.3, eq. 2 and 3:
    `f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x))`, of the image mapped into `[eps, 1 - eps]` by
    `phi(x) = (1 - 2 eps) x + eps`, x in [0, 1] and eps 0.1.

    Args:
        outputs: `(B, 2C, H, W)`: mu of every channel, then ln b of every channel.
        images: `(B, C, H, W)` in [-1, 1].
    """
    mean, log_scale = _mean_and_log_scale(outputs)
    pixels = (1 - 2 * LOGIT_LAPLACE_MARGIN) * (images + 1) / 2 + LOGIT_LAPLACE_MARGIN
    distance = (torch.logit(pixels) - mean).abs() * torch.exp(-log_scale)
    return (distance + log_scale + torch.log(2 * pixels * (1 - pixels))).mean()


def logit_laplace_images(outputs: Tensor) -> Tensor:
    """The images `(B, C, H, W)` in [-1, 1] that outputs `(B, 2C, H, W)` stand for: `phi^-1(sigmoid(mu))`, clamped."""
    mean, _ = _mean_and_log_scale(outputs)
    pixels = (torch.sigmoid(mean) - LOGIT_LAPLACE_MARGIN) / (1 - 2 * LOGIT_LAPLACE_MARGIN)
    return pixels.clamp(0, 1) * 2 - 1


def _mean_and_log_scale(outputs: Tensor) -> tuple[Tensor, Tensor]:
    if outputs.shape[1] % 2:
        raise ValueError(
            "the logit-Laplace loss needs a mean and a scale of every channel, so a network with twice the channels of "
            f"the images (out_channels), and its outputs have {outputs.shape[1]}"
        )
    mean, log_scale = outputs.chunk(2, dim=1)
    return mean, log_scale
