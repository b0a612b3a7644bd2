"""VQGAN (Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021)."""

from collections.abc import Callable
from typing import Any

from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import Quantizer


class VQGAN(AutoencoderTokenizer):
    """An autoencoder around any quantizer, trained with perceptual and adversarial losses.

    Args:
        network: called with the quantizer's `dim` and `latent_dim`.
        quantizer: the paper's is a `VectorQuantizer`.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.
    """

    def __init__(self, network: Callable[[int, int], Autoencoder], quantizer: Quantizer, **training: Any) -> None:
        super().__init__(network, quantizer, **training)
