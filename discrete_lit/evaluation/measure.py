"""One pass over a selection of images: features, their moments, the spread of each class, the judged labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from discrete_lit.evaluation.diversity import ClassSpread
from discrete_lit.evaluation.even_sample import EvenSample
from discrete_lit.evaluation.features import FeatureExtractor
from discrete_lit.evaluation.moments import FeatureMoments
from discrete_lit.evaluation.selection import Selection
from discrete_lit.images import from_uint8


@dataclass(frozen=True)
class Measurement:
    """Statistics of a set of images; the last two are None for a set without labels."""

    moments: FeatureMoments
    features: EvenSample
    """Of all images, or of as many as were asked for."""
    spread: ClassSpread | None
    correct: Tensor | None
    """`(K,)`: how many of each class's images the classifier gave their class; None without a classifier."""


def measure(
    selection: Selection,
    extractor: FeatureExtractor,
    *,
    num_classes: int | None,
    batch_size: int,
    device: torch.device | str,
    most_features: int | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    classifier: Callable[[Tensor], Tensor] | None = None,
    description: str = "",
) -> Measurement:
    """Run the extractor, and the classifier where labels are known, over a selection.

    Args:
        selection: which images.
        extractor: on `device`.
        num_classes: K; needed for labelled sets.
        batch_size: images at once.
        device: where networks run.
        most_features: how many features are kept; all by default.
        transform: from uint8 images `(B, 3, H, W)` to the uint8 images that are measured, such as a reconstruction.
        classifier: from images in [-1, 1] to logits `(B, K)`.
        description: of the progress bar.

    Raises:
        ValueError: a label outside [0, K), or what `Selection.batches` raises.
    """
    moments = FeatureMoments(extractor)
    kept = EvenSample(most_features, selection.count)
    spread: ClassSpread | None = None
    correct = torch.zeros(num_classes or 0, dtype=torch.float64)
    with torch.inference_mode(), tqdm(total=selection.count, desc=description, unit="image", disable=None) as progress:
        for images, labels in selection.batches(batch_size):
            images = images.to(device)
            if transform is not None:
                images = transform(images)
            features = extractor(images)
            moments.update(features)
            kept.update(features)
            if labels is not None and num_classes is not None:
                if int(labels.max()) >= num_classes:
                    raise ValueError(
                        f"{str(selection.images.path)!r} has label {int(labels.max())}, there are {num_classes} classes"
                    )
                spread = spread or ClassSpread(num_classes, extractor.dim)
                spread.update(features, labels)
                if classifier is not None:
                    hits = classifier(from_uint8(images)).argmax(1).cpu() == labels
                    correct.index_add_(0, labels, hits.double())
            progress.update(len(images))
    judged = spread is not None and classifier is not None
    return Measurement(moments, kept, spread, correct if judged else None)
