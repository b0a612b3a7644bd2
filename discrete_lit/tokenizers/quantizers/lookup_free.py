"""Lookup-free quantisation, LFQ, and binary spherical quantisation, BSQ: the sign of each channel is a bit of the id.

LFQ: Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", 2024 (MAGVIT-v2). BSQ: Zhao et
al., "Image and Video Tokenization with Binary Spherical Quantization", 2025. For latents z with one channel for a bit

              LFQ               BSQ
    u         z                 z / |z|
    code      sign(u)           sign(u) / sqrt(bits)
    id        the bits [u_i > 0], read as a number
    losses    commitment |u - sg(code)|^2, and the entropies of the bits (`entropy.py`)
"""

from math import sqrt
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.modules import OfWholeBatch, full_precision
from discrete_lit.tokenizers.quantizers.entropy import bits_entropy, joint_bits_entropy
from discrete_lit.tokenizers.quantizers.quantizer import Component, Quantized, Quantizer

BitOrder = Literal["first_least_significant", "first_most_significant"]
"""The bit of the id that channel 0 is: the lowest (Open-MAGVIT2, MaskBit, XQ-GAN, WeTok) or the highest
(vector-quantize-pytorch, BSQ-ViT, Infinity)."""

# The probabilities of a group's codes are held at once: 4 MB of float32.
_MOST_JOINT_BITS = 20


class LookupFreeQuantizer(Quantizer, OfWholeBatch):
    """Make each channel of a latent a bit of its id (LFQ): code +1 and bit 1 where it is above 0, else -1 and 0.

    A latent u has the affinity `2 u.c` to code c in {-1, 1}^bits, so with a temperature each bit is set with
    probability `sigmoid(4 u / temperature)`. The losses are `commitment`, the mean of `(u - sg(code))^2`, and the
    entropies of these probabilities (eq. 5), `entropy_weight * (per-sample - batch_entropy_weight * batch)`, as
    `sample_entropy` and `batch_entropy`. Both are exact, over all 2^bits codes, unless `entropy_groups` splits the
    bits. Nothing moves in `forward`.

    Args:
        bits: K is 2^bits, D is bits.
        commitment_weight: of the commitment term.
        entropy_weight: of both entropies; 0.1 in Open-MAGVIT2, 0.02 in MaskBit.
        entropy_temperature: of the affinities.
        batch_entropy_weight: of the batch entropy against the per-sample one; gamma in MaskBit and BSQ.
        entropy_groups: groups of equal size in which the bits are split for the batch entropy. The sum over groups is
            taken, an upper bound: WeTok's and BSQ's approximation, for more bits than can be held jointly.
        entropy_log_offset: added to probabilities inside the logarithm of the batch entropy; 1e-5 in Open-MAGVIT2.
        entropy_across_ranks: the batch entropy is that of the joint batch of all ranks; if not, the mean of those of
            the ranks, as in Open-MAGVIT2 and MaskBit.
        bit_order: whether channel 0 is the lowest or the highest bit of the id.

    Raises:
        ValueError: a setting out of its range, or a group of bits too large.
    """

    shifts: Tensor
    """`(bits,)` int64: the position of each channel's bit in the id, 0 for the lowest."""

    def __init__(
        self,
        bits: int,
        *,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        batch_entropy_weight: float = 1.0,
        entropy_groups: int = 1,
        entropy_log_offset: float = 0.0,
        entropy_across_ranks: bool = True,
        bit_order: BitOrder = "first_least_significant",
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 62:
            raise ValueError(f"bits must lie in [1, 62], got {bits}")
        if entropy_groups < 1 or bits % entropy_groups:
            raise ValueError(f"entropy_groups must divide the {bits} bits, got {entropy_groups}")
        joint = bits // entropy_groups
        if entropy_weight and joint > _MOST_JOINT_BITS:
            raise ValueError(
                f"the batch entropy of {joint} bits together has 2^{joint} probabilities: split the {bits} bits by "
                f"entropy_groups into groups of at most {_MOST_JOINT_BITS}, or set entropy_weight to 0"
            )
        if not entropy_temperature > 0:
            raise ValueError(f"entropy_temperature must be above 0, got {entropy_temperature}")
        if min(commitment_weight, entropy_weight, batch_entropy_weight, entropy_log_offset) < 0:
            raise ValueError(
                "weights and entropy_log_offset must be >= 0, got "
                f"commitment_weight={commitment_weight}, entropy_weight={entropy_weight}, "
                f"batch_entropy_weight={batch_entropy_weight}, entropy_log_offset={entropy_log_offset}"
            )
        self.vocab_size = 2**bits
        self.dim = bits
        self.scale = 1.0
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.batch_entropy_weight = batch_entropy_weight
        self.entropy_groups = entropy_groups
        self.entropy_log_offset = entropy_log_offset
        self.entropy_across_ranks = entropy_across_ranks
        self.bit_order: BitOrder = bit_order
        ascending = torch.arange(bits)
        shifts = ascending if bit_order == "first_least_significant" else ascending.flip(0)
        # A saved buffer, so that a checkpoint says in which order its bits are.
        self.register_buffer("shifts", shifts)

    def whole_batch_terms(self) -> list[str]:
        return ["the batch entropy (entropy_weight)"] if self.entropy_weight * self.batch_entropy_weight else []

    def forward(self, latents: Tensor) -> Quantized:
        with full_precision(latents.device):
            u = self.project(latents.to(self.precision.dtype))
            code = self._signs(u) * self.scale
            losses = {"commitment": self.commitment_weight * self.commitment(u, code)}
            if self.entropy_weight:
                losses |= self._entropies(u)
            return Quantized(code + (u - u.detach()), self._ids(u), losses)

    def project(self, latents: Tensor) -> Tensor:
        """Put latents `(B, *grid, bits)` where they are compared with codes: for LFQ, leave them."""
        return latents

    def commitment(self, u: Tensor, code: Tensor) -> Tensor:
        """The unweighted distance of latents to their codes, both `(B, *grid, bits)`: a mean over all elements."""
        return F.mse_loss(u, code)

    def _entropies(self, u: Tensor) -> dict[str, Tensor]:
        log_odds = rearrange(u, "... d -> (...) d") * (4 * self.scale / self.entropy_temperature)
        grouped = rearrange(log_odds, "n (g d) -> n g d", g=self.entropy_groups)
        batch = joint_bits_entropy(grouped, log_offset=self.entropy_log_offset, across_ranks=self.entropy_across_ranks)
        return {
            "sample_entropy": self.entropy_weight * bits_entropy(log_odds),
            "batch_entropy": -self.entropy_weight * self.batch_entropy_weight * batch,
        }

    @staticmethod
    def _signs(u: Tensor) -> Tensor:
        return (u.detach() > 0).to(u.dtype).mul_(2).sub_(1)

    def _ids(self, u: Tensor) -> Tensor:
        return ((u.detach() > 0).long() << self.shifts).sum(dim=-1)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        return self._ids(latents)  # `project` changes no sign

    def lookup(self, tokens: Tensor) -> Tensor:
        return self.bits_of(tokens).to(self.precision.dtype).mul_(2).sub_(1).mul_(self.scale)

    def components(self, tokens: Tensor) -> dict[str, Component]:
        """Name the bit of each channel, with two values: `bit_0`, ..."""
        return {f"bit_{channel}": Component(bit, 2) for channel, bit in enumerate(self.bits_of(tokens).unbind(dim=-1))}

    def bits_of(self, tokens: Tensor) -> Tensor:
        """Split ids `(...)` into the bit of each channel, `(..., bits)`."""
        return (tokens[..., None] >> self.shifts) & 1

    def ids_of(self, bits: Tensor) -> Tensor:
        """Join the bits of the channels, `(..., bits)` int64, to ids `(...)`."""
        return (bits << self.shifts).sum(dim=-1)


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """Make each channel of a latent a bit of its id on the unit sphere (BSQ): codes are {-1, 1}^bits / sqrt(bits).

    As `LookupFreeQuantizer`, of latents u of length 1: each bit is set with probability
    `sigmoid(4 u / (sqrt(bits) * temperature))`. The commitment term is the mean over positions of `|u - sg(code)|^2`,
    at most 2 - 2 / sqrt(bits): the published models do without it.

    Args:
        bits: K is 2^bits, D is bits.
        commitment_weight: beta.
        entropy_weight: zeta; 0.1 in the published models.
        entropy_temperature: of the affinities; 1 in the published models.
        batch_entropy_weight: gamma.
        entropy_groups: groups of equal size in which the bits are split for the batch entropy; by default every bit
            by itself, as in the published models, an upper bound; 1 is exact.
        bit_order: whether channel 0 is the lowest or the highest bit of the id.

    Raises:
        ValueError: a setting out of its range, or a group of bits too large.
    """

    def __init__(
        self,
        bits: int,
        *,
        commitment_weight: float = 0.0,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 1.0,
        batch_entropy_weight: float = 1.0,
        entropy_groups: int | None = None,
        bit_order: BitOrder = "first_most_significant",
    ) -> None:
        super().__init__(
            bits,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            batch_entropy_weight=batch_entropy_weight,
            entropy_groups=bits if entropy_groups is None else entropy_groups,
            bit_order=bit_order,
        )
        self.scale = 1 / sqrt(bits)

    def project(self, latents: Tensor) -> Tensor:
        """Divide the latents `(B, *grid, bits)` by their length."""
        return F.normalize(latents, dim=-1)

    def commitment(self, u: Tensor, code: Tensor) -> Tensor:
        """The squared distance of latents to their codes, both `(B, *grid, bits)`: a mean over positions."""
        return (u - code).square().sum(dim=-1).mean()
