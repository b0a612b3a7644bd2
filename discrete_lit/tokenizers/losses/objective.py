"""Losses between pixels.

The loss of an image autoencoder, term by term.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.losses.adversarial import (
    AdversarialLoss,
    adaptive_weight,
    take_gradients,
    with_known_gradients,
)
from discrete_lit.tokenizers.losses.perceptual import PerceptualLoss

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


@dataclass
class Judgement:
    """What an objective says of a batch."""

    loss: Tensor
    """Scalar, the sum of the terms, with the gradient for autoencoder and discriminator."""
    terms: dict[str, Tensor]
    """Scalars, each already multiplied by its weight."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that are no part of the loss."""


class Objective(nn.Module):
    """Compares what a decoder gave with the images: pixels, perception, and a discriminator's judgement.

    All of it is one loss for one backward pass. With a discriminator, the gradients of its two players and of the
    reconstruction are computed at the decoder's outputs, in the forward pass: each network is passed backward once for
    each gradient that is needed, the generator's gives the discriminator's weights nothing, and the adaptive weight
    costs two passes through the decoder's last layer alone.

    Args:
        reconstruction_loss: between pixels; or the weight of each of several.
        perceptual_loss: between features of a frozen network.
        adversarial_loss: with a discriminator, in training only.

    Raises:
        ValueError: an unknown loss, a negative weight, or the logit-Laplace loss beside another.
    """

    def __init__(
        self,
        reconstruction_loss: PixelLoss | dict[PixelLoss, float] = "l2",
        perceptual_loss: PerceptualLoss | None = None,
        adversarial_loss: AdversarialLoss | None = None,
    ) -> None:
        super().__init__()
        several = isinstance(reconstruction_loss, dict)
        weights: dict[PixelLoss, float] = reconstruction_loss if several else {reconstruction_loss: 1.0}
        if not weights or min(weights.values()) < 0:
            raise ValueError(f"reconstruction_loss must name losses with weights >= 0, got {weights}")
        self.pixel_losses = {name: (pixel_loss(name), weight) for name, weight in weights.items()}
        self.names = {name: f"reconstruction_{name}" if several else "reconstruction" for name in weights}
        self.distribution = "logit_laplace" in weights
        if self.distribution and (len(weights) > 1 or perceptual_loss is not None or adversarial_loss is not None):
            raise ValueError(
                "the logit-Laplace loss is the density of a distribution, whose parameters no other loss can compare "
                "with images: give it alone"
            )
        self.perceptual = perceptual_loss
        self.adversarial = adversarial_loss

    def prepare(self) -> None:
        """Read the weights of the frozen networks.

        Raises:
            ValueError: there are none where they should be, or they are another network's.
        """
        if self.perceptual is not None:
            self.perceptual.prepare()
        if self.adversarial is not None:
            self.adversarial.discriminator.prepare()

    def images(self, outputs: Tensor) -> Tensor:
        """The images `(B, C, H, W)` in [-1, 1] that a decoder's outputs stand for."""
        return logit_laplace_images(outputs) if self.distribution else outputs.clamp(-1, 1)

    def forward(
        self, outputs: Tensor, images: Tensor, last_layer: Tensor | None = None, step: int | None = None
    ) -> Judgement:
        """Of outputs `(B, C', H, W)`, float32, and images `(B, C, H, W)`.

        Args:
            outputs: of the decoder; C' is C, or twice as many for the logit-Laplace loss.
            images: in [-1, 1].
            last_layer: the decoder's; an adaptive adversarial weight needs it.
            step: of the optimizer, in training; without it there are no adversarial terms.
        """
        with _no_half_precision(outputs.device.type):
            if self.adversarial is None or step is None:
                terms = self._reconstruction(outputs, images)
                return Judgement(torch.stack(list(terms.values())).sum(), terms)
            return self._with_discriminator(self.adversarial, outputs, images, last_layer, step)

    def _reconstruction(self, outputs: Tensor, images: Tensor) -> dict[str, Tensor]:
        terms = {self.names[name]: weight * loss(outputs, images) for name, (loss, weight) in self.pixel_losses.items()}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual.weight * self.perceptual(outputs, images)
        return terms

    def _with_discriminator(
        self, adversarial: AdversarialLoss, outputs: Tensor, images: Tensor, last_layer: Tensor | None, step: int
    ) -> Judgement:
        parameters = adversarial.parameters_to_train()
        if not adversarial.trains(step):
            terms = self._reconstruction(outputs, images)
            loss = torch.stack(list(terms.values())).sum()
            # Data parallelism waits for a gradient of every parameter, zero or not.
            zeros = [torch.zeros_like(parameter) for parameter in parameters]
            return Judgement(loss + with_known_gradients(torch.zeros_like(loss), parameters, zeros), terms)

        seen = outputs.detach().requires_grad_()
        terms = self._reconstruction(seen, images)
        (gradient,) = take_gradients(torch.stack(list(terms.values())).sum(), [seen])
        terms = {name: term.detach() for name, term in terms.items()}
        match = adversarial(seen, images, step)
        figures = match.figures
        if match.generator is not None and match.generator_gradient is not None:
            weight = torch.full_like(match.generator, adversarial.weight * adversarial.share(step))
            if adversarial.adaptive:
                assert last_layer is not None
                weight = weight * adaptive_weight(outputs, last_layer, gradient, match.generator_gradient)
            gradient = gradient + weight * match.generator_gradient
            terms["generator"] = weight * match.generator
            figures["generator_weight"] = weight
        terms |= match.terms
        value = torch.stack(list(terms.values())).sum()
        loss = with_known_gradients(value, [outputs, *parameters], [gradient, *match.gradients])
        return Judgement(loss, terms, figures)


@contextmanager
def _no_half_precision(device_type: str) -> Iterator[None]:
    """float32 where autocast is float16: a mean's gradient at a pixel is too small for it, and the gradients taken in
    the forward pass are taken before the loss is scaled. bfloat16 has float32's range, and stays."""
    half = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    with torch.autocast(device_type, enabled=not half and torch.is_autocast_enabled(device_type)):
        yield
