"""The Fréchet distance of reconstructions, as an autoencoder trains."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from discrete_lit.evaluation.efficientnet import EfficientNetLite0
from discrete_lit.evaluation.features import FeatureExtractor
from discrete_lit.evaluation.frechet import frechet_distance
from discrete_lit.evaluation.moments import FeatureMoments
from discrete_lit.images import to_uint8
from discrete_lit.tokenizers.image_autoencoder import ImageAutoencoder


class ReconstructionFrechet(Callback):
    """Logs `validation/r<metric>`: the Fréchet distance between the validation images and their reconstructions.

    `validation/rFID` with `InceptionV3`, else `validation/rFD-<extractor>`; over all validation batches and ranks. With
    `ExponentialMovingAverage` the reconstructions are those of the averaged weights. Nothing for other modules.

    Args:
        extractor: EfficientNetLite0 by default; `InceptionV3` with its weight file gives rFID.
    """

    def __init__(self, extractor: FeatureExtractor | None = None) -> None:
        self.extractor = extractor
        self._moments: tuple[FeatureMoments, FeatureMoments] | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, ImageAutoencoder):
            return
        self.extractor = (self.extractor or EfficientNetLite0()).to(pl_module.device)
        place = pl_module.device  # where a process group of GPUs can add the sums up
        self._moments = FeatureMoments(self.extractor, place), FeatureMoments(self.extractor, place)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._moments is None:
            return
        assert self.extractor is not None
        both = to_uint8(torch.cat((batch["image"].float(), outputs.float())))
        for moments, features in zip(self._moments, self.extractor(both).chunk(2), strict=True):
            moments.update(features)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._moments is None:
            return
        assert self.extractor is not None
        real, reconstructed = (moments.over_ranks().compute() for moments in self._moments)
        self._moments = None
        pl_module.log(f"validation/r{self.extractor.metric_name}", frechet_distance(reconstructed, real))
