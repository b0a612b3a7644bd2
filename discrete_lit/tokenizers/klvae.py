"""KL-VAE of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from discrete_lit.processes.random import CounterRandom
from discrete_lit.tokenizers.image_autoencoder import ImageAutoencoder, Reconstruction
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import DiagonalGaussian, GaussianBottleneck


class KLVAE(ImageAutoencoder):
    """An autoencoder whose latents are normal, near the standard normal: what models of continuous latents work on.

    Not a `Tokenizer`: it has no ids. Training samples latents; validation takes their means.

    Args:
        network: called with `latent_channels` and twice that, for the means and the variances.
        latent_channels: D.
        kl_weight: of the divergence from the standard normal, in nats per image. The reconstruction loss is a mean
            over pixels: LDM, which sums them, has its 1e-6 as 1e-6 / (C H W) here, 5e-12 at 256 pixels.
        scale_factor: what `encode` multiplies latents by and `decode` divides them by, so that those that a generator
            sees have a deviation near 1: 0.2325 for the KL-16 of MAR, 0.18215 for the KL-8 of Stable Diffusion.
        seed: of the latents' noise in training, which belongs to (seed, sample) where batches give the sample's place
            in the run as `"index"`; without it, torch's generator draws.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
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
        self._random: CounterRandom | None = None

    def latent_shape(self, image_size: int) -> tuple[int, ...]:
        """`(D, *grid)` of a square image.

        Raises:
            ValueError: a size that the network cannot divide.
        """
        return (self.bottleneck.dim, *self.network.grid(image_size))

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """The law of the unscaled latents, `(B, *grid, D)`, of images `(B, C, H, W)` in [-1, 1]."""
        return self.bottleneck.posterior(self.network.encode(images).movedim(1, -1))

    def encode(self, images: Tensor, random: CounterRandom | None = None) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to scaled latents `(B, D, *grid)` float32.

        Args:
            images: of a size that the network can divide.
            random: the noise of each image's latents; None takes the means.

        Raises:
            ValueError: a side that the network cannot divide.
        """
        posterior = self.posterior(images)
        latents = posterior.mode() if random is None else posterior.sample(random)
        return latents.movedim(-1, 1) * self.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents `(B, D, *grid)` to images `(B, C, H, W)` in [-1, 1]."""
        return self.objective.images(self.network.decode(latents / self.scale_factor).float())

    def reconstruct(self, images: Tensor) -> Reconstruction:
        latents, losses = self.bottleneck(self.network.encode(images).movedim(1, -1), self._random)
        return Reconstruction(self.network.decode(latents.movedim(-1, 1)).float(), losses)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self._random = CounterRandom(self.seed, batch["index"]) if "index" in batch else None
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self._random = None
