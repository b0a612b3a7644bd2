"""SimVQ (Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer", 2024)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers.gradients import GRADIENTS
from discrete_lit.tokenizers.quantizers.nearest import nearest_codes
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer


class SimVectorQuantizer(Quantizer):
    """Codes `W c + b` of random coefficients c that stay as they are: every update of W moves all codes, used or not.

    The loss is that of VQ: a codebook term `|sg(z) - e|^2` that trains W and b, and a commitment term
    `commitment_weight * |z - sg(e)|^2`, each a mean over all elements. `lookup` gives the same e.

    Args:
        codebook_size: K.
        dim: D.
        commitment_weight: beta.
        bias: the layer has a bias, as the paper's code; vector-quantize-pytorch's has none.
        gradient: what the latents receive: `"straight_through"`, or `"rotation"` (the rotation trick).

    Raises:
        ValueError: a setting out of its range.
    """

    coefficients: Tensor
    """`(K, D)`, normal with deviation D^-1/2."""

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment_weight: float = 0.25,
        bias: bool = True,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"codebook_size and dim must be positive, got {codebook_size} and {dim}")
        if commitment_weight < 0:
            raise ValueError(f"commitment_weight must be >= 0, got {commitment_weight}")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {sorted(GRADIENTS)}, got {gradient!r}")
        self.vocab_size = codebook_size
        self.dim = dim
        self.commitment_weight = commitment_weight
        self.gradient = gradient
        self.register_buffer("coefficients", torch.randn(codebook_size, dim) * dim**-0.5)
        self.to_codes = nn.Linear(dim, dim, bias=bias)

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            tokens = self.encode(latents)
            codes = self.lookup(tokens)
            losses = {
                "commitment": self.commitment_weight * F.mse_loss(latents, codes.detach()),
                "codebook": F.mse_loss(codes, latents.detach()),
            }
            return Quantized(GRADIENTS[self.gradient](latents, codes), tokens, losses)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            rows = latents.float().reshape(-1, self.dim)
            return nearest_codes(rows, self.to_codes(self.coefficients)).reshape(latents.shape[:-1])

    def lookup(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            return self.to_codes(F.embedding(tokens, self.coefficients))
