"""Measures of images in anyone's LightningModule: one pass of an extractor for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from discrete_lit.core.images import to_uint8
from discrete_lit.metrics.extractors import POOL, FeatureExtractor


class ImageMetrics(nn.Module):
    """Run an extractor over images once a batch, and give its features to every measure that is taken over them.

        self.measures = ImageMetrics(inception, {                                   # __init__
            "fid": FrechetDistance(inception, reference),
            "sfid": FrechetDistance(inception.space("spatial"), spatial_reference),
            "kid": KernelDistance(inception, features),
        })
        self.measures.update(images)                                                # validation_step
        self.log_dict(self.measures.compute()); self.measures.reset()               # on_validation_epoch_end

    The extractor is no submodule: a checkpoint does not grow by it, an optimizer does not see it, and it follows the
    images to their device. Measures that keep features share them.

    Args:
        extractor: the network.
        metrics: measures by name; each takes the part of the extractor that it was made for.

    Raises:
        ValueError: no measure, or one of a part that the extractor does not give.
    """

    def __init__(self, extractor: FeatureExtractor, metrics: Mapping[str, Metric]) -> None:
        super().__init__()
        # In a tuple it is not registered.
        self._held = (extractor,)
        by_part: dict[str, dict[str, Metric | MetricCollection]] = {}
        for name, metric in metrics.items():
            by_part.setdefault(getattr(metric, "part", POOL), {})[name] = metric
        if not by_part:
            raise ValueError("metrics is empty: give measures by name")
        for part in by_part:
            extractor.space(part)
        self.by_part = nn.ModuleDict({part: MetricCollection(found) for part, found in by_part.items()})

    @property
    def extractor(self) -> FeatureExtractor:
        return self._held[0]

    @property
    def collections(self) -> dict[str, MetricCollection]:
        """The measures by the part of the extractor that they take."""
        return cast(dict[str, MetricCollection], dict(self.by_part.items()))

    def update(self, images: Tensor, labels: Tensor | None = None, *, indices: Tensor | None = None) -> None:
        """Measure a batch.

        Args:
            images: `(B, C, H, W)`, C 1, 3 or 4: float in [-1, 1], or uint8.
            labels: `(B,)`, for measures of each class.
            indices: `(B,)` int64, which of all images these are, for measures that depend on their order.
        """
        extractor = self.extractor.to(images.device)
        images = to_uint8(images) if images.is_floating_point() else images
        features = extractor.features(images, tuple(self.collections))
        # What was not given is not passed on: some measures take none of it.
        given = {name: value for name, value in (("labels", labels), ("indices", indices)) if value is not None}
        for part, collection in self.collections.items():
            collection.update(features[part], **given)

    def compute(self) -> dict[str, Tensor]:
        """The results of all measures over all ranks: by name, or by their own names where a measure gives several."""
        return {name: value for collection in self.collections.values() for name, value in collection.compute().items()}

    def reset(self) -> None:
        """Forget all images."""
        for collection in self.collections.values():
            collection.reset()
