"""LFQ (Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", 2024).

BSQ (Zhao et al., "Image and Video Tokenization with Binary Spherical Quantization", 2025).
"""

from math import sqrt
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers.entropy import bits_entropy, joint_bits_entropy
from discrete_lit.tokenizers.quantizers.quantizer import Component, Quantized, Quantizer

BitOrder = Literal["first_least_significant", "first_most_significant"]
"""What channel 0 is in the id: its lowest bit (Open-MAGVIT2, MaskBit, XQ-GAN, WeTok) or its highest
(vector-quantize-pytorch, BSQ-ViT, Infinity)."""


# The probabilities of a group's codes are held at once: 4 MB of float32.
_MOST_JOINT_BITS = 20


class LookupFreeQuantizer(Quantizer):
    """The sign of each channel is a bit of the id: +1 where the latent is above 0, else -1.

    A latent x is as near to code c in {-1, 1}^bits as the affinity `2 x.c`, so with a temperature each bit is set with
    probability `sigmoid(4 x / temperature)`, and the loss has, beside the commitment `mean (x - sg(code))^2`, the
    entropies of these probabilities (eq. 5): `entropy_weight * (per-sample - batch_entropy_weight * batch)`. Both are
    exact, over all 2^bits codes, unless `entropy_groups` splits the bits.

    Args:
        bits: K is 2^bits, D is bits.
        commitment_weight: of the commitment term.
        entropy_weight: of both entropies; 0.1 in Open-MAGVIT2, 0.02 in MaskBit.
        entropy_temperature: of the affinities.
        batch_entropy_weight: of the batch entropy against the per-sample one; gamma in MaskBit and BSQ.
        entropy_groups: parts of equal size in which the bits are split for the batch entropy, of which the sum over
            parts is taken, an upper bound: WeTok's and BSQ's approximation, for more bits than can be held jointly.
        entropy_log_offset: added to probabilities inside the logarithm of the batch entropy; 1e-5 in Open-MAGVIT2.
        bit_order: what channel 0 is in the id.

    Raises:
        ValueError: a setting out of its range, or a group of bits too large.
    """

    shifts: Tensor

    def __init__(
        self,
        bits: int,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        batch_entropy_weight: float = 1.0,
        entropy_groups: int = 1,
        entropy_log_offset: float = 0.0,
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
                f"entropy_groups into parts of at most {_MOST_JOINT_BITS}, or set entropy_weight to 0"
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
        self.bit_order: BitOrder = bit_order
        ascending = torch.arange(bits)
        shifts = ascending if bit_order == "first_least_significant" else ascending.flip(0)
        # Saved: weights say in which order their bits are.
        self.register_buffer("shifts", shifts)

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents = self.prepare(latents.float())
            signs = self._signs(latents)
            codes = signs * self.scale
            losses = {"commitment": self.commitment_weight * self.commitment(latents, codes)}
            if self.entropy_weight:
                losses |= self._entropies(latents)
            return Quantized(codes + (latents - latents.detach()), self._tokens(latents), losses)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        return self._tokens(latents)

    def lookup(self, tokens: Tensor) -> Tensor:
        return self._bits(tokens).float().mul_(2).sub_(1).mul_(self.scale)

    def components(self, tokens: Tensor) -> dict[str, Component]:
        """`bit_0`, ...: the bit of each channel, with two values."""
        return {f"bit_{channel}": Component(bit, 2) for channel, bit in enumerate(self._bits(tokens).unbind(dim=-1))}

    def prepare(self, latents: Tensor) -> Tensor:
        """What is compared with the codes; the latents themselves."""
        return latents

    def commitment(self, latents: Tensor, codes: Tensor) -> Tensor:
        """The unweighted distance of latents to their codes, both `(B, ..., bits)`."""
        return F.mse_loss(latents, codes)

    def _entropies(self, latents: Tensor) -> dict[str, Tensor]:
        log_odds = latents.reshape(-1, self.dim) * (4 * self.scale / self.entropy_temperature)
        grouped = log_odds.unflatten(1, (self.entropy_groups, -1))
        batch_weight = self.entropy_weight * self.batch_entropy_weight
        return {
            "sample_entropy": self.entropy_weight * bits_entropy(log_odds),
            "batch_entropy": -batch_weight * joint_bits_entropy(grouped, self.entropy_log_offset),
        }

    @staticmethod
    def _signs(latents: Tensor) -> Tensor:
        return (latents.detach() > 0).float().mul_(2).sub_(1)

    def _tokens(self, latents: Tensor) -> Tensor:
        return ((latents.detach() > 0).long() << self.shifts).sum(dim=-1)

    def _bits(self, tokens: Tensor) -> Tensor:
        return (tokens[..., None] >> self.shifts) & 1


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """Lookup-free quantisation on the unit sphere: latents are l2-normalised, codes lie in {-1, 1}^bits / sqrt(bits).

    Each bit is set with probability `sigmoid(4 x / (sqrt(bits) * temperature))`. The commitment term is the mean over
    places of `|x - sg(code)|^2`, at most 2 - 2 / sqrt(bits): the published models do without it.

    Args:
        bits: K is 2^bits, D is bits.
        commitment_weight: beta.
        entropy_weight: zeta; 0.1 in the published models.
        entropy_temperature: of the affinities; 1 in the published models.
        batch_entropy_weight: gamma.
        entropy_groups: parts of equal size in which the bits are split for the batch entropy; by default every bit by
            itself, as in the published models, an upper bound; 1 is exact.
        bit_order: what channel 0 is in the id.

    Raises:
        ValueError: a setting out of its range, or a group of bits too large.
    """

    def __init__(
        self,
        bits: int,
        commitment_weight: float = 0.0,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 1.0,
        batch_entropy_weight: float = 1.0,
        entropy_groups: int | None = None,
        bit_order: BitOrder = "first_most_significant",
    ) -> None:
        super().__init__(
            bits,
            commitment_weight,
            entropy_weight,
            entropy_temperature,
            batch_entropy_weight,
            bits if entropy_groups is None else entropy_groups,
            bit_order=bit_order,
        )
        self.scale = 1 / sqrt(bits)

    def prepare(self, latents: Tensor) -> Tensor:
        """The latents `(B, ..., bits)` divided by their length."""
        return F.normalize(latents, dim=-1)

    def commitment(self, latents: Tensor, codes: Tensor) -> Tensor:
        """The mean over places of the squared distance of latents to their codes, both `(B, ..., bits)`."""
        return (latents - codes).square().sum(dim=-1).mean()
