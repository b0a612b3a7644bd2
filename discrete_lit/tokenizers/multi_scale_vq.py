"""The tokenizer of VAR (Tian et al., "Visual Autoregressive Modeling", NeurIPS 2024)."""

from collections.abc import Callable
from typing import Any, Literal

from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import MultiScaleResidualQuantizer


class MultiScaleVQ(AutoencoderTokenizer):
    """An image as one code, then 2 x 2, up to the latent grid: each scale codes what those before left.

    Args:
        network: called with `code_dim`, twice.
        codebook_size: K; 4096 in VAR.
        code_dim: D, the width of a code; 32 in VAR.
        scales: sides of the scales in growing order, the last that of the latent grid; those of VAR at 256 pixels by
            default.
        phi_kernels: convolutions behind the interpolation, shared by neighbouring scales.
        phi_ratio: share of the convolution in its output.
        codebook_update: train codes (`"gradient"`) or move them by a running mean (`"ema"`).
        commitment_weight: beta.
        decay: of the running mean.
        codebook_init: first codes at random, normal of deviation D^-1/2 or uniform in [-1 / K, 1 / K], or from the
            first training batch, some of its latents (`"data"`) or the centres of their clusters (`"kmeans"`).
        revive_below: codes with fewer latents a batch than this, in the running mean, are replaced by latents; None
            keeps dead codes.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.
    """

    quantizer: MultiScaleResidualQuantizer

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        codebook_size: int = 4096,
        code_dim: int = 32,
        scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        phi_kernels: int = 4,
        phi_ratio: float = 0.5,
        codebook_update: Literal["ema", "gradient"] = "gradient",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: Literal["data", "kmeans", "uniform", "normal"] = "normal",
        revive_below: float | None = None,
        **training: Any,
    ) -> None:
        quantizer = MultiScaleResidualQuantizer(
            codebook_size,
            code_dim,
            scales,
            phi_kernels,
            phi_ratio,
            codebook_update,
            commitment_weight,
            decay,
            codebook_init,
            revive_below,
        )
        super().__init__(network, quantizer, **training)
