"""The KL-VAE of latent diffusion (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models").

A variational autoencoder (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014): the encoder gives each latent a
mean and a variance, training decodes a sample of that normal law and keeps it near the standard normal by a small KL
term. Generators of continuous latents work on its latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from discrete_lit.checkpoints import loadable
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.tokenizers.autoencoder import ImageAutoencoder, Reconstruction
from discrete_lit.tokenizers.networks import Autoencoder


@loadable
class KLVAE(ImageAutoencoder):
    """Encode images as normal latents near the standard normal, for generators of continuous latents.

    Not a `Tokenizer`: it has no ids. Training samples latents; validation takes their means.

    Args:
        network: called with `latent_channels` and twice that, for the means and the variances.
        latent_channels: D.
        kl_weight: of the divergence from the standard normal, in nats per image. The reconstruction loss is a mean
            over pixels: LDM, which sums them, has its 1e-6 as 1e-6 / (C H W) here, 5e-12 at 256 pixels.
        scale_factor: what `encode` multiplies latents by and `decode` divides them by, so that those that a generator
            sees have a deviation near 1: 0.2325 for the KL-16 of MAR, 0.18215 for the KL-8 of Stable Diffusion.
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
        seed: int = 0,
        **training: Any,
    ) -> None:
        if not scale_factor > 0:
            raise ValueError(f"scale_factor must be above 0, got {scale_factor}")
        bottleneck = GaussianBottleneck(latent_channels, kl_weight)
        super().__init__(network(bottleneck.dim, bottleneck.latent_dim), **training)
        self.bottleneck = bottleneck
        self.scale_factor = scale_factor
        self.seed = seed

    def latent_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        """`(D, *grid)` of images of this size: the side of a square, or (H, W).

        Raises:
            ValueError: a size that the network cannot divide.
        """
        return (self.bottleneck.dim, *self.network.grid(image_size))

    def posterior(self, images: Tensor) -> "DiagonalGaussian":
        """The law of the unscaled latents, `(B, *grid, D)`, of images `(B, C, H, W)` in [-1, 1]."""
        return self.bottleneck.posterior(self.latents(images))

    @in_evaluation
    def encode(self, images: Tensor, random: CounterRandom | None = None) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to scaled latents `(B, D, *grid)`, float32, or float64 where the network is.

        Args:
            images: of a size that the network can divide.
            random: the noise of each image's latents; None takes the means.

        Raises:
            ValueError: a side that the network cannot divide.
        """
        posterior = self.posterior(images)
        latents = posterior.mode() if random is None else posterior.sample(random)
        return rearrange(latents, "b ... d -> b d ...") * self.scale_factor

    @in_evaluation
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents `(B, D, *grid)` to images `(B, C, H, W)` in [-1, 1], float32, or float64 of such a network."""
        return self.to_images(self.outputs(rearrange(latents / self.scale_factor, "b d ... -> b ... d")))

    def reconstruct(self, images: Tensor, *, step: int | None = None, index: Tensor | None = None) -> Reconstruction:
        random = None if index is None else CounterRandom(self.seed, index)
        latents, losses = self.bottleneck(self.latents(images), random)
        return Reconstruction(outputs=self.outputs(latents), losses=losses)


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
