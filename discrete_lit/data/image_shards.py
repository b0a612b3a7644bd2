"""The DataModule of images streamed from webdataset shards, on disk or behind a URL.

Which samples a worker reads in an epoch, and in what order, is in `shard_order.py`. It is known before anything is
read, so a resume goes straight to the samples that are left, and only opens the shards that hold them.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.data.captions import Captions
from discrete_lit.data.data_module import ResumableDataModule, Split
from discrete_lit.data.image_batches import (
    CENTER_CROP,
    Decoding,
    EvaluationCrops,
    ImagePipeline,
    LabelledSample,
    SamplePipeline,
    TrainingCrop,
)
from discrete_lit.data.loaders import (
    BadSample,
    Batch,
    BatchSource,
    EvaluationOrder,
    TooManyBadSamples,
    complete_batches,
)
from discrete_lit.data.media import UndecodableSample
from discrete_lit.data.shard_order import (
    EpochReader,
    Layout,
    SampleStream,
    ShardOrder,
    SplitReader,
    say_what_is_passed_over,
    worker_range,
)
from discrete_lit.data.shard_set import ShardSet, find_shards
from discrete_lit.data.tars import RawSample, label_of


class ImageShards(ResumableDataModule):
    """Batches of images from shards; see `image_batches.image_batch` for what is in them.

    A split is a folder of shards, a shard, a pattern such as `shards/train-{000000..000099}.tar` or, on the disk,
    `shards/*.tar`, a URL of one of these (`http://`, `https://`, presigned ones too, `s3://` by the extra `s3`,
    `gs://` by gsutil, `pipe:` any command), or a list of them. Shards end with `.tar` or, compressed, with `.tar.gz`,
    `.tgz`, `.tar.bz2`, `.tbz2`, `.tar.xz` or `.txz`; other archives and images beside them are left out with a warning.
    How many samples each holds, and of which classes, is read from the `manifest.json` beside them; without one, local
    shards are counted. A set of which nobody says the classes, as img2dataset writes it, has no labels, and its batches
    no `"label"`: a tokenizer needs none.

    In an epoch every sample is read once, less the last incomplete global batch. The order depends on seed, epoch, and
    the batch size and numbers of ranks and workers that the run began with. It may go on with others, as long as the
    global batch stays: the global batches stay the same, in this epoch and in those that follow. In training `index` is
    epoch * count + a position in the epoch, unique in the run; in evaluation it is the position in the split (shards in
    the order of the manifest).

    A sample that cannot be read is replaced in training by the next readable one of its part of the order, and left
    out in evaluation; both are logged and counted. The samples that a truncated shard lacks count as unreadable
    ones; a shard of which nothing can be read ends the run, and so does a truncated one that must be counted. An image
    file above 256 MB is not read, nor is anything that stays mute for 15 seconds; the environment variables
    `DISCRETE_LIT_MAX_IMAGE_MEGABYTES` and `DISCRETE_LIT_READ_TIMEOUT` set other limits.

    Args:
        train: the training shards; None where only the other split is used.
        validation: the validation shards.
        image_size: of the images that come out, in pixels: the side of a square, or `[height, width]`.
        batch_size: samples of a batch on each rank.
        num_workers: processes that read and decode; 0 does it in the training process.
        seed: decides the order and the augmentation.
        crop: `random` resizes the shorter side and cuts out a random square (or rectangle); `random_resized` cuts out a
            part of random area and resizes it (torchvision's `RandomResizedCrop`: MaskBit); `dall_e` cuts a square
            near the centre (DALL-E, VQ-Diffusion); `center` is the crop of evaluation.
        minimum_crop, maximum_crop: smallest and largest fraction of the shorter side that a random crop covers: 1.0
            (VQGAN), from 0.8 (ADM, LlamaGen), or always 0.889 (VAR).
        crop_area, crop_aspect: of a random part, from the smallest to the largest: the fraction of the image's area,
            and the ratio of width to height; the defaults are torchvision's.
        flip: mirror half of the training images.
        apply_exif: turn pictures as their EXIF orientation says; published figures do not.
        decoding: of training images: `exact` has the pixels of Pillow's filters, as published pipelines do; `fast`
            decodes and resizes a JPEG file in two thirds of the time, with pixels that differ by a level in a few
            places, and one of twice the size that is needed at half of its size, see `transforms.decode_image_fast`.
            Images that are measured, or made tokens of, are always exact.
        image_channels: 1 for grey, 3 for RGB, 4 for RGBA; see `transforms` for what becomes of other files.
        shuffle_window: samples of a worker that are mixed with each other, on top of the random order of the
            shards; each worker holds about that many undecoded images in memory.
        max_bad_fraction: fraction of an epoch's samples that may be unreadable before the run fails.
        train_count: for URLs without a manifest, the number of training samples, which the shards must hold in equal
            parts, or a list with the number of each shard.
        validation_count: the same of the validation shards.
        num_classes: number of classes, where there is no manifest; by default the samples are read without labels.
        captions: where the captions are, see `captions.Captions`; by default none are read.
        persistent_workers: keep the processes between epochs.

    Raises:
        ValueError: a setting is out of range. Finding the shards raises it where one is missing or cut off, or where
            counts are not known. Reading raises it for a label that is not in 0..num_classes-1.
    """

    def __init__(
        self,
        train: str | list[str] | None,
        validation: str | list[str] | None = None,
        *,
        image_size: ImageSize,
        batch_size: int,
        num_workers: int = 2,
        seed: int = 0,
        crop: TrainingCrop = "random",
        minimum_crop: float = 1.0,
        maximum_crop: float = 1.0,
        crop_area: tuple[float, float] = (0.08, 1.0),
        crop_aspect: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        apply_exif: bool = False,
        decoding: Decoding = "exact",
        image_channels: int = 3,
        shuffle_window: int = 1000,
        max_bad_fraction: float = 0.01,
        train_count: int | list[int] | None = None,
        validation_count: int | list[int] | None = None,
        num_classes: int | None = None,
        captions: Captions | None = None,
        persistent_workers: bool = False,
    ):
        super().__init__(
            train,
            validation,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
            persistent_workers=persistent_workers,
        )
        if shuffle_window < 0:
            raise ValueError(f"shuffle_window is {shuffle_window}; it must be at least 0")
        self._counts: dict[Split, int | list[int] | None] = {"train": train_count, "validation": validation_count}
        self._given_num_classes = num_classes
        self.pipeline = ImagePipeline(
            normal_size(image_size),
            seed,
            image_channels=image_channels,
            crop=crop,
            minimum_crop=minimum_crop,
            maximum_crop=maximum_crop,
            crop_area=crop_area,
            crop_aspect=crop_aspect,
            flip=flip,
            apply_exif=apply_exif,
            decoding=decoding,
        )
        self.image_size = self.pipeline.image_size
        self.image_channels = image_channels
        self.captions = captions
        self.shuffle_window = shuffle_window

    @cached_property
    def shards(self) -> dict[Split, ShardSet]:
        """The shards that were found, by split."""
        found: dict[Split, ShardSet] = {
            split: find_shards(location, self._counts[split], num_classes=self._given_num_classes)
            for split, location in self.locations.items()
            if location is not None
        }
        classes = next(iter(found.values())).classes
        if not classes:
            # The labels of validation alone mean nothing.
            return {split: replace(shards, classes=()) for split, shards in found.items()}
        if any(shards.classes and shards.classes != classes for shards in found.values()):
            raise ValueError(
                f"the classes of {self.locations['train']} and {self.locations['validation']} are not the same"
            )
        return found

    @property
    def classes(self) -> list[str]:
        """Name of each label; none where the samples have no labels."""
        return list(next(iter(self.shards.values())).classes)

    @property
    def num_classes(self) -> int:
        """Labels are in 0..num_classes-1; 0 where the samples have no labels."""
        return len(self.classes)

    def training_source(self, rank: int, world_size: int) -> BatchSource:
        return TrainingShards(
            self.shards["train"],
            self.pipeline,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            workers=max(1, self.num_workers),
            captions=self.captions,
            shuffle_window=self.shuffle_window,
        )

    def evaluation_source(
        self,
        split: Split,
        rank: int,
        world_size: int,
        *,
        crops: EvaluationCrops = CENTER_CROP,
        batches: np.ndarray | None = None,
    ) -> BatchSource:
        return EvaluationShards(
            self.shards[split],
            self.pipeline,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            workers=max(1, self.num_workers),
            captions=self.captions,
            crops=crops,
            batches=batches,
        )

    def listing_sha256(self, split: Split) -> str:
        """Hash names and counts of the shards of a split, which tell that a sample's number means the same."""
        return self.shards[split].listing_sha256()


class _Shards:
    """The base of the two sources: what they read, and how a sample becomes an image with a label and captions."""

    batches: int
    samples: int

    def __init__(
        self,
        shards: ShardSet,
        pipeline: SamplePipeline,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        captions: Captions | None,
    ):
        self.shards = shards
        self.pipeline = pipeline
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.captions = captions
        self.caption_kind = None if captions is None else captions.kind
        self.samples_per_step = batch_size * world_size
        self._reader: Any = None
        """The opened shards, kept between the batches of a worker."""
        self._next: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_next": None}

    def opened(self, epoch: int, number: int) -> Any:
        """Open what the batches `number`, `number + workers`, ... are read from."""
        raise NotImplementedError

    def _reader_at(self, epoch: int, number: int) -> Any:
        """Give what batch `number` is read from, with the batches before it taken."""
        if self._reader is None or self._next != (epoch, number):
            self._reader = self.opened(epoch, number)
        self._next = (epoch, number + self.workers)
        return self._reader

    def _label(self, sample: RawSample) -> int | None:
        return label_of(sample, len(self.shards.classes))

    def _captions(self, sample: RawSample) -> tuple[str, ...] | None:
        return None if self.captions is None else self.captions.read(sample.captions)

    def _image(self, sample: RawSample) -> bytes:
        if sample.problem is not None:
            raise UndecodableSample(sample.problem)
        if sample.label is None and self.shards.classes:
            raise UndecodableSample("it has no .cls entry (a set without labels is read without num_classes)")
        return sample.image


class TrainingShards(_Shards):
    def __init__(
        self,
        shards: ShardSet,
        pipeline: SamplePipeline,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        captions: Captions | None,
        shuffle_window: int,
    ):
        super().__init__(
            shards,
            pipeline,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            workers=workers,
            captions=captions,
        )
        self.shuffle_window = shuffle_window
        self.batches = complete_batches(shards.count, batch_size, world_size)
        self.samples = self.batches * batch_size
        self.order = self._order_of(Layout(batch_size, world_size, workers))

    def _order_of(self, layout: Layout) -> ShardOrder:
        return ShardOrder(self.shards.count, layout, shuffle_window=self.shuffle_window, seed=self.pipeline.seed)

    def positions(self, number: int) -> np.ndarray:
        """Positions, in the epoch's order, of this rank's batch `number`: int64 `(batch_size,)`."""
        start = (number * self.world_size + self.rank) * self.batch_size
        return np.arange(start, start + self.batch_size)

    def opened(self, epoch: int, number: int) -> EpochReader:
        stream = SampleStream.of_epoch(self.shards, seed=self.pipeline.seed, epoch=epoch, captions=self.caption_kind)
        positions = np.concatenate([self.positions(batch) for batch in range(number, self.batches, self.workers)])
        return EpochReader(stream, self.order, epoch=epoch, positions=positions[positions < self.order.samples])

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        reader: EpochReader = self._reader_at(epoch, number)
        samples, bad = [], []
        for position in self.positions(number).tolist():
            taken = reader.take(position)
            index = epoch * self.shards.count + position
            try:
                sample = self._decode(taken, epoch, index)
            except UndecodableSample as error:
                bad.append(BadSample(taken.key, taken.shard, str(error)))
                sample = self._stand_in(reader, epoch, position)
            samples.append(sample)
        return self.pipeline.batch(samples), bad

    def _decode(self, sample: RawSample, epoch: int, index: int) -> LabelledSample:
        values = self.pipeline.training(self._image(sample), epoch, sample.key)
        captions = self._captions(sample)
        caption = self.pipeline.training_caption(captions, epoch, sample.key)
        return LabelledSample(
            values, self._label(sample), key=sample.key, index=index, captions=captions, caption=caption
        )

    def _stand_in(self, reader: EpochReader, epoch: int, position: int) -> LabelledSample:
        """The next readable sample of its part of the order, its first ones after its last."""
        for sample in reader.following(position):
            try:
                return self._decode(sample, epoch, epoch * self.shards.count + position)
            except UndecodableSample:
                continue
        raise TooManyBadSamples(f"not one sample of a worker's part of the epoch can be used, on rank {self.rank}")

    def identity(self) -> Mapping[str, int | str]:
        return {
            "shuffle_window": self.shuffle_window,
            "seed": self.pipeline.seed,
            "count": self.shards.count,
            "shards": len(self.shards.shards),
            **({} if self.captions is None else {"captions": str(self.captions)}),
        }

    def layout(self) -> Mapping[str, int]:
        return self.order.layout._asdict()

    def follow(self, layout: Mapping[str, int]) -> None:
        own = Layout(self.batch_size, self.world_size, self.workers)
        self.order = self._order_of(Layout.of_state(layout))
        if self.order.layout != own and self.rank == 0:
            say_what_is_passed_over(self.order, own)


class EvaluationShards(_Shards):
    def __init__(
        self,
        shards: ShardSet,
        pipeline: SamplePipeline,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        captions: Captions | None,
        crops: EvaluationCrops,
        batches: np.ndarray | None,
    ):
        super().__init__(
            shards,
            pipeline,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            workers=workers,
            captions=captions,
        )
        self.crops = crops
        order = EvaluationOrder(shards.count, batch_size, rank=rank, world_size=world_size, batches=batches)
        self.positions, self.samples, self.batches = order.positions, order.samples, order.batches

    def opened(self, epoch: int, number: int) -> SplitReader:
        worker = number % self.workers
        start, stop = worker_range(worker, self.workers, samples=self.samples, batch_size=self.batch_size)
        taken = number // self.workers * self.batch_size
        stream = SampleStream.in_order(self.shards, captions=self.caption_kind)
        return SplitReader(stream, self.positions[start + taken : stop])

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        reader: SplitReader = self._reader_at(epoch, number)
        samples, bad = [], []
        for _ in range(min(self.batch_size, len(reader))):
            index, taken = reader.take()
            try:
                values = self.pipeline.evaluation(self._image(taken), self.crops)
                captions = self._captions(taken)
            except UndecodableSample as error:
                bad.append(BadSample(taken.key, taken.shard, str(error)))
                continue
            samples.append(LabelledSample(values, self._label(taken), key=taken.key, index=index, captions=captions))
        return self.pipeline.batch(samples), bad

    def identity(self) -> Mapping[str, int | str]:
        return {}

    def layout(self) -> Mapping[str, int]:
        return {}

    def follow(self, layout: Mapping[str, int]) -> None:
        assert not layout, "an evaluation is read in the order of the set"
