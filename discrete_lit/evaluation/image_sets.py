"""Sets of stored images, read one by one as uint8, and the protocol by which images are selected from them.

`ImageSet` is the contract, `open_image_set` finds the kind of a path: shards, folders, and `samples.npz` files.
`Selection` takes the same count of images from every set that is compared, and the same count of each class.
"""

import logging
import os
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.core.files import content_sha256, file_sha256, read_npz
from discrete_lit.data.shard_set import find_shards, holds_shards
from discrete_lit.data.shard_writer import MANIFEST
from discrete_lit.data.sources.class_folders import ClassFolders
from discrete_lit.data.tars import RawSample, label_of, read_samples
from discrete_lit.data.transforms import UndecodableImage, center_crop, decode_image

_log = logging.getLogger(__name__)

Pixels = np.ndarray
"""uint8 `(H, W, 3)`."""

MAX_BROKEN_FRACTION = 0.01
"""The largest fraction of a selection's images that may be unreadable."""

_ACCEPTED = (
    "accepted are a folder of shards, a folder of images (one subfolder per class, or images "
    "alone), and a .npz with uint8 arr_0 (N, H, W, 3)"
)


class ImageSet(ABC):
    """Images in a fixed order, with labels or without.

    Files of any size become `image_size` by ADM's centre crop, which leaves an image of that size as it is.
    """

    path: Path
    count: int
    num_classes: int | None
    """None where the images have no labels."""
    labels: np.ndarray | None = None
    """int64 `(count,)` where they are known before reading."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Compute a hash that changes when the images do."""

    @abstractmethod
    def stream(self) -> Iterator[tuple[int | None, Callable[[], Pixels]]]:
        """Give every image in order: its label, and a function that decodes it.

        That function raises `UndecodableImage` for a broken file.
        """


def open_image_set(path: str | Path, image_size: int) -> ImageSet:
    """Open the image set that a path names.

    Raises:
        ValueError: nothing there, or nothing that holds images of `image_size`.
    """
    path = Path(path).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path, image_size)
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is no image set: {_ACCEPTED}")
    if holds_shards(path):
        return ShardImages(path, image_size)
    return FolderImages(path, image_size)


class NpzImages(ImageSet):
    """Images of an npz file: `arr_0` uint8 `(N, H, W, 3)`.

    Where the samples have classes the file also holds `labels` (or ADM's `arr_1`), int64 `(N,)`. The pixels are read as
    a stream: 50,000 images of 256x256 would be 10 GB in memory.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        self.path = path
        names, arrays = read_npz(path, ("labels", "arr_1"))
        labels = arrays.get("labels", arrays.get("arr_1"))
        if "arr_0" not in names:
            raise ValueError(f"{str(path)!r} holds {sorted(names)} and no arr_0: {_ACCEPTED}")
        with self._open() as (shape, dtype, _):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise ValueError(f"{str(path)!r}: arr_0 is {dtype} {shape}, it must be uint8 (N, H, W, 3)")
            if shape[1:3] != (image_size, image_size):
                raise ValueError(
                    f"{str(path)!r} has images of {shape[1]}x{shape[2]}, image_size is {image_size}: "
                    "samples are never resized"
                )
        self.count = shape[0]
        self.num_classes = None
        if labels is not None:
            if (
                labels.shape != (self.count,)
                or not np.issubdtype(labels.dtype, np.integer)
                or labels.min(initial=0) < 0
            ):
                raise ValueError(
                    f"{str(path)!r}: labels are {labels.dtype} {labels.shape}, expected ({self.count},) ids"
                )
            self.labels = labels.astype(np.int64)
            self.num_classes = int(labels.max(initial=-1)) + 1

    def _open(self) -> "_NpyStream":
        return _NpyStream(self.path, "arr_0.npy")

    def fingerprint(self) -> str:
        return file_sha256(self.path)

    def stream(self) -> Iterator[tuple[int | None, Callable[[], Pixels]]]:
        with self._open() as (shape, _, file):
            size = int(np.prod(shape[1:]))
            for index in range(self.count):
                data = file.read(size)
                if len(data) != size:
                    raise ValueError(f"{str(self.path)!r} ends after {index} of {self.count} images")
                label = None if self.labels is None else int(self.labels[index])
                yield label, lambda data=data: np.frombuffer(data, np.uint8).reshape(shape[1:])


class _NpyStream:
    """Open an array of an npz file as (shape, dtype, file of its bytes), without loading it."""

    def __init__(self, path: Path, member: str) -> None:
        self.path, self.member = path, member

    def __enter__(self) -> tuple[tuple[int, ...], np.dtype, IO[bytes]]:
        self._archive = zipfile.ZipFile(self.path)
        self._file = self._archive.open(self.member)
        version = np.lib.format.read_magic(self._file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(self._file)
        if fortran_order:
            raise ValueError(f"{str(self.path)!r}: arr_0 is in Fortran order; save it with np.ascontiguousarray")
        return shape, dtype, self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._archive.close()


class ShardImages(ImageSet):
    """Images of a folder of webdataset shards, found and read as `ImageShards` does.

    Without the manifest of `discrete-lit shards` they have no labels.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        self.path, self.image_size = path, image_size
        found = find_shards(str(path))
        self._shards, self.count, self.num_classes = found.shards, found.count, len(found.classes) or None

    def fingerprint(self) -> str:
        manifest = self.path / MANIFEST
        if manifest.is_file():  # It holds the SHA-256 of every shard.
            return content_sha256(manifest.read_bytes())
        states = ((shard.name, os.stat(shard.name)) for shard in self._shards)
        return content_sha256(f"{name} {state.st_size} {state.st_mtime_ns}\n" for name, state in states)

    def stream(self) -> Iterator[tuple[int | None, Callable[[], Pixels]]]:
        for shard in self._shards:
            for _, sample in read_samples(shard, np.ones(shard.count, dtype=bool)):
                problem = sample.problem
                if problem is None and sample.label is None and self.num_classes is not None:
                    problem = "it has no .cls entry"
                label = label_of(sample, self.num_classes or 0) if problem is None else None
                yield label, lambda sample=sample, problem=problem: self._decode(sample, problem)

    def _decode(self, sample: RawSample, problem: str | None) -> Pixels:
        if problem is not None:
            raise UndecodableImage(f"sample {sample.key!r} of {sample.shard}: {problem}")
        return center_crop(decode_image(sample.image), self.image_size)


class FolderImages(ImageSet):
    """Images of a folder with one subfolder per class, or without labels; classes and images in sorted order."""

    def __init__(self, path: Path, image_size: int) -> None:
        self.path, self.image_size = path, image_size
        self._source = ClassFolders(path)
        self.count, self.num_classes = len(self._source), len(self._source.classes) or None
        if self._source.classes:
            self.labels = np.array([entry.label for entry in self._source.entries], np.int64)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def stream(self) -> Iterator[tuple[int | None, Callable[[], Pixels]]]:
        for index, entry in enumerate(self._source.entries):
            yield entry.label, lambda index=index: self._decode(index)

    def _decode(self, index: int) -> Pixels:
        try:
            data = self._source.read(index)
        except OSError as error:
            raise UndecodableImage(f"image {self._source.entries[index].key!r}: {error}") from error
        return center_crop(decode_image(data), self.image_size)


class Selection:
    """Take the first `num_images` of a set, in order; from a labelled set, equally many of each class.

    Where `num_images / num_classes` leaves a remainder r, the first r classes give one image more. A broken image is
    left out, counted and logged, and the next of its class is taken instead.

    Args:
        images: the set.
        num_images: how many; None takes all.
        num_classes: of the comparison; used for labelled sets.

    Raises:
        ValueError: fewer images than asked, of the set or of a class, or a label that is no class.
    """

    def __init__(self, images: ImageSet, num_images: int | None, *, num_classes: int | None) -> None:
        self.images = images
        self._whole = num_images is None
        self.count = images.count if num_images is None else num_images
        if images.count < self.count:
            raise ValueError(
                f"{str(images.path)!r} has {images.count:,} images, num_images is {self.count:,}: "
                "every set is measured at the same count"
            )
        self._quota: Counter[int] | None = None
        if num_images is not None and images.num_classes is not None:
            assert num_classes is not None
            each, rest = divmod(num_images, num_classes)
            self._quota = Counter({label: each + (label < rest) for label in range(num_classes)})
            if images.labels is not None:
                self._check_classes(Counter(images.labels.tolist()))

    def _check_classes(self, available: Counter[int]) -> None:
        assert self._quota is not None
        if unknown := set(available) - set(self._quota):
            raise ValueError(
                f"{str(self.images.path)!r} has label {min(unknown)}, there are {len(self._quota)} classes"
            )
        for label, needed in self._quota.items():
            if available[label] < needed:
                raise ValueError(
                    f"{str(self.images.path)!r} has {available[label]} images of class {label}, needs {needed}: "
                    f"{self.count:,} images are taken evenly from {len(self._quota)} classes"
                )

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Give images, uint8 `(B, 3, H, W)`, and labels, int64 `(B,)` or None for a set without.

        Raises:
            ValueError: too few readable images, or more than 1% broken ones.
        """
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        taken: Counter[int] = Counter()
        total, broken, reason = 0, 0, ""
        for label, decode in self.images.stream():
            if self._quota is not None and label is not None:
                if label not in self._quota:
                    self._check_classes(Counter([label]))
                if taken[label] == self._quota[label]:
                    continue
            try:
                pixels.append(decode())
            except UndecodableImage as error:
                broken, reason = broken + 1, str(error)
                _log.warning("left out a broken image of %s: %s", self.images.path, error)
                continue
            total += 1
            if label is not None:
                labels.append(label)
                taken[label] += 1
            if len(pixels) == batch_size:
                yield _tensors(pixels, labels)
                pixels, labels = [], []
            if total == self.count:
                break
        if pixels:
            yield _tensors(pixels, labels)
        if broken > MAX_BROKEN_FRACTION * (total + broken):
            raise ValueError(
                f"{str(self.images.path)!r}: {broken} of {total + broken} images are broken, the last: {reason}"
            )
        if total < self.count and not self._whole:
            if self._quota is not None:
                self._check_classes(taken)
            raise ValueError(f"{str(self.images.path)!r} gave {total:,} readable images, {self.count:,} are needed")


def _tensors(pixels: list[np.ndarray], labels: list[int]) -> tuple[Tensor, Tensor | None]:
    images = rearrange(torch.from_numpy(np.stack(pixels)), "b h w c -> b c h w")
    return images.contiguous(), torch.tensor(labels) if labels else None
