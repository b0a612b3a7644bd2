"""VQ-VAE (van den Oord et al., "Neural Discrete Representation Learning", 2017)."""

from collections.abc import Callable
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import VectorQuantizer


class VQVAE(AutoencoderTokenizer):
    """A learned codebook inside an autoencoder.

    Args:
        network: called with `code_dim`.
        codebook_size: K.
        code_dim: D, the width of a code.
        codebook_update: move codes by a running mean (`"ema"`) or train them (`"gradient"`).
        commitment_weight: beta of eq. 3.
        decay: of the running mean.
        codebook_init: first codes from the first training batch (`"data"`), or uniform in [-1 / K, 1 / K].
        reconstruction_loss: `"l1"` or `"l2"` on pixels in [-1, 1].
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
    """

    def __init__(
        self,
        network: Callable[[int], Autoencoder],
        codebook_size: int,
        code_dim: int,
        codebook_update: Literal["ema", "gradient"] = "ema",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: Literal["data", "uniform"] = "data",
        reconstruction_loss: Literal["l1", "l2"] = "l2",
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        quantizer = VectorQuantizer(codebook_size, code_dim, codebook_update, commitment_weight, decay, codebook_init)
        super().__init__(network(code_dim), quantizer, reconstruction_loss, optimizer, scheduler)
