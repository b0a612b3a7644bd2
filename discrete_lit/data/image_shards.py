"""The DataModule of images streamed from webdataset shards, on disk or behind a URL.

Which samples a worker reads in an epoch, and in what order: the shards in the order of the epoch form one stream of
samples. It is cut into equal splits, one for each worker of each rank, wherever that falls inside a shard; so every
sample is read once in an epoch however uneven the shards are. A worker's split is read in order and mixed within a
window. Which sample comes when is known before anything is read, so a resume goes straight to the samples that are
left, and only opens the shards that hold them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.random import numpy_stream, sample_order
from discrete_lit.data.captions import Captions
from discrete_lit.data.data_module import ResumableDataModule, Split
from discrete_lit.data.image_batches import (
    CENTER_CROP,
    EvaluationCrops,
    ImagePipeline,
    LabelledSample,
    SamplePipeline,
    TrainingCrop,
)
from discrete_lit.data.loaders import BadSample, Batch, BatchSource, TooManyBadSamples, complete_batches, rank_range
from discrete_lit.data.media import UndecodableSample
from discrete_lit.data.shard_set import ShardSet, find_shards
from discrete_lit.data.tars import RawSample, label_of, read_samples


class ImageShards(ResumableDataModule):
    """Batches of images from shards; see `image_batches.image_batch` for what is in them.

    A split is a folder of shards, a shard, a pattern such as `shards/train-{000000..000099}.tar` or, on the disk,
    `shards/*.tar`, a URL of one of these (`http://`, `https://`, presigned ones too, `s3://` by the aws command,
    `gs://` by gsutil, `pipe:` any command), or a list of them. Shards end with `.tar` or, compressed, with `.tar.gz`,
    `.tgz`, `.tar.bz2`, `.tbz2`, `.tar.xz` or `.txz`; other archives and images beside them are left out with a warning.
    How many samples each holds, and of which classes, is read from the `manifest.json` beside them; without one, local
    shards are counted. A set of which nobody says the classes, as img2dataset writes it, has no labels, and its batches
    no `"label"`: a tokenizer needs none.

    In an epoch every sample is read once, less the last incomplete global batch. The order depends on seed, epoch,
    batch size, and the numbers of ranks and workers: inside an epoch a run resumes exactly with the same ones, and
    refuses others. In training `index` is epoch * count + a position in the epoch, unique in the run; in evaluation
    it is the position in the split (shards in the order of the manifest).

    A sample that cannot be read is replaced in training by the next readable one that its worker would read, and
    left out in evaluation; both are logged and counted. The samples that a truncated shard lacks count as unreadable
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
        self, split: Split, rank: int, world_size: int, *, crops: EvaluationCrops = CENTER_CROP
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
        )


@dataclass(frozen=True)
class SampleStream:
    """All samples of a split of the data, shard after shard.

    Args:
        shards: the shards of the data's split.
        order: int64 `(len(shards.shards),)`, the order of the shards.
        captions: the extension of the caption files that are read; None reads none.
    """

    shards: ShardSet
    order: np.ndarray
    captions: str | None = None

    @classmethod
    def of_epoch(cls, shards: ShardSet, *, seed: int, epoch: int, captions: str | None = None) -> "SampleStream":
        """The stream of a training epoch, its shards in an order of (seed, epoch)."""
        return cls(shards, sample_order(seed, epoch, len(shards.shards)), captions)

    @classmethod
    def in_order(cls, shards: ShardSet, *, captions: str | None = None) -> "SampleStream":
        """The stream of an evaluation, its shards in the order that numbers the samples."""
        return cls(shards, np.arange(len(shards.shards)), captions)

    def read(self, start: int, wanted: np.ndarray) -> Iterator[tuple[int, RawSample]]:
        """Read the wanted samples among those at `start` and after: position in the stream and sample.

        Args:
            start: the first position.
            wanted: bool, for each position from `start` on.
        """
        stop = start + len(wanted)
        end = 0
        for number in self.order:
            shard = self.shards.shards[number]
            begin, end = end, end + shard.count
            if end <= start or begin >= stop:
                continue
            in_shard = np.zeros(shard.count, dtype=bool)
            low, high = max(begin, start), min(end, stop)
            in_shard[low - begin : high - begin] = wanted[low - start : high - start]
            if in_shard.any():
                for position, sample in read_samples(shard, in_shard, captions=self.captions, kind=self.shards.kind):
                    yield begin + position, sample


class WorkerSplit:
    """One worker's split of the stream, given out sample by sample.

    Args:
        stream: all samples.
        start: first position of the split.
        order: int64, the positions of the split, counted from `start`, in the order in which they are given out.
        taken: how many of them were given out before.
    """

    def __init__(self, stream: SampleStream, start: int, *, order: np.ndarray, taken: int):
        self._order = order + start
        self._taken = taken
        self._read_ahead: dict[int, RawSample] = {}
        wanted = np.zeros(len(order), dtype=bool)
        wanted[order[taken:]] = True
        self._reader = stream.read(start, wanted)

    def __len__(self) -> int:
        """Samples that are left."""
        return len(self._order) - self._taken

    def peek(self, distance: int) -> RawSample:
        """The sample that will be given out after `distance` others."""
        position = int(self._order[self._taken + distance])
        while position not in self._read_ahead:
            read, sample = next(self._reader)
            self._read_ahead[read] = sample
        return self._read_ahead[position]

    def take(self) -> RawSample:
        """Give out the next sample."""
        sample = self.peek(0)
        del self._read_ahead[int(self._order[self._taken])]
        self._taken += 1
        return sample

    def next_position(self) -> int:
        """Position in the stream of the sample that `take` gives out next."""
        return int(self._order[self._taken])


def worker_range(worker: int, workers: int, *, samples: int, batch_size: int) -> tuple[int, int]:
    """The samples [start, stop) that one worker reads, of a rank's `samples`.

    Batch b of the rank is made by worker b mod `workers`, so the first workers may have a batch more than the
    others; only the last batch of the last split may be incomplete.
    """
    batches = -(-samples // batch_size)
    batches_of = [len(range(number, batches, workers)) for number in range(workers)]
    start = min(sum(batches_of[:worker]) * batch_size, samples)
    return start, min(start + batches_of[worker] * batch_size, samples)


def window_shuffle(count: int, window: int, *words: int) -> np.ndarray:
    """A permutation of 0..count-1 that moves nothing by more than `window` positions.

    So a reader holds at most about `window` samples at a time. `window` 0 keeps the order.

    Args:
        count: number of samples.
        window: positions.
        words: integers that decide the permutation.
    """
    if window == 0:
        return np.arange(count)
    shifts = numpy_stream(*words).random_sample(count) * window
    return np.argsort(np.arange(count) + shifts, kind="stable")


class _Shards:
    """The base of the two sources: the split that a worker reads, kept between its batches."""

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
        self._open: WorkerSplit | None = None
        self._next: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_next": None}

    def worker_split(self, epoch: int, worker: int, taken: int) -> WorkerSplit:
        raise NotImplementedError

    def _split_at(self, epoch: int, number: int) -> WorkerSplit:
        """The split that batch `number` comes from, with the batches before it taken."""
        if self._open is None or self._next != (epoch, number):
            self._open = self.worker_split(epoch, number % self.workers, number // self.workers * self.batch_size)
        self._next = (epoch, number + self.workers)
        return self._open

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

    def worker_split(self, epoch: int, worker: int, taken: int) -> WorkerSplit:
        seed, kind = self.pipeline.seed, self.caption_kind
        stream = SampleStream.of_epoch(self.shards, seed=seed, epoch=epoch, captions=kind)
        start, stop = worker_range(worker, self.workers, samples=self.samples, batch_size=self.batch_size)
        words = (seed, epoch, self.rank, worker)
        order = window_shuffle(stop - start, self.shuffle_window, *words)
        return WorkerSplit(stream, self.rank * self.samples + start, order=order, taken=taken)

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        split = self._split_at(epoch, number)
        first = epoch * self.shards.count + (number * self.world_size + self.rank) * self.batch_size
        samples, bad = [], []
        for index in range(first, first + self.batch_size):
            taken = split.take()
            try:
                sample = self._decode(taken, epoch, index)
            except UndecodableSample as error:
                bad.append(BadSample(taken.key, taken.shard, str(error)))
                sample = self._stand_in(split, epoch, number % self.workers, index)
            samples.append(sample)
        return self.pipeline.batch(samples), bad

    def _decode(self, sample: RawSample, epoch: int, index: int) -> LabelledSample:
        values = self.pipeline.training(self._image(sample), epoch, sample.key)
        captions = self._captions(sample)
        caption = self.pipeline.training_caption(captions, epoch, sample.key)
        return LabelledSample(
            values, self._label(sample), key=sample.key, index=index, captions=captions, caption=caption
        )

    def _stand_in(self, split: WorkerSplit, epoch: int, worker: int, index: int) -> LabelledSample:
        """The next readable sample of the split, its first ones after its last.

        It is looked at and not taken, so that no later batch moves, and the batch stays a function of its number.
        """
        for sample in self._following(split, epoch, worker):
            try:
                return self._decode(sample, epoch, index)
            except UndecodableSample:
                continue
        raise TooManyBadSamples(f"not one sample that worker {worker} of rank {self.rank} reads can be used")

    def _following(self, split: WorkerSplit, epoch: int, worker: int) -> Iterator[RawSample]:
        for distance in range(len(split)):
            yield split.peek(distance)
        again = self.worker_split(epoch, worker, 0)
        while len(again):
            yield again.take()

    def identity(self) -> Mapping[str, int | str]:
        return {
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "workers": self.workers,
            "shuffle_window": self.shuffle_window,
            "seed": self.pipeline.seed,
            "count": self.shards.count,
            "shards": len(self.shards.shards),
            **({} if self.captions is None else {"captions": str(self.captions)}),
        }


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
        self.start, stop = rank_range(shards.count, rank, world_size)
        self.samples = stop - self.start
        self.batches = -(-self.samples // batch_size)

    def worker_split(self, epoch: int, worker: int, taken: int) -> WorkerSplit:
        start, stop = worker_range(worker, self.workers, samples=self.samples, batch_size=self.batch_size)
        order = window_shuffle(stop - start, 0)
        stream = SampleStream.in_order(self.shards, captions=self.caption_kind)
        return WorkerSplit(stream, self.start + start, order=order, taken=taken)

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        split = self._split_at(epoch, number)
        samples, bad = [], []
        for _ in range(min(self.batch_size, len(split))):
            index = split.next_position()
            taken = split.take()
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
