"""Measures of reconstructed clips beside their originals: PSNR and LPIPS of each frame, and the error of what moves.

A frame may be near its original while the clip flickers. So `temporal_difference_error` compares the differences
between successive frames. `VideoFidelity` averages all of it over a set; `ClipFeatures` makes features of clips for a
Fréchet distance (`frechet.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from discrete_lit.core.images import frames_of, from_uint8
from discrete_lit.metrics.extractors import POOL, FeatureExtractor
from discrete_lit.metrics.reconstruction import pixel_fidelity


def temporal_difference_error(reconstructions: Tensor, clips: Tensor) -> Tensor:
    """Compute the mean of `|(y[t+1] - y[t]) - (x[t+1] - x[t])|` of each clip, in fractions of the range of pixels.

    0 where all that moves, moves as in the original, whatever constant error each pixel has. A clip that is frozen at
    one of its frames has the mean change of the original.

    Args:
        reconstructions: y, uint8 `(B, C, T, H, W)`.
        clips: x, the same shape; T is at least 2.

    Returns:
        `(B,)` float32.

    Raises:
        ValueError: clips of one frame, in which nothing moves, or of other shapes.
    """
    _check(reconstructions, clips)
    if clips.shape[2] < 2:
        raise ValueError(f"a temporal difference needs clips of at least two frames, got {tuple(clips.shape)}")
    moved, expected = (each.float().diff(dim=2) for each in (reconstructions, clips))
    return (moved - expected).abs().flatten(1).mean(dim=1) / 255


class VideoFigures(NamedTuple):
    """Figures of a set of reconstructed clips; means over the clips."""

    psnr: float
    """Decibels, the mean over frames of each frame's."""
    psnr_by_frame: list[float]
    ssim: float | None
    """None of frames too small for its window."""
    lpips: float | None
    """None where it was not asked for."""
    lpips_by_frame: list[float] | None
    temporal_difference: float | None
    """None of clips of one frame."""


class VideoFidelity(Metric):
    """Average PSNR, SSIM, LPIPS and the temporal difference error over clips of one length, batches and ranks.

    The sums are float64 and lie on the CPU until `.to(device)`.

    Args:
        frames: T.
        lpips: from reconstructions and images `(B, C, H, W)` in [-1, 1] to their mean distance.

    Raises:
        ValueError: less than one frame; in use, clips of another length.
    """

    full_state_update = False
    count: Tensor
    psnr: Tensor
    ssim: Tensor
    count_ssim: Tensor
    distance: Tensor
    difference: Tensor

    def __init__(self, frames: int, lpips: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        self.frames, self.lpips = frames, lpips
        for name in ("count", "ssim", "count_ssim", "difference"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("psnr", "distance"):
            self.add_state(name, torch.zeros(frames, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reconstructions: Tensor, clips: Tensor) -> None:
        """Add reconstructions and their originals, both uint8 `(B, C, T, H, W)`."""
        _check(reconstructions, clips)
        if clips.shape[2] != self.frames:
            raise ValueError(f"clips must have {self.frames} frames, got {tuple(clips.shape)}")
        psnr, ssim = pixel_fidelity(frames_of(reconstructions), frames_of(clips))
        self.psnr += psnr.view(len(clips), -1).sum(dim=0).to(self.psnr)
        if ssim is not None:
            self.ssim += ssim.sum().to(self.ssim)
            self.count_ssim += len(ssim)
        if self.lpips is not None:
            pairs = zip(reconstructions.unbind(2), clips.unbind(2), strict=True)
            means = [self.lpips(from_uint8(frame), from_uint8(original)) for frame, original in pairs]
            self.distance += torch.stack(means).to(self.distance) * len(clips)
        if self.frames > 1:
            self.difference += temporal_difference_error(reconstructions, clips).sum().to(self.difference)
        self.count += len(clips)

    def compute(self) -> VideoFigures:
        """The means so far; of at least one clip."""
        psnr = self.psnr / self.count
        lpips = None if self.lpips is None else self.distance / self.count
        return VideoFigures(
            psnr=float(psnr.mean()),
            psnr_by_frame=psnr.tolist(),
            ssim=float(self.ssim / self.count_ssim) if self.count_ssim else None,
            lpips=None if lpips is None else float(lpips.mean()),
            lpips_by_frame=None if lpips is None else lpips.tolist(),
            temporal_difference=float(self.difference / self.count) if self.frames > 1 else None,
        )


class ClipFeatures:
    """Features of clips from those of their frames: the mean over frames, and the mean change from frame to frame.

    A Fréchet distance over them sees what the frames show and how fast it changes, not the order of events. It is
    called `FD-<extractor>-clips`: the name FVD is for I3D's features, with its published weights, alone. Any
    other network of clips takes this class's place in `FeatureMoments` and `compare` by having its attributes.

    Args:
        extractor: of images.
    """

    part = POOL

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self.name = f"{extractor.name}-clips"
        self.dim = 2 * extractor.dim
        self.protocol = f"{extractor.protocol}; of each clip the mean over frames, and of the absolute differences"
        self.weights_sha256 = extractor.weights_sha256
        self.metric_name = f"FD-{self.name}"

    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features `(B, dim)` of uint8 clips `(B, C, T, H, W)`; of one frame the changes are 0."""
        if clips.ndim != 5:
            raise ValueError(f"ClipFeatures takes clips (B, C, T, H, W), got {tuple(clips.shape)}")
        features = self.extractor(frames_of(clips)).view(len(clips), clips.shape[2], -1)
        changes = features.diff(dim=1).abs()
        moved = changes.mean(dim=1) if changes.shape[1] else torch.zeros_like(features[:, 0])
        return torch.cat((features.mean(dim=1), moved), dim=1)


def _check(reconstructions: Tensor, clips: Tensor) -> None:
    if reconstructions.shape != clips.shape or clips.ndim != 5:
        raise ValueError(
            f"clips must be (B, C, T, H, W) of one shape, got {tuple(reconstructions.shape)} and {tuple(clips.shape)}"
        )
