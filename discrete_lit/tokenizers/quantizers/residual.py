"""Residual quantisation, RQ-VAE (Lee et al., "Autoregressive Image Generation using Residual Quantization", CVPR 2022).

A latent z becomes D ids, each that of the code nearest to what the codes before left (eq. 3):

    r_0 = z
    k_d = argmin_k |r_{d-1} - e_k|,   r_d = r_{d-1} - e_{k_d}      for d = 1, ..., D

and the latent is replaced by the sum of its D codes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.modules import OfWholeBatch, full_precision
from discrete_lit.tokenizers.quantizers.codebook import Codebook, CodebookInit, CodebookUpdate
from discrete_lit.tokenizers.quantizers.gradient_estimators import straight_through
from discrete_lit.tokenizers.quantizers.nearest import near_codes
from discrete_lit.tokenizers.quantizers.quantizer import Component, Quantized, Quantizer


class ResidualQuantizer(Quantizer, OfWholeBatch):
    """Replace each latent by a sum of `depth` codes, each the nearest to what the codes before left of it.

    Ids are `(B, *grid, depth)`. The term `commitment` is the paper's, `|z - sg(z_d)|^2` with z_d the sum of the first d
    codes, as a mean over depths (as in the released code; the paper sums) and elements, times `commitment_weight`. With
    `codebook_update="gradient"` there is a term `codebook`, `|sg(r_{d-1}) - e_d|^2` of residual and code, a mean
    likewise. In training `forward` moves the buffers of each `Codebook`.

    Args:
        codebook_size: K of each depth.
        dim: D.
        depth: codes for each latent.
        shared_codebook: one codebook for all depths, as RQ-VAE. In training it moves at every depth, and the next depth
            searches the moved codes.
        codebook_update: `"ema"` or `"gradient"`, see `Codebook`.
        commitment_weight: beta.
        decay: of `"ema"` and of the usage.
        codebook_init: where the codes begin, see `Codebook`; separate codebooks begin at their depth's residuals.
        revive_below: replace codes whose usage falls below this, 1 in RQ-VAE; None keeps them.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        depth: int,
        shared_codebook: bool = True,
        codebook_update: CodebookUpdate = "ema",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: CodebookInit = "data",
        revive_below: float | None = 1.0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be positive, got {depth}")
        if commitment_weight < 0:
            raise ValueError(f"commitment_weight must be >= 0, got {commitment_weight}")
        self.vocab_size = codebook_size
        self.dim = dim
        self.depth = depth
        self.commitment_weight = commitment_weight
        self.codebooks = nn.ModuleList(
            Codebook(
                codebook_size,
                dim,
                update=codebook_update,
                decay=decay,
                init=codebook_init,
                revive_below=revive_below,
                seed=number,
            )
            for number in range(1 if shared_codebook else depth)
        )

    def token_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        return (*grid, self.depth)

    def codebook(self, number: int) -> Codebook:
        """The codebook of depth `number`, counted from 0."""
        codebook = self.codebooks[number if len(self.codebooks) > 1 else 0]
        assert isinstance(codebook, Codebook)
        return codebook

    def whole_batch_terms(self) -> list[str]:
        moves = self.depth > 1 and len(self.codebooks) == 1 and self.codebook(0).counts_usage
        return ["a codebook that moves from depth to depth (shared_codebook, codebook_update)"] if moves else []

    def forward(self, latents: Tensor, *, depth: int | None = None) -> Quantized:
        """Quantise latents `(B, *grid, D)`, with ids `(B, *grid, depth)`: by the first codes alone if `depth` is given.

        Training with depths that change from step to step makes one model of several bit rates (SoundStream: Zeghidour
        et al., 2021, section III.C).
        """
        with full_precision(latents.device):
            z = latents.to(self.precision.dtype)
            residual, z_d = z.detach(), torch.zeros_like(z)
            tokens, commitments, codebook_terms = [], [], []
            for number in range(self._checked(depth)):
                codebook = self.codebook(number)
                codebook.prepare(residual)
                ids = codebook.search(residual)
                e = codebook.lookup(ids)
                z_d = z_d + e.detach()
                tokens.append(ids)
                commitments.append(F.mse_loss(z, z_d))
                if codebook.update == "gradient":
                    codebook_terms.append(F.mse_loss(e, residual))
                codebook.observe(residual, ids, depth=number)
                residual = residual - e.detach()
            losses = {"commitment": self.commitment_weight * torch.stack(commitments).mean()}
            if codebook_terms:
                losses["codebook"] = torch.stack(codebook_terms).mean()
            return Quantized(straight_through(z, z_d), torch.stack(tokens, dim=-1), losses)

    @torch.no_grad()
    def encode(self, latents: Tensor, *, depth: int | None = None) -> Tensor:
        """The ids `(B, *grid, depth)` of latents, all or those of the first `depth` codes."""
        with full_precision(latents.device):
            residual, tokens = latents.to(self.precision.dtype), []
            for number in range(self._checked(depth)):
                tokens.append(self.codebook(number).search(residual))
                residual = residual - self.codebook(number).lookup(tokens[-1])
            return torch.stack(tokens, dim=-1)

    def _checked(self, depth: int | None) -> int:
        depth = self.depth if depth is None else depth
        if not 1 <= depth <= self.depth:
            raise ValueError(f"this ResidualQuantizer has {self.depth} codes for each latent, {depth} are asked for")
        return depth

    def lookup(self, tokens: Tensor) -> Tensor:
        """The sums of the codes of ids `(B, *grid, depth)`; of fewer codes than there are those of the first."""
        self._checked(tokens.shape[-1])
        z_q = torch.zeros_like(self.precision)
        for number, ids in enumerate(tokens.unbind(dim=-1)):
            z_q = z_q + self.codebook(number).lookup(ids)
        return z_q

    def components(self, tokens: Tensor) -> dict[str, Component]:
        """Name the ids of each depth: `depth_0`, ..."""
        split = enumerate(tokens.unbind(dim=-1))
        return {f"depth_{number}": Component(ids, self.vocab_size) for number, ids in split}

    @torch.no_grad()
    def code_tables(self) -> Tensor:
        every = torch.arange(self.vocab_size, device=self.precision.device)
        return torch.stack([self.codebook(number).lookup(every) for number in range(self.depth)])

    @torch.no_grad()
    def soft_encode(self, latents: Tensor, *, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the code of each depth by its distance, and give the laws that they were drawn from.

        `Q(k | r_{d-1}) ~ exp(-|r_{d-1} - e_k|^2 / temperature)`, and r_d is what the drawn code leaves (Lee et al.,
        2022, section 3.2.3, eq. 12): stochastic codes and soft labels for a generator.

        Args:
            latents: `(B, *grid, D)`.
            temperature: tau > 0; as it goes to 0 the codes become those of `encode`.
            uniforms: `(B, *grid, depth)` float64 in (0, 1), which decide the draws.

        Returns:
            Ids `(B, *grid, depth)` int64, and probabilities `(B, *grid, depth, K)`.
        """
        with full_precision(latents.device):
            residual, ids, laws = latents.to(self.precision.dtype), [], []
            every = torch.arange(self.vocab_size, device=latents.device)
            for number, numbers in enumerate(uniforms.unbind(dim=-1)):
                codes = self.codebook(number).lookup(every)
                # Without |r|^2, which is the same for every code.
                affinity = 2 * residual @ codes.T - codes.square().sum(dim=-1)
                laws.append((affinity / temperature).softmax(dim=-1))
                cumulative = laws[-1].cumsum(dim=-1, dtype=torch.float64)
                target = numbers[..., None] * cumulative[..., -1:]
                found = torch.searchsorted(cumulative, target, right=True)[..., 0]
                ids.append(found.clamp(max=self.vocab_size - 1))
                residual = residual - codes[ids[-1]]
            return torch.stack(ids, dim=-1), torch.stack(laws, dim=-2)

    @torch.no_grad()
    def near_ids(self, tokens: Tensor, count: int) -> Tensor:
        """Find the other ids whose codes are nearest, among the codes of each id's own depth."""
        self.check_near(count)
        every = torch.arange(self.vocab_size, device=tokens.device)
        near = (
            near_codes(ids, self.codebook(number).lookup(every), count)
            for number, ids in enumerate(tokens.unbind(dim=-1))
        )
        return torch.stack(list(near), dim=-2)
