"""The training loss of an image autoencoder: pixels, perception, and a discriminator, for one backward pass.

`Objective` compares a decoder's outputs with the images. How a discriminator is trained by the same backward pass, and
why, stands in `adversarial.py`; the pixel losses stand below. How outputs become images is no matter of the loss: see
`ImageAutoencoder.images`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.images import frames_of
from discrete_lit.core.modules import FullPrecision
from discrete_lit.tokenizers.losses.adversarial import (
    AdversarialLoss,
    take_gradients,
    with_known_gradients,
)
from discrete_lit.tokenizers.losses.perceptual import PerceptualLoss

PixelLoss = Literal["l1", "l2", "logit_laplace"]
"""Mean absolute (`"l1"`) or mean squared (`"l2"`) error of pixels in [-1, 1], or the mean negative log-density of a
logit-Laplace distribution (`"logit_laplace"`, see `logit_laplace_loss`)."""


@dataclass(kw_only=True)
class ObjectiveTerms:
    """The loss of a batch and what it is made of."""

    loss: Tensor
    """Scalar, the sum of the terms, with the gradient for autoencoder and discriminator."""
    terms: dict[str, Tensor]
    """Scalars, each already multiplied by its weight."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that are worth a curve and no part of the loss."""
    reconstruction_gradient: Tensor | None = None
    """The gradient of the terms of reconstruction at the outputs, `(B, C', H, W)`; None where nobody needed it."""


class Objective(FullPrecision):
    """Compare a decoder's outputs with the images: pixels, perception, and in training a discriminator.

    It compares in float32 also where the autoencoder is in half precision: a mean's gradient at a pixel is too small
    for float16, and the discriminator's too.

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
        *,
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
        alone = len(weights) == 1 and perceptual_loss is None and adversarial_loss is None
        if "logit_laplace" in weights and not alone:
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

    def forward(
        self,
        outputs: Tensor,
        images: Tensor,
        *,
        last_layer: Tensor | None = None,
        step: int | None = None,
        index: Tensor | None = None,
    ) -> ObjectiveTerms:
        """The loss of outputs `(B, C', H, W)`, float32 or float64, against images `(B, C, H, W)`.

        Clips `(B, C, T, H, W)` are compared frame by frame, by frozen networks and discriminators too, but for a
        discriminator of whole clips.

        Args:
            outputs: of the decoder; C' is C, or twice as many for the logit-Laplace loss.
            images: in [-1, 1].
            last_layer: the decoder's; an adaptive adversarial weight needs it.
            step: of the optimizer, in training; without it there are no adversarial terms.
            index: `(B,)` int64, each image's number in the run, to which its augmentation belongs. None: nobody knows.
        """
        if images.ndim == 5 and not (self.adversarial is not None and self.adversarial.discriminator.sees_clips):
            frames = images.shape[2]
            if index is not None:
                index = (index[:, None] * frames + torch.arange(frames, device=index.device)).flatten()
            outputs, images = frames_of(outputs), frames_of(images)
        with _no_half_precision(outputs.device.type):
            if self.adversarial is not None and step is not None:
                if self.adversarial.trains(step):
                    return self._with_discriminator(self.adversarial, outputs, images, last_layer, step, index)
                return self._before_discriminator(self.adversarial, outputs, images)
            terms = self._reconstruction(outputs, images)
            return ObjectiveTerms(loss=_sum(terms), terms=terms)

    def _reconstruction(self, outputs: Tensor, images: Tensor) -> dict[str, Tensor]:
        outputs, images = frames_of(outputs), frames_of(images)
        terms = {self.names[name]: weight * loss(outputs, images) for name, (loss, weight) in self.pixel_losses.items()}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual.weight * self.perceptual(outputs, images)
        return terms

    def _before_discriminator(self, adversarial: AdversarialLoss, outputs: Tensor, images: Tensor) -> ObjectiveTerms:
        terms = self._reconstruction(outputs, images)
        loss = _sum(terms)
        # Data parallelism waits for a gradient of every parameter, zero or not.
        parameters = adversarial.parameters_to_train()
        zeros = [torch.zeros_like(parameter) for parameter in parameters]
        return ObjectiveTerms(loss=loss + with_known_gradients(torch.zeros_like(loss), parameters, zeros), terms=terms)

    def _with_discriminator(
        self,
        adversarial: AdversarialLoss,
        outputs: Tensor,
        images: Tensor,
        last_layer: Tensor | None,
        step: int,
        index: Tensor | None,
    ) -> ObjectiveTerms:
        """L_rec + w lambda L_G for the autoencoder and L_D for the discriminator, as one loss (`adversarial.py`)."""
        # Every gradient is taken here, at the outputs cut from the decoder's graph.
        y = outputs.detach().requires_grad_()
        terms = self._reconstruction(y, images)
        (gradient,) = take_gradients(_sum(terms), [y])
        reconstruction_gradient = gradient
        terms = {name: term.detach() for name, term in terms.items()}

        players = adversarial(y, images, step, index=index)
        figures = players.figures
        if players.generator is not None and players.generator_gradient is not None:
            weight = torch.full_like(players.generator, adversarial.weight * adversarial.warmup(step))
            if adversarial.adaptive is not None:
                assert last_layer is not None
                weight = weight * adversarial.adaptive(
                    outputs,
                    last_layer,
                    reconstruction_gradient=gradient,
                    generator_gradient=players.generator_gradient,
                )
            gradient = gradient + weight * players.generator_gradient
            terms["generator"] = weight * players.generator
            figures["generator_weight"] = weight
        terms |= players.terms

        # The backward pass hands the gradients on: through the decoder, and to the discriminator's weights.
        parameters = adversarial.parameters_to_train()
        loss = with_known_gradients(_sum(terms), [outputs, *parameters], [gradient, *players.gradients])
        return ObjectiveTerms(loss=loss, terms=terms, figures=figures, reconstruction_gradient=reconstruction_gradient)


def _sum(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


@contextmanager
def _no_half_precision(device_type: str) -> Iterator[None]:
    """float32 where autocast is float16: a mean's gradient at a pixel is too small for it, and the gradients taken in
    the forward pass are taken before the loss is scaled. bfloat16 has float32's range, and stays."""
    half = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    with torch.autocast(device_type, enabled=not half and torch.is_autocast_enabled(device_type)):
        yield


def pixel_loss(name: PixelLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of decoder outputs and images `(B, C, H, W)` that gives the scalar loss.

    Raises:
        ValueError: an unknown name.
    """
    losses = {"l1": F.l1_loss, "l2": F.mse_loss, "logit_laplace": logit_laplace_loss}
    if name not in losses:
        raise ValueError(f"reconstruction_loss must be one of {', '.join(losses)}, got {name!r}")
    return losses[name]


LOGIT_LAPLACE_MARGIN = 0.1
"""eps of `phi(x) = (1 - 2 eps) x + eps`, which keeps pixels away from 0 and 1, where the logit is infinite."""


def logit_laplace_loss(outputs: Tensor, images: Tensor) -> Tensor:
    """Negative log-density of images under a logit-Laplace distribution for each pixel and channel; nats, mean.

    Ramesh et al., "Zero-Shot Text-to-Image Generation" (2021), appendix A.3, eq. 2 and 3:
    `f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x))`, of the image mapped into `[eps, 1 - eps]` by
    `phi(x) = (1 - 2 eps) x + eps`, x in [0, 1] and eps 0.1.

    Args:
        outputs: `(B, 2C, H, W)`: mu of every channel, then ln b of every channel.
        images: `(B, C, H, W)` in [-1, 1].
    """
    mean, log_scale = mean_and_log_scale(outputs)
    pixels = map_pixels(images)
    distance = (torch.logit(pixels) - mean).abs() * torch.exp(-log_scale)
    return (distance + log_scale + torch.log(2 * pixels * (1 - pixels))).mean()


def map_pixels(images: Tensor) -> Tensor:
    """Map pixels in [-1, 1] into [eps, 1 - eps], by phi of appendix A.3."""
    return (1 - 2 * LOGIT_LAPLACE_MARGIN) * (images + 1) / 2 + LOGIT_LAPLACE_MARGIN


def mean_and_log_scale(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """mu and ln b, `(B, C, H, W)` each, of outputs `(B, 2C, H, W)`.

    Raises:
        ValueError: an odd number of channels.
    """
    if outputs.shape[1] % 2:
        raise ValueError(
            "the logit-Laplace loss needs a mean and a scale of every channel, so a network with twice the channels of "
            f"the images (out_channels), and its outputs have {outputs.shape[1]}"
        )
    mean, log_scale = outputs.chunk(2, dim=1)
    return mean, log_scale
