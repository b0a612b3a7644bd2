"""What a quantizer is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn


@dataclass
class Quantized:
    """What a quantizer made of latents `(B, *grid, latent_dim)`."""

    codes: Tensor
    """`(B, *grid, D)` float32 code vectors, with the gradient that the quantizer gives its latents."""
    tokens: Tensor
    """`(B, *token_shape(grid))` int64 ids in [0, K)."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalar terms by their paper's name, each already multiplied by its weight; their sum joins the loss."""


class Component(NamedTuple):
    """A component of composite ids, with a vocabulary of its own: a codebook of several, a scale, a bit."""

    ids: Tensor
    """int64 of any shape, in [0, size)."""
    size: int


class Quantizer(nn.Module, ABC):
    """Maps the last dimension of latents on any grid, `(B, *grid, latent_dim)`, to ids and code vectors.

    Works in float32 or better, whatever the autocast.
    """

    vocab_size: int
    """K, the number of ids."""
    dim: int
    """D, the width of a code vector."""

    @property
    def latent_dim(self) -> int:
        """Width of the latents that it takes; D unless said otherwise."""
        return self.dim

    def token_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the ids of one latent grid; the grid itself unless a place has several ids."""
        return grid

    @abstractmethod
    def forward(self, latents: Tensor) -> Quantized:
        """Quantise latents `(B, *grid, latent_dim)` with the losses; in training mode this may update statistics."""

    @abstractmethod
    def encode(self, latents: Tensor) -> Tensor:
        """The ids `(B, *token_shape(grid))` of latents: deterministic, without gradient or side effect."""

    @abstractmethod
    def lookup(self, tokens: Tensor) -> Tensor:
        """Ids `(B, *token_shape(grid))` to float32 code vectors `(B, *grid, D)`, the values that `forward` gives."""

    def components(self, tokens: Tensor) -> dict[str, Component]:
        """Name the components of ids `(B, *token_shape(grid))`, whose usage is reported too; none by default."""
        return {}
