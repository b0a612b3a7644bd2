"""Index backpropagation, IBQ (Shi et al., "Scalable Image Tokenization with Index Backpropagation Quantization", 2025).

The choice of a code carries the gradient of a softmax over all codes, so that all codes are trained by every latent:

    p = softmax(z . e_1, ..., z . e_K),   k = argmax p
    index = onehot(k) + (p - sg(p)),      z_q = index @ codes
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.modules import OfWholeBatch, full_precision
from discrete_lit.tokenizers.quantizers.entropy import softmax_entropies
from discrete_lit.tokenizers.quantizers.gradient_estimators import through_probabilities
from discrete_lit.tokenizers.quantizers.nearest import largest_product
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer


class IndexBackpropagationQuantizer(Quantizer, OfWholeBatch):
    """Replace each latent by the code with the largest dot product, whose gradient reaches all codes.

    Three squared distances, each a mean over all elements, train both sides: `quantization`, `|z_q - z|^2` with the
    z_q that carries the gradient of p; `commitment`, `|z - sg(e_k)|^2`; and `codebook`,
    `codebook_weight * |e_k - sg(z)|^2`: this is the one that the published models multiply by beta. The terms
    `sample_entropy` and `batch_entropy` are those of `softmax(z.e / entropy_temperature)`. All `(n, K)` probabilities
    are held in memory by `forward`, not by `encode`. Nothing moves in `forward`.

    Args:
        codebook_size: K.
        dim: D.
        codebook_weight: beta.
        entropy_weight: of both entropies, `entropy_weight * (per-sample - batch_entropy_weight * batch)`.
        entropy_temperature: of the probabilities in the entropies.
        batch_entropy_weight: of the batch entropy against the per-sample one.
        entropy_log_offset: added to probabilities inside the logarithm of the batch entropy.
        entropy_across_ranks: the batch entropy is that of the joint batch of all ranks; if not, the mean of those of
            the ranks, as in the published training.
        codebook_init: first codes, uniform in [-1 / K, 1 / K], or `"normal"` of deviation 1, as in the published
            training (`quantize.py`).

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        codebook_weight: float = 0.25,
        entropy_weight: float = 0.05,
        entropy_temperature: float = 0.01,
        batch_entropy_weight: float = 1.0,
        entropy_log_offset: float = 1e-5,
        entropy_across_ranks: bool = True,
        codebook_init: Literal["uniform", "normal"] = "uniform",
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"codebook_size and dim must be positive, got {codebook_size} and {dim}")
        if not entropy_temperature > 0:
            raise ValueError(f"entropy_temperature must be above 0, got {entropy_temperature}")
        if min(codebook_weight, entropy_weight, batch_entropy_weight, entropy_log_offset) < 0:
            raise ValueError(
                "weights and entropy_log_offset must be >= 0, got "
                f"codebook_weight={codebook_weight}, entropy_weight={entropy_weight}, "
                f"batch_entropy_weight={batch_entropy_weight}, entropy_log_offset={entropy_log_offset}"
            )
        if codebook_init not in ("uniform", "normal"):
            raise ValueError(f"codebook_init must be 'uniform' or 'normal', got {codebook_init!r}")
        self.vocab_size = codebook_size
        self.dim = dim
        self.codebook_weight = codebook_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.batch_entropy_weight = batch_entropy_weight
        self.entropy_log_offset = entropy_log_offset
        self.entropy_across_ranks = entropy_across_ranks
        codes = torch.empty(codebook_size, dim)
        normal = codebook_init == "normal"
        self.codes = nn.Parameter(codes.normal_() if normal else codes.uniform_(-1 / codebook_size, 1 / codebook_size))

    def whole_batch_terms(self) -> list[str]:
        return ["the batch entropy (entropy_weight)"] if self.entropy_weight * self.batch_entropy_weight else []

    def forward(self, latents: Tensor) -> Quantized:
        with full_precision(latents.device):
            z = rearrange(latents.to(self.precision.dtype), "... d -> (...) d")
            logits = z @ self.codes.T  # (n, K)
            ids = largest_product(z, self.codes)
            e = F.embedding(ids, self.codes)
            z_q = through_probabilities(e, logits.softmax(dim=1), self.codes)
            losses = {
                "quantization": F.mse_loss(z_q, z),
                "commitment": F.mse_loss(z, e.detach()),
                "codebook": self.codebook_weight * F.mse_loss(e, z.detach()),
            }
            if self.entropy_weight:
                sample, batch = softmax_entropies(
                    logits / self.entropy_temperature,
                    log_offset=self.entropy_log_offset,
                    across_ranks=self.entropy_across_ranks,
                )
                losses["sample_entropy"] = self.entropy_weight * sample
                losses["batch_entropy"] = -self.entropy_weight * self.batch_entropy_weight * batch
            return Quantized(z_q.reshape(latents.shape), ids.reshape(latents.shape[:-1]), losses)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Ids `(B, *grid)` of the codes with the largest dot product with latents `(B, *grid, D)`."""
        with full_precision(latents.device):
            ids = largest_product(rearrange(latents.to(self.precision.dtype), "... d -> (...) d"), self.codes)
            return ids.reshape(latents.shape[:-1])

    def lookup(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codes)
