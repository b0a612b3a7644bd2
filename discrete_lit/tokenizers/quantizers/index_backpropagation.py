"""IBQ (Shi et al., "Scalable Image Tokenization with Index Backpropagation Quantization", ICCV 2025)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers.entropy import softmax_entropies
from discrete_lit.tokenizers.quantizers.gradient_estimators import through_probabilities
from discrete_lit.tokenizers.quantizers.nearest import largest_product
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer


class IndexBackpropagationQuantizer(Quantizer):
    """The code with the largest dot product; its gradient reaches all codes through the softmax over them.

    With probabilities `p = softmax(z.e)` over the K codes, the one-hot choice carries the gradient of p, straight
    through. Three squared distances, each a mean over all elements, train both sides: between the latents and the
    codes that carry that gradient (`quantization`), from the latents to the bare code (`commitment`, weight 1) and
    from the bare code to the latents (`codebook`, weight `codebook_weight`): the published models multiply this one
    by beta. The entropies are those of `softmax(z.e / entropy_temperature)`. All `(n, K)` probabilities are held in
    memory by `forward`, not by `encode`.

    Args:
        codebook_size: K.
        dim: D.
        codebook_weight: beta.
        entropy_weight: of `per-sample - batch` entropy.
        entropy_temperature: of the probabilities in the entropies.
        entropy_log_offset: added to probabilities inside the logarithm of the batch entropy.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        codebook_weight: float = 0.25,
        entropy_weight: float = 0.05,
        entropy_temperature: float = 0.01,
        entropy_log_offset: float = 1e-5,
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"codebook_size and dim must be positive, got {codebook_size} and {dim}")
        if not entropy_temperature > 0:
            raise ValueError(f"entropy_temperature must be above 0, got {entropy_temperature}")
        if min(codebook_weight, entropy_weight, entropy_log_offset) < 0:
            raise ValueError(
                "weights and entropy_log_offset must be >= 0, got "
                f"codebook_weight={codebook_weight}, entropy_weight={entropy_weight}, "
                f"entropy_log_offset={entropy_log_offset}"
            )
        self.vocab_size = codebook_size
        self.dim = dim
        self.codebook_weight = codebook_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.entropy_log_offset = entropy_log_offset
        self.codes = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            rows = latents.reshape(-1, self.dim)
            logits = rows @ self.codes.T  # (n, K)
            ids = largest_product(rows, self.codes)
            bare = F.embedding(ids, self.codes)
            codes = through_probabilities(bare, logits.softmax(dim=1), self.codes)
            losses = {
                "quantization": F.mse_loss(codes, rows),
                "commitment": F.mse_loss(rows, bare.detach()),
                "codebook": self.codebook_weight * F.mse_loss(bare, rows.detach()),
            }
            if self.entropy_weight:
                sample, batch = softmax_entropies(logits / self.entropy_temperature, self.entropy_log_offset)
                losses["sample_entropy"] = self.entropy_weight * sample
                losses["batch_entropy"] = -self.entropy_weight * batch
            return Quantized(codes.reshape(latents.shape), ids.reshape(latents.shape[:-1]), losses)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Ids `(B, ...)` of the codes with the largest dot product with latents `(B, ..., D)`."""
        with torch.autocast(latents.device.type, enabled=False):
            ids = largest_product(latents.float().reshape(-1, self.dim), self.codes)
            return ids.reshape(latents.shape[:-1])

    def lookup(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codes)
