"""The contract of a quantizer: latents of any grid to ids and code vectors, and ids back to vectors.

    quantized = quantizer(latents)        # training: z_q with a gradient to the latents, ids, losses
    tokens = quantizer.encode(latents)    # the ids alone
    z_q = quantizer.lookup(tokens)        # and back to the vectors that the decoder takes

The last dimension of the latents is the one that is quantised; what stands before it (a row, a grid of an image, a
volume) makes no difference, except to the multi-scale quantizer, which averages over a grid of two axes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from discrete_lit.core.modules import FullPrecision
from discrete_lit.tokenizers.quantizers.nearest import near_codes

_LARGEST_TABLE = 2**20


@dataclass
class Quantized:
    """Latents `(B, *grid, latent_dim)` after their quantisation."""

    z_q: Tensor
    """`(B, *grid, D)` code vectors in its precision; they hand the latents the gradient that the paper says.
    """
    tokens: Tensor
    """`(B, *token_shape(grid))` int64 ids in [0, K)."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalar terms by their paper's name, each already multiplied by its weight; their sum joins the loss."""


class Component(NamedTuple):
    """A component of composite ids, with a vocabulary of its own: a codebook of several, a scale, a bit."""

    ids: Tensor
    """int64 of any shape, in [0, size)."""
    size: int


class Quantizer(FullPrecision, ABC):
    """Map the last dimension of latents on any grid, `(B, *grid, latent_dim)`, to ids and code vectors.

    Computes in float32, or in float64 where it was put into it, whatever the autocast and the precision of the latents,
    and not in TF32 where that is allowed in float32's place.
    Its codes and statistics stay in float32 in a tokenizer in half precision: distances between near codes, and running
    means that move by a thousandth, would be lost.
    """

    precision: Tensor
    """A number whose dtype is the precision that it computes in."""

    vocab_size: int
    """K, the number of ids."""
    dim: int
    """D, the width of a code vector."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("precision", torch.zeros((), dtype=torch.float32), persistent=False)

    @property
    def latent_dim(self) -> int:
        """Width of the latents that it takes; D unless said otherwise."""
        return self.dim

    def token_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the ids of one latent grid; the grid itself unless a position has several ids."""
        return grid

    @abstractmethod
    def forward(self, latents: Tensor) -> Quantized:
        """Quantise latents `(B, *grid, latent_dim)` and compute the losses.

        In training mode it may also update buffers (running means, a count of steps): each class says which.
        """

    @abstractmethod
    def encode(self, latents: Tensor) -> Tensor:
        """The ids `(B, *token_shape(grid))` of latents: deterministic, without gradient or side effect."""

    @abstractmethod
    def lookup(self, tokens: Tensor) -> Tensor:
        """The code vectors `(B, *grid, D)` of ids `(B, *token_shape(grid))`, with the values and precision of `z_q`."""

    def components(self, tokens: Tensor) -> dict[str, Component]:
        """Name the components of ids `(B, *token_shape(grid))` whose usage is reported beside the whole: none here."""
        return {}

    @torch.no_grad()
    def near_ids(self, tokens: Tensor, count: int) -> Tensor:
        """Find the other ids whose codes are nearest to those of ids `(B, *token_shape(grid))`, in Euclidean distance.

        Args:
            tokens: int64 in [0, K).
            count: how many, in [1, K).

        Returns:
            `(B, *token_shape(grid), count)` int64, the nearest first.

        Raises:
            ValueError: a count out of its range, or more codes than can be compared, 2^20.
        """
        self.check_near(count)
        return near_codes(tokens, self.code_table(), count)

    def check_near(self, count: int) -> None:
        """Raise the errors of `near_ids`."""
        if not 1 <= count < self.vocab_size:
            raise ValueError(f"count must be in [1, {self.vocab_size}), the number of other codes, got {count}")
        if self.vocab_size > _LARGEST_TABLE:
            raise ValueError(
                f"near codes are looked for among at most {_LARGEST_TABLE:,}, this {type(self).__name__} has "
                f"{self.vocab_size:,}"
            )

    def code_tables(self) -> Tensor:
        """List the codes of each of the P ids of a position, `(P, K, D)`: one table unless each has its own place.

        Raises:
            ValueError: more codes than can be listed, 2^20.
        """
        self.check_near(1)
        return self.code_table()[None]

    def code_table(self) -> Tensor:
        """List the codes of all ids, `(K, D)`, where an id stands for one whatever its place."""
        return self.lookup(torch.arange(self.vocab_size, device=self.precision.device))
