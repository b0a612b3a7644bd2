"""FSQ (Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", ICLR 2024)."""

from collections.abc import Callable
from typing import Any, Literal

from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import FiniteScalarQuantizer


class FSQ(AutoencoderTokenizer):
    """Rounding instead of a codebook: no codebook loss, no collapse.

    Args:
        network: called with the number of channels, the width of a code, twice.
        levels: levels of each channel; K is their product. The paper's table 1 recommends `[8, 6, 5]` for K near 2^8,
            `[8, 5, 5, 5]` for 2^10, `[7, 5, 5, 5, 5]` for 2^12, `[8, 8, 8, 6, 5]` for 2^14,
            `[8, 8, 8, 5, 5, 5]` for 2^16.
        formula: the paper's, or that of vector-quantize-pytorch and Cosmos (`"atanh"`).
        codebook_size: K, to be checked against the levels.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.
    """

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        levels: list[int],
        formula: Literal["paper", "atanh"] = "paper",
        codebook_size: int | None = None,
        **training: Any,
    ) -> None:
        super().__init__(network, FiniteScalarQuantizer(levels, formula, codebook_size), **training)
