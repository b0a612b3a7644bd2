"""Images streamed from webdataset shards, on disk or behind a URL."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

from discrete_lit.data.bad_samples import BadSample, TooManyBadSamples
from discrete_lit.data.data_module import ResumableDataModule, Split
from discrete_lit.data.decoding import UndecodableImage
from discrete_lit.data.image_batches import ImagePipeline, LabelledImage, image_batch
from discrete_lit.data.loaders import Batch, BatchSource
from discrete_lit.data.map_order import complete_batches, rank_range
from discrete_lit.data.shard_set import ShardSet, find_shards
from discrete_lit.data.shard_stream import Line, Piece, piece_of, window_shuffle
from discrete_lit.data.tars import RawSample


class ImageShards(ResumableDataModule):
    """Batches of images from shards; see `image_batches.image_batch` for what is in them.

    A split is a folder of shards, a shard, a brace pattern such as `shards/train-{000000..000099}.tar`, a URL of one
    of these (`http://`, `https://`, `s3://` by the aws command, `gs://` by gsutil, `pipe:` any command), or a list
    of them. How many samples each shard holds is read from the `manifest.json` beside them.

    In an epoch every sample is read once, less the last incomplete global batch. The order depends on seed, epoch,
    batch size, and the numbers of ranks and workers: inside an epoch a run resumes exactly with the same ones, and
    refuses others. In training `index` is epoch * count + a place in the epoch, unique in the run; in evaluation it
    is the place in the split (shards in the order of the manifest).

    A sample that cannot be read is replaced in training by the next readable one that its worker would read, and
    left out in evaluation; both are logged and counted. The samples that a truncated shard lacks count as unreadable
    ones; a shard of which nothing can be read ends the run.

    Args:
        train: the training shards; None where only the other split is used.
        validation: the validation shards.
        image_size: side of the square images, in pixels.
        batch_size: samples of a batch on each rank.
        num_workers: processes that read and decode; 0 does it in the training process.
        seed: of the order and the augmentation.
        crop: `random` resizes the shorter side and cuts out a random square; `center` is the crop of evaluation.
        minimum_crop: smallest part of the shorter side that a random crop covers; 1.0 (VQGAN) or 0.8 (ADM, LlamaGen).
        flip: mirror half of the training images.
        apply_exif: turn pictures as their EXIF orientation says; published figures do not.
        shuffle_window: samples of a worker that are mixed with each other, on top of the random order of the
            shards; each worker holds about that many undecoded images in memory.
        max_bad_fraction: share of an epoch's samples that may be unreadable before the run fails.
        train_count: for URLs without a manifest, the number of training samples, which the shards must hold in equal
            parts, or a list with the number of each shard.
        validation_count: the same of the validation shards.
        num_classes: number of classes, where there is no manifest.
        persistent_workers: keep the processes between epochs.

    Raises:
        ValueError: a setting is out of range. Finding the shards raises it where one is missing, or where counts or
            classes are not known. Reading raises it for a label that is not in 0..num_classes-1.
    """

    def __init__(
        self,
        train: str | list[str] | None,
        validation: str | list[str] | None = None,
        *,
        image_size: int,
        batch_size: int,
        num_workers: int = 2,
        seed: int = 0,
        crop: Literal["random", "center"] = "random",
        minimum_crop: float = 1.0,
        flip: bool = True,
        apply_exif: bool = False,
        shuffle_window: int = 1000,
        max_bad_fraction: float = 0.01,
        train_count: int | list[int] | None = None,
        validation_count: int | list[int] | None = None,
        num_classes: int | None = None,
        persistent_workers: bool = False,
    ):
        super().__init__(train, validation, batch_size, num_workers, seed, max_bad_fraction, persistent_workers)
        if shuffle_window < 0:
            raise ValueError(f"shuffle_window is {shuffle_window}; it must be at least 0")
        self._counts: dict[Split, int | list[int] | None] = {"train": train_count, "validation": validation_count}
        self._given_num_classes = num_classes
        # `discrete-lit tokenize` sets other crops.
        self.pipeline = ImagePipeline(image_size, seed, crop, minimum_crop, flip, apply_exif)
        self.image_size = image_size
        self.shuffle_window = shuffle_window

    @cached_property
    def shards(self) -> dict[Split, ShardSet]:
        """The shards that were found, by split."""
        found: dict[Split, ShardSet] = {
            split: find_shards(location, self._counts[split], self._given_num_classes)
            for split, location in self.locations.items()
            if location is not None
        }
        if len({shards.classes for shards in found.values()}) > 1:
            raise ValueError(
                f"the classes of {self.locations['train']} and {self.locations['validation']} are not the same"
            )
        return found

    @property
    def classes(self) -> list[str]:
        """Name of each label."""
        return list(next(iter(self.shards.values())).classes)

    @property
    def num_classes(self) -> int:
        """Labels are in 0..num_classes-1."""
        return len(self.classes)

    def training_source(self, rank: int, world_size: int) -> BatchSource:
        return _TrainingShards(
            self.shards["train"],
            self.pipeline,
            self.batch_size,
            rank,
            world_size,
            max(1, self.num_workers),
            self.shuffle_window,
        )

    def evaluation_source(self, split: Split, rank: int, world_size: int) -> BatchSource:
        shards = self.shards[split]
        return _EvaluationShards(shards, self.pipeline, self.batch_size, rank, world_size, max(1, self.num_workers))


class _Shards:
    """What the two sources share: the piece that is being read, kept between the batches of a worker."""

    batches: int
    samples: int

    def __init__(
        self, shards: ShardSet, pipeline: ImagePipeline, batch_size: int, rank: int, world_size: int, workers: int
    ):
        self.shards = shards
        self.pipeline = pipeline
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.samples_per_step = batch_size * world_size
        self._open: Piece | None = None
        self._next: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_next": None}

    def piece(self, epoch: int, worker: int, taken: int) -> Piece:
        raise NotImplementedError

    def _piece_at(self, epoch: int, number: int) -> Piece:
        """The piece that batch `number` comes from, with the batches before it taken."""
        if self._open is None or self._next != (epoch, number):
            self._open = self.piece(epoch, number % self.workers, number // self.workers * self.batch_size)
        self._next = (epoch, number + self.workers)
        return self._open

    def _label(self, sample: RawSample) -> int:
        classes = len(self.shards.classes)
        text = sample.label.decode("ascii", "replace").strip()
        if not text.isdecimal() or int(text) >= classes:
            raise ValueError(
                f"sample {sample.key!r} of {sample.shard} has label {text!r}; labels must be in 0..{classes - 1}"
            )
        return int(text)

    def _image(self, sample: RawSample) -> bytes:
        if sample.problem is not None:
            raise UndecodableImage(sample.problem)
        return sample.image


class _TrainingShards(_Shards):
    def __init__(
        self,
        shards: ShardSet,
        pipeline: ImagePipeline,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        shuffle_window: int,
    ):
        super().__init__(shards, pipeline, batch_size, rank, world_size, workers)
        self.shuffle_window = shuffle_window
        self.batches = complete_batches(shards.count, batch_size, world_size)
        self.samples = self.batches * batch_size

    def piece(self, epoch: int, worker: int, taken: int) -> Piece:
        line = Line.of_epoch(self.shards, self.pipeline.seed, epoch)
        start, stop = piece_of(worker, self.workers, self.samples, self.batch_size)
        words = (self.pipeline.seed, epoch, self.rank, worker)
        order = window_shuffle(stop - start, self.shuffle_window, *words)
        return Piece(line, self.rank * self.samples + start, order, taken)

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        piece = self._piece_at(epoch, number)
        first = epoch * self.shards.count + (number * self.world_size + self.rank) * self.batch_size
        samples, bad = [], []
        for index in range(first, first + self.batch_size):
            taken = piece.take()
            try:
                sample = self._decode(taken, epoch, index)
            except UndecodableImage as error:
                bad.append(BadSample(taken.key, taken.shard, str(error)))
                sample = self._stand_in(piece, epoch, number % self.workers, index)
            samples.append(sample)
        return image_batch(samples, self.pipeline.image_size), bad

    def _decode(self, sample: RawSample, epoch: int, index: int) -> LabelledImage:
        pixels = self.pipeline.training(self._image(sample), epoch, sample.key)
        return LabelledImage(pixels, self._label(sample), sample.key, index)

    def _stand_in(self, piece: Piece, epoch: int, worker: int, index: int) -> LabelledImage:
        """The next readable sample of the piece, its first ones after its last.

        It is looked at and not taken, so that no later batch moves, and the batch stays a function of its number.
        """
        for sample in self._following(piece, epoch, worker):
            try:
                return self._decode(sample, epoch, index)
            except UndecodableImage:
                continue
        raise TooManyBadSamples(f"not one sample that worker {worker} of rank {self.rank} reads can be used")

    def _following(self, piece: Piece, epoch: int, worker: int) -> Iterator[RawSample]:
        for distance in range(len(piece)):
            yield piece.peek(distance)
        again = self.piece(epoch, worker, 0)
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
        }


class _EvaluationShards(_Shards):
    def __init__(
        self, shards: ShardSet, pipeline: ImagePipeline, batch_size: int, rank: int, world_size: int, workers: int
    ):
        super().__init__(shards, pipeline, batch_size, rank, world_size, workers)
        self.start, stop = rank_range(shards.count, rank, world_size)
        self.samples = stop - self.start
        self.batches = -(-self.samples // batch_size)

    def piece(self, epoch: int, worker: int, taken: int) -> Piece:
        start, stop = piece_of(worker, self.workers, self.samples, self.batch_size)
        order = window_shuffle(stop - start, 0)
        return Piece(Line.in_order(self.shards), self.start + start, order, taken)

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        piece = self._piece_at(epoch, number)
        samples, bad = [], []
        for _ in range(min(self.batch_size, len(piece))):
            index = piece.next_place()
            taken = piece.take()
            try:
                pixels = self.pipeline.evaluation(self._image(taken))
            except UndecodableImage as error:
                bad.append(BadSample(taken.key, taken.shard, str(error)))
                continue
            samples.append(LabelledImage(pixels, self._label(taken), taken.key, index))
        return image_batch(samples, self.pipeline.image_size), bad

    def identity(self) -> Mapping[str, int | str]:
        return {}
