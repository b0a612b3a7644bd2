"""Vector quantisation with a codebook (van den Oord et al., "Neural Discrete Representation Learning", 2017)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers.codebook import Codebook, CodebookInit, CodebookUpdate
from discrete_lit.tokenizers.quantizers.gradients import rotation_trick, straight_through
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer

_GRADIENTS = {"straight_through": straight_through, "rotation": rotation_trick}


class VectorQuantizer(Quantizer):
    """Nearest code of a codebook.

    The loss is eq. 3 of the paper: a codebook term `|sg(z) - e|^2` (only with `codebook_update="gradient"`) and a
    commitment term `commitment_weight * |z - sg(e)|^2`, each a mean over all elements. With `normalize` both z and e
    are the vectors on the unit sphere.

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
        gradient: what the latents receive: `"straight_through"`, or `"rotation"` (the rotation trick).
        revive_below: replace codes whose usage falls below this, see `Codebook`; None keeps them.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        codebook_update: CodebookUpdate = "ema",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: CodebookInit = "data",
        normalize: bool = False,
        weighted_term: Literal["commitment", "codebook"] = "commitment",
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        revive_below: float | None = None,
    ) -> None:
        super().__init__()
        if commitment_weight < 0:
            raise ValueError(f"commitment_weight must be >= 0, got {commitment_weight}")
        if weighted_term not in ("commitment", "codebook"):
            raise ValueError(f"weighted_term must be 'commitment' or 'codebook', got {weighted_term!r}")
        if weighted_term == "codebook" and codebook_update != "gradient":
            raise ValueError("weighted_term='codebook' needs codebook_update='gradient': 'ema' has no codebook term")
        if gradient not in _GRADIENTS:
            raise ValueError(f"gradient must be one of {sorted(_GRADIENTS)}, got {gradient!r}")
        self.vocab_size = codebook_size
        self.dim = dim
        self.codebook = Codebook(
            codebook_size, dim, codebook_update, decay, codebook_init, normalize, revive_below=revive_below
        )
        self.commitment_weight = commitment_weight if weighted_term == "commitment" else 1.0
        self.codebook_weight = commitment_weight if weighted_term == "codebook" else 1.0
        self.gradient = gradient

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            self.codebook.prepare(latents)
            tokens = self.codebook.search(latents)
            codes, points = self.codebook.lookup(tokens), self.codebook.project(latents)
            losses = {"commitment": self.commitment_weight * F.mse_loss(points, codes.detach())}
            if self.codebook.update == "gradient":
                losses["codebook"] = self.codebook_weight * F.mse_loss(codes, points.detach())
            # The codes looked up before the update: the ones that the losses and the tokens speak of.
            quantized = Quantized(_GRADIENTS[self.gradient](points, codes), tokens, losses)
            self.codebook.observe(latents, tokens)
            return quantized

    def lookup(self, tokens: Tensor) -> Tensor:
        return self.codebook.lookup(tokens)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Ids `(B, ...)` of the codes nearest in Euclidean distance to latents `(B, ..., D)`."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.codebook.search(latents.float())
