"""Finite scalar quantisation, FSQ (Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", ICLR 2024).

Each of D channels of a latent z is bounded and rounded to one of L levels. There is no codebook and no loss:

    z_hat = round(tanh(z + shift) * half + offset)      in -(L // 2), ..., (L - 1) // 2; gradient straight through
    z_q = z_hat / (L // 2)
    id = sum over channels of (z_hat + L // 2) * (product of the levels of the channels before)
"""

from collections.abc import Sequence
from math import gcd, prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from discrete_lit.core.modules import full_precision
from discrete_lit.tokenizers.quantizers.quantizer import Component, Quantized, Quantizer

FiniteScalarFormula = Literal["paper", "atanh"]

# How far from a half-step the outermost bounds lie, as a fraction of the range.
_MARGIN = 1e-3
# Positions in a row, at most: broadcasting over the D numbers of one position at a time is slow on a CPU.
_POSITIONS_TOGETHER = 64
# Up to so many ids sums of products of integers are exact in float32, and in float64.
_EXACT_IN_FLOAT32 = 2**24
_EXACT_IN_FLOAT64 = 2**53
# With so many levels the margin outside the range, a fraction of it, stays under a half-step.
_MOST_LEVELS_OUTSIDE = 1000


class _Constants(NamedTuple):
    """The constants of the formula for each channel, `(D,)`, or `(together * D,)` for rows of several positions."""

    shift: Tensor
    half: Tensor
    offset: Tensor
    half_width: Tensor
    slope: Tensor
    basis: Tensor
    """In the fastest type in which ids are exact."""
    first_id: int


class FiniteScalarQuantizer(Quantizer):
    """Round each of D bounded channels to one of its levels; the product grid is the codebook.

    A channel with L levels becomes `round(tanh(z + shift) * half + offset)`, with offset -1/2 for even L and 0 for odd
    L, divided by L // 2. Codes lie in [-1, 1]; for even L the largest is 1 - 2/L. In the id the first channel is least
    significant. Nothing moves in `forward`. The two published formulas, which do not give all latents the same id:

    - `"paper"` (appendix A.1, the authors' JAX code): half is (L - 1)(1 - 0.001) / 2, the shift `tan(-offset / half)`.
    - `"atanh"` (vector-quantize-pytorch, Cosmos): half is (L - 1)(1 + 0.001) / 2, the shift `atanh(-offset / half)`,
      with which a latent of 0 is bounded to exactly 0.

    Args:
        levels: L of each channel, every one at least 2; K is their product.
        formula: which of the two.
        codebook_size: K, to be checked against the levels.

    Raises:
        ValueError: a setting out of its range, or levels whose product is not `codebook_size`.
    """

    levels: Tensor
    """`(D,)` int64: L of each channel."""
    basis: Tensor
    """`(D,)` int64: what one level of each channel counts in the id."""

    def __init__(
        self, levels: Sequence[int], *, formula: FiniteScalarFormula = "paper", codebook_size: int | None = None
    ) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels must be integers of at least 2, got {list(levels)}")
        if formula not in ("paper", "atanh"):
            raise ValueError(f"formula must be 'paper' or 'atanh', got {formula!r}")
        if formula == "atanh" and max(levels) > _MOST_LEVELS_OUTSIDE:
            raise ValueError(f"formula='atanh' has at most {_MOST_LEVELS_OUTSIDE} levels, got {max(levels)}")
        self.vocab_size = prod(levels)
        if codebook_size not in (None, self.vocab_size):
            raise ValueError(
                f"codebook_size={codebook_size} is not the product of the levels {list(levels)}, {self.vocab_size}"
            )
        if self.vocab_size > 2**62:
            raise ValueError(f"the product of the levels must be at most 2^62, got {self.vocab_size}")
        self.dim = len(levels)
        self.formula: FiniteScalarFormula = formula
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.int64))
        bases = torch.tensor([1, *levels[:-1]], dtype=torch.int64).cumprod(0)
        self.register_buffer("basis", bases, persistent=False)
        self._first_id = int((self.levels // 2 * self.basis).sum())
        self._made: dict[tuple[torch.device, torch.dtype, int], _Constants] = {}

    def forward(self, latents: Tensor) -> Quantized:
        with full_precision(latents.device):
            latents = latents.to(self.precision.dtype)
            together = gcd(latents.shape[:-1].numel(), _POSITIONS_TOGETHER) if latents.is_contiguous() else 1
            rows = latents.reshape(-1, together * self.dim) if together > 1 else latents
            constants = self._constants(latents.device, together)
            z_q, z_hat = _Round.apply(rows, constants)
            digits = z_hat.reshape(latents.shape).to(constants.basis)
            if digits.is_floating_point():
                offsets = (digits @ constants.basis).long()
            else:
                offsets = (digits * constants.basis).sum(dim=-1)
            return Quantized(z_q.reshape(latents.shape), offsets + constants.first_id)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        return self(latents).tokens

    def bound(self, latents: Tensor) -> Tensor:
        """Bound latents `(B, *grid, D)` of its own precision: rounding gives -(L // 2), ..., (L - 1) // 2."""
        constants = self._constants(latents.device)
        return torch.tanh(latents + constants.shift) * constants.half + constants.offset

    def lookup(self, tokens: Tensor) -> Tensor:
        half_width = self.levels // 2
        return (self._digits(tokens) - half_width).to(self.precision.dtype) / half_width.to(self.precision.dtype)

    def components(self, tokens: Tensor) -> dict[str, Component]:
        """Name the level of each channel, counted from 0: `channel_0`, ..."""
        split = zip(self._digits(tokens).unbind(dim=-1), self.levels.tolist(), strict=True)
        return {f"channel_{channel}": Component(digit, levels) for channel, (digit, levels) in enumerate(split)}

    def _digits(self, tokens: Tensor) -> Tensor:
        return (tokens[..., None] // self.basis) % self.levels

    def _constants(self, device: torch.device, together: int = 1) -> _Constants:
        """Make the formula's constants, once for a device and a precision."""
        dtype = self.precision.dtype
        if (device, dtype, together) not in self._made:
            # Made in validation, they serve training too.
            with torch.inference_mode(False), torch.no_grad():
                levels = self.levels.to(device)
                inside = self.formula == "paper"
                half = (levels - 1).to(dtype) * (1 - _MARGIN if inside else 1 + _MARGIN) / 2
                offset = (levels % 2 - 1).to(dtype) / 2
                shift = torch.tan(-offset / half) if inside else torch.atanh(-offset / half)
                half_width = (levels // 2).to(dtype)
                slope = half / half_width
                shift, half, offset, half_width, slope = (
                    each.repeat(together) for each in (shift, half, offset, half_width, slope)
                )
                exact = torch.float64 if self.vocab_size <= _EXACT_IN_FLOAT64 else torch.int64
                if self.vocab_size <= _EXACT_IN_FLOAT32:
                    exact = torch.float32
                made = _Constants(shift, half, offset, half_width, slope, self.basis.to(device, exact), self._first_id)
                self._made[device, dtype, together] = made
        return self._made[device, dtype, together]


class _Round(torch.autograd.Function):
    """Compute z_q and z_hat, `round(tanh(z + shift) * half + offset)`; the gradient passes the rounding unchanged.

    One function, for the number of passes over the latents decides its speed.
    """

    @staticmethod
    def forward(ctx: Any, latents: Tensor, constants: _Constants) -> tuple[Tensor, Tensor]:
        squashed = (latents + constants.shift).tanh_()
        ctx.save_for_backward(squashed, constants.slope)
        z_hat = torch.addcmul(constants.offset, squashed, constants.half).round_()
        ctx.mark_non_differentiable(z_hat)
        return z_hat / constants.half_width, z_hat

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        squashed, slope = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(gradients[0] * slope, squashed), None
