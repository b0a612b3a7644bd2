"""An image autoencoder and its training, whatever its bottleneck; and the tokenizer whose bottleneck is a quantizer.

    images -> network.encode -> latents -> bottleneck -> codes -> network.decode -> outputs -> to_images -> images

`ImageAutoencoder` says what an autoencoder is (`reconstruct`, `loss`, `to_images`) and, apart from that, how Lightning
trains it: one loss, one optimizer, one backward pass, also with a discriminator (`losses/adversarial.py`).
`AutoencoderTokenizer` puts a `Quantizer` in the middle. `VQVAE` and its kin, `DVAE` and `TiTok` are tokenizers of this
kind; `KLVAE` has a bottleneck of its own.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from einops import rearrange
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torchmetrics import Metric

from discrete_lit.accumulation import AccumulatedMean, Accumulation, check_accumulation, micro_batches_of
from discrete_lit.core.distributed import logged_batch_size, means_over_ranks
from discrete_lit.core.images import ImageSize, check_channels, frames_of, to_uint8
from discrete_lit.core.lightning_internals import accumulates_gradients
from discrete_lit.core.modules import accumulate_statistics, at_least_float32, end_statistics_step, in_evaluation
from discrete_lit.fsdp2 import keep_written, shard_steps, whole_weights
from discrete_lit.metrics.binned_mean import Mean
from discrete_lit.metrics.codebook_usage import MOST_COUNTED, CodebookUsage
from discrete_lit.metrics.reconstruction import pixel_fidelity
from discrete_lit.metrics.video import temporal_difference_error
from discrete_lit.optimization import WeightDecayRule, configure_apart, configure_optimizers, evaluation_stage
from discrete_lit.tokenizers.losses import AdversarialLoss, Objective, PerceptualLoss, PixelLoss
from discrete_lit.tokenizers.losses.objective import LOGIT_LAPLACE_MARGIN, ObjectiveTerms, mean_and_log_scale
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.networks.network import LayerInitialization, initialise_layers
from discrete_lit.tokenizers.quantizers import Quantizer
from discrete_lit.tokenizers.quantizers.quantizer import Component
from discrete_lit.tokenizers.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Reconstruction:
    """A batch of images after its way through an autoencoder, and the bottleneck's losses on it."""

    outputs: Tensor
    """`(B, C', H, W)` float32 or float64, as the decoder gives them; `to_images` makes images of them."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """The bottleneck's own scalar terms, weighted."""
    tokens: Tensor | None = None
    """`(B, *token_shape)` int64, of a discrete bottleneck."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that are worth a curve and no part of the loss."""
    latents: Tensor | None = None
    """`(B, *grid, D)`, those that were decoded, of a continuous bottleneck."""


class ImageAutoencoder(LightningModule):
    """Train a network to give its images back.

    Autoencoder and discriminator are trained by one loss and one optimizer, so a batch is one step, and accumulation,
    schedulers and precision are the Trainer's. Gradient clipping by norm acts on each of the two alone. Frozen networks
    of the losses are read when training starts, and are in no checkpoint.

    Logs `train/loss` and its terms, each with its weight; of a discriminator also the generator's weight and the mean
    logits of both kinds of images; in validation the same terms, `validation/psnr` (decibels) and `validation/ssim`,
    means over the images on uint8 pixels (`discrete_lit.metrics.reconstruction.pixel_fidelity`; no SSIM of images below
    6 pixels); in a test the same under `test/`.

    Args:
        network: encoder and decoder.
        reconstruction_loss: mean absolute (`"l1"`) or mean squared (`"l2"`) error of pixels in [-1, 1], or
            `"logit_laplace"`; or a weight of each of several, as in `{l1: 0.2, l2: 1.0}`.
        perceptual_loss: between features of a frozen network.
        adversarial_loss: with a discriminator, when training.
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
        weight_decay_rule: which parameters the optimizer's weight decay acts on, see
            `discrete_lit.optimization.decayed_parameters`.
        initialization: first weights of the layers of network and quantizer, see `networks.initialise_layers`; None
            leaves what these begin with. Codes are `codebook_init`'s.
        accumulation: of micro-batches (`trainer.accumulate_grad_batches`). `"exact"`: a step is that of one batch of
            all their samples, and what cannot be is refused: batch norms, adaptive weights, batch entropies, LeCam, a
            balancer, a codebook that moves between residual depths. `"by_micro_batch"` takes these of each micro-batch
            by itself, as published code does.
    """

    modality: Literal["image", "audio", "video"]
    makes_images: bool

    def __init__(
        self,
        network: Autoencoder,
        *,
        reconstruction_loss: PixelLoss | dict[PixelLoss, float] = "l2",
        perceptual_loss: PerceptualLoss | None = None,
        adversarial_loss: AdversarialLoss | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        weight_decay_rule: WeightDecayRule = "linear",
        initialization: LayerInitialization | None = None,
        accumulation: Accumulation = "exact",
    ) -> None:
        super().__init__()
        initialise_layers(network, initialization)
        self.network = network
        if network.modality != "image":  # otherwise the class says it
            self.modality = network.modality
        self.makes_images = self.modality == "image"
        self.initialization: LayerInitialization | None = initialization
        self.objective = Objective(
            reconstruction_loss, perceptual_loss=perceptual_loss, adversarial_loss=adversarial_loss
        )
        losses = reconstruction_loss if isinstance(reconstruction_loss, dict) else (reconstruction_loss,)
        self.outputs_are_logit_laplace = "logit_laplace" in losses
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.weight_decay_rule: WeightDecayRule = weight_decay_rule
        self.accumulation: Accumulation = accumulation
        self.accumulated = AccumulatedMean()
        self.micro_batches = 1
        self.psnr = Mean()
        self.ssim = Mean()
        self.temporal_difference = Mean()

    # What an autoencoder is.

    @property
    def image_channels(self) -> int:
        """C of the images."""
        return self.network.image_channels

    def latents(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to the encoder's latents, channels last: `(B, *grid, latent_dim)`.

        Raises:
            ValueError: a size or a number of channels that the network does not take.
        """
        check_channels(images, self.image_channels, f"the network of this {type(self).__name__}")
        return rearrange(self.network.encode(images.to(self.network.dtype)), "b d ... -> b ... d")

    def outputs(self, codes: Tensor) -> Tensor:
        """Codes `(B, *grid, D)` to the decoder's outputs `(B, C', H, W)`, of which `to_images` makes images.

        They are float32, or float64 where the network is.
        """
        return at_least_float32(self.network.decode(rearrange(codes, "b ... d -> b d ...").to(self.network.dtype)))

    def to_images(self, outputs: Tensor) -> Tensor:
        """The images `(B, C, H, W)` in [-1, 1] that a decoder's outputs `(B, C', H, W)` stand for.

        Outputs are pixels, to be clamped, unless the network learned to give the parameters of a distribution.
        """
        return logit_laplace_images(outputs) if self.outputs_are_logit_laplace else outputs.clamp(-1, 1)

    @abstractmethod
    def reconstruct(self, images: Tensor, *, step: int | None = None, index: Tensor | None = None) -> Reconstruction:
        """Pass images through the bottleneck and back, with the bottleneck's losses.

        Args:
            images: `(B, C, H, W)` in [-1, 1].
            step: of the optimizer, in training: what is annealed follows it. None: as at the end of training.
            index: `(B,)` int64, each image's number in the run, to which its noise belongs. None: nobody knows.
        """

    def loss(
        self, images: Tensor, *, step: int | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Reconstruction]:
        """The loss of images, its named terms, each with its weight, and their reconstruction.

        Args:
            images: `(B, C, H, W)` in [-1, 1].
            step: of the optimizer, in training; without it there are no adversarial terms.
            index: `(B,)` int64, each image's number in the run, as for `reconstruct`.
        """
        made = self.reconstruct(images, step=step, index=index)
        compared = self.objective(
            made.outputs, images.to(made.outputs.dtype), last_layer=self.network.last_layer, step=step, index=index
        )
        made.figures |= compared.figures
        made.losses |= self.latent_losses(made, compared, images, step=step)
        terms = {**compared.terms, **made.losses}
        return torch.stack([compared.loss, *made.losses.values()]).sum(), terms, made

    def latent_losses(
        self, made: Reconstruction, compared: ObjectiveTerms, images: Tensor, *, step: int | None
    ) -> dict[str, Tensor]:
        """Scalar terms of the latents, weighted, that depend on the loss of the outputs: none by default.

        Args:
            made: the reconstruction of the images, with its graph.
            compared: the loss of its outputs, with their graph.
            images: `(B, C, H, W)` in [-1, 1].
            step: of the optimizer, in training.
        """
        return {}

    def coded_of(self, batch: dict[str, Any]) -> Tensor:
        """The images `(B, C, H, W)`, or clips, of a batch; where clips are coded, images are taken as well.

        Raises:
            ValueError: the batch holds neither.
        """
        for name in (self.modality, "image"):
            if name in batch and (name == self.modality or self.modality == "video"):
                return batch[name]
        raise ValueError(
            f'a batch holds {", ".join(map(str, batch))}: this {type(self).__name__} codes "{self.modality}"'
        )

    # Its training by Lightning.

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_accumulation(self, self.accumulation, [self])
        if stage in ("fit", "validate", "test"):
            self.objective.prepare()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The `"loss"` of a batch of images and, of a discrete bottleneck, their `"tokens"` for callbacks."""
        self.micro_batches = micro_batches_of(self)
        accumulate_statistics(self, self.micro_batches > 1)
        coded = self.coded_of(batch)
        loss, terms, made = self.loss(coded, step=self.global_step, index=batch.get("index"))
        self._log_terms("train", loss, {**terms, **made.figures}, len(coded))
        keep_written(self)
        if self.micro_batches > 1:
            loss = self.accumulated.loss(loss, len(coded))
        return {"loss": loss} if made.tokens is None else {"loss": loss, "tokens": made.tokens}

    def on_after_backward(self) -> None:
        if self.micro_batches > 1 and not accumulates_gradients(self.trainer):
            self.accumulated.end_step(self.parameters(), self.micro_batches)
            with whole_weights(self):
                end_statistics_step(self)
                keep_written(self)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The reconstructions `(B, C, H, W)` in [-1, 1] of a batch of images, for callbacks."""
        images, stage = self.coded_of(batch), evaluation_stage(self)
        loss, terms, made = self.loss(images)
        self._log_terms(stage, loss, terms, len(images))
        reconstructions = self.to_images(made.outputs)
        self.log_dict({f"{stage}/{name}": metric for name, metric in self.fidelity(reconstructions, images).items()})
        self.measure(made)
        return reconstructions

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Measure what validation does, and log it under `test/`."""
        return self.validation_step(batch, batch_idx)

    def fidelity(self, reconstructions: Tensor, images: Tensor) -> dict[str, Metric]:
        """Measure how near reconstructions come to images, both in [-1, 1]: the metrics, updated, by their names."""
        pair = to_uint8(reconstructions), to_uint8(images)
        psnr, ssim = pixel_fidelity(*map(frames_of, pair))
        self.psnr.update(psnr)
        measured: dict[str, Metric] = {"psnr": self.psnr}
        if ssim is not None:
            self.ssim.update(ssim)
            measured["ssim"] = self.ssim
        if images.ndim == 5 and images.shape[2] > 1:
            self.temporal_difference.update(temporal_difference_error(*pair))
            measured["temporal_difference"] = self.temporal_difference
        return measured

    def measure(self, made: Reconstruction) -> None:
        """Measure of a validation batch what a kind of bottleneck adds to its reconstruction: nothing by default."""

    def _log_terms(self, stage: str, loss: Tensor, terms: dict[str, Tensor], batch_size: int) -> None:
        named = {f"{stage}/loss": loss, **{f"{stage}/{name}": term for name, term in terms.items()}}
        if stage == "train":
            self.log_dict(means_over_ranks(named), batch_size=batch_size)
        else:
            self.log_dict(named, sync_dist=True, batch_size=logged_batch_size(batch_size))

    def configure_model(self) -> None:
        """Shard the weights over the data-parallel ranks under `ModelParallelStrategy` (FSDP2)."""
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            shard_steps(self, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        adversarial = self.objective.adversarial
        ratios = [] if adversarial is None else [(adversarial.discriminator, adversarial.learning_rate_factor)]
        configured = configure_optimizers(
            self,
            self.optimizer,
            self.scheduler,
            learning_rate_ratios=ratios,
            hidden_layers=self.network.hidden_layers(),
            weight_decay_rule=self.weight_decay_rule,
        )
        if adversarial is None:
            return configured
        return configure_apart(
            configured,
            adversarial.parameters_to_train(),
            weight_decay=adversarial.weight_decay,
            scheduler=adversarial.scheduler,
            first_step=adversarial.start_step - adversarial.lead_steps,
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        adversarial = self.objective.adversarial
        if adversarial is None or adversarial.idle_steps == "counted":
            return
        if not adversarial.trains(self.global_step):
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


def logit_laplace_images(outputs: Tensor) -> Tensor:
    """The images `(B, C, H, W)` in [-1, 1] that outputs `(B, 2C, H, W)` stand for: `phi^-1(sigmoid(mu))`, clamped.

    phi keeps pixels away from 0 and 1 in `logit_laplace_loss`, by which such outputs are trained.
    """
    mean, _ = mean_and_log_scale(outputs)
    pixels = (torch.sigmoid(mean) - LOGIT_LAPLACE_MARGIN) / (1 - 2 * LOGIT_LAPLACE_MARGIN)
    return pixels.clamp(0, 1) * 2 - 1


# The name of all ids together among those of their components.
_WHOLE = "all"


class AutoencoderTokenizer(ImageAutoencoder, Tokenizer):
    """Tokenize images by an autoencoder around a quantizer, trained by its objective and the quantizer's terms.

    In validation it also logs `validation/codebook_usage` (fraction of the K ids that occur) and
    `validation/perplexity` (exp of the entropy of the ids in nats, between 1 and K), and both again, as
    `validation/codebook_usage/<component>`, of each component of the ids that the quantizer names: a codebook of
    several, a scale, a bit. Above K = 2^24 the components alone.

    Args:
        network: called with the quantizer's `dim` and `latent_dim`.
        quantizer: from latents to ids and code vectors.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.
    """

    def __init__(self, network: Callable[[int, int], Autoencoder], quantizer: Quantizer, **training: Any) -> None:
        super().__init__(network(quantizer.dim, quantizer.latent_dim), **training)
        initialise_layers(quantizer, self.initialization)
        self.quantizer = quantizer
        self.vocab_size = quantizer.vocab_size
        self.usage = nn.ModuleDict()

    # What a tokenizer is.

    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        return self.quantizer.token_shape(self.network.grid(image_size))

    @in_evaluation
    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.quantizer.encode(self.latents(images))

    def embed(self, tokens: Tensor) -> Tensor:
        self.check_tokens(tokens)
        return rearrange(self.quantizer.lookup(tokens), "b ... d -> b d ...")

    @in_evaluation
    def decode(self, tokens: Tensor) -> Tensor:
        self.check_tokens(tokens)
        return self.to_images(self.outputs(self.quantizer.lookup(tokens)))

    def components(self, tokens: Tensor) -> dict[str, Component]:
        return self.quantizer.components(tokens)

    def code_tables(self) -> Tensor:
        return self.quantizer.code_tables()

    def coding_state(self) -> dict[str, Tensor]:
        """The weights and buffers of network and quantizer: all but those of the losses."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("objective.")}

    # What an autoencoder is.

    def reconstruct(self, images: Tensor, *, step: int | None = None, index: Tensor | None = None) -> Reconstruction:
        quantized = self.quantizer(self.latents(images))
        return Reconstruction(outputs=self.outputs(quantized.z_q), losses=quantized.losses, tokens=quantized.tokens)

    # Its validation and prediction by Lightning.

    def measure(self, made: Reconstruction) -> None:
        assert made.tokens is not None
        counted = self.components(made.tokens)
        if self.vocab_size <= MOST_COUNTED:
            counted[_WHOLE] = Component(made.tokens, self.vocab_size)
        for name, component in counted.items():
            if name not in self.usage:
                self.usage[name] = CodebookUsage(component.size).to(self.device)
            cast(CodebookUsage, self.usage[name]).update(component.ids)

    def on_validation_epoch_end(self) -> None:
        for name, measured in self.usage.items():
            measured = cast(CodebookUsage, measured)
            usage, perplexity = measured.compute()
            measured.reset()
            suffix = "" if name == _WHOLE else f"/{name}"
            stage = evaluation_stage(self)
            figures = {f"{stage}/codebook_usage{suffix}": usage, f"{stage}/perplexity{suffix}": perplexity}
            self.log_dict(figures, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The ids `(B, *token_shape)` of a batch of images."""
        return self.encode(self.coded_of(batch))
