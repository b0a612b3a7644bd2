"""The files of clips, their crop in time and their batches: for the DataModules of audio and of video.

A split is a folder, read as `ImageFolder` reads one, or shards, read as `ImageShards` reads them: the same order, the
same exact resume, the same labels and captions. What a clip is says a `SamplePipeline`: it decodes a file, takes
`length` consecutive steps of it, and stacks them to a batch.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from discrete_lit.core.random import augmentation_uniforms
from discrete_lit.data.captions import Captions
from discrete_lit.data.data_module import ResumableDataModule, Split
from discrete_lit.data.image_batches import CENTER_CROP, EvaluationCrops, SamplePipeline
from discrete_lit.data.image_folder import EvaluationFiles, SampleFiles, TrainingFiles
from discrete_lit.data.image_shards import EvaluationShards, TrainingShards
from discrete_lit.data.loaders import BatchSource, EvaluationOrder, TrainingOrder
from discrete_lit.data.media import MediaKind
from discrete_lit.data.shard_set import ShardSet, find_shards, holds_shards
from discrete_lit.data.sources.class_folders import FoundImages, find_images


def clip_start(steps: int, length: int, *, uniform: float | None) -> int:
    """Choose the first step of a crop in time: uniformly by a number in [0, 1), or the middle one where it is None.

    Args:
        steps: of the decoded clip, samples or frames.
        length: of the crop; one that the clip does not fill starts at 0.
        uniform: of `clip_uniform`.
    """
    room = max(steps - length, 0)
    return room // 2 if uniform is None else int(uniform * (room + 1))


def clip_uniform(seed: int, epoch: int, key: str) -> float:
    """Draw the number that places the crop in time of a sample: the same for the same (seed, epoch, key)."""
    return augmentation_uniforms(seed, epoch, f"time of {key}")[0]


class Clips(ResumableDataModule):
    """Batches of clips from a folder or from shards; a subclass says what a clip is by its pipeline.

    A folder is `<folder>/<class>/**/<clip>`, or clips alone, which have no labels; classes are the names of the
    subfolders. Everything else is taken for shards, see `ImageShards`. Both splits are of the same form.

    Args:
        pipeline: decodes and cuts a clip, and makes batches.
        kind: the files that are clips.
        train: folder or shards of training clips; None where only the other split is used.
        validation: the same of validation.
        batch_size: clips of a batch on each rank.
        num_workers: processes that decode; 0 decodes in the training process.
        seed: decides the order and the crops.
        max_bad_fraction: fraction of an epoch's clips that may be unreadable before the run fails.
        labels: False reads every clip below a folder, at any depth, without a label.
        captions: where the captions are, see `captions.Captions`; by default none are read.
        shuffle_window: of shards, see `ImageShards`.
        train_count, validation_count: of shards behind a URL without a manifest, see `ImageShards`.
        num_classes: of shards without a manifest, see `ImageShards`.
        persistent_workers: keep the processes between epochs.

    Raises:
        ValueError: a setting is out of range. Reading raises it where there are no clips, where one split is a folder
            and the other shards, or where their classes differ.
    """

    def __init__(
        self,
        pipeline: SamplePipeline,
        kind: MediaKind,
        *,
        train: str | list[str] | None,
        validation: str | list[str] | None,
        batch_size: int,
        num_workers: int,
        seed: int,
        max_bad_fraction: float,
        labels: bool,
        captions: Captions | None,
        shuffle_window: int,
        train_count: int | list[int] | None,
        validation_count: int | list[int] | None,
        num_classes: int | None,
        persistent_workers: bool,
    ) -> None:
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
        self.pipeline, self.kind = pipeline, kind
        self.labels, self.captions = labels, captions
        self.shuffle_window = shuffle_window
        self._counts: dict[Split, int | list[int] | None] = {"train": train_count, "validation": validation_count}
        self._given_num_classes = num_classes

    @cached_property
    def _found(self) -> dict[Split, FoundImages | ShardSet]:
        found: dict[Split, FoundImages | ShardSet] = {}
        for split, location in self.locations.items():
            if location is None:
                continue
            if is_folder_of_files(location):
                known = all(earlier.classes for earlier in found.values())
                caption_kind = None if self.captions is None else self.captions.kind
                found[split] = find_images(
                    location, labels=self.labels and known, captions=caption_kind, kind=self.kind
                )
            else:
                found[split] = find_shards(
                    location, self._counts[split], num_classes=self._given_num_classes, kind=self.kind
                )
        if len({type(each) for each in found.values()}) > 1:
            raise ValueError(
                f"train={self.locations['train']} and validation={self.locations['validation']}: one is a folder of "
                f"{self.kind.name}s and the other shards; give both in one form"
            )
        classes = [tuple(each.classes) for each in found.values() if isinstance(each, ShardSet)]
        if len(set(classes)) > 1:
            raise ValueError(
                f"the classes of {self.locations['train']} and {self.locations['validation']} are not the same"
            )
        return found

    @property
    def classes(self) -> list[str]:
        """Name of each label; none where the clips have no labels."""
        return list(next(iter(self._found.values())).classes)

    @property
    def num_classes(self) -> int:
        """Labels are in 0..num_classes-1; 0 where the clips have no labels."""
        return len(self.classes)

    @cached_property
    def _files(self) -> dict[Split, SampleFiles]:
        return {
            split: SampleFiles(found, self.classes, captions=self.captions)
            for split, found in self._found.items()
            if isinstance(found, FoundImages)
        }

    def training_source(self, rank: int, world_size: int) -> BatchSource:
        found = self._found["train"]
        if isinstance(found, ShardSet):
            return TrainingShards(
                found, self.pipeline, shuffle_window=self.shuffle_window, **self._of(rank, world_size)
            )
        files = self._files["train"]
        order = TrainingOrder(len(files), self.batch_size, rank=rank, world_size=world_size, seed=self.seed)
        return TrainingFiles(files, order, pipeline=self.pipeline)

    def listing_sha256(self, split: Split) -> str:
        """Hash what a split lists in its order, which tells that a sample's number means the same."""
        found = self._found[split]
        if isinstance(found, ShardSet):
            return found.listing_sha256()
        return self._files[split].listing_sha256()

    def evaluation_source(
        self,
        split: Split,
        rank: int,
        world_size: int,
        *,
        crops: EvaluationCrops = CENTER_CROP,
        batches: np.ndarray | None = None,
    ) -> BatchSource:
        if crops.kind != "center":
            raise ValueError(f"crops={crops.kind!r} are of images; of {self.kind.name}s it must be 'center'")
        found = self._found[split]
        if isinstance(found, ShardSet):
            return EvaluationShards(found, self.pipeline, crops=crops, batches=batches, **self._of(rank, world_size))
        files = self._files[split]
        order = EvaluationOrder(len(files), self.batch_size, rank=rank, world_size=world_size, batches=batches)
        return EvaluationFiles(files, order, pipeline=self.pipeline, crops=crops)

    def _of(self, rank: int, world_size: int) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "rank": rank,
            "world_size": world_size,
            "workers": max(1, self.num_workers),
            "captions": self.captions,
        }


def is_folder_of_files(location: str | list[str]) -> bool:
    """Whether a split is a folder that is read file by file, and no shards."""
    if not isinstance(location, str):
        return False
    folder = Path(location).expanduser()
    return folder.is_dir() and not holds_shards(folder)
