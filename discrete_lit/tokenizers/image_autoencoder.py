"""The training and validation that every image autoencoder shares, whatever its bottleneck."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from discrete_lit.evaluation.reconstruction import pixel_fidelity
from discrete_lit.images import to_uint8
from discrete_lit.optimization import configure_optimizers
from discrete_lit.tokenizers.losses import Objective, PixelLoss
from discrete_lit.tokenizers.networks import Autoencoder


@dataclass
class Reconstruction:
    """What an autoencoder made of a batch of images."""

    outputs: Tensor
    """`(B, C', H, W)` float32, as the decoder gives them."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """The bottleneck's own scalar terms, weighted."""
    tokens: Tensor | None = None
    """`(B, *token_shape)` int64, of a discrete bottleneck."""


class ImageAutoencoder(LightningModule):
    """Trains a network to give its images back.

    Logs `train/loss` and its terms; in validation the same terms, `validation/psnr` (decibels) and `validation/ssim`,
    means over the images on uint8 pixels (`discrete_lit.evaluation.reconstruction.pixel_fidelity`).

    Args:
        network: encoder and decoder.
        reconstruction_loss: mean absolute (`"l1"`) or mean squared (`"l2"`) error of pixels in [-1, 1].
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
    """

    def __init__(
        self,
        network: Autoencoder,
        reconstruction_loss: PixelLoss = "l2",
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.objective = Objective(reconstruction_loss)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.psnr = MeanMetric()
        self.ssim = MeanMetric()

    @abstractmethod
    def reconstruct(self, images: Tensor) -> Reconstruction:
        """Images `(B, C, H, W)` in [-1, 1] through the bottleneck and back, with its losses."""

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], Reconstruction]:
        """Of images `(B, C, H, W)`: the loss, its named terms, and what the autoencoder made of them."""
        made = self.reconstruct(images)
        terms = {**self.objective(made.outputs, images), **made.losses}
        return torch.stack(list(terms.values())).sum(), terms, made

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, terms, _ = self.loss(batch["image"])
        self._log_terms("train", loss, terms, len(batch["image"]))
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
        return configure_optimizers(self, self.optimizer, self.scheduler)
