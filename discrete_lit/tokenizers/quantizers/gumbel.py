"""Gumbel-softmax quantisation: DALL-E's dVAE (Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021).

A linear layer gives logits l over K ids, so q(k | z) = softmax(l). Training draws a relaxed sample with standard Gumbel
noise g and temperature tau (Jang et al., "Categorical Reparameterization with Gumbel-Softmax", 2017, eq. 2):

    y = softmax((l + g) / tau),   k = argmax(l + g)
    z_q = sum_k y_k e_k                      DALL-E
    z_q = e_k, with the gradient of that sum taming's `hard`
    loss = kl_weight * KL(q, uniform)
"""

from math import log

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.distributed import rank, world_size
from discrete_lit.core.modules import RunningStatistics, full_precision
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.tokenizers.quantizers.gradient_estimators import through_probabilities
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer

# Noise is drawn for this many logits at once: the draw's 64-bit words take some 100 bytes each.
_DRAWN_AT_ONCE = 2**22


class GumbelQuantizer(Quantizer, RunningStatistics):
    """Classify latents as one of K ids, in training by a relaxed sample.

    In evaluation and `encode` the id is the argmax of the logits, without noise. The loss `kl` is the divergence from
    the uniform prior, `kl_weight` times the mean over positions of `sum q log(q K)`, in nats.

    The noise that training draws is a function of (seed, number of training steps, row in the joined batch of all
    ranks and micro-batches), so neither a resume nor the number of ranks changes it; ranks must hold equally many rows.
    The number of training steps is the buffer `steps`, the one thing that moves in `forward`.

    Args:
        codebook_size: K.
        dim: D.
        latent_dim: width of the latents; D if None.
        kl_weight: of the divergence. DALL-E's is 6.6 / 192 beside a reconstruction term that is a mean over
            pixels and channels; taming's 1e-8.
        temperature: of the relaxation, unless a call gives another. DALL-E goes from 1 to 1/16.
        hard: the forward pass sees one code, not a mixture.
        seed: of the noise.

    Raises:
        ValueError: a setting out of its range, or noise of another shape than the logits.
    """

    steps: Tensor
    """int64: steps of training that drew noise."""

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        latent_dim: int | None = None,
        kl_weight: float = 6.6 / 192,
        temperature: float = 1.0,
        hard: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1 or (latent_dim is not None and latent_dim < 1):
            raise ValueError(
                f"codebook_size, dim and latent_dim must be positive, got {codebook_size}, {dim} and {latent_dim}"
            )
        if kl_weight < 0:
            raise ValueError(f"kl_weight must be >= 0, got {kl_weight}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.vocab_size = codebook_size
        self.dim = dim
        self.kl_weight = kl_weight
        self.temperature = temperature
        self.hard = hard
        self.seed = seed
        self.to_logits = nn.Linear(dim if latent_dim is None else latent_dim, codebook_size)
        self.codes = nn.Parameter(torch.randn(codebook_size, dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._drawn_rows = 0  # in this step, over all ranks

    @property
    def latent_dim(self) -> int:
        return self.to_logits.in_features

    def forward(
        self,
        latents: Tensor,
        *,
        noise: Tensor | None = None,
        temperature: float | None = None,
        kl_weight: float | None = None,
    ) -> Quantized:
        """Quantise latents `(B, *grid, latent_dim)`, in training by a relaxed sample.

        Args:
            latents: of any grid.
            noise: `(B, *grid, K)` standard Gumbel, in place of what training draws, or of none in evaluation.
            temperature: of the relaxation at this step; None takes the constructor's.
            kl_weight: of the divergence at this step; None takes the constructor's.
        """
        temperature = self.temperature if temperature is None else temperature
        kl_weight = self.kl_weight if kl_weight is None else kl_weight
        grid = latents.shape[:-1]
        if noise is not None and noise.shape != (*grid, self.vocab_size):
            raise ValueError(
                f"noise must have the shape of the logits, {(*grid, self.vocab_size)}, got {tuple(noise.shape)}"
            )
        with full_precision(latents.device):
            logits = self.to_logits(rearrange(latents.to(self.precision.dtype), "... d -> (...) d"))  # (n, K)
            log_q = logits.log_softmax(dim=1)
            kl = (log_q.exp() * (log_q + log(self.vocab_size))).sum(dim=1).mean()
            if noise is not None:
                noise = rearrange(noise.to(logits.dtype), "... k -> (...) k")
            elif self.training:
                noise = self._draw(len(logits))
            if noise is None:
                ids = logits.argmax(dim=1)
                z_q = self.lookup(ids)
            else:
                y = ((logits + noise) / temperature).softmax(dim=1)
                ids = (logits.detach() + noise).argmax(dim=1)
                z_q = through_probabilities(self.lookup(ids), y, self.codes) if self.hard else y @ self.codes
            return Quantized(z_q.reshape(*grid, self.dim), ids.reshape(grid), {"kl": kl_weight * kl})

    @torch.no_grad()
    def end_step(self) -> None:
        if self._drawn_rows:
            self.steps += 1
        self._drawn_rows = 0

    def forget_step(self) -> None:
        self._drawn_rows = 0

    @torch.no_grad()
    def _draw(self, rows: int) -> Tensor:
        """Draw standard Gumbel noise `(rows, K)` for this training step, and count it."""
        row = torch.arange(rows, device=self.steps.device) + rank() * rows + self._drawn_rows
        indices = (self.steps << 32) + row
        self._drawn_rows += world_size() * rows
        if not self.accumulating:
            self.end_step()
        at_once = max(1, _DRAWN_AT_ONCE // self.vocab_size)
        return torch.cat(
            [
                CounterRandom(self.seed, some).gumbel(Purpose.CODE_NOISE, self.vocab_size).to(self.precision.dtype)
                for some in indices.split(at_once)
            ]
        )

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Ids `(B, *grid)` of the largest logits of latents `(B, *grid, latent_dim)`."""
        with full_precision(latents.device):
            return self.to_logits(latents.to(self.precision.dtype)).argmax(dim=-1)

    def lookup(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codes)
