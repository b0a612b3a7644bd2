"""The tokenizer that is an autoencoder around a quantizer: its training and validation."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.functional.image import peak_signal_noise_ratio

from discrete_lit.evaluation.codebook_usage import CodebookUsage
from discrete_lit.images import to_uint8
from discrete_lit.optimization import configure_optimizers
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import Quantizer
from discrete_lit.tokenizers.tokenizer import Tokenizer


class AutoencoderTokenizer(Tokenizer):
    """Reconstruction loss plus the quantizer's terms.

    Logs `train/loss` and its terms; in validation the same terms, `validation/psnr` (decibels, mean over images, on
    uint8 pixels), `validation/codebook_usage` (share of the K ids that occur) and `validation/perplexity` (exp of the
    entropy of the ids in nats, between 1 and K).

    Args:
        network: encoder and decoder.
        quantizer: of the network's latent width.
        reconstruction_loss: mean absolute (`"l1"`) or mean squared (`"l2"`) error of pixels in [-1, 1].
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
    """

    def __init__(
        self,
        network: Autoencoder,
        quantizer: Quantizer,
        reconstruction_loss: Literal["l1", "l2"],
        optimizer: OptimizerCallable | None,
        scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.quantizer = quantizer
        self.vocab_size = quantizer.vocab_size
        self.reconstruction_loss = F.l1_loss if reconstruction_loss == "l1" else F.mse_loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.codebook_usage = CodebookUsage(quantizer.vocab_size)
        self.psnr = MeanMetric()

    def token_shape(self, image_size: int) -> tuple[int, ...]:
        return self.network.grid(image_size)

    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer(self.network.encode(images).movedim(1, -1)).tokens

    def embed(self, tokens: Tensor) -> Tensor:
        self.check_tokens(tokens)
        return self.quantizer.lookup(tokens).movedim(-1, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.network.decode(self.embed(tokens)).float().clamp(-1, 1)

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """Of images `(B, C, H, W)`: the loss, its named terms, reconstructions, and ids `(B, *token_shape)`."""
        quantized = self.quantizer(self.network.encode(images).movedim(1, -1))
        reconstructions = self.network.decode(quantized.codes.movedim(-1, 1)).float()
        terms = {"reconstruction": self.reconstruction_loss(reconstructions, images), **quantized.losses}
        return torch.stack(list(terms.values())).sum(), terms, reconstructions, quantized.tokens

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, terms, _, _ = self.loss(batch["image"])
        self._log_terms("train", loss, terms, len(batch["image"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = batch["image"]
        loss, terms, reconstructions, tokens = self.loss(images)
        self._log_terms("validation", loss, terms, len(images))
        pixels = to_uint8(torch.stack((reconstructions, images))).float()
        psnr = peak_signal_noise_ratio(pixels[0], pixels[1], data_range=255.0, dim=(1, 2, 3), reduction="none")
        self.psnr.update(psnr)
        self.codebook_usage.update(tokens)
        self.log("validation/psnr", self.psnr)

    def on_validation_epoch_end(self) -> None:
        usage, perplexity = self.codebook_usage.compute()
        self.codebook_usage.reset()
        self.log_dict({"validation/codebook_usage": usage, "validation/perplexity": perplexity}, sync_dist=True)

    def _log_terms(self, stage: str, loss: Tensor, terms: dict[str, Tensor], batch_size: int) -> None:
        named = {f"{stage}/loss": loss, **{f"{stage}/{name}": term for name, term in terms.items()}}
        self.log_dict(named, sync_dist=True, batch_size=batch_size)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The ids `(B, *token_shape)` of a batch of images."""
        return self.encode(batch["image"])

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer, self.scheduler)
