"""DALL-E's dVAE, the discrete VAE (Ramesh et al., "Zero-Shot Text-to-Image Generation", ICML 2021).

A classifier gives each position its id; training passes through a relaxed sample of it (`GumbelQuantizer`), whose
temperature falls while the weight of the KL divergence grows (appendix A.2). Pixels have a logit-Laplace distribution
(appendix A.3, `logit_laplace_loss`).
"""

from collections.abc import Callable
from math import cos, pi
from typing import Any

from torch import Tensor

from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer, Reconstruction
from discrete_lit.tokenizers.losses import PixelLoss
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import GumbelQuantizer


class DVAE(AutoencoderTokenizer):
    """Tokenize images by a classifier, trained through a relaxed sample of the ids that hardens; appendix A.

    In training also logs `train/temperature` and `train/kl_weight`. In validation the divergence has its full weight.

    Args:
        network: called with `code_dim` and `latent_dim`; for the logit-Laplace loss with `out_channels` twice the
            channels of the images.
        codebook_size: K.
        code_dim: D, the width of a code.
        latent_dim: width of the encoder's latents, which the classifier takes; D if None.
        kl_weight: of the divergence from even ids, at the end of its warm-up. The paper's 6.6 weighs sums over an
            image of 256x256x3 pixels and 1024 ids; between means that is 6.6 / 192.
        kl_warmup_steps: optimizer steps over which it grows from 0, by half a cosine.
        final_temperature: of the relaxation, which starts at 1.
        temperature_steps: optimizer steps over which it falls, by half a cosine.
        hard: decode the most likely code, with the relaxed gradient.
        reconstruction_loss: as for `ImageAutoencoder`; the paper's is the logit-Laplace loss.
        training: further settings of `ImageAutoencoder`: the optimizer, the scheduler.

    Raises:
        ValueError: a setting out of its range.
    """

    quantizer: GumbelQuantizer

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        codebook_size: int,
        *,
        code_dim: int,
        latent_dim: int | None = None,
        kl_weight: float = 6.6 / 192,
        kl_warmup_steps: int = 5_000,
        final_temperature: float = 1 / 16,
        temperature_steps: int = 150_000,
        hard: bool = False,
        reconstruction_loss: PixelLoss | dict[PixelLoss, float] = "logit_laplace",
        **training: Any,
    ) -> None:
        if kl_warmup_steps < 0 or temperature_steps < 0:
            raise ValueError(
                f"kl_warmup_steps and temperature_steps must be >= 0, got {kl_warmup_steps} and {temperature_steps}"
            )
        quantizer = GumbelQuantizer(
            codebook_size,
            code_dim,
            latent_dim=latent_dim,
            kl_weight=kl_weight,
            temperature=final_temperature,
            hard=hard,
        )
        super().__init__(network, quantizer, reconstruction_loss=reconstruction_loss, **training)
        self.kl_weight = kl_weight
        self.kl_warmup_steps = kl_warmup_steps
        self.final_temperature = final_temperature
        self.temperature_steps = temperature_steps

    def annealed(self, step: int | None) -> dict[str, float]:
        """The `temperature` and the `kl_weight` of an optimizer step; None: those at the end of training."""
        if step is None:
            return {"temperature": self.final_temperature, "kl_weight": self.kl_weight}
        return {
            "temperature": _half_cosine(1.0, self.final_temperature, step, self.temperature_steps),
            "kl_weight": _half_cosine(0.0, self.kl_weight, step, self.kl_warmup_steps),
        }

    def reconstruct(self, images: Tensor, *, step: int | None = None, index: Tensor | None = None) -> Reconstruction:
        annealed = self.annealed(step)
        quantized = self.quantizer(self.latents(images), **annealed)
        outputs = self.outputs(quantized.z_q)
        figures = {name: outputs.new_full((), value) for name, value in annealed.items()}
        return Reconstruction(outputs=outputs, losses=quantized.losses, tokens=quantized.tokens, figures=figures)


def _half_cosine(start: float, end: float, step: int, steps: int) -> float:
    progress = min(1.0, step / steps) if steps else 1.0
    return end + (start - end) * (1 + cos(pi * progress)) / 2
