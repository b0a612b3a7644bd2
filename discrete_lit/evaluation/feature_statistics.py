"""Statistics of a set of images in one pass: moments of the features, the features, spread and accuracy of each class.

`measure` makes the pass. A `Reference` is what other sets are compared with: moments from a file, as ADM publishes
them, or images that were measured once and whose statistics are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from discrete_lit.core.files import atomic_write, content_sha256, file_sha256
from discrete_lit.core.images import ImageSize, from_uint8, normal_size
from discrete_lit.evaluation.image_sets import NO_CLASS, Selection
from discrete_lit.metrics.extractors import FeatureExtractor
from discrete_lit.metrics.frechet import FeatureMoments, Moments, check_reference
from discrete_lit.metrics.precision_recall import ClassSpread

_log = logging.getLogger(__name__)

MOST_FEATURES = 10_000
"""The most features of a reference that are kept: as many as the reference batches of ADM have images."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Statistics of a set of images; of a set without labels the last two are None and empty.

    Images without a class, of a set that has labels, count for the first two alone.
    """

    moments: FeatureMoments
    features: EvenSample
    """Features of all images, or of as many as were asked for."""
    spread: ClassSpread | None
    correct: Mapping[str, Tensor]
    """By the name of each classifier `(K,)`: the images of each class that it recognised."""


def measure(
    selection: Selection,
    extractor: FeatureExtractor,
    *,
    num_classes: int | None,
    batch_size: int,
    device: torch.device | str,
    most_features: int | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    classifiers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    description: str = "",
) -> Measurement:
    """Run the extractor, and the classifiers where labels are known, over a selection.

    Args:
        selection: which images.
        extractor: on `device`.
        num_classes: K, to measure each class of a labelled set; None measures none.
        batch_size: images at once.
        device: where networks run.
        most_features: how many features are kept; all by default.
        transform: from uint8 images `(B, C, H, W)` to the uint8 images that are measured, such as a reconstruction.
        classifiers: by name, each from images in [-1, 1] to logits `(B, K)`.
        description: of the progress bar.

    Raises:
        ValueError: features that are not finite, or what `Selection.batches` raises.
    """
    moments = FeatureMoments(extractor)
    kept = EvenSample(most_features, selection.count)
    spread: ClassSpread | None = None
    correct = {name: torch.zeros(num_classes or 0, dtype=torch.float64) for name in classifiers or {}}
    with torch.inference_mode(), tqdm(total=selection.count, desc=description, unit="image", disable=None) as progress:
        for images, labels in selection.batches(batch_size):
            images = images.to(device)
            if transform is not None:
                images = transform(images)
            features = extractor(images)
            if not bool(features.isfinite().all()):
                raise ValueError(
                    f"{extractor.name} gives features of {str(selection.images.path)!r} that are not finite"
                )
            moments.update(features)
            kept.update(features)
            if labels is not None and num_classes is not None:
                if spread is None:
                    spread = ClassSpread(num_classes, extractor.dim)
                known = labels != NO_CLASS
                spread.update(features[known.to(features.device)], labels[known])
                for name, classifier in (classifiers or {}).items():
                    hits = classifier(from_uint8(images)).argmax(1).cpu() == labels
                    correct[name].index_add_(0, labels[known], hits[known].double())
            progress.update(len(images))
    return Measurement(moments=moments, features=kept, spread=spread, correct={} if spread is None else correct)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The moments of a reference's features, and features of it."""

    name: str
    """Path of the images or of their moments."""
    sha256: str
    """The hash of the images themselves, or of the file of their moments."""
    moments: Moments
    features: Tensor | None
    """`(n, D)` float32, up to `MOST_FEATURES`, evenly spaced over the images; None where moments alone are given."""


def reference_from_moments(path: str, extractor: FeatureExtractor, *, apply_exif: bool | None = None) -> Reference:
    """Read a reference from a moments file, such as ADM's.

    Args:
        path: the file.
        extractor: of the features.
        apply_exif: how the images that are compared with it are read.

    Raises:
        ValueError: an unreadable file, what are no moments, or moments of another extractor or of images that were
            read otherwise.
    """
    moments = Moments.load(path, extractor)
    check_reference(extractor, moments, path)
    if None not in (apply_exif, moments.apply_exif) and apply_exif != moments.apply_exif:
        raise ValueError(
            f"reference {path!r} was measured with apply_exif={str(moments.apply_exif).lower()}, apply_exif is "
            f"{str(apply_exif).lower()} here"
        )
    return Reference(name=path, sha256=file_sha256(path), moments=moments, features=None)


def reference_from_images(
    name: str,
    selection: Selection,
    *,
    extractor: FeatureExtractor,
    image_size: ImageSize,
    batch_size: int,
    device: torch.device,
    folder: Path,
) -> Reference:
    """Measure reference images, or take what an earlier evaluation kept of the same ones in `folder`.

    Args:
        name: path of the images.
        selection: which of them.
        extractor: on `device`.
        image_size: of the images in pixels.
        batch_size: images at once.
        device: where the extractor runs.
        folder: where the statistics are kept for the next evaluation.

    Raises:
        ValueError: images that cannot be read.
    """
    images = selection.images
    sha256 = images.fingerprint()
    # All that the features depend on: a file that was kept for anything else has another name.
    settings = (
        *(sha256, selection.settings, normal_size(image_size), images.image_channels, images.apply_exif),
        *(extractor.name, extractor.weights_sha256, extractor.protocol, extractor.dim, MOST_FEATURES),
    )
    key = content_sha256(repr(settings))
    kept_moments = folder / f"reference-{key[:16]}.npz"
    kept_features = kept_moments.with_suffix(".features.npy")
    if kept_moments.is_file() and kept_features.is_file():
        try:
            features = _read_features(kept_features, extractor.dim)
            moments = Moments.load(kept_moments, extractor)
            return Reference(name=name, sha256=sha256, moments=moments, features=features)
        except ValueError as error:
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
    moments.apply_exif = images.apply_exif
    folder.mkdir(parents=True, exist_ok=True)
    moments.save(kept_moments)
    with atomic_write(kept_features) as file:
        np.save(file, features.numpy())
    return Reference(name=name, sha256=sha256, moments=moments, features=features)


def _read_features(path: Path, dim: int) -> Tensor:
    try:
        features = np.load(path, allow_pickle=False)
    except Exception as error:  # a broken file raises almost anything
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if (
        features.dtype != np.float32
        or features.ndim != 2
        or features.shape[1] != dim
        or not np.isfinite(features).all()
    ):
        raise ValueError(f"{str(path)!r} does not hold finite features (n, {dim})")
    return torch.from_numpy(features)


class EvenSample:
    """Keep up to `limit` rows of a stream of known length, evenly spaced, so that of sorted classes each is among them.

    Args:
        limit: the most rows to keep; all by default.
        total: rows of the stream.
    """

    def __init__(self, limit: int | None, total: int) -> None:
        self.limit = total if limit is None else min(limit, total)
        self.total = total
        self._seen = 0
        self._kept: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Take the next rows `(B, D)` of the stream."""
        index = torch.arange(self._seen, self._seen + len(rows))
        # The first of every total / limit rows: there the whole part of index * limit / total goes up.
        chosen = (index * self.limit) // self.total != ((index - 1) * self.limit) // self.total
        self._seen += len(rows)
        self._kept.append(rows.detach().cpu()[chosen])

    def compute(self) -> Tensor:
        """Give the rows so far, `(n, D)` on the CPU; after the whole stream n is the limit."""
        return torch.cat(self._kept)
