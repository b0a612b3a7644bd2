"""Finite scalar quantisation (Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", ICLR 2024)."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer

# The bounded latent stays strictly inside the outermost half-steps, so that rounding never leaves the levels.
_MARGIN = 1e-3


class FiniteScalarQuantizer(Quantizer):
    """Rounds each of D bounded channels to one of its levels; the product grid is the codebook.

    A channel with L levels becomes `round(tanh(z + shift) * (L - 1)(1 - 0.001) / 2 - offset)`, with offset 1/2 and
    shift `tan(offset / half-width)` for even L, both 0 for odd L (the paper's appendix A.1), divided by L // 2. Codes
    lie in [-1, 1]; for even L the largest is 1 - 2/L. In the id the first channel is least significant.

    Args:
        levels: L of each channel, every one at least 2; K is their product.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels must be integers of at least 2, got {list(levels)}")
        self.vocab_size = prod(levels)
        self.dim = len(levels)
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.int64))
        bases = torch.tensor([1, *levels[:-1]], dtype=torch.int64).cumprod(0)
        self.register_buffer("basis", bases, persistent=False)

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self.bound(latents.float())
            steps = bounded + (bounded.round() - bounded).detach()
            half_width = self.levels // 2
            tokens = ((steps.detach().round().long() + half_width) * self.basis).sum(dim=-1)
            return Quantized(steps / half_width, tokens)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        return self(latents).tokens

    def bound(self, latents: Tensor) -> Tensor:
        """Float32 latents `(B, ..., D)` to values whose rounding gives the levels -(L // 2) ... (L - 1) // 2."""
        half = (self.levels - 1) * (1 - _MARGIN) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(latents + torch.tan(offset / half)) * half - offset

    def lookup(self, tokens: Tensor) -> Tensor:
        half_width = self.levels // 2
        digits = (tokens[..., None] // self.basis) % self.levels
        return (digits - half_width) / half_width
