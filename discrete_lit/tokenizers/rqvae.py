"""RQ-VAE (Lee et al., "Autoregressive Image Generation using Residual Quantization", CVPR 2022)."""

from collections.abc import Callable
from typing import Any, Literal

from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import ResidualQuantizer


class RQVAE(AutoencoderTokenizer):
    """Several codes for each place, each of what those before left; the ids have their depth as last dimension.

    Args:
        network: called with `code_dim`, twice.
        codebook_size: K.
        code_dim: D, the width of a code.
        depth: codes for each place; 4 in the paper.
        shared_codebook: one codebook for all depths, or one each.
        codebook_update: move codes by a running mean (`"ema"`) or train them (`"gradient"`).
        commitment_weight: beta.
        decay: of the running mean.
        codebook_init: first codes from the first training batch, some of its latents (`"data"`) or the centres of
            their clusters (`"kmeans"`), or random: uniform in [-1 / K, 1 / K], normal of deviation D^-1/2.
        revive_below: codes with fewer latents a batch than this, in the running mean, are replaced by latents; None
            keeps dead codes.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.
    """

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        codebook_size: int,
        code_dim: int,
        depth: int = 4,
        shared_codebook: bool = True,
        codebook_update: Literal["ema", "gradient"] = "ema",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: Literal["data", "kmeans", "uniform", "normal"] = "data",
        revive_below: float | None = 1.0,
        **training: Any,
    ) -> None:
        quantizer = ResidualQuantizer(
            codebook_size,
            code_dim,
            depth,
            shared_codebook,
            codebook_update,
            commitment_weight,
            decay,
            codebook_init,
            revive_below,
        )
        super().__init__(network, quantizer, **training)
