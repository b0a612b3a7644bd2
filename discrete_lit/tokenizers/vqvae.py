"""VQ-VAE (van den Oord et al., "Neural Discrete Representation Learning", 2017)."""

from collections.abc import Callable
from typing import Any, Literal

from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import VectorQuantizer


class VQVAE(AutoencoderTokenizer):
    """A learned codebook inside an autoencoder.

    Args:
        network: called with `code_dim`, twice.
        codebook_size: K.
        code_dim: D, the width of a code.
        codebook_update: move codes by a running mean (`"ema"`) or train them (`"gradient"`).
        commitment_weight: beta of eq. 3.
        decay: of the running mean.
        codebook_init: first codes from the first training batch, some of its latents (`"data"`) or the centres of
            their clusters (`"kmeans"`), or random: uniform in [-1 / K, 1 / K], normal of deviation D^-1/2.
        normalize: latents and codes on the unit sphere.
        gradient: what the encoder receives: straight through, or the rotation trick.
        revive_below: codes with fewer latents a batch than this, in the running mean, are replaced by latents; None
            keeps dead codes.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.
    """

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        codebook_size: int,
        code_dim: int,
        codebook_update: Literal["ema", "gradient"] = "ema",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: Literal["data", "kmeans", "uniform", "normal"] = "data",
        normalize: bool = False,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        revive_below: float | None = None,
        **training: Any,
    ) -> None:
        quantizer = VectorQuantizer(
            codebook_size,
            code_dim,
            codebook_update,
            commitment_weight,
            decay,
            codebook_init,
            normalize,
            gradient=gradient,
            revive_below=revive_below,
        )
        super().__init__(network, quantizer, **training)
