"""How well an autoencoder gives images back, and at what price in bits.

torchmetrics is imported where it is used: it takes seconds, which `discrete-lit evaluate --help` need not wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import isfinite, log2, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from discrete_lit.core.images import from_uint8, to_uint8

if TYPE_CHECKING:
    from discrete_lit.metrics.codebook_usage import CodebookUsage


def pixel_fidelity(reconstructions: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in decibels and SSIM of each of a batch of uint8 images `(B, C, H, W)`, both `(B,)`.

    SSIM (Wang et al., 2004, eq. 13) has a Gaussian window of 11x11 and deviation 1.5, around every pixel of every
    channel; at the border the image is reflected, as torchmetrics does and scikit-image does not. Images are at least
    6 pixels wide and high.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    pair = reconstructions.float(), images.float()
    psnr = peak_signal_noise_ratio(*pair, data_range=255.0, dim=(1, 2, 3), reduction="none")
    ssim = structural_similarity_index_measure(*pair, data_range=255.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return psnr, ssim


@dataclass(frozen=True)
class IdStatistics:
    """Of the ids of a set of images, or of a part of them."""

    size: int
    """K."""
    usage: float
    """Share of the K ids that occur, in [0, 1]."""
    perplexity: float
    """exp of the entropy of the ids in nats, in [1, K]."""

    @staticmethod
    def of(measured: CodebookUsage) -> IdStatistics:
        usage, perplexity = measured.compute()
        return IdStatistics(measured.vocab_size, float(usage), float(perplexity))


@dataclass(frozen=True)
class ReconstructionFigures:
    """Means over the images; None where it does not apply, as ids of a continuous bottleneck."""

    psnr: float
    """Decibels, on uint8 pixels."""
    ssim: float
    lpips: float | None = None
    tokens: int | None = None
    """L, ids of one image."""
    vocab_size: int | None = None
    """K."""
    ids: IdStatistics | None = None
    """Of all ids together; None above K = 2^24, where the parts alone are counted."""
    parts: dict[str, IdStatistics] = field(default_factory=dict)
    """Of each codebook of several, each scale, each bit."""
    pixels: int = 0
    """H·W of the images."""

    @property
    def capacity_bits(self) -> float | None:
        """What the ids of an image could carry: L log2 K."""
        return None if self.vocab_size is None or self.tokens is None else self.tokens * log2(self.vocab_size)

    @property
    def entropy_bits(self) -> float | None:
        """What they carry at most, as measured: L times the entropy of the ids over all images and positions, in bits.

        The plug-in estimate from counts: too low while there are not many more ids than K.
        """
        return None if self.ids is None or self.tokens is None else self.tokens * log2(self.ids.perplexity)

    @property
    def bits_per_pixel(self) -> float | None:
        """The capacity over H·W."""
        return None if self.capacity_bits is None else self.capacity_bits / self.pixels

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every figure; JSON has no infinity, so the PSNR of exact reconstructions is None."""
        derived = {name: getattr(self, name) for name in ("capacity_bits", "entropy_bits", "bits_per_pixel")}
        return {**asdict(self), "psnr": self.psnr if isfinite(self.psnr) else None, **derived}


class ReconstructionMeter:
    """Encodes and decodes images, and measures on the way.

    Args:
        autoencoder: a Tokenizer, or a continuous autoencoder: `decode(encode(images))` gives images back.
        lpips: from reconstructions and images `(B, 3, H, W)` in [-1, 1] to their mean distance.
    """

    def __init__(self, autoencoder: Any, lpips: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.autoencoder = autoencoder
        self.lpips = lpips
        self.totals = dict.fromkeys(("psnr", "ssim", "lpips"), 0.0)
        self.count = 0
        self.token_shape: tuple[int, ...] = ()
        self.pixels = 0
        self.usage: CodebookUsage | None = None
        self.parts: dict[str, CodebookUsage] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images `(B, C, H, W)` to their uint8 reconstructions."""
        originals = from_uint8(images)
        codes = self.autoencoder.encode(originals)
        reconstructions = to_uint8(self.autoencoder.decode(codes))
        psnr, ssim = pixel_fidelity(reconstructions, images)
        self.totals["psnr"] += float(psnr.sum())
        self.totals["ssim"] += float(ssim.sum())
        if self.lpips is not None:
            self.totals["lpips"] += float(self.lpips(from_uint8(reconstructions), originals)) * len(images)
        self.count += len(images)
        self.pixels = prod(images.shape[2:])
        if hasattr(self.autoencoder, "vocab_size"):
            self._count_ids(codes)
        return reconstructions

    def _count_ids(self, tokens: Tensor) -> None:
        from discrete_lit.metrics.codebook_usage import MOST_COUNTED, CodebookUsage

        self.token_shape = tuple(tokens.shape[1:])
        if self.usage is None and self.autoencoder.vocab_size <= MOST_COUNTED:
            self.usage = CodebookUsage(self.autoencoder.vocab_size).to(tokens.device)
        if self.usage is not None:
            self.usage.update(tokens)
        for name, part in self.autoencoder.components(tokens).items():
            if name not in self.parts:
                self.parts[name] = CodebookUsage(part.size).to(tokens.device)
            self.parts[name].update(part.ids)

    def figures(self) -> ReconstructionFigures:
        """Of all images so far; at least one."""
        means = {name: total / self.count for name, total in self.totals.items()}
        return ReconstructionFigures(
            psnr=means["psnr"],
            ssim=means["ssim"],
            lpips=None if self.lpips is None else means["lpips"],
            tokens=prod(self.token_shape) if self.token_shape else None,
            vocab_size=getattr(self.autoencoder, "vocab_size", None),
            ids=None if self.usage is None else IdStatistics.of(self.usage),
            parts={name: IdStatistics.of(usage) for name, usage in self.parts.items()},
            pixels=self.pixels,
        )
