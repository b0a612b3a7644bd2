"""Gumbel-softmax quantisation (Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021: DALL-E's dVAE)."""

from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.distributed import rank
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.tokenizers.quantizers.gradient_estimators import through_probabilities
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer

# Noise is drawn for this many logits at once: the draw's 64-bit words take some 100 bytes each.
_DRAWN_AT_ONCE = 2**22


class GumbelQuantizer(Quantizer):
    """A linear classifier from latents to K logits, and a relaxed sample of the id in training.

    In training, with standard Gumbel noise g, the relaxed one-hot is `y = softmax((logits + g) / temperature)` (Jang
    et al., 2017, eq. 2), the ids are its argmax, and the codes are `y @ codes` (DALL-E), or with `hard` the chosen
    code, whose gradient is that of `y @ codes` (taming). In evaluation and `encode` the id is the argmax of the logits,
    without noise. The loss is the divergence from the uniform prior, `kl_weight` times the mean over places of
    `sum q log(q K)`, in nats.

    The noise of a training step is a function of (seed, number of training steps, row in the joined batch of all
    ranks), so neither a resume nor the number of ranks changes it; ranks must hold equally many rows.

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

    def __init__(
        self,
        codebook_size: int,
        dim: int,
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
        with torch.autocast(latents.device.type, enabled=False):
            logits = self.to_logits(latents.float().reshape(-1, self.latent_dim))  # (n, K)
            log_probabilities = logits.log_softmax(dim=1)
            divergence = (log_probabilities.exp() * (log_probabilities + log(self.vocab_size))).sum(dim=1).mean()
            if noise is not None:
                if noise.shape != (*latents.shape[:-1], self.vocab_size):
                    raise ValueError(
                        f"noise must have the shape of the logits, {(*latents.shape[:-1], self.vocab_size)}, "
                        f"got {tuple(noise.shape)}"
                    )
                noise = noise.float().reshape(logits.shape)
            elif self.training:
                noise = self._draw(len(logits))
            if noise is None:
                ids = logits.argmax(dim=1)
                codes = self.lookup(ids)
            else:
                relaxed = ((logits + noise) / temperature).softmax(dim=1)
                ids = (logits.detach() + noise).argmax(dim=1)
                codes = (
                    through_probabilities(self.lookup(ids), relaxed, self.codes) if self.hard else relaxed @ self.codes
                )
            shape = latents.shape[:-1]
            return Quantized(codes.reshape(*shape, self.dim), ids.reshape(shape), {"kl": kl_weight * divergence})

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Ids `(B, ...)` of the largest logits of latents `(B, ..., latent_dim)`."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.to_logits(latents.float()).argmax(dim=-1)

    def lookup(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codes)

    @torch.no_grad()
    def _draw(self, rows: int) -> Tensor:
        """Standard Gumbel noise `(rows, K)` of this step."""
        places = torch.arange(rows, device=self.steps.device) + rank() * rows
        indices = (self.steps << 32) + places
        self.steps += 1
        at_once = max(1, _DRAWN_AT_ONCE // self.vocab_size)
        return torch.cat(
            [
                CounterRandom(self.seed, part).gumbel(Purpose.CODE_NOISE, self.vocab_size).float()
                for part in indices.split(at_once)
            ]
        )
