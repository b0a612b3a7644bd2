"""Multi-scale binary spherical quantisation, the tokenizer of Infinity, and its self-correction.

(Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis", 2024.)
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.modules import full_precision
from discrete_lit.tokenizers.quantizers.gradient_estimators import straight_through
from discrete_lit.tokenizers.quantizers.lookup_free import BinarySphericalQuantizer, BitOrder
from discrete_lit.tokenizers.quantizers.multi_scale import MultiScaleQuantizer, in_sequence
from discrete_lit.tokenizers.quantizers.quantizer import Component, Quantized


class MultiScaleBinarySphericalQuantizer(MultiScaleQuantizer):
    """Quantise a grid of latents at growing scales, each place of a scale by the signs of its channels (Infinity).

    What the scales before left is averaged over areas, its signs / sqrt(bits) are the codes, and these come to the
    whole grid by bilinear interpolation. There is nothing to learn. The losses are those of `BinarySphericalQuantizer`
    at each scale, a mean over scales. Bits are in the order of the channels.

    What a next-scale predictor reads is interpolated too, not averaged, as in the published training and sampling.

    Args:
        bits: d, channels of the latents; K is 2^bits.
        scales: in growing order, the last that of the latent grid: sides of squares, or `[h, w]`.
        commitment_weight, entropy_weight, entropy_temperature, batch_entropy_weight, entropy_groups, bit_order: of
            `BinarySphericalQuantizer`.

    Raises:
        ValueError: a setting out of its range; in use, a grid other than the last scale's.
    """

    def __init__(
        self,
        bits: int,
        *,
        scales: Sequence[int | tuple[int, int]],
        commitment_weight: float = 0.0,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 1.0,
        batch_entropy_weight: float = 1.0,
        entropy_groups: int | None = None,
        bit_order: BitOrder = "first_most_significant",
    ) -> None:
        sphere = BinarySphericalQuantizer(
            bits,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            batch_entropy_weight=batch_entropy_weight,
            entropy_groups=entropy_groups,
            bit_order=bit_order,
        )
        super().__init__(2**bits, bits, scales=scales)
        self.sphere = sphere

    def forward(self, latents: Tensor) -> Quantized:
        with full_precision(latents.device):
            self.token_shape(tuple(latents.shape[1:-1]))  # refuses other grids
            latents = latents.to(self.precision.dtype)
            f = rearrange(latents, "b h w d -> b d h w")
            rest, f_hat, ids = f, torch.zeros_like(f), list[Tensor]()
            losses: dict[str, Tensor] = {}
            for number in range(len(self.scales)):
                made = self.sphere(rearrange(self.averaged(number, rest), "b d h w -> b h w d"))
                contribution = self.enlarged(number, self.codes_of(made.tokens))
                rest, f_hat = rest - contribution, f_hat + contribution
                ids.append(made.tokens)
                for name, value in made.losses.items():
                    losses[name] = losses.get(name, 0) + value / len(self.scales)
            z_q = straight_through(latents, rearrange(f_hat, "b d h w -> b h w d"))
            return Quantized(z_q, in_sequence(ids), losses)

    def search(self, pooled: Tensor) -> Tensor:
        return self.sphere.encode(pooled)

    def codes_of(self, ids: Tensor) -> Tensor:
        return self.sphere.lookup(ids)

    def enlarged(self, number: int, codes: Tensor) -> Tensor:
        return self._interpolated(len(self.scales) - 1, rearrange(codes, "b h w d -> b d h w"))

    def at_scale(self, number: int, f_hat: Tensor) -> Tensor:
        """Interpolate f_hat `(B, D, H, W)` to scale `number`, counted from 0: `(B, h w, D)`."""
        return rearrange(self._interpolated(number, f_hat), "b d h w -> b (h w) d")

    def _interpolated(self, number: int, grid: Tensor) -> Tensor:
        size = self.sizes[number]
        return grid if tuple(grid.shape[2:]) == tuple(size) else F.interpolate(grid, size=size, mode="bilinear")

    def components(self, tokens: Tensor) -> dict[str, Component]:
        """Name the bits of all scales together, `bit_0`, ...: the ids of a scale are too many to be counted."""
        return self.sphere.components(tokens)

    def code_table(self) -> Tensor:
        """List the codes `(K, D)` that all scales share."""
        return self.codes_of(torch.arange(self.vocab_size, device=self.precision.device))

    # Bits.

    def bits_of(self, ids: Tensor) -> Tensor:
        """Split ids `(...)` into their bits `(..., d)`, in the order of the channels."""
        return self.sphere.bits_of(ids)

    def ids_of(self, bits: Tensor) -> Tensor:
        """Join bits `(..., d)` to ids `(...)`."""
        return self.sphere.ids_of(bits)

    @torch.no_grad()
    def self_corrected(self, latents: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Make what training on errors is given (bitwise self-correction, section 3.4).

        At each scale some bits are flipped before they are added up, as a wrong prediction would be. What the next
        scale is to predict is then the residual of the flipped sum, so that it makes up for the errors.

        Args:
            latents: `(B, H, W, D)`.
            flips: `(B, N, D)` bool, the bits that are flipped.

        Returns:
            The ids to predict `(B, N)`, and what is read for every scale but the first, `(B, N - h w of it, D)`.
        """
        with full_precision(latents.device):
            self.token_shape(tuple(latents.shape[1:-1]))  # refuses other grids
            f = rearrange(latents.to(self.precision.dtype), "b h w d -> b d h w")
            f_hat, targets, read = torch.zeros_like(f), list[Tensor](), list[Tensor]()
            for number, (flipped, (height, width)) in enumerate(
                zip(flips.split(self.lengths, dim=1), self.sizes, strict=True)
            ):
                ids = self.search(rearrange(self.averaged(number, f - f_hat), "b d h w -> b h w d"))
                targets.append(ids)
                bits = self.bits_of(ids) ^ flipped.view(-1, height, width, self.dim).long()
                f_hat = f_hat + self.enlarged(number, self.codes_of(self.ids_of(bits)))
                if number + 1 < len(self.scales):
                    read.append(self.at_scale(number + 1, f_hat))
            empty = f.new_zeros(len(f), 0, self.dim)
            return in_sequence(targets), torch.cat([empty, *read], dim=1)
