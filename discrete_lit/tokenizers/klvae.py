"""The KL-VAE of latent diffusion (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models").

A variational autoencoder (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014): the encoder gives each latent a
mean and a variance, training decodes a sample of that normal law and keeps it near the standard normal by a small KL
term. Generators of continuous latents work on its latents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.tokenizers.autoencoder import ImageAutoencoder, Reconstruction
from discrete_lit.tokenizers.losses import AlignmentLoss
from discrete_lit.tokenizers.losses.adversarial import take_gradients
from discrete_lit.tokenizers.losses.alignment import gradient_ratio
from discrete_lit.tokenizers.losses.objective import ObjectiveTerms
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer


class KLVAE(ImageAutoencoder, ContinuousTokenizer):
    """Encode images as normal latents near the standard normal, for generators of continuous latents.

    Not a `Tokenizer`: it has no ids. Training samples latents; validation takes their means.

    Scaled latents are `(z - latent_mean) / latent_std * scale_factor`, in the settings' names, of the network's z.

    Args:
        network: called with `latent_channels` and twice that, for the means and the variances.
        latent_channels: D.
        kl_weight: of the divergence from the standard normal, in nats per image. The reconstruction loss is a mean
            over pixels: LDM, which sums them, has its 1e-6 as 1e-6 / (C H W) here, 5e-12 at 256 pixels.
        scale_factor: what `encode` multiplies latents by and `decode` divides them by, so that those that a generator
            sees have a deviation near 1: 0.2325 for the KL-16 of MAR, 0.18215 for the KL-8 of Stable Diffusion.
        latent_mean: of each of the D channels over a data set, which `encode` subtracts first; None subtracts nothing.
        latent_std: of each channel, which `encode` then divides by, as generators on VA-VAE's latents do.
        alignment_loss: of the latents with the features of a frozen network, in training (VA-VAE); called with D.
        seed: of the latents' noise in training, which belongs to (seed, sample) where batches give the sample's number
            in the run as `"index"`; without it, torch's generator draws.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        *,
        latent_channels: int,
        kl_weight: float,
        scale_factor: float = 1.0,
        latent_mean: Sequence[float] | None = None,
        latent_std: Sequence[float] | None = None,
        alignment_loss: Callable[[int], AlignmentLoss] | None = None,
        seed: int = 0,
        **training: Any,
    ) -> None:
        if not 0 < scale_factor < math.inf:
            raise ValueError(f"scale_factor must be above 0 and finite, got {scale_factor}")
        bottleneck = GaussianBottleneck(latent_channels, kl_weight)
        super().__init__(network(bottleneck.dim, bottleneck.latent_dim), **training)
        self.bottleneck = bottleneck
        self.latent_dim = latent_channels
        self.scale_factor = scale_factor
        # Numbers, not buffers: they are settings, which every checkpoint holds, and half precision must not round them.
        self.latent_mean = _per_channel("latent_mean", latent_mean, latent_channels)
        self.latent_std = _per_channel("latent_std", latent_std, latent_channels)
        self.alignment = None if alignment_loss is None else alignment_loss(latent_channels)
        if self.alignment is not None and self.alignment.adaptive:
            _ = self.network.last_encoder_layer  # or it says that it has none
        self.seed = seed

    def latent_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        return (self.latent_dim, *self.network.grid(image_size))

    def posterior(self, images: Tensor) -> "DiagonalGaussian":
        """The law of the unscaled latents, `(B, *grid, D)`, of images `(B, C, H, W)` in [-1, 1]."""
        return self.bottleneck.posterior(self.latents(images))

    @in_evaluation
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.check_images(images)
        posterior = self.posterior(images)
        logvar = rearrange(posterior.logvar, "b ... d -> b d ...") + 2 * math.log(self.scale_factor)
        if self.latent_std is not None:
            logvar = logvar - 2 * self._of_channels(self.latent_std, logvar).log()
        return self.scaled(rearrange(posterior.mean, "b ... d -> b d ...")), logvar

    @in_evaluation
    def encode(self, images: Tensor, random: CounterRandom | None = None) -> Tensor:
        self.check_images(images)
        posterior = self.posterior(images)
        latents = posterior.mode() if random is None else posterior.sample(random)
        return self.scaled(rearrange(latents, "b ... d -> b d ..."))

    @in_evaluation
    def decode(self, latents: Tensor) -> Tensor:
        self.check_latents(latents)
        return self.to_images(self.outputs(rearrange(self.unscaled(latents), "b d ... -> b ... d")))

    def scaled(self, latents: Tensor) -> Tensor:
        """Scale the network's latents `(B, D, *grid)` to those that generators take."""
        if self.latent_mean is not None:
            latents = latents - self._of_channels(self.latent_mean, latents)
        if self.latent_std is not None:
            latents = latents / self._of_channels(self.latent_std, latents)
        return latents * self.scale_factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """Invert `scaled`."""
        latents = latents / self.scale_factor
        if self.latent_std is not None:
            latents = latents * self._of_channels(self.latent_std, latents)
        if self.latent_mean is not None:
            latents = latents + self._of_channels(self.latent_mean, latents)
        return latents

    def _of_channels(self, values: list[float], latents: Tensor) -> Tensor:
        return latents.new_tensor(values).reshape(-1, *[1] * (latents.ndim - 2))

    def coding_state(self) -> dict[str, Tensor]:
        """The weights of the network, and the scale of the latents: all but what the losses have."""
        weights = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        scale = {"scale_factor": self.scale_factor, "latent_mean": self.latent_mean, "latent_std": self.latent_std}
        given = {name: torch.tensor(value, dtype=torch.float64) for name, value in scale.items() if value is not None}
        return weights | given

    def reconstruct(self, images: Tensor, *, step: int | None = None, index: Tensor | None = None) -> Reconstruction:
        random = None if index is None else CounterRandom(self.seed, index)
        latents, losses = self.bottleneck(self.latents(images), random)
        return Reconstruction(outputs=self.outputs(latents), losses=losses, latents=latents)

    def latent_losses(
        self, made: Reconstruction, compared: ObjectiveTerms, images: Tensor, *, step: int | None
    ) -> dict[str, Tensor]:
        """The alignment loss, `alignment`, in training; its weight is the figure `alignment_weight`."""
        if self.alignment is None or step is None:
            return {}
        assert made.latents is not None
        alignment = self.alignment(made.latents, images)
        weight = torch.full_like(alignment.detach(), self.alignment.weight)
        if self.alignment.adaptive:
            gradient = compared.reconstruction_gradient
            if gradient is None:
                reconstruction = torch.stack(list(compared.terms.values())).sum()
                (gradient,) = take_gradients(reconstruction, [made.outputs], retain_graph=True)
            weight = weight * gradient_ratio(
                alignment,
                made.latents,
                outputs=made.outputs,
                reconstruction_gradient=gradient,
                layer=self.network.last_encoder_layer,
            )
        made.figures["alignment_weight"] = weight
        return {"alignment": weight * alignment}

    # Its training by Lightning.

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.alignment is not None:
            self.alignment.prepare()


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> list[float] | None:
    """The numbers of a setting with one for each latent channel.

    Raises:
        ValueError: another count, numbers that are not finite, or a deviation that is not above 0.
    """
    if values is None:
        return None
    found = [float(value) for value in values]
    if len(found) != channels or not all(map(math.isfinite, found)):
        raise ValueError(f"{name} must be {channels} finite numbers, one for each latent channel, got {found}")
    if name == "latent_std" and min(found) <= 0:
        raise ValueError(f"latent_std must be above 0 in every channel, got {found}")
    return found


@dataclass
class DiagonalGaussian:
    """The law of independent normal latents, `(B, *grid, D)` float32 or float64."""

    mean: Tensor
    logvar: Tensor
    """Logarithm of the variance, in [-30, 20]."""

    def mode(self) -> Tensor:
        """The most likely latents `(B, *grid, D)`: the mean."""
        return self.mean

    def sample(self, random: CounterRandom | None = None) -> Tensor:
        """Draw latents `(B, *grid, D)` with the gradient of the mean and the variance.

        Args:
            random: the noise of each sample of the batch; None draws it from torch's generator, which depends on the
                batch and the rank.
        """
        if random is None:
            noise = torch.randn_like(self.mean)
        else:
            noise = random.normal(Purpose.LATENT_NOISE, self.mean[0].numel()).reshape(self.mean.shape)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Divergence from the standard normal, `0.5 sum(mean^2 + var - 1 - log var)`, in nats for each image `(B,)`."""
        divergence = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * divergence.flatten(1).sum(dim=1)


class GaussianBottleneck(nn.Module):
    """Make latents `(B, *grid, D)` of moments `(B, *grid, 2 D)`: means, then logarithms of variances.

    In training latents are sampled; in evaluation they are the means. The loss is `kl`, the batch mean of nats per
    image, times `kl_weight`.

    Args:
        dim: D.
        kl_weight: of the divergence. Pixel losses here are means over pixels: LDM, which sums them, has its 1e-6 as
            1e-6 / (C H W) here, 5e-12 at 256 pixels.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, dim: int, kl_weight: float) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        if kl_weight < 0:
            raise ValueError(f"kl_weight must be >= 0, got {kl_weight}")
        self.dim = dim
        self.latent_dim = 2 * dim
        self.kl_weight = kl_weight

    def forward(self, moments: Tensor, random: CounterRandom | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents `(B, *grid, D)` and the weighted loss of moments `(B, *grid, 2 D)`; `random` as for `sample`."""
        with torch.autocast(moments.device.type, enabled=False):
            posterior = self.posterior(moments)
            latents = posterior.sample(random) if self.training else posterior.mode()
            return latents, {"kl": self.kl_weight * posterior.kl().mean()}

    def posterior(self, moments: Tensor) -> DiagonalGaussian:
        """The law of the latents, in float32 or float64, of moments `(B, *grid, 2 D)`."""
        mean, logvar = at_least_float32(moments).chunk(2, dim=-1)
        return DiagonalGaussian(mean, logvar.clamp(-30, 20))
