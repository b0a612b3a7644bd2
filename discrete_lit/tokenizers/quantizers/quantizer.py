"""What a quantizer is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Quantized:
    """What a quantizer made of latents `(B, ..., D)`."""

    codes: Tensor
    """`(B, ..., D)` float32 code vectors; gradients pass straight through to the latents."""
    tokens: Tensor
    """`(B, ...)` int64 ids in [0, K)."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalar terms by their paper's name, each already multiplied by its weight; their sum joins the loss."""


class Quantizer(nn.Module, ABC):
    """Maps the last dimension of latents with any grid, `(B, ..., D)`, to one id each. Works in float32 or better."""

    vocab_size: int
    """K, the number of ids."""
    dim: int
    """D, the width of a latent and of a code vector."""

    @abstractmethod
    def forward(self, latents: Tensor) -> Quantized:
        """Quantise latents `(B, ..., D)`; in training mode this may update statistics."""

    @abstractmethod
    def lookup(self, tokens: Tensor) -> Tensor:
        """Ids `(B, ...)` to float32 code vectors `(B, ..., D)`, the values that `forward` gives."""
