"""Vector quantisation: VQ-VAE (van den Oord et al., "Neural Discrete Representation Learning", 2017), and SimVQ.

With the encoder's output z_e and codes e_1, ..., e_K, VQ-VAE is

    k = argmin_j |z_e - e_j|                                       eq. 1
    z_q = e_k, whose gradient goes straight through to z_e         eq. 2
    loss = |sg(z_e) - e_k|^2 + beta |z_e - sg(e_k)|^2              eq. 3: codebook term, commitment term

or without the codebook term, where codes follow the running means of their latents instead (appendix A.1, `Codebook`).
VQGAN, ViT-VQGAN, LlamaGen and TiTok are settings of `VectorQuantizer`. SimVQ (Zhu et al., "Addressing Representation
Collapse in Vector Quantized Models with One Linear Layer", 2024) makes all codes by one linear layer.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.modules import OfWholeBatch, full_precision
from discrete_lit.tokenizers.quantizers.codebook import Codebook, CodebookInit, CodebookUpdate
from discrete_lit.tokenizers.quantizers.entropy import softmax_entropies
from discrete_lit.tokenizers.quantizers.gradient_estimators import GRADIENTS
from discrete_lit.tokenizers.quantizers.nearest import nearest_codes
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer


class VectorQuantizer(Quantizer, OfWholeBatch):
    """Replace each latent by the nearest code of a codebook.

    The losses are those of eq. 3: `codebook`, `|sg(z_e) - e|^2` (only with `codebook_update="gradient"`), and
    `commitment`, `commitment_weight * |z_e - sg(e)|^2`, each a mean over all elements. With `normalize` both z_e and e
    are the vectors on the unit sphere. In training `forward` moves the buffers of the `Codebook`.

    Args:
        codebook_size: K.
        dim: D.
        codebook_update: `"ema"` moves codes to the running mean of their latents (appendix A.1; no gradient),
            `"gradient"` trains them by the codebook term.
        commitment_weight: beta of eq. 3.
        decay: gamma of appendix A.1.
        codebook_init: where the codes begin, see `Codebook`.
        normalize: latents and codes on the unit sphere (LlamaGen, TiTok, ViT-VQGAN).
        weighted_term: the term that beta multiplies; the other has weight 1. `"commitment"` is the paper's;
            `"codebook"` is what taming's published models were trained with, and diffusers and Chameleon keep.
        unit_lookup: `lookup`, by which ids are decoded, gives the codes on the unit sphere, also where nothing else is
            (Janus's port of LlamaGen's codes).
        gradient: what the latents receive: `"straight_through"`, or `"rotation"` (the rotation trick).
        revive_below: replace codes whose usage falls below this, see `Codebook`; None keeps them.
        entropy_weight: of the terms `sample_entropy` and `batch_entropy`, per-sample minus batch entropy of the
            probabilities `softmax(-|z_e - e|^2 / entropy_temperature)`, which are held in memory, `(n, K)`; 0.1 in
            MaskGIT's VQ.
        entropy_temperature: of these probabilities.
        entropy_log_offset: added to probabilities inside the logarithm of the batch entropy; 1e-5 in MaskGIT's VQ and
            LlamaGen.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        codebook_update: CodebookUpdate = "ema",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: CodebookInit = "data",
        normalize: bool = False,
        weighted_term: Literal["commitment", "codebook"] = "commitment",
        unit_lookup: bool = False,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        revive_below: float | None = None,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        entropy_log_offset: float = 0.0,
    ) -> None:
        super().__init__()
        if commitment_weight < 0:
            raise ValueError(f"commitment_weight must be >= 0, got {commitment_weight}")
        if weighted_term not in ("commitment", "codebook"):
            raise ValueError(f"weighted_term must be 'commitment' or 'codebook', got {weighted_term!r}")
        if weighted_term == "codebook" and codebook_update != "gradient":
            raise ValueError("weighted_term='codebook' needs codebook_update='gradient': 'ema' has no codebook term")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {sorted(GRADIENTS)}, got {gradient!r}")
        if not entropy_temperature > 0:
            raise ValueError(f"entropy_temperature must be above 0, got {entropy_temperature}")
        if min(entropy_weight, entropy_log_offset) < 0:
            raise ValueError(
                f"entropy_weight and entropy_log_offset must be >= 0, got {entropy_weight} and {entropy_log_offset}"
            )
        self.vocab_size = codebook_size
        self.dim = dim
        self.codebook = Codebook(
            codebook_size,
            dim,
            update=codebook_update,
            decay=decay,
            init=codebook_init,
            normalize=normalize,
            revive_below=revive_below,
        )
        self.commitment_weight = commitment_weight if weighted_term == "commitment" else 1.0
        self.codebook_weight = commitment_weight if weighted_term == "codebook" else 1.0
        self.gradient = gradient
        self.unit_lookup = unit_lookup
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.entropy_log_offset = entropy_log_offset

    def whole_batch_terms(self) -> list[str]:
        return ["the batch entropy (entropy_weight)"] if self.entropy_weight else []

    def forward(self, latents: Tensor) -> Quantized:
        with full_precision(latents.device):
            latents = latents.to(self.precision.dtype)
            self.codebook.prepare(latents)
            tokens = self.codebook.search(latents)  # eq. 1
            z_e, e = self.codebook.project(latents), self.codebook.lookup(tokens)
            losses = {"commitment": self.commitment_weight * F.mse_loss(z_e, e.detach())}  # eq. 3
            if self.codebook.update == "gradient":
                losses["codebook"] = self.codebook_weight * F.mse_loss(e, z_e.detach())
            if self.entropy_weight:
                losses |= self._entropies(z_e)
            z_q = GRADIENTS[self.gradient](z_e, e)  # eq. 2
            # Last, for z_q and the losses speak of the codes that the tokens were searched among.
            self.codebook.observe(latents, tokens)
            return Quantized(z_q, tokens, losses)

    def _entropies(self, z_e: Tensor) -> dict[str, Tensor]:
        codes = self.codebook.project(self.codebook.codes.clone())  # a copy: they move before the backward pass
        # -|z_e - e|^2 without the term |z_e|^2, which is the same for every code.
        affinities = 2 * rearrange(z_e, "... d -> (...) d") @ codes.T - codes.square().sum(dim=1)
        sample, batch = softmax_entropies(affinities / self.entropy_temperature, log_offset=self.entropy_log_offset)
        return {"sample_entropy": self.entropy_weight * sample, "batch_entropy": -self.entropy_weight * batch}

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Ids `(B, *grid)` of the codes nearest in Euclidean distance to latents `(B, *grid, D)`."""
        with full_precision(latents.device):
            return self.codebook.search(latents.to(self.precision.dtype))

    def lookup(self, tokens: Tensor) -> Tensor:
        codes = self.codebook.lookup(tokens)
        return F.normalize(codes, dim=-1) if self.unit_lookup else codes


class SimVectorQuantizer(Quantizer):
    """Replace each latent by the nearest of the codes `e_k = W c_k + b`, whose coefficients c_k are random and fixed.

    Every update of W moves all codes, used or not. The losses are those of VQ-VAE: `codebook`, `|sg(z_e) - e|^2`, which
    trains W and b, and `commitment`, `commitment_weight * |z_e - sg(e)|^2`, each a mean over all elements. Nothing
    moves in `forward`.

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
        *,
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
        with full_precision(latents.device):
            z_e = latents.to(self.precision.dtype)
            tokens = self.encode(z_e)
            e = self.lookup(tokens)
            losses = {
                "commitment": self.commitment_weight * F.mse_loss(z_e, e.detach()),
                "codebook": F.mse_loss(e, z_e.detach()),
            }
            return Quantized(GRADIENTS[self.gradient](z_e, e), tokens, losses)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Ids `(B, *grid)` of the codes nearest in Euclidean distance to latents `(B, *grid, D)`."""
        with full_precision(latents.device):
            rows = rearrange(latents.to(self.precision.dtype), "... d -> (...) d")
            return nearest_codes(rows, self.to_codes(self.coefficients)).reshape(latents.shape[:-1])

    def lookup(self, tokens: Tensor) -> Tensor:
        with full_precision(tokens.device):
            return self.to_codes(F.embedding(tokens, self.coefficients))
