"""LFQ (Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", ICLR 2024)."""

from collections.abc import Callable
from typing import Any, Literal

from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import LookupFreeQuantizer


class LFQ(AutoencoderTokenizer):
    """Signs instead of a codebook: K = 2^bits ids, kept in use by entropy terms.

    Args:
        network: called with `bits`, twice.
        bits: channels of the latents; 10 to 18 in MaskBit, 18 in Open-MAGVIT2.
        commitment_weight: of the commitment term.
        entropy_weight: of the entropy terms.
        entropy_temperature: of the affinities to codes.
        batch_entropy_weight: of the batch entropy against the per-sample one.
        entropy_groups: parts of the bits for the batch entropy; 1 is exact.
        bit_order: what the first channel is in the id.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.
    """

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        bits: int,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        batch_entropy_weight: float = 1.0,
        entropy_groups: int = 1,
        bit_order: Literal["first_least_significant", "first_most_significant"] = "first_least_significant",
        **training: Any,
    ) -> None:
        quantizer = LookupFreeQuantizer(
            bits,
            commitment_weight,
            entropy_weight,
            entropy_temperature,
            batch_entropy_weight,
            entropy_groups,
            bit_order=bit_order,
        )
        super().__init__(network, quantizer, **training)
