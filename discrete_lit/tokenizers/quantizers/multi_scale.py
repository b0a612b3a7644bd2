"""Multi-scale residual quantisation (Tian et al., "Visual Autoregressive Modeling", 2024, algorithms 1 and 2)."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers.codebook import Codebook, CodebookInit, CodebookUpdate
from discrete_lit.tokenizers.quantizers.gradient_estimators import straight_through
from discrete_lit.tokenizers.quantizers.quantizer import Component, Quantized, Quantizer


class _Step(NamedTuple):
    """One scale of algorithm 1."""

    latents: Tensor
    """`(B, s, s, D)`: what remained, averaged down to the scale."""
    ids: Tensor
    """`(B, s, s)`."""
    contribution: Tensor
    """`(B, D, H, W)`."""


class MultiScaleResidualQuantizer(Quantizer):
    """Quantises a square grid at growing scales: each codes what those before it left of the whole grid.

    At scale s the rest is averaged over areas down to s x s; its nearest codes are interpolated (bicubic) to the grid
    and pass `phi(h) = (1 - phi_ratio) h + phi_ratio conv(h)`, of which neighbouring scales share one convolution; the
    result, the scale's contribution, is subtracted from the rest. The code vectors, f_hat, are the sum of all
    contributions. The last scale is the grid's own. The losses, as in the released code, compare f_hat after every
    scale with the latents f, a mean over scales of means over elements: `commitment_weight * |sg(f_hat) - f|^2`, and
    `|f_hat - sg(f)|^2`, which trains the convolutions and, with `"gradient"`, the codes.

    Ids are `(B, sum of s^2)`: the scales from the smallest on, each row by row. Internally grids are `(B, D, H, W)`.

    Args:
        codebook_size: K, of the one codebook of all scales.
        dim: D.
        scales: sides s in growing order, the last that of the latent grid: 1, 2, 3, 4, 5, 6, 8, 10, 13, 16 for VAR at
            256 pixels, 1, 2, 3, 4, 6, 9, 13, 18, 24, 32 at 512.
        phi_kernels: convolutions; a scale takes the one whose place in [0, 1] is nearest to its own.
        phi_ratio: share of the convolution; 0 has none.
        codebook_update: `"gradient"` as VAR; `"ema"` moves codes once a batch by the latents of all scales.
        commitment_weight: beta.
        decay: of `"ema"` and of the usage.
        codebook_init: where the codes begin, see `Codebook`. Codes taken from an untrained encoder's latents are so
            near to one another that all scales but the last may stay with one of them.
        revive_below: replace codes whose usage, over all scales, falls below this; None keeps them.

    Raises:
        ValueError: a setting out of its range; in use, a grid other than the last scale's.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        scales: Sequence[int],
        phi_kernels: int = 4,
        phi_ratio: float = 0.5,
        codebook_update: CodebookUpdate = "gradient",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: CodebookInit = "normal",
        revive_below: float | None = None,
    ) -> None:
        super().__init__()
        if not scales or scales[0] < 1 or any(small >= large for small, large in pairwise(scales)):
            raise ValueError(f"scales must be positive and grow, got {list(scales)}")
        if phi_kernels < 1:
            raise ValueError(f"phi_kernels must be positive, got {phi_kernels}")
        if not 0 <= phi_ratio <= 1:
            raise ValueError(f"phi_ratio must lie in [0, 1], got {phi_ratio}")
        if commitment_weight < 0:
            raise ValueError(f"commitment_weight must be >= 0, got {commitment_weight}")
        self.vocab_size = codebook_size
        self.dim = dim
        self.scales = tuple(scales)
        self.lengths = [scale * scale for scale in scales]
        self.codebook = Codebook(codebook_size, dim, codebook_update, decay, codebook_init, revive_below=revive_below)
        self.commitment_weight = commitment_weight
        self.phi_ratio = phi_ratio
        self.phi = nn.ModuleList(_identity_convolution(dim) for _ in range(phi_kernels if phi_ratio else 0))
        # Places of the convolutions, as the released code spreads them; the first wins where two are as near.
        margin = 1 / 3 / phi_kernels if phi_kernels == 4 else 1 / 2 / phi_kernels
        places = np.linspace(margin, 1 - margin, phi_kernels)
        last = max(len(scales) - 1, 1)
        self.phi_of_scale = [int(np.argmin(np.abs(places - number / last))) for number in range(len(scales))]

    def token_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        side = self.scales[-1]
        if tuple(grid) != (side, side):
            raise ValueError(
                f"the latent grid is {' x '.join(map(str, grid))}, and the scales {list(self.scales)} end at {side}: "
                "another image size needs scales that end at its grid"
            )
        return (sum(self.lengths),)

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            self.codebook.prepare(latents)
            target = latents.movedim(-1, 1)
            f_hat = torch.zeros_like(target)
            commitment, codebook = f_hat.new_zeros(()), f_hat.new_zeros(())
            steps = []
            for step in self._steps(latents.detach()):
                f_hat = f_hat + step.contribution
                commitment = commitment + F.mse_loss(f_hat.detach(), target)
                codebook = codebook + F.mse_loss(f_hat, target.detach())
                steps.append(step)
            count = len(self.scales)
            losses = {"commitment": self.commitment_weight * commitment / count, "codebook": codebook / count}
            tokens = torch.cat([step.ids.flatten(1) for step in steps], dim=1)
            quantized = Quantized(straight_through(latents, f_hat.movedim(1, -1)), tokens, losses)
            self.codebook.observe(torch.cat([step.latents.flatten(1, 2) for step in steps], dim=1), tokens)
            return quantized

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([step.ids.flatten(1) for step in self._steps(latents.float())], dim=1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """f_hat `(B, H, W, D)` after the last scale, of ids `(B, sum of s^2)`."""
        f_hat = None
        for number, ids in enumerate(self.split(tokens)):
            contribution = self.contribution(number, ids)
            f_hat = contribution if f_hat is None else f_hat + contribution
        assert f_hat is not None
        return f_hat.movedim(1, -1)

    def components(self, tokens: Tensor) -> dict[str, Component]:
        """`scale_1`, ..., by their sides."""
        split = zip(self.scales, self.split(tokens), strict=True)
        return {f"scale_{scale}": Component(ids, self.vocab_size) for scale, ids in split}

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Ids `(B, sum of s^2)` as `(B, s^2)` for each scale.

        Raises:
            ValueError: ids of other scales.
        """
        if tokens.ndim != 2 or tokens.shape[1] != sum(self.lengths):
            raise ValueError(
                f"ids of the scales {list(self.scales)} have shape (B, {sum(self.lengths)}), got {tuple(tokens.shape)}"
            )
        return tokens.split(self.lengths, dim=1)

    def contribution(self, number: int, ids: Tensor) -> Tensor:
        """What the ids `(B, s^2)` of scale `number`, counted from 0, add to f_hat: `(B, D, H, W)` float32."""
        return self._contribution(number, self.codebook.lookup(ids.unflatten(1, (self.scales[number], -1))))

    def at_scale(self, number: int, f_hat: Tensor) -> Tensor:
        """f_hat `(B, D, H, W)` averaged over areas to scale `number`, counted from 0: `(B, s^2, D)`."""
        return self._down(number, f_hat).flatten(2).transpose(1, 2)

    def cumulative(self, tokens: Tensor) -> Tensor:
        """f_hat after each scale, `(S, B, D, H, W)`, of ids `(B, sum of s^2)`."""
        contributions = [self.contribution(number, ids) for number, ids in enumerate(self.split(tokens))]
        return torch.stack(contributions).cumsum(dim=0)

    def teacher_forcing(self, tokens: Tensor) -> Tensor:
        """What a next-scale predictor is given for every scale but the first (VAR, section 3.2).

        Args:
            tokens: `(B, sum of s^2)`.

        Returns:
            `(B, sum of s^2 - first s^2, D)`: f_hat after the scales before, averaged down to each scale.
        """
        before = self.cumulative(tokens)[:-1]
        shrunk = [self.at_scale(number, f_hat) for number, f_hat in enumerate(before, start=1)]
        return torch.cat([tokens.new_zeros(len(tokens), 0, self.dim, dtype=before.dtype), *shrunk], dim=1)

    def _steps(self, latents: Tensor) -> Iterator[_Step]:
        """Algorithm 1 on latents `(B, H, W, D)`."""
        self.token_shape(tuple(latents.shape[1:-1]))
        rest = latents.movedim(-1, 1)
        for number in range(len(self.scales)):
            pooled = self._down(number, rest).movedim(1, -1)
            ids = self.codebook.search(pooled)
            contribution = self._contribution(number, self.codebook.lookup(ids))
            rest = rest - contribution.detach()
            yield _Step(pooled, ids, contribution)

    def _down(self, number: int, grid: Tensor) -> Tensor:
        if number == len(self.scales) - 1:
            return grid
        return F.interpolate(grid, size=(self.scales[number],) * 2, mode="area")

    def _contribution(self, number: int, codes: Tensor) -> Tensor:
        spread = codes.movedim(-1, 1)
        if number < len(self.scales) - 1:
            spread = F.interpolate(spread, size=(self.scales[-1],) * 2, mode="bicubic")
        if not self.phi_ratio:
            return spread
        convolved = self.phi[self.phi_of_scale[number]](spread)
        return (1 - self.phi_ratio) * spread + self.phi_ratio * convolved


def _identity_convolution(dim: int) -> nn.Conv2d:
    """A 3 x 3 convolution that begins as the identity: a random one would distort every code it is to bring nearer."""
    convolution = nn.Conv2d(dim, dim, 3, padding=1)
    nn.init.dirac_(convolution.weight)
    nn.init.zeros_(convolution.bias)  # pyright: ignore[reportArgumentType]
    return convolution
