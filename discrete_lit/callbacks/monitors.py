"""Curves of a training run beside its losses: gradient norms, and the Fréchet distance of reconstructions (rFID)."""

from collections import defaultdict
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from discrete_lit.core.images import to_uint8
from discrete_lit.core.lightning_internals import logs_this_step
from discrete_lit.metrics.extractors import EfficientNetLite0, FeatureExtractor
from discrete_lit.metrics.frechet import FeatureMoments, frechet_distance
from discrete_lit.tokenizers.autoencoder import ImageAutoencoder


class GradientNorm(Callback):
    """Logs Euclidean norms of the gradient on the logger's schedule; other steps cost nothing.

    `gradient_norm/total` is the norm over all parameters, after accumulation and before clipping;
    `gradient_norm/<submodule>` that over each submodule at the first level where there are several.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not logs_this_step(trainer):
            return
        norms = {name: _norm(gradients) for name, gradients in _by_submodule(pl_module).items()}
        if not norms:
            return
        named = {"gradient_norm/total": torch.stack(list(norms.values())).norm()}
        if len(norms) > 1:
            named |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        pl_module.log_dict(named)


def _by_submodule(module: LightningModule) -> dict[str, list[Tensor]]:
    """The gradients of each submodule at the first level where there are several."""
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    depth = 1
    while len({_head(name, depth) for name in gradients}) == 1 and any(name.count(".") >= depth for name in gradients):
        depth += 1
    groups = defaultdict(list)
    for name, gradient in gradients.items():
        groups[_head(name, depth)].append(gradient)
    return dict(groups)


def _head(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def _norm(gradients: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    # A sharded gradient gives the norm as a partial sum over ranks.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class ReconstructionFrechet(Callback):
    """Logs `validation/r<metric>`: the Fréchet distance between the validation images and their reconstructions.

    `validation/rFID` with `InceptionV3`, else `validation/rFD-<extractor>`; over all validation batches and ranks. With
    `ExponentialMovingAverage` the averaged weights reconstruct. Modules that are no autoencoder log nothing.

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
        real, reconstructed = FeatureMoments(self.extractor), FeatureMoments(self.extractor)
        # On the module's device a process group of GPUs can add the sums up.
        self._moments = real.to(pl_module.device), reconstructed.to(pl_module.device)

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
        real, reconstructed = (moments.compute() for moments in self._moments)
        self._moments = None
        pl_module.log(f"validation/r{self.extractor.metric_name}", frechet_distance(reconstructed, real))
