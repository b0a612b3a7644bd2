"""The DataModule of images in a folder, with one subfolder per class or without classes, read directly."""

from functools import cached_property

import numpy as np

from discrete_lit.core.files import content_sha256
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
    OrderedSource,
    TooManyBadSamples,
    TrainingOrder,
)
from discrete_lit.data.media import UndecodableSample
from discrete_lit.data.sources.class_folders import FoundImages, captions_beside, find_images
from discrete_lit.data.transforms import IMAGE_BYTES_VARIABLE, image_bytes_limit


class ImageFolder(ResumableDataModule):
    """Batches of images from `<folder>/<class>/**/<image>`; see `image_batches.image_batch` for what is in them.

    Images are found as `find_images` says. Classes are the subfolders' names in sorted order, those of `train` where
    it is given. A folder of images alone has no classes, and its batches no `"label"`: a tokenizer needs none. Where
    `train` has none, `validation` is read without labels too.

    A sample's key is its path below the folder. Training order depends on (seed, epoch) alone: a run may be resumed
    with other numbers of ranks and workers, other batch sizes and accumulation, as long as the global batch stays. In
    training `index` is the sample's position in the run, epoch * count + position in the epoch; in evaluation it is the
    position in the list of files, sorted by key.

    An image that cannot be read is replaced in training by the next one of the epoch's order, and left out in
    evaluation; both are logged and counted.

    Args:
        train: folder of training images; None where only the other split is used.
        validation: folder of validation images.
        image_size: of the images that come out, in pixels: the side of a square, or `[height, width]`.
        batch_size: samples of a batch on each rank.
        num_workers: processes that decode; 0 decodes in the training process.
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
        max_bad_fraction: fraction of an epoch's images that may be unreadable before the run fails.
        labels: False reads every image below the folders, at any depth, without a label.
        captions: where the captions are, in files beside the images, see `captions.Captions`; by default none are read.
        persistent_workers: keep the processes between epochs.

    Raises:
        ValueError: a setting is out of range. Reading the folders raises it where one has another form, see
            `find_images`, or where `validation` has a class that `train` has not.
    """

    def __init__(
        self,
        train: str | None,
        validation: str | None = None,
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
        max_bad_fraction: float = 0.01,
        labels: bool = True,
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
        self.labels = labels
        self.captions = captions

    @cached_property
    def _found(self) -> dict[Split, FoundImages]:
        """The images of each split; those of validation have labels only where those of training have."""
        found: dict[Split, FoundImages] = {}
        for split, path in self.locations.items():
            if path is not None:
                known = all(earlier.classes for earlier in found.values())
                kind = None if self.captions is None else self.captions.kind
                found[split] = find_images(path, labels=self.labels and known, captions=kind)
        return found

    @property
    def classes(self) -> list[str]:
        """Name of each label; none where the images have no labels."""
        return next(iter(self._found.values())).classes

    @property
    def num_classes(self) -> int:
        """Labels are in 0..num_classes-1; 0 where the images have no labels."""
        return len(self.classes)

    @cached_property
    def _files(self) -> dict[Split, "SampleFiles"]:
        return {split: SampleFiles(found, self.classes, captions=self.captions) for split, found in self._found.items()}

    def listing_sha256(self, split: Split) -> str:
        """Hash the names of the images of a split in their order, which tells that a sample's number means the same."""
        return self._files[split].listing_sha256()

    def training_source(self, rank: int, world_size: int) -> BatchSource:
        files = self._files["train"]
        order = TrainingOrder(len(files), self.batch_size, rank=rank, world_size=world_size, seed=self.seed)
        return TrainingFiles(files, order, pipeline=self.pipeline)

    def evaluation_source(
        self,
        split: Split,
        rank: int,
        world_size: int,
        *,
        crops: EvaluationCrops = CENTER_CROP,
        batches: np.ndarray | None = None,
    ) -> BatchSource:
        files = self._files[split]
        order = EvaluationOrder(len(files), self.batch_size, rank=rank, world_size=world_size, batches=batches)
        return EvaluationFiles(files, order, pipeline=self.pipeline, crops=crops)


class SampleFiles:
    """The files of a folder, images or clips, in sorted order.

    Raises:
        ValueError: the folder has a class that is not one of `classes`.
    """

    def __init__(self, found: FoundImages, classes: list[str], *, captions: Captions | None = None):
        self.folder, self.kind = found.root, found.kind
        self._captions = captions
        label_of = {name: label for label, name in enumerate(classes)}
        self.keys: list[str] = []
        labels: list[int] = []
        for name, files in found.files.items():
            if name is not None and name not in label_of:
                raise ValueError(
                    f"{self.folder} has a class {name!r} that the training folder has not; which has {len(classes)}: "
                    f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
                )
            self.keys += sorted(files)
            if name is not None:
                labels += [label_of[name]] * len(files)
        self.labels = np.array(labels, dtype=np.int64) if found.classes else None
        """int64 `(len(self),)`; None where the images have no labels."""

    def __len__(self) -> int:
        return len(self.keys)

    def listing_sha256(self) -> str:
        """Hash the names of the files in their order, which tells that a sample's number means the same."""
        return content_sha256(f"{key}\n" for key in self.keys)

    def label(self, sample: int) -> int | None:
        """The label of an image, where it has one."""
        return None if self.labels is None else int(self.labels[sample])

    def captions(self, sample: int) -> tuple[str, ...] | None:
        """Read the captions beside an image; None where none were asked for."""
        return None if self._captions is None else captions_beside(self.folder / self.keys[sample], self._captions)

    def read(self, sample: int) -> bytes:
        """Read the bytes of an image file."""
        path = self.folder / self.keys[sample]
        try:
            if (size := path.stat().st_size) > image_bytes_limit():
                raise UndecodableSample(f"it has {size:,} bytes, more than {IMAGE_BYTES_VARIABLE} allows")
            return path.read_bytes()
        except OSError as error:
            raise UndecodableSample(f"{type(error).__name__}: {error}") from error


class TrainingFiles(OrderedSource):
    def __init__(self, files: SampleFiles, order: TrainingOrder, *, pipeline: SamplePipeline):
        super().__init__(order)
        self.files = files
        self.order = order
        self.pipeline = pipeline

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        bad: list[BadSample] = []
        samples = [self._sample(epoch, int(position), bad) for position in self.order.positions(number)]
        return self.pipeline.batch(samples), bad

    def _sample(self, epoch: int, position: int, bad: list[BadSample]) -> LabelledSample:
        permutation = self.order.permutation(epoch)
        # The stand-in of a bad image is the next good one of the epoch's order, which no rank or worker decides.
        for distance in range(len(permutation)):
            sample = permutation[(position + distance) % len(permutation)]
            key = self.files.keys[sample]
            try:
                values = self.pipeline.training(self.files.read(sample), epoch, key)
                captions = self.files.captions(sample)
            except UndecodableSample as error:
                if distance == 0:
                    bad.append(BadSample(key, str(self.files.folder), str(error)))
                continue
            index = epoch * self.order.count + position
            caption = self.pipeline.training_caption(captions, epoch, key)
            label = self.files.label(sample)
            return LabelledSample(values, label, key=key, index=index, captions=captions, caption=caption)
        raise TooManyBadSamples(f"not one {self.files.kind.name} in {self.files.folder} can be read")


class EvaluationFiles(OrderedSource):
    def __init__(self, files: SampleFiles, order: EvaluationOrder, *, pipeline: SamplePipeline, crops: EvaluationCrops):
        super().__init__(order)
        self.files = files
        self.order = order
        self.pipeline = pipeline
        self.crops = crops

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        samples, bad = [], []
        for sample in self.order.samples_of(number):
            key = self.files.keys[sample]
            try:
                values = self.pipeline.evaluation(self.files.read(sample), self.crops)
                captions = self.files.captions(sample)
            except UndecodableSample as error:
                bad.append(BadSample(key, str(self.files.folder), str(error)))
                continue
            label = self.files.label(sample)
            samples.append(LabelledSample(values, label, key=key, index=int(sample), captions=captions))
        return self.pipeline.batch(samples), bad
