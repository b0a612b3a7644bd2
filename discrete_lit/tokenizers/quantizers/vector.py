"""Vector quantisation with a codebook (van den Oord et al., "Neural Discrete Representation Learning", 2017)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.distributed import all_gather_rows, all_reduce_sum
from discrete_lit.tokenizers.quantizers.quantizer import Quantized, Quantizer

# Distances are formed for this many (row, code) pairs at once: 64 MB of float32.
_PAIRS_AT_ONCE = 2**24


class VectorQuantizer(Quantizer):
    """Nearest code of a codebook, with the straight-through gradient.

    The loss is eq. 3 of the paper: a codebook term `|sg(z) - e|^2` (only with `codebook_update="gradient"`) and a
    commitment term `commitment_weight * |z - sg(e)|^2`, each a mean over all elements.

    Args:
        codebook_size: K.
        dim: D.
        codebook_update: `"ema"` moves codes to the running mean of their latents (appendix A.1; no gradient, the
            statistics are summed over ranks), `"gradient"` trains them by the codebook term.
        commitment_weight: beta of eq. 3.
        decay: gamma of appendix A.1; used by `"ema"` only.
        codebook_init: `"data"` takes the first codes from the latents of the first training batch, `"uniform"` from
            [-1 / K, 1 / K], where taming, LlamaGen and others begin: far from the latents, most codes are never used.

    Raises:
        ValueError: a setting out of its range.
    """

    codebook: Tensor
    started: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        codebook_update: Literal["ema", "gradient"] = "ema",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: Literal["data", "uniform"] = "data",
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"codebook_size and dim must be positive, got {codebook_size} and {dim}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if commitment_weight < 0:
            raise ValueError(f"commitment_weight must be >= 0, got {commitment_weight}")
        self.vocab_size = codebook_size
        self.dim = dim
        self.codebook_update = codebook_update
        self.commitment_weight = commitment_weight
        self.decay = decay
        codes = torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        if codebook_update == "gradient":
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
            self.register_buffer("cluster_size", torch.ones(codebook_size))
            self.register_buffer("embedding_sum", codes.clone())
        self._may_start = codebook_init == "data"
        if self._may_start:
            self.register_buffer("started", torch.tensor(False))

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            if self.training and self._may_start:
                self._start(latents.detach().reshape(-1, self.dim))
            tokens = self.encode(latents)
            codes = self.lookup(tokens)
            losses = {"commitment": self.commitment_weight * F.mse_loss(latents, codes.detach())}
            if self.codebook_update == "gradient":
                losses["codebook"] = F.mse_loss(codes, latents.detach())
            elif self.training:
                self._update_codebook(latents.detach().reshape(-1, self.dim), tokens.reshape(-1))
            # The codes looked up before the update: the ones that the losses and the tokens speak of.
            return Quantized(codes.detach() + (latents - latents.detach()), tokens, losses)

    def lookup(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codebook)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Ids `(B, ...)` of the codes nearest in Euclidean distance to latents `(B, ..., D)`."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._nearest(latents.float())

    def _nearest(self, latents: Tensor) -> Tensor:
        rows = latents.reshape(-1, self.dim)
        offsets = self.codebook.square().sum(dim=1)
        tokens = [
            # |z - e|^2 without the term |z|^2, which is the same for every code.
            torch.addmm(offsets, part, self.codebook.T, alpha=-2).argmin(dim=1)
            for part in rows.split(max(1, _PAIRS_AT_ONCE // self.vocab_size))
        ]
        return torch.cat(tokens).reshape(latents.shape[:-1])

    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        """Take the codes from the latents `(n, D)` of all ranks, unless a checkpoint brought codes."""
        self._may_start = False  # `started` is read once: reading it on every step would wait for the device
        if self.started:
            return
        everyone = all_gather_rows(rows)
        # Evenly along the first channel: the same codes however the batch is split over ranks.
        places = (torch.arange(self.vocab_size, device=rows.device) * 2 + 1) * len(everyone) // (2 * self.vocab_size)
        self.codebook.copy_(everyone[everyone[:, 0].argsort()[places]])
        if self.codebook_update == "ema":
            self.embedding_sum.copy_(self.codebook)
        self.started.fill_(True)

    @torch.no_grad()
    def _update_codebook(self, rows: Tensor, tokens: Tensor) -> None:
        """Appendix A.1, eq. 6-8, on the latents `(n, D)` of all ranks together."""
        counts = torch.zeros_like(self.cluster_size).index_add_(0, tokens, torch.ones_like(rows[:, 0]))
        sums = torch.zeros_like(self.embedding_sum).index_add_(0, tokens, rows)
        counts, sums = all_reduce_sum(counts), all_reduce_sum(sums)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embedding_sum.lerp_(sums, 1 - self.decay)
        # Laplace smoothing keeps the codes of empty clusters finite.
        total, smoothing = self.cluster_size.sum(), 1e-5
        size = (self.cluster_size + smoothing) / (total + self.vocab_size * smoothing) * total
        self.codebook.copy_(self.embedding_sum / size[:, None])
