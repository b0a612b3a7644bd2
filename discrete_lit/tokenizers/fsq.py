"""FSQ (Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", ICLR 2024)."""

from collections.abc import Callable
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import FiniteScalarQuantizer


class FSQ(AutoencoderTokenizer):
    """Rounding instead of a codebook: no codebook loss, no collapse.

    Args:
        network: called with the number of channels, the width of a code.
        levels: levels of each channel; K is their product. The paper's table 1 recommends `[8, 6, 5]` for K near 2^8,
            `[8, 5, 5, 5]` for 2^10, `[7, 5, 5, 5, 5]` for 2^12, `[8, 8, 8, 6, 5]` for 2^14,
            `[8, 8, 8, 5, 5, 5]` for 2^16.
        reconstruction_loss: `"l1"` or `"l2"` on pixels in [-1, 1].
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
    """

    def __init__(
        self,
        network: Callable[[int], Autoencoder],
        levels: list[int],
        reconstruction_loss: Literal["l1", "l2"] = "l2",
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        quantizer = FiniteScalarQuantizer(levels)
        super().__init__(network(len(levels)), quantizer, reconstruction_loss, optimizer, scheduler)
