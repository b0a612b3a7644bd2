"""What sets of images are measured against."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from discrete_lit.evaluation.features import FeatureExtractor
from discrete_lit.evaluation.frechet import check_reference
from discrete_lit.evaluation.measure import measure
from discrete_lit.evaluation.moments import Moments
from discrete_lit.evaluation.selection import Selection
from discrete_lit.files import atomic_write, content_sha256, file_sha256

MOST_FEATURES = 10_000
"""Of a reference of more images so many features are kept, as many as the reference batches of ADM have."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """The moments of a reference's features, and features of it."""

    name: str
    """Path of the images or of their moments."""
    sha256: str
    """A hash that changes when they do."""
    moments: Moments
    features: Tensor | None
    """`(n, D)` float32, up to `MOST_FEATURES`, evenly spaced over the images; None where moments alone are given."""


def reference_from_moments(path: str, extractor: FeatureExtractor) -> Reference:
    """A moments file, such as ADM's.

    Raises:
        ValueError: an unreadable file, or moments of another extractor.
    """
    moments = Moments.load(path)
    check_reference(extractor, moments, path)
    return Reference(path, file_sha256(path), moments, None)


def reference_from_images(
    name: str,
    selection: Selection,
    extractor: FeatureExtractor,
    image_size: int,
    batch_size: int,
    device: torch.device,
    folder: Path,
) -> Reference:
    """Measured images, from an earlier evaluation into `folder`, or measured now and kept there for the next one.

    Args:
        name: path of the images.
        selection: which of them.
        extractor: on `device`.
        image_size: side of the images in pixels.
        batch_size: images at once.
        device: where the extractor runs.
        folder: of the files that are kept.

    Raises:
        ValueError: images that cannot be read.
    """
    sha256 = selection.images.fingerprint()
    settings = (sha256, selection.count, image_size, extractor.weights_sha256, extractor.protocol)
    key = content_sha256(repr(settings))
    kept_moments = folder / f"reference-{key[:16]}.npz"
    kept_features = kept_moments.with_suffix(".features.npy")
    if kept_moments.is_file() and kept_features.is_file():
        try:
            features = torch.from_numpy(np.load(kept_features, allow_pickle=False))
            return Reference(name, sha256, Moments.load(kept_moments), features)
        except (ValueError, EOFError) as error:
            _log.warning("computing the reference again: %s", error)
    measured = measure(
        selection,
        extractor,
        num_classes=None,
        batch_size=batch_size,
        device=device,
        most_features=MOST_FEATURES,
        description="reference",
    )
    moments, features = measured.moments.compute(), measured.features.compute()
    folder.mkdir(parents=True, exist_ok=True)
    moments.save(kept_moments)
    with atomic_write(kept_features) as file:
        np.save(file, features.numpy())
    return Reference(name, sha256, moments, features)
