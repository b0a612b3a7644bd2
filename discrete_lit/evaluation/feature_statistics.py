"""Statistics of a set of images in one pass: moments of the features, the features, spread and accuracy of each class.

`measure` makes the pass, on all ranks. A `Reference` is what other sets are compared with: moments from a file, as ADM
publishes them, or images that were measured once and whose statistics are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete_lit.core.bounded_reading import open_array
from discrete_lit.core.distributed import gather_objects, on_first_rank, rank
from discrete_lit.core.files import atomic_write, content_sha256, file_sha256
from discrete_lit.core.images import ImageSize, from_uint8, height_and_width, normal_size, size_text
from discrete_lit.evaluation.compared_images import NO_CLASS, Selection
from discrete_lit.evaluation.shares import (
    Shares,
    Tally,
    measure_in_shares,
    restore_states,
    states_of,
    whole_metrics,
)
from discrete_lit.metrics.codebook_usage import CodebookUsage
from discrete_lit.metrics.extractors import LOGITS, POOL, FeatureExtractor
from discrete_lit.metrics.moments import FeatureMoments, Moments, check_reference
from discrete_lit.metrics.precision_recall import ClassSpread, Manifold
from discrete_lit.metrics.reconstruction import ReconstructionMeter

_log = logging.getLogger(__name__)

_SUMMED_AT_ONCE = 256
"""Images whose features wait to be summed: products of a few rows take as long as reading D² sums and writing them."""

MOST_FEATURES = 10_000
"""The most features of a reference that are kept: as many as the reference batches of ADM have images."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Statistics of a set of images; of a set without labels `spread` is None and `correct` empty.

    Images without a class, of a set that has labels, do not count for these two.
    """

    moments: Moments
    features: Tensor
    """Features `(n, D)` of all images, or of as many as were asked for."""
    spread: ClassSpread | None
    scores: Mapping[str, Any]
    """Results of further measures of the features, by their names."""
    correct: Mapping[str, Tensor]
    """By the name of each classifier `(K,)`: the images of each class that it recognised."""


class FeatureMeter:
    """Count features of images: their moments, the features, and of labelled sets each class and what is recognised.

    Args:
        extractor: on the device of the images.
        count: images of the selection.
        num_classes: K, to measure each class of a labelled set; None measures none.
        most_features: how many features are kept, evenly spaced; all by default, 0 keeps none.
        transform: from uint8 images `(B, C, H, W)` to the uint8 images that are measured, such as a reconstruction.
        classifiers: by name, each from images in [-1, 1] to logits `(B, K)`.
        scores: further measures by name, such as `FeatureMoments` of spatial features or an `InceptionScore`; each
            takes the part of the features that it was made for.
        source: names the images in an error.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        count: int,
        *,
        num_classes: int | None = None,
        most_features: int | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        classifiers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        scores: Mapping[str, Any] | None = None,
        source: str = "the images",
    ) -> None:
        self.extractor, self.num_classes, self.transform, self.source = extractor, num_classes, transform, source
        self.classifiers = dict(classifiers or {})
        self.scores = dict(scores or {})
        self._even = EvenSample(most_features, count)
        # Kept features of few images are a factor of their covariance, which need not be summed.
        self._moments = None if self._even.limit == count <= extractor.dim else FeatureMoments(extractor)
        self._waiting: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._spread: ClassSpread | None = None
        self._correct: dict[str, Tensor] = {}

    def update(self, images: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        """Extract and count a batch, see `Meter`.

        Raises:
            ValueError: features that are not finite.
        """
        if self.transform is not None:
            images = self.transform(images)
        parts = self.extractor.features(images, {POOL, *(score.part for score in self.scores.values())})
        features = parts[POOL]
        if not bool(features.isfinite().all()):
            raise ValueError(f"{self.extractor.name} gives features of {self.source} that are not finite")
        # On CUDA float64 is there, and the features need not be waited for.
        summed_on = features.device if features.device.type == "cuda" else torch.device("cpu")
        if self._moments is not None:
            self._moments.to(summed_on)
            self._waiting.append(features)
            if sum(map(len, self._waiting)) >= _SUMMED_AT_ONCE:
                self._sum_waiting()
        for score in self.scores.values():
            # The splits of an Inception Score go by the number of the image.
            numbers = {"indices": indices} if score.part == LOGITS else {}
            score.to(summed_on).update(parts[score.part], **numbers)
        if self._even.limit:
            self._kept.append(features.detach().cpu()[self._even.chosen(indices)])
        if labels is not None and self.num_classes is not None:
            self._count_classes(images, features, labels, self.num_classes)

    def _count_classes(self, images: Tensor, features: Tensor, labels: Tensor, num_classes: int) -> None:
        if self._spread is None:
            self._spread = ClassSpread(num_classes, self.extractor.dim)
            zeros = torch.zeros(num_classes, dtype=torch.float64)
            self._correct = {name: zeros.clone() for name in self.classifiers}
        known = labels != NO_CLASS
        self._spread.update(features[known.to(features.device)], labels[known])
        for name, classifier in self.classifiers.items():
            hits = classifier(from_uint8(images)).argmax(1).cpu() == labels
            self._correct[name].index_add_(0, labels[known], hits[known].double())

    def _sum_waiting(self) -> None:
        if self._moments is not None and self._waiting:
            self._moments.update(torch.cat(self._waiting))
            self._waiting = []

    def _metrics(self) -> dict[str, Any]:
        self._sum_waiting()
        moments = {} if self._moments is None else {"moments": self._moments}
        spread = {} if self._spread is None else {"spread": self._spread}
        scores = {f"score.{name}": score for name, score in self.scores.items()}
        return {**moments, **scores, **spread, **_metrics_of(self.transform)}

    def tally(self) -> Tally:
        sums = states_of(self._metrics())
        sums |= {f"correct.{name}": value.clone() for name, value in self._correct.items()}
        return Tally(sums=sums, rows={"features": self._features()}, facts=_facts_of(self.transform))

    def _features(self) -> Tensor:
        return torch.cat(self._kept) if self._kept else torch.zeros(0, self.extractor.dim)

    def restore(self, tally: Tally) -> None:
        correct = {
            name.removeprefix("correct."): value.clone()
            for name, value in tally.sums.items()
            if name.startswith("correct.")
        }
        labelled = self.num_classes is not None and any(name.startswith("spread.") for name in tally.sums)
        self._spread = ClassSpread(self.num_classes or 0, self.extractor.dim) if labelled else None
        self._correct = correct
        _prepare(self.transform, tally.facts)
        restore_states(self._metrics(), tally.sums)
        self._kept = [tally.rows["features"]] if "features" in tally.rows else []

    def measurement(self) -> Measurement:
        """Give the statistics of what was counted.

        Raises:
            ValueError: fewer than two images.
        """
        self._sum_waiting()
        features = self._features()
        with whole_metrics():
            moments = self._computed_moments(features)
            scores = {name: score.compute() for name, score in self.scores.items()}
        return Measurement(
            moments=moments, features=features, spread=self._spread, scores=scores, correct=dict(self._correct)
        )

    def _computed_moments(self, features: Tensor) -> Moments:
        if self._moments is not None:
            return self._moments.compute()
        extractor, sha256 = self.extractor.name, self.extractor.weights_sha256
        return Moments.of_features(features, extractor=extractor, weights_sha256=sha256)


def _metrics_of(transform: Any) -> dict[str, Any]:
    """List the metrics of a meter of reconstructions by name; none of another transform."""
    if not isinstance(transform, ReconstructionMeter):
        return {}
    usage = {} if transform.usage is None else {"usage": transform.usage}
    components = {f"component.{name}": metric for name, metric in transform.components.items()}
    return {"fidelity": transform.fidelity, **usage, **components}


def _facts_of(transform: Any) -> dict[str, Any]:
    """Say what a meter of reconstructions found out from its first batch."""
    if not isinstance(transform, ReconstructionMeter) or not transform.pixels:
        return {}
    return {
        "pixels": transform.pixels,
        "token_shape": list(transform.token_shape),
        "usage": None if transform.usage is None else transform.usage.vocab_size,
        "components": {name: metric.vocab_size for name, metric in transform.components.items()},
    }


def _prepare(transform: Any, facts: Mapping[str, Any]) -> None:
    """Make a meter of reconstructions ready for sums: in a process that measured no image it knows nothing yet."""
    if not isinstance(transform, ReconstructionMeter):
        return
    transform.pixels = facts.get("pixels", 0)
    transform.token_shape = tuple(facts.get("token_shape", ()))
    weight = next(iter(transform.autoencoder.parameters()), torch.zeros(()))
    if facts.get("usage") is not None and transform.usage is None:
        transform.usage = CodebookUsage(facts["usage"]).to(weight.device)
    for name, size in facts.get("components", {}).items():
        if name not in transform.components:
            transform.components[name] = CodebookUsage(size).to(weight.device)


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
    scores: Mapping[str, Any] | None = None,
    shares: Shares | None = None,
    identity: Iterable[object] = (),
    description: str = "",
) -> Measurement | None:
    """Run the extractor, and the classifiers where labels are known, over a selection; each rank over its share.

    Args:
        selection: which images.
        extractor: on `device`.
        num_classes: K, to measure each class of a labelled set; None measures none.
        batch_size: images at once.
        device: where networks run.
        most_features: how many features are kept; all by default.
        transform: from uint8 images `(B, C, H, W)` to the uint8 images that are measured, such as a reconstruction.
        classifiers: by name, each from images in [-1, 1] to logits `(B, K)`.
        scores: further measures by name, see `FeatureMeter`.
        shares: which share is this job's; everything by default.
        identity: what names the images, the transform and the classifiers, for shares that are kept.
        description: of the progress bar.

    Returns:
        The statistics, on every rank; None where this job measured one part alone.

    Raises:
        ValueError: features that are not finite, or what `measure_in_shares` raises.
    """
    meter = FeatureMeter(
        extractor,
        selection.count,
        num_classes=num_classes,
        most_features=most_features,
        transform=transform,
        classifiers=classifiers,
        scores=scores,
        source=repr(str(selection.images.path)),
    )
    images = selection.images
    settings = (
        *(normal_size(images.image_size), images.image_channels, images.apply_exif, num_classes, most_features),
        *(extractor.name, extractor.weights_sha256, extractor.protocol, extractor.dim, sorted(scores or {})),
    )
    whole = measure_in_shares(
        selection,
        meter,
        batch_size=batch_size,
        device=device,
        shares=shares,
        identity=(*identity, *settings),
        description=description,
    )
    return meter.measurement() if whole else None


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
    kept: Path | None = None
    """The beginning of the names of the files that its statistics are kept in; None where none are kept."""


def reference_from_moments(
    path: str, extractor: FeatureExtractor, *, apply_exif: bool | None = None, image_size: ImageSize | None = None
) -> Reference:
    """Read a reference from a moments file, such as ADM's.

    Args:
        path: the file.
        extractor: of the features.
        apply_exif: how the images that are compared with it are read.
        image_size: of those images in pixels.

    Raises:
        ValueError: an unreadable file, what are no moments, or moments of another extractor or of images that were
            of another size or read otherwise, where the file says so.
    """
    moments = Moments.load(path, extractor)
    check_reference(extractor, moments, path)
    if None not in (apply_exif, moments.apply_exif) and apply_exif != moments.apply_exif:
        raise ValueError(
            f"reference {path!r} was measured with apply_exif={str(moments.apply_exif).lower()}, apply_exif is "
            f"{str(apply_exif).lower()} here"
        )
    known = moments.image_size
    if image_size is not None and known is not None and normal_size(image_size) != normal_size(known):
        raise ValueError(
            f"reference {path!r} was measured on images of {size_text(known)} pixels, those compared with it are of "
            f"{size_text(image_size)}"
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
    shares: Shares | None = None,
) -> Reference | None:
    """Measure reference images, or take what an earlier evaluation kept of the same ones in `folder`.

    Args:
        name: path of the images.
        selection: which of them.
        extractor: on `device`.
        image_size: of the images in pixels.
        batch_size: images at once.
        device: where the extractor runs.
        folder: where the statistics are kept for the next evaluation.
        shares: which share is this job's; everything by default.

    Returns:
        The reference, on every rank; None where this job measured one part of it alone.

    Raises:
        ValueError: images that cannot be read.
    """
    images = selection.images
    sha256 = on_first_rank(images.fingerprint)
    # All that the features depend on: a file that was kept for anything else has another name.
    settings = (
        *(sha256, selection.settings, normal_size(image_size), images.image_channels, images.apply_exif),
        *(extractor.name, extractor.weights_sha256, extractor.protocol, extractor.dim, MOST_FEATURES),
    )
    key = content_sha256(repr(settings))
    kept = folder / f"reference-{key[:16]}"
    kept_moments, kept_features = kept.with_suffix(".npz"), kept.with_suffix(".features.npy")
    # The ranks must agree, and a file of another machine may not be seen yet.
    if all(gather_objects(kept_moments.is_file() and kept_features.is_file())):
        try:
            features = _read_finite(kept_features, np.float32, (None, extractor.dim))
            moments = Moments.load(kept_moments, extractor, features=features)
            return Reference(name=name, sha256=sha256, moments=moments, features=features, kept=kept)
        except ValueError as error:
            _log.warning("computing the reference again: %s", error)
    measured = measure(
        selection,
        extractor,
        num_classes=None,
        batch_size=batch_size,
        device=device,
        most_features=MOST_FEATURES,
        shares=shares,
        identity=("reference", sha256),
        description="reference",
    )
    if measured is None:
        return None
    moments, features = measured.moments, measured.features
    moments.apply_exif, moments.image_size = images.apply_exif, height_and_width(image_size)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        moments.save(kept_moments)
        with atomic_write(kept_features) as file:
            np.save(file, features.numpy())
    return Reference(name=name, sha256=sha256, moments=moments, features=features, kept=kept)


def reference_manifold(reference: Reference, neighbours: int, *, device: torch.device) -> Manifold:
    """Span the manifold of a reference's features, by the radii that an earlier evaluation kept where there are any.

    Args:
        reference: one with features.
        neighbours: k.
        device: where distances are computed.

    Raises:
        ValueError: what `Manifold` raises.
    """
    assert reference.features is not None
    file = None if reference.kept is None else reference.kept.with_suffix(f".radii-{neighbours}.npy")
    if file is not None and file.is_file():
        try:
            squared_radii = _read_finite(file, np.float64, (len(reference.features),))
            return Manifold(reference.features, neighbours, squared_radii=squared_radii, device=device)
        except ValueError as error:
            _log.warning("computing the balls around the reference's features again: %s", error)
    manifold = Manifold(reference.features, neighbours, device=device)
    if file is not None and rank() == 0:
        with atomic_write(file) as opened:
            np.save(opened, manifold.squared_radii.cpu().numpy())
    return manifold


def _read_finite(path: Path, dtype: type[np.floating], shape: tuple[int | None, ...]) -> Tensor:
    """Read an array of finite numbers whose shape is known, but for the lengths that are None.

    Raises:
        ValueError: a file that cannot be read, or another array.
    """
    try:
        array = open_array(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    fits = len(array.shape) == len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits or not np.isfinite(array).all():
        wanted_shape = ", ".join("n" if length is None else str(length) for length in shape)
        raise ValueError(f"{str(path)!r} does not hold finite numbers ({wanted_shape}) of {np.dtype(dtype)}")
    return torch.from_numpy(array)


class EvenSample:
    """Choose up to `limit` rows of a set of known size, evenly spaced, so that of sorted classes each is among them.

    Args:
        limit: the most rows to choose; all by default.
        total: rows of the set.
    """

    def __init__(self, limit: int | None, total: int) -> None:
        self.limit = total if limit is None else min(limit, total)
        self.total = total

    def chosen(self, indices: Tensor) -> Tensor:
        """Tell which of the rows of some numbers, int64 `(B,)` from 0, are chosen: bool `(B,)`."""
        # The first of every total / limit rows: there the whole part of index * limit / total goes up.
        return (indices * self.limit) // self.total != ((indices - 1) * self.limit) // self.total
