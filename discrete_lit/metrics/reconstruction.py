"""Reconstruction quality and rate of an autoencoder: PSNR, SSIM and LPIPS of its images, usage and bits of its ids.

`pixel_fidelity` compares two batches of images, `ReconstructionFidelity` averages that over a set, and
`ReconstructionMeter` runs an autoencoder and measures all of `ReconstructionFigures` on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import isfinite, log2, prod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from discrete_lit.core.images import from_uint8, to_uint8
from discrete_lit.metrics.codebook_usage import MOST_COUNTED, CodebookUsage

# A reflection by 5 pixels, half of the window, needs one more.
_LEAST_SSIM_SIDE = 6


def pixel_fidelity(reconstructions: Tensor, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compute PSNR in decibels and SSIM of each of a batch of uint8 images `(B, C, H, W)`, both `(B,)`.

    SSIM (Wang et al., 2004, eq. 13) has a Gaussian window of 11x11 and deviation 1.5, around every pixel of every
    channel; at the border the image is reflected, as torchmetrics does and scikit-image does not. Images below 6 pixels
    of height or width cannot be reflected for that window: they have no SSIM, None.
    """
    pair = reconstructions.float(), images.float()
    psnr = peak_signal_noise_ratio(*pair, data_range=255.0, dim=(1, 2, 3), reduction="none")
    if min(images.shape[-2:]) < _LEAST_SSIM_SIDE:
        return psnr, None
    ssim = structural_similarity_index_measure(*pair, data_range=255.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return psnr, ssim


class ReconstructionFidelity(Metric):
    """Average PSNR, SSIM and, if asked for, LPIPS over images, batches and ranks.

    The sums are float64 and lie on the CPU until `.to(device)`.

    Args:
        lpips: from reconstructions and images `(B, C, H, W)` in [-1, 1] to their mean distance.
    """

    full_state_update = False
    count: Tensor
    count_ssim: Tensor
    psnr: Tensor
    ssim: Tensor
    distance: Tensor

    def __init__(self, lpips: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.lpips = lpips
        for name in ("count", "count_ssim", "psnr", "ssim", "distance"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        """Add reconstructions and their originals, both uint8 `(B, C, H, W)`."""
        psnr, ssim = pixel_fidelity(reconstructions, images)
        self.psnr += psnr.sum().to(self.psnr.device)
        if ssim is not None:
            self.ssim += ssim.sum().to(self.ssim.device)
            self.count_ssim += len(images)
        if self.lpips is not None:
            mean = self.lpips(from_uint8(reconstructions), from_uint8(images))
            self.distance += mean.to(self.distance.device).double() * len(images)
        self.count += len(images)

    def compute(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The means so far, float64 scalars: PSNR, SSIM (None of images too small for it) and LPIPS (None without)."""
        distance = None if self.lpips is None else self.distance / self.count
        ssim = None if self.count_ssim == 0 else self.ssim / self.count_ssim
        return self.psnr / self.count, ssim, distance


@dataclass(frozen=True)
class IdStatistics:
    """Usage of the ids of a set of images, or of one component of them."""

    size: int
    """K."""
    usage: float
    """Fraction of the K ids that occur, in [0, 1]."""
    perplexity: float
    """exp of the entropy of the ids in nats, in [1, K]."""

    @staticmethod
    def of(measured: CodebookUsage) -> IdStatistics:
        """Read the statistics off a metric of at least one id."""
        usage, perplexity = measured.compute()
        return IdStatistics(measured.vocab_size, float(usage), float(perplexity))


@dataclass(frozen=True, kw_only=True)
class ReconstructionFigures:
    """Figures of a set of reconstructed images; None where one does not apply, as ids of a continuous bottleneck.

    PSNR, SSIM and LPIPS are means over the images.
    """

    psnr: float
    """Decibels, on uint8 pixels."""
    ssim: float | None
    """None of images too small for its window."""
    lpips: float | None = None
    tokens: int | None = None
    """L, ids of one image."""
    vocab_size: int | None = None
    """K."""
    ids: IdStatistics | None = None
    """All ids together; None above K = 2^24, where the components alone are counted."""
    parts: dict[str, IdStatistics] = field(default_factory=dict)
    """Each component: a codebook of several, a scale, a bit."""
    pixels: int = 0
    """H·W of the images."""

    @property
    def capacity_bits(self) -> float | None:
        """The bits that the ids of an image could carry: L log2 K."""
        return None if self.vocab_size is None or self.tokens is None else self.tokens * log2(self.vocab_size)

    @property
    def entropy_bits(self) -> float | None:
        """The bits that they carry at most, as measured: L times the entropy of the ids over all images and positions.

        The plug-in estimate from counts: too low while there are not many more ids than K.
        """
        return None if self.ids is None or self.tokens is None else self.tokens * log2(self.ids.perplexity)

    @property
    def bits_per_pixel(self) -> float | None:
        """The capacity over H·W."""
        return None if self.capacity_bits is None else self.capacity_bits / self.pixels

    def to_dict(self) -> dict[str, Any]:
        """Give every figure as plain data; JSON has no infinity, so the PSNR of exact reconstructions is None."""
        derived = {name: getattr(self, name) for name in ("capacity_bits", "entropy_bits", "bits_per_pixel")}
        return {**asdict(self), "psnr": self.psnr if isfinite(self.psnr) else None, **derived}


class ReconstructionMeter:
    """Encode and decode images, and measure on the way.

    Args:
        autoencoder: a Tokenizer, or a continuous autoencoder: `decode(encode(images))` gives images back.
        lpips: from reconstructions and images `(B, 3, H, W)` in [-1, 1] to their mean distance.
    """

    def __init__(self, autoencoder: Any, lpips: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.autoencoder = autoencoder
        self.fidelity = ReconstructionFidelity(lpips)
        self.usage: CodebookUsage | None = None
        self.components: dict[str, CodebookUsage] = {}
        self.token_shape: tuple[int, ...] = ()
        self.pixels = 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Reconstruct uint8 images `(B, C, H, W)`, as uint8."""
        codes = self.autoencoder.encode(from_uint8(images))
        reconstructions = to_uint8(self.autoencoder.decode(codes))
        self.fidelity.update(reconstructions, images)
        self.pixels = prod(images.shape[2:])
        if hasattr(self.autoencoder, "vocab_size"):
            self._count_ids(codes)
        return reconstructions

    def _count_ids(self, tokens: Tensor) -> None:
        self.token_shape = tuple(tokens.shape[1:])
        if self.usage is None and self.autoencoder.vocab_size <= MOST_COUNTED:
            self.usage = CodebookUsage(self.autoencoder.vocab_size).to(tokens.device)
        if self.usage is not None:
            self.usage.update(tokens)
        for name, component in self.autoencoder.components(tokens).items():
            if name not in self.components:
                self.components[name] = CodebookUsage(component.size).to(tokens.device)
            self.components[name].update(component.ids)

    def figures(self) -> ReconstructionFigures:
        """Compute the figures of all images so far; at least one."""
        psnr, ssim, lpips = self.fidelity.compute()
        return ReconstructionFigures(
            psnr=float(psnr),
            ssim=None if ssim is None else float(ssim),
            lpips=None if lpips is None else float(lpips),
            tokens=prod(self.token_shape) if self.token_shape else None,
            vocab_size=getattr(self.autoencoder, "vocab_size", None),
            ids=None if self.usage is None else IdStatistics.of(self.usage),
            parts={name: IdStatistics.of(usage) for name, usage in self.components.items()},
            pixels=self.pixels,
        )
