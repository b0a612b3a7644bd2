"""The Fréchet distance while training: of a generator's samples (gFID), or of a tokenizer's reconstructions (rFID).

It is measured on the averaged weights, over all ranks by the number of the image, in validation and every n steps. The
images, and so the figures, are the same for any number of ranks, and training goes on as if nothing had been measured.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from discrete_lit.callbacks.ema import ExponentialMovingAverage
from discrete_lit.callbacks.image_grids import as_in_validation, shards_weights
from discrete_lit.core.distributed import failing_together, on_first_rank
from discrete_lit.core.images import ImageSize, from_uint8, normal_size, size_of, size_text, to_uint8
from discrete_lit.core.lightning_internals import log_step
from discrete_lit.evaluation.compared_images import Selection
from discrete_lit.evaluation.drawn_images import draw_images, own_numbers
from discrete_lit.evaluation.feature_statistics import (
    FeatureMeter,
    Measurement,
    Reference,
    measure,
    reference_from_images,
    reference_from_moments,
)
from discrete_lit.evaluation.image_sets import open_image_set
from discrete_lit.evaluation.rows import NEIGHBOURS, manifold_for
from discrete_lit.generators import Generator, LatentGenerator
from discrete_lit.metrics.extractors import EfficientNetLite0, FeatureExtractor
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.metrics.moments import holds_moments
from discrete_lit.metrics.precision_recall import Manifold, precision_and_recall
from discrete_lit.samplers import GuidedSolver, MARSampler, Sampler
from discrete_lit.tokenizers.autoencoder import ImageAutoencoder


class ImageDistance(Callback):
    """Log the Fréchet distance to a reference, in every validation and test, and every n steps of training if asked.

    Of a generator, N samples are drawn, sample i a function of (seed, i) and of the weights; its label is i modulo the
    number of classes. Of a tokenizer, the images of `reference` are reconstructed, or those of the validation batches
    where it is moments or none. Other modules, and generators of text, log nothing.

    The names say what is measured, of how many images: `validation/gFID_50000` of samples, `validation/rFID_50000` of
    reconstructions, `gFD-EffNetLite0_1000` with another extractor. Beside the distance stand its two terms,
    `..._mean_term` (the squared distance of the means) and `..._covariance_term`, and, where the features of the
    reference are known, `validation/gprecision-InceptionV3_50000` and `grecall` (Kynkäänniemi et al., 2019, k = 3).
    `ModelCheckpoint(monitor=...)` keeps the best checkpoint by any of them.

    With `ExponentialMovingAverage` the averaged weights are measured. Weights, modes and random states are afterwards
    as they were, and checkpoints hold nothing of the extractor.

    Args:
        reference: images (shards, or a folder), or their moments, an npz with `mu` and `sigma` such as ADM's. Images
            are measured once, over all ranks, and their statistics kept in `<default_root_dir>/references`. By default
            the images of the validation batches.
        num_samples: N of a generator.
        extractor: EfficientNetLite0 by default; `InceptionV3` with its weight file gives FID.
        every_n_steps: optimizer steps between two measurements in training; by default there are those of validation
            alone. It needs a `reference`, and one of images for a tokenizer.
        num_reference: images of the reference, equally many of each class; all by default.
        image_size: of the reference's images in pixels; a generator's own by default, a tokenizer needs it.
        sampler: how samples are drawn; the generator's own by default.
        seed: of the draw.
        batch_size: images at a time on each device.
        precision_recall: measure precision and recall too, for which the features of all images are gathered.
        apply_exif: turn the reference's files as their EXIF orientation says.

    Raises:
        ValueError: a number below 1, or settings that cannot be measured; in use, a reference that is none or of
            another extractor or size, or validation batches without images.
    """

    def __init__(
        self,
        reference: str | None = None,
        num_samples: int = 1000,
        *,
        extractor: FeatureExtractor | None = None,
        every_n_steps: int | None = None,
        num_reference: int | None = None,
        image_size: ImageSize | None = None,
        sampler: Sampler | GuidedSolver | MARSampler | None = None,
        seed: int = 0,
        batch_size: int = 64,
        precision_recall: bool = True,
        apply_exif: bool = False,
    ) -> None:
        if num_samples < 2 or batch_size < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(
                f"ImageDistance needs num_samples of at least 2, batch_size and every_n_steps of at least 1, got "
                f"{num_samples}, {batch_size} and {every_n_steps}"
            )
        if every_n_steps is not None and reference is None:
            raise ValueError(
                f"every_n_steps={every_n_steps} of ImageDistance measures outside of validation, where there are no "
                "images to compare with: give reference, or leave every_n_steps out"
            )
        self.reference = reference
        self.num_samples = num_samples
        self.extractor = extractor
        self.every_n_steps = every_n_steps
        self.num_reference = num_reference
        self.image_size = image_size
        self.sampler = sampler
        self.seed = seed
        self.batch_size = batch_size
        self.precision_recall = precision_recall
        self.apply_exif = apply_exif
        self._selection: Selection | None = None
        self._known: Reference | None = None
        self._manifold: Manifold | None = None
        self._made: Measurement | None = None
        self._last_step = 0
        self._at_last_step: Measurement | None = None
        # Of the validation batches: the real images, and what is made of them.
        self._real_meter: FeatureMeter | None = None
        self._made_meter: FeatureMeter | None = None

    # When it is measured.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the reference: a mistake must not cost the time up to the first measurement."""
        if not _makes_images(pl_module):
            return
        self.extractor = self.extractor or EfficientNetLite0()
        if self.sampler is not None:
            kind = getattr(pl_module, "sampler_kind", None)
            if kind is None or not isinstance(self.sampler, kind):
                raise ValueError(
                    f"sampler={type(self.sampler).__name__} of ImageDistance does not draw from a "
                    f"{type(pl_module).__name__}"
                )
        if self.reference is None:
            return
        size = self.image_size or getattr(pl_module, "image_size", None)
        if holds_moments(self.reference):
            if self.every_n_steps is not None and isinstance(pl_module, ImageAutoencoder):
                raise ValueError(
                    f"ImageDistance has no images to reconstruct every {self.every_n_steps} steps: reference="
                    f"{self.reference!r} is moments; give the images, or leave every_n_steps out"
                )
            self._known = reference_from_moments(
                self.reference, self.extractor, apply_exif=self.apply_exif, image_size=size
            )
            return
        if size is None:
            raise ValueError(
                f"ImageDistance needs the image_size of reference={self.reference!r}: a {type(pl_module).__name__} "
                "takes images of any"
            )
        channels = getattr(getattr(pl_module, "tokenizer", pl_module), "image_channels", 3)
        images = open_image_set(self.reference, normal_size(size), image_channels=channels, apply_exif=self.apply_exif)
        self._selection = Selection(images, self.num_reference, num_classes=images.num_classes)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # With accumulated gradients several batches end at one step.
        if (
            not self.every_n_steps
            or step % self.every_n_steps
            or step == self._last_step
            or not _makes_images(pl_module)
        ):
            return
        self._last_step = step
        with _on_averages(trainer, pl_module):
            made = self._measure(trainer, pl_module)
        assert made is not None
        self._at_last_step = made
        values = self._compare(pl_module, made, self._measured_reference(trainer, pl_module), "validation")
        pl_module.log_dict(values, logger=False, on_step=True, sync_dist=True, reduce_fx="max")
        # The logger's own schedule would leave out what falls between two of its steps.
        for logger in trainer.loggers:
            logger.log_metrics(values, log_step(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at_last_step = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Inside the validation loop, where averaged weights are in place if the run keeps any.
        if trainer.sanity_checking or not _makes_images(pl_module):
            return
        # Where a validation follows upon a step that was measured, the images are the same.
        known, self._at_last_step = self._at_last_step, None
        self._made = known if known and self._last_step == trainer.global_step else self._measure(trainer, pl_module)
        extractor = self._extractor(pl_module)
        real = self.reference is None
        self._real_meter = FeatureMeter(extractor, 1, most_features=0) if real else None
        self._made_meter = FeatureMeter(extractor, 1, most_features=0) if self._made is None else None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._real_meter is None and self._made_meter is None:
            return
        if not isinstance(batch, dict) or "image" not in batch:
            raise ValueError(
                "ImageDistance compares with the images of the validation batches, and these hold none: give reference"
            )
        numbers = torch.arange(len(batch["image"]))
        if self._real_meter is not None:
            self._real_meter.update(to_uint8(batch["image"]), None, numbers)
        if self._made_meter is not None:
            self._made_meter.update(to_uint8(outputs), None, numbers)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "validation")

    on_test_epoch_start = on_validation_epoch_start

    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "test")

    def _end(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        real, made = (
            None if meter is None else _over_ranks(meter, module.device)
            for meter in (self._real_meter, self._made_meter)
        )
        self._real_meter = self._made_meter = None
        made, self._made = made or self._made, None
        if made is None:
            return
        if real is None:
            reference = self._measured_reference(trainer, module)
        else:
            reference = Reference(name="validation", sha256="", moments=real.moments, features=None)
        values = self._compare(module, made, reference, stage)
        # Every rank has the same: the greatest of them is this one, to the bit.
        module.log_dict(values, sync_dist=True, reduce_fx="max")

    # What is measured.

    def _extractor(self, module: LightningModule) -> FeatureExtractor:
        assert self.extractor is not None
        return self.extractor.to(module.device)

    def _measured_reference(self, trainer: Trainer, module: LightningModule) -> Reference:
        """Give the statistics of the reference; those of images are measured the first time."""
        if self._known is None:
            assert self._selection is not None and self.reference is not None
            self._known = reference_from_images(
                self.reference,
                self._selection,
                extractor=self._extractor(module),
                image_size=self._selection.images.image_size,
                batch_size=self.batch_size,
                device=module.device,
                folder=Path(trainer.default_root_dir) / "references",
            )
        assert self._known is not None
        return self._known

    def _measure(self, trainer: Trainer, module: LightningModule) -> Measurement | None:
        """Draw samples, or reconstruct the images of the reference, and measure them; None without such images."""
        keeps = self.precision_recall and self._selection is not None
        most_features = None if keeps else 0
        with as_in_validation(trainer, module):
            if not isinstance(module, ImageAutoencoder):
                meter = FeatureMeter(self._extractor(module), self.num_samples, most_features=most_features)
                sharded = shards_weights(trainer)
                # Ranks that gather sharded weights wait for one another at every batch.
                with nullcontext() if sharded else failing_together():
                    for indices, counted in own_numbers(self.num_samples, self.batch_size, together=sharded):
                        images = self._draw(module, indices)
                        if counted:
                            meter.update(images, None, indices)
                return _over_ranks(meter, module.device)
            if self._selection is None:
                return None
            autoencoder = cast(Any, module)  # a tokenizer of ids or of latents

            def reconstruct(images: Tensor) -> Tensor:
                return to_uint8(autoencoder.decode(autoencoder.encode(from_uint8(images))))

            return measure(
                self._selection,
                self._extractor(module),
                num_classes=None,
                batch_size=self.batch_size,
                device=module.device,
                most_features=most_features,
                transform=reconstruct,
                description="reconstructions",
            )

    def _draw(self, module: LightningModule, indices: Tensor) -> Tensor:
        """Draw samples of some numbers: uint8 `(B, C, H, W)`."""
        assert isinstance(module, Generator | LatentGenerator)
        images, _ = draw_images(module, indices.to(module.device), seed=self.seed, sampler=self.sampler)
        if self._selection is not None and normal_size(size_of(images)) != self._selection.images.image_size:
            raise ValueError(
                f"ImageDistance: samples are of {size_text(size_of(images))} pixels, image_size of the reference is "
                f"{size_text(self._selection.images.image_size)}"
            )
        return images

    # How it is compared and called.

    def _compare(
        self, module: LightningModule, made: Measurement, reference: Reference, stage: str
    ) -> dict[str, float]:
        """Compute all figures on rank 0, by the names that they are logged under."""
        extractor = self.extractor
        assert extractor is not None
        kind = "r" if isinstance(module, ImageAutoencoder) else "g"
        count = made.moments.count
        name = f"{stage}/{kind}{extractor.metric_name}_{count}"

        def compute() -> dict[str, float]:
            distance = frechet_distance(made.moments, reference.moments)
            mean_term = float((made.moments.mean - reference.moments.mean).square().sum())
            values = {name: distance, f"{name}_mean_term": mean_term, f"{name}_covariance_term": distance - mean_term}
            if self.precision_recall and reference.features is not None and len(made.features) > NEIGHBOURS:
                if self._manifold is None:
                    # Distances are float64, which not every device has.
                    device = module.device if module.device.type == "cuda" else torch.device("cpu")
                    self._manifold, _ = manifold_for(reference, len(made.features), device)
                if self._manifold is not None:
                    both = precision_and_recall(made.features, self._manifold)
                    for word, value in zip(("precision", "recall"), both, strict=True):
                        values[f"{stage}/{kind}{word}-{extractor.name}_{count}"] = value
            return values

        return on_first_rank(compute)


def _makes_images(module: LightningModule) -> bool:
    if isinstance(module, Generator | LatentGenerator):
        return module.tokenizer.makes_images
    return isinstance(module, ImageAutoencoder)


def _over_ranks(meter: FeatureMeter, device: torch.device) -> Measurement:
    meter.restore(meter.tally().over_ranks(device))
    return meter.measurement()


@contextmanager
def _on_averages(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let the module have the averaged weights meanwhile, if the run keeps any."""
    with ExitStack() as averages:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ExponentialMovingAverage):
                averages.enter_context(callback.in_use(module))
        yield
