"""The KL bottleneck of continuous latents (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from discrete_lit.processes.random import CounterRandom, Purpose


@dataclass
class DiagonalGaussian:
    """Independent normal latents, `(B, *grid, D)` float32."""

    mean: Tensor
    logvar: Tensor
    """Logarithm of the variance, in [-30, 20]."""

    def mode(self) -> Tensor:
        """The most likely latents `(B, *grid, D)`: the mean."""
        return self.mean

    def sample(self, random: CounterRandom | None = None) -> Tensor:
        """Latents `(B, *grid, D)` with the gradient of the mean and the variance.

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
    """From moments `(B, *grid, 2 D)`, means and then logarithms of variances, to latents `(B, *grid, D)`.

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
        """The law of the latents, in float32, of moments `(B, *grid, 2 D)`."""
        mean, logvar = moments.float().chunk(2, dim=-1)
        return DiagonalGaussian(mean, logvar.clamp(-30, 20))
