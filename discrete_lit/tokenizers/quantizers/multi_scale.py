"""Multi-scale residual quantisation, the tokenizer of VAR (Tian et al., "Visual Autoregressive Modeling", 2024).

Latents f on a grid become ids at S growing scales, each of what the scales before left (algorithm 1), and come
back as f_hat (algorithm 2):

    for k = 1, ..., S:                                     f_hat = 0
        r_k = nearest codes of f averaged to h_k x w_k     for k = 1, ..., S:
        z_k = codes of r_k interpolated to the grid            z_k = codes of r_k interpolated to the grid
        f = f - phi_k(z_k)                                     f_hat = f_hat + phi_k(z_k)

VAR's scales are squares. On other grids each has a height and a width of its own, as in the tables of Infinity, VAR's
successor for images of any aspect ratio (Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling", 2024).
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.images import height_and_width, normal_size, size_text
from discrete_lit.core.modules import full_precision
from discrete_lit.tokenizers.quantizers.codebook import Codebook, CodebookInit, CodebookUpdate
from discrete_lit.tokenizers.quantizers.gradient_estimators import straight_through
from discrete_lit.tokenizers.quantizers.quantizer import Component, Quantized, Quantizer


class _Step(NamedTuple):
    """One scale k of algorithm 1."""

    pooled: Tensor
    """`(B, h, w, D)`: what the scales before left of f, averaged to the scale."""
    ids: Tensor
    """`(B, h, w)`: r_k."""
    contribution: Tensor
    """`(B, D, H, W)`: phi_k(z_k)."""


class MultiScaleQuantizer(Quantizer):
    """Quantize at growing scales: algorithms 1 and 2, and what a next-scale predictor reads.

    A subclass says which codes there are (`search`, `codes_of`) and how those of a scale come to the whole grid
    (`enlarged`). Ids are `(B, sum of h w)`: the scales from the smallest on, each row by row. Internally grids are
    `(B, D, H, W)`.

    Args:
        vocab_size: K, ids of each place.
        dim: D.
        scales: in growing order, the last that of the latent grid: sides of squares, or `[h, w]`.

    Raises:
        ValueError: scales that do not grow; in use, a grid other than the last scale's.
    """

    def __init__(self, vocab_size: int, dim: int, *, scales: Sequence[int | tuple[int, int]]) -> None:
        super().__init__()
        rule = f"scales must be positive and grow, got {list(scales)}"
        sizes = [height_and_width(scale, f"{rule}: a scale") for scale in scales]
        grow = all(low[0] <= high[0] and low[1] <= high[1] and low != high for low, high in pairwise(sizes))
        if not sizes or not grow:
            raise ValueError(f"{rule}; neither height nor width may shrink")
        self.vocab_size = vocab_size
        self.dim = dim
        self.scales = tuple(normal_size(scale) for scale in scales)
        self.sizes = sizes
        self.lengths = [height * width for height, width in sizes]

    @abstractmethod
    def search(self, pooled: Tensor) -> Tensor:
        """Find the ids `(B, h, w)` of latents `(B, h, w, D)` at a scale."""

    @abstractmethod
    def codes_of(self, ids: Tensor) -> Tensor:
        """Look up the codes `(..., D)` of ids `(...)`."""

    @abstractmethod
    def enlarged(self, number: int, codes: Tensor) -> Tensor:
        """Bring codes `(B, h, w, D)` of scale `number`, counted from 0, to the whole grid: `(B, D, H, W)`."""

    def token_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        if tuple(grid) != self.sizes[-1]:
            raise ValueError(
                f"the latent grid is {' x '.join(map(str, grid))}, and the scales {list(self.scales)} end at "
                f"{' x '.join(map(str, self.sizes[-1]))}: another image size needs scales that end at its grid, "
                "[height, width] where it is not square"
            )
        return (sum(self.lengths),)

    def _algorithm_1(self, latents: Tensor) -> Iterator[_Step]:
        """Quantise latents `(B, H, W, D)` scale by scale."""
        f = rearrange(latents, "b h w d -> b d h w")
        for number in range(len(self.scales)):
            pooled = rearrange(self.averaged(number, f), "b d h w -> b h w d")
            ids = self.search(pooled)
            contribution = self.enlarged(number, self.codes_of(ids))
            f = f - contribution.detach()
            yield _Step(pooled, ids, contribution)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        with full_precision(latents.device):
            self.token_shape(tuple(latents.shape[1:-1]))  # refuses other grids
            return in_sequence([step.ids for step in self._algorithm_1(latents.to(self.precision.dtype))])

    def lookup(self, tokens: Tensor) -> Tensor:
        """Compute f_hat `(B, H, W, D)` by algorithm 2, of ids `(B, sum of h w)`."""
        f_hat = None
        for number, ids in enumerate(self.split(tokens)):
            contribution = self.contribution(number, ids)
            f_hat = contribution if f_hat is None else f_hat + contribution
        assert f_hat is not None
        return rearrange(f_hat, "b d h w -> b h w d")

    def averaged(self, number: int, grid: Tensor) -> Tensor:
        """Average a grid `(B, D, H, W)` over areas to scale `number`: `(B, D, h, w)`."""
        if number == len(self.scales) - 1:
            return grid
        return F.interpolate(grid, size=self.sizes[number], mode="area")

    # Sequences of ids: what a next-scale predictor needs, in training and while sampling.

    def components(self, tokens: Tensor) -> dict[str, Component]:
        """Name the ids of each scale by its side, `scale_1`, ..., or its height and width, `scale_2x3`."""
        names = [f"scale_{scale}" if isinstance(scale, int) else f"scale_{size_text(scale)}" for scale in self.scales]
        split = zip(names, self.split(tokens), strict=True)
        return {name: Component(ids, self.vocab_size) for name, ids in split}

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Split ids `(B, sum of h w)` into `(B, h w)` for each scale.

        Raises:
            ValueError: ids of other scales.
        """
        if tokens.ndim != 2 or tokens.shape[1] != sum(self.lengths):
            raise ValueError(
                f"ids of the scales {list(self.scales)} have shape (B, {sum(self.lengths)}), got {tuple(tokens.shape)}"
            )
        return tokens.split(self.lengths, dim=1)

    def contribution(self, number: int, ids: Tensor) -> Tensor:
        """Compute what ids `(B, h w)` of scale `number`, counted from 0, add to f_hat: `(B, D, H, W)`."""
        height, _ = self.sizes[number]
        return self.enlarged(number, self.codes_of(rearrange(ids, "b (h w) -> b h w", h=height)))

    def at_scale(self, number: int, f_hat: Tensor) -> Tensor:
        """Average f_hat `(B, D, H, W)` over areas to scale `number`, counted from 0: `(B, h w, D)`."""
        return rearrange(self.averaged(number, f_hat), "b d h w -> b (h w) d")

    def cumulative(self, tokens: Tensor) -> Tensor:
        """Compute f_hat after each scale, `(S, B, D, H, W)`, of ids `(B, sum of h w)`."""
        contributions = [self.contribution(number, ids) for number, ids in enumerate(self.split(tokens))]
        return torch.stack(contributions).cumsum(dim=0)

    def teacher_forcing(self, tokens: Tensor) -> Tensor:
        """Compute what a next-scale predictor is given for every scale but the first (VAR, section 3.2).

        Args:
            tokens: `(B, sum of h w)`.

        Returns:
            `(B, sum of h w - first h w, D)`: f_hat after the scales before, averaged down to each scale.
        """
        before = self.cumulative(tokens)[:-1]
        shrunk = [self.at_scale(number, f_hat) for number, f_hat in enumerate(before, start=1)]
        return torch.cat([tokens.new_zeros(len(tokens), 0, self.dim, dtype=before.dtype), *shrunk], dim=1)


class MultiScaleResidualQuantizer(MultiScaleQuantizer):
    """Quantise a grid of latents at growing scales, each of what those before it left of the whole grid.

    Averages are over areas, the interpolation is bicubic, and `phi(h) = (1 - phi_ratio) h + phi_ratio conv(h)`, whose
    convolution neighbouring scales share. The last scale is the grid's own. The code vectors are f_hat, the sum of all
    contributions phi_k(z_k). The losses, as in the released code, compare f_hat after every scale with the latents f, a
    mean over scales of means over elements: `commitment`, `commitment_weight * |sg(f_hat) - f|^2`, and `codebook`,
    `|f_hat - sg(f)|^2`, which trains the convolutions and, with `codebook_update="gradient"`, the codes. In training
    `forward` moves the buffers of the `Codebook`, once a batch.

    Ids are `(B, sum of h w)`: the scales from the smallest on, each row by row. Internally grids are `(B, D, H, W)`.

    Args:
        codebook_size: K, of the one codebook of all scales.
        dim: D.
        scales: in growing order, the last that of the latent grid: sides of squares, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16
            for VAR at 256 pixels, 1, 2, 3, 4, 6, 9, 13, 18, 24, 32 at 512; or `[h, w]`, as in 1, [1, 2], [4, 6].
        phi_kernels: number of convolutions; both they and the scales are spread over [0, 1], and a scale takes the
            nearest one.
        phi_ratio: weight of the convolution in phi, in [0, 1]; 0 has no convolution.
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
        *,
        scales: Sequence[int | tuple[int, int]],
        phi_kernels: int = 4,
        phi_ratio: float = 0.5,
        codebook_update: CodebookUpdate = "gradient",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: CodebookInit = "normal",
        revive_below: float | None = None,
    ) -> None:
        super().__init__(codebook_size, dim, scales=scales)
        if phi_kernels < 1:
            raise ValueError(f"phi_kernels must be positive, got {phi_kernels}")
        if not 0 <= phi_ratio <= 1:
            raise ValueError(f"phi_ratio must lie in [0, 1], got {phi_ratio}")
        if commitment_weight < 0:
            raise ValueError(f"commitment_weight must be >= 0, got {commitment_weight}")
        self.codebook = Codebook(
            codebook_size, dim, update=codebook_update, decay=decay, init=codebook_init, revive_below=revive_below
        )
        self.commitment_weight = commitment_weight
        self.phi_ratio = phi_ratio
        self.phi = nn.ModuleList(_identity_convolution(dim) for _ in range(phi_kernels if phi_ratio else 0))
        # The convolutions lie in [0, 1] as the released code spreads them; the first wins where two are as near.
        margin = 1 / 3 / phi_kernels if phi_kernels == 4 else 1 / 2 / phi_kernels
        centres = np.linspace(margin, 1 - margin, phi_kernels)
        last = max(len(scales) - 1, 1)
        self.phi_of_scale = [int(np.argmin(np.abs(centres - number / last))) for number in range(len(scales))]

    def forward(self, latents: Tensor) -> Quantized:
        with full_precision(latents.device):
            self.token_shape(tuple(latents.shape[1:-1]))  # refuses other grids
            latents = latents.to(self.precision.dtype)
            self.codebook.prepare(latents)
            f = rearrange(latents, "b h w d -> b d h w")
            f_hat = torch.zeros_like(f)
            commitment, codebook = f_hat.new_zeros(()), f_hat.new_zeros(())
            steps = []
            for step in self._algorithm_1(latents.detach()):
                f_hat = f_hat + step.contribution
                commitment = commitment + F.mse_loss(f_hat.detach(), f)
                codebook = codebook + F.mse_loss(f_hat, f.detach())
                steps.append(step)
            count = len(self.scales)
            losses = {"commitment": self.commitment_weight * commitment / count, "codebook": codebook / count}
            tokens = in_sequence([step.ids for step in steps])
            z_q = straight_through(latents, rearrange(f_hat, "b d h w -> b h w d"))
            self.codebook.observe(in_sequence([step.pooled for step in steps]), tokens)
            return Quantized(z_q, tokens, losses)

    def search(self, pooled: Tensor) -> Tensor:
        return self.codebook.search(pooled)

    def codes_of(self, ids: Tensor) -> Tensor:
        return self.codebook.lookup(ids)

    def enlarged(self, number: int, codes: Tensor) -> Tensor:
        """Compute phi_k(z_k) `(B, D, H, W)` of the codes `(B, h, w, D)` of scale `number`."""
        z = rearrange(codes, "b h w d -> b d h w")
        if number < len(self.scales) - 1:
            z = F.interpolate(z, size=self.sizes[-1], mode="bicubic")
        if not self.phi_ratio:
            return z
        with full_precision(z.device):
            convolved = self.phi[self.phi_of_scale[number]](z)
        return (1 - self.phi_ratio) * z + self.phi_ratio * convolved

    def code_table(self) -> Tensor:
        """List the codes `(K, D)` that all scales share, before they are enlarged and convolved."""
        return self.codebook.lookup(torch.arange(self.vocab_size, device=self.precision.device))

    def raw_codes(self, ids: Tensor) -> Tensor:
        """Look up ids `(B, H W)` of the last scale without phi: `(B, D, H, W)`, what a residual is added to (HART)."""
        height, _ = self.sizes[-1]
        return rearrange(self.codebook.lookup(ids), "b (h w) d -> b d h w", h=height)

    def before_residual(self, tokens: Tensor) -> Tensor:
        """Add up what a residual is added to: f_hat of all scales but the last, and the last one's codes without phi.

        HART's residual is what this leaves of the latents (Tang et al., "HART", 2024). It is no f_hat of `lookup`,
        whose last codes go through phi.

        Args:
            tokens: `(B, sum of h w)`.

        Returns:
            `(B, D, H, W)`.
        """
        *coarse, last = self.split(tokens)
        total = self.raw_codes(last)
        for number, ids in enumerate(coarse):
            total = total + self.contribution(number, ids)
        return total


def in_sequence(grids: list[Tensor]) -> Tensor:
    """Join grids `(B, h, w, ...)` of all scales, each row by row: `(B, sum of h w, ...)`."""
    return torch.cat([rearrange(grid, "b h w ... -> b (h w) ...") for grid in grids], dim=1)


def _identity_convolution(dim: int) -> nn.Conv2d:
    """Make a 3 x 3 convolution that starts as the identity: a random one would distort the codes it should refine."""
    convolution = nn.Conv2d(dim, dim, 3, padding=1)
    nn.init.dirac_(convolution.weight)
    nn.init.zeros_(convolution.bias)  # pyright: ignore[reportArgumentType]
    return convolution
