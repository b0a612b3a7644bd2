"""BSQ (Zhao et al., "Image and Video Tokenization with Binary Spherical Quantization", 2025)."""

from math import sqrt

from torch import Tensor
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers.lookup_free import BitOrder, LookupFreeQuantizer


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
