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
        codebook_init: first codes from the first training batch (`"data"`), or uniform in [-1 / K, 1 / K].
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
        codebook_init: Literal["data", "uniform"] = "data",
        **training: Any,
    ) -> None:
        quantizer = VectorQuantizer(codebook_size, code_dim, codebook_update, commitment_weight, decay, codebook_init)
        super().__init__(network, quantizer, **training)
