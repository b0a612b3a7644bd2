"""The training and validation that every image autoencoder shares, whatever its bottleneck.

The tokenizer that is an autoencoder around a quantizer.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from discrete_lit.core.images import to_uint8
from discrete_lit.metrics.codebook_usage import MOST_COUNTED, CodebookUsage
from discrete_lit.metrics.reconstruction import pixel_fidelity
from discrete_lit.optimization import configure_optimizers
from discrete_lit.tokenizers.losses import AdversarialLoss, Objective, PerceptualLoss, PixelLoss
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import Quantizer
from discrete_lit.tokenizers.quantizers.quantizer import Component
from discrete_lit.tokenizers.tokenizer import Tokenizer


@dataclass
class Reconstruction:
    """What an autoencoder made of a batch of images."""

    outputs: Tensor
    """`(B, C', H, W)` float32, as the decoder gives them."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """The bottleneck's own scalar terms, weighted."""
    tokens: Tensor | None = None
    """`(B, *token_shape)` int64, of a discrete bottleneck."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that are worth a curve and no part of the loss."""


class ImageAutoencoder(LightningModule):
    """Trains a network to give its images back.

    Autoencoder and discriminator are trained by one loss and one optimizer, so a batch is one step, and accumulation,
    schedulers and precision are the Trainer's. Gradient clipping by norm acts on each of the two alone. Frozen networks
    of the losses are read when training starts, and are in no checkpoint.

    Logs `train/loss` and its terms, each with its weight; of a discriminator also the generator's weight and the mean
    logits of both kinds of images; in validation the same terms, `validation/psnr` (decibels) and `validation/ssim`,
    means over the images on uint8 pixels (`discrete_lit.metrics.reconstruction.pixel_fidelity`).

    Args:
        network: encoder and decoder.
        reconstruction_loss: mean absolute (`"l1"`) or mean squared (`"l2"`) error of pixels in [-1, 1], or
            `"logit_laplace"`; or a weight of each of several, as in `{l1: 0.2, l2: 1.0}`.
        perceptual_loss: between features of a frozen network.
        adversarial_loss: with a discriminator, when training.
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
    """

    def __init__(
        self,
        network: Autoencoder,
        reconstruction_loss: PixelLoss | dict[PixelLoss, float] = "l2",
        perceptual_loss: PerceptualLoss | None = None,
        adversarial_loss: AdversarialLoss | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.objective = Objective(reconstruction_loss, perceptual_loss, adversarial_loss)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.training_tokens: Tensor | None = None  # of the newest batch, for callbacks
        self.psnr = MeanMetric()
        self.ssim = MeanMetric()

    @abstractmethod
    def reconstruct(self, images: Tensor) -> Reconstruction:
        """Images `(B, C, H, W)` in [-1, 1] through the bottleneck and back, with its losses."""

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], Reconstruction]:
        """Of images `(B, C, H, W)`: the loss, its named terms, and what the autoencoder made of them."""
        made = self.reconstruct(images)
        judged = self.objective(made.outputs, images, *self._for_discriminator())
        made.figures |= judged.figures
        terms = {**judged.terms, **made.losses}
        return torch.stack([judged.loss, *made.losses.values()]).sum(), terms, made

    def _for_discriminator(self) -> tuple[Tensor | None, int | None]:
        """The last layer and the step, where there is a discriminator to train."""
        if self.objective.adversarial is None or not (self.training and torch.is_grad_enabled()):
            return None, None
        return self.network.last_layer, self.global_step

    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate"):
            self.objective.prepare()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, terms, made = self.loss(batch["image"])
        self.training_tokens = made.tokens
        self._log_terms("train", loss, {**terms, **made.figures}, len(batch["image"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The reconstructions `(B, C, H, W)` in [-1, 1] of a batch of images, for callbacks."""
        images = batch["image"]
        loss, terms, made = self.loss(images)
        self._log_terms("validation", loss, terms, len(images))
        reconstructions = self.objective.images(made.outputs)
        psnr, ssim = pixel_fidelity(to_uint8(reconstructions), to_uint8(images))
        self.psnr.update(psnr)
        self.ssim.update(ssim)
        self.log_dict({"validation/psnr": self.psnr, "validation/ssim": self.ssim})
        self.validate(made)
        return reconstructions

    def validate(self, made: Reconstruction) -> None:
        """What a kind of bottleneck measures of a validation batch beside its reconstruction."""

    def _log_terms(self, stage: str, loss: Tensor, terms: dict[str, Tensor], batch_size: int) -> None:
        named = {f"{stage}/loss": loss, **{f"{stage}/{name}": term for name, term in terms.items()}}
        self.log_dict(named, sync_dist=True, batch_size=batch_size)

    def configure_optimizers(self) -> Any:
        adversarial = self.objective.adversarial
        apart = [] if adversarial is None else [(adversarial.discriminator, adversarial.learning_rate_factor)]
        return configure_optimizers(self, self.optimizer, self.scheduler, apart)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        adversarial = self.objective.adversarial
        if adversarial is not None and not adversarial.trains(self.global_step):
            # Zero gradients would still decay its weights, and count as steps of Adam.
            for parameter in adversarial.parameters_to_train():
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        adversarial = self.objective.adversarial
        if adversarial is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        of_discriminator = adversarial.parameters_to_train()
        identities = {id(parameter) for parameter in of_discriminator}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in identities]
        for parameters in (rest, of_discriminator):
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)


# The name of all ids together among those of their parts.
_WHOLE = "all"


class AutoencoderTokenizer(ImageAutoencoder, Tokenizer):
    """Trained by the objective of an image autoencoder and the quantizer's terms.

    In validation it also logs `validation/codebook_usage` (share of the K ids that occur) and `validation/perplexity`
    (exp of the entropy of the ids in nats, between 1 and K), and both again, as `validation/codebook_usage/<part>`, of
    each part that the quantizer names: a codebook of several, a scale, a bit. Above K = 2^24 the parts alone.

    Args:
        network: called with the quantizer's `dim` and `latent_dim`.
        quantizer: from latents to ids and code vectors.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.
    """

    def __init__(self, network: Callable[[int, int], Autoencoder], quantizer: Quantizer, **training: Any) -> None:
        super().__init__(network(quantizer.dim, quantizer.latent_dim), **training)
        self.quantizer = quantizer
        self.vocab_size = quantizer.vocab_size
        self.usage = nn.ModuleDict()

    def token_shape(self, image_size: int) -> tuple[int, ...]:
        return self.quantizer.token_shape(self.network.grid(image_size))

    def coding_state(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if not name.startswith("objective.")}

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.quantizer.encode(self.network.encode(images).movedim(1, -1))

    def embed(self, tokens: Tensor) -> Tensor:
        self.check_tokens(tokens)
        return self.quantizer.lookup(tokens).movedim(-1, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.objective.images(self.network.decode(self.embed(tokens)).float())

    def components(self, tokens: Tensor) -> dict[str, Component]:
        return self.quantizer.components(tokens)

    def reconstruct(self, images: Tensor) -> Reconstruction:
        quantized = self.quantizer(self.network.encode(images).movedim(1, -1))
        outputs = self.network.decode(quantized.z_q.movedim(-1, 1)).float()
        return Reconstruction(outputs, quantized.losses, quantized.tokens)

    def validate(self, made: Reconstruction) -> None:
        assert made.tokens is not None
        counted = self.components(made.tokens)
        if self.vocab_size <= MOST_COUNTED:
            counted[_WHOLE] = Component(made.tokens, self.vocab_size)
        for name, part in counted.items():
            if name not in self.usage:
                self.usage[name] = CodebookUsage(part.size).to(self.device)
            cast(CodebookUsage, self.usage[name]).update(part.ids)

    def on_validation_epoch_end(self) -> None:
        for name, measured in self.usage.items():
            measured = cast(CodebookUsage, measured)
            usage, perplexity = measured.compute()
            measured.reset()
            suffix = "" if name == _WHOLE else f"/{name}"
            figures = {f"validation/codebook_usage{suffix}": usage, f"validation/perplexity{suffix}": perplexity}
            self.log_dict(figures, sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The ids `(B, *token_shape)` of a batch of images."""
        return self.encode(batch["image"])
