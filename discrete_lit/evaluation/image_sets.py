"""Sets of stored images, read one by one as uint8: shards, folders, and `samples.npz` files.

`ImageSet` is the contract, `open_image_set` finds the kind of a path.
"""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from discrete_lit.core.files import Npz, file_sha256
from discrete_lit.core.images import ImageSize, height_and_width, size_text
from discrete_lit.data.media import UndecodableSample
from discrete_lit.data.shard_set import find_shards, holds_shards
from discrete_lit.data.sources.class_folders import ClassFolders
from discrete_lit.data.tars import RawSample, label_of, read_samples
from discrete_lit.data.transforms import UndecodableImage, center_crop, decode_image

Pixels = np.ndarray
"""uint8 `(H, W, C)`."""

_ORIENTATION = 0x0112

_ACCEPTED = (
    "accepted are a folder of shards, a folder of images (one subfolder per class, or images "
    "alone), and a .npz with uint8 arr_0 (N, H, W, C)"
)


class ImageSet(ABC):
    """Images in a fixed order, with labels or without.

    Files of any size become `image_size` by ADM's centre crop, which leaves an image of that size as it is.
    """

    path: Path
    image_size: ImageSize
    image_channels: int
    apply_exif: bool
    """Whether files are turned as their EXIF orientation says."""
    count: int
    num_classes: int | None
    """None where the images have no labels."""
    classes: tuple[str, ...] = ()
    """Name of each label; none where labels have no names."""
    labels: np.ndarray | None = None
    """int64 `(count,)` where they are known before reading."""
    in_files: bool = True
    """Whether images are files, which take time to decode."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Compute the SHA-256 of the stored images, which are all read."""

    @abstractmethod
    def stream(self, positions: np.ndarray | None = None) -> Iterator[tuple[int | None, Callable[[], Pixels]]]:
        """Give images in order: the label of each, and a function that decodes it.

        That function raises `UndecodableImage` for a broken file.

        Args:
            positions: which images, int64 in ascending order; all by default. Others are passed over unread.
        """

    def _decoded(self, data: bytes) -> Pixels:
        """Decode and crop an image file."""
        image = decode_image(data, self.apply_exif, image_channels=self.image_channels)
        _unturned.count += _orientation(image) > 1
        return center_crop(image, self.image_size)


class _ThreadCount(threading.local):
    """A count of each thread's own."""

    count = 0


_unturned = _ThreadCount()
"""Files whose EXIF orientation was not applied though it says to turn them."""


def counted(decode: Callable[[], Pixels]) -> tuple[Pixels, int]:
    """Decode an image, in any thread, and tell whether it was one of the unturned: 1 or 0."""
    before = _unturned.count
    return decode(), _unturned.count - before


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that a decoded image still has; 1 is upright."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises almost anything for broken metadata, with which the pixels are right
        return 1


def open_image_set(
    path: str | Path, image_size: ImageSize, *, image_channels: int = 3, apply_exif: bool = False
) -> ImageSet:
    """Open the image set that a path names.

    Args:
        path: shards, a folder or an npz.
        image_size: of the images in pixels.
        image_channels: 1 for grey, 3 for RGB, 4 for RGBA.
        apply_exif: turn image files as their EXIF orientation says, as the DataModules' `apply_exif` does.

    Raises:
        ValueError: nothing there, or nothing that holds images of `image_size`.
    """
    path = Path(path).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path, image_size, image_channels=image_channels)
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is no image set: {_ACCEPTED}")
    kind = ShardImages if holds_shards(path) else FolderImages
    return kind(path, image_size, image_channels=image_channels, apply_exif=apply_exif)


class NpzImages(ImageSet):
    """Images of an npz file: `arr_0` uint8 `(N, H, W, C)`; grey ones are repeated where colour is asked for.

    Where the samples have classes the file also holds `labels` (or ADM's `arr_1`), int64 `(N,)`. The pixels are read as
    a stream: 50,000 images of 256x256 would be 10 GB in memory.
    """

    in_files = False

    def __init__(self, path: Path, image_size: ImageSize, *, image_channels: int = 3) -> None:
        self.path, self.image_size, self.image_channels, self.apply_exif = path, image_size, image_channels, False
        self.num_classes = None
        with Npz(path) as file:
            if "arr_0" not in file.headers:
                raise ValueError(f"{str(path)!r} holds {sorted(file.headers)} and no arr_0: {_ACCEPTED}")
            shape, dtype, _ = file.headers["arr_0"]
            if dtype != np.uint8 or len(shape) != 4:
                raise ValueError(f"{str(path)!r}: arr_0 is {dtype} {shape}, it must be uint8 (N, H, W, C)")
            if shape[1:3] != height_and_width(image_size):
                raise ValueError(
                    f"{str(path)!r} has images of {shape[1]}x{shape[2]}, image_size is {size_text(image_size)}: "
                    "samples are never resized"
                )
            if shape[3] != image_channels and (shape[3], image_channels) != (1, 3):
                raise ValueError(
                    f"{str(path)!r} has images of {shape[3]} channels, image_channels is {image_channels}: 1 (grey), 3 "
                    "(RGB) and 4 (RGBA) can be measured, all sets alike"
                )
            self.count = shape[0]
            name = next((name for name in ("labels", "arr_1") if name in file.headers), None)
            if name is not None:
                self.labels = self._read_labels(file, name)
                self.num_classes = int(self.labels.max(initial=-1)) + 1

    def _read_labels(self, file: Npz, name: str) -> np.ndarray:
        shape, dtype, _ = file.headers[name]
        if shape != (self.count,) or dtype.kind not in "iub":
            raise ValueError(f"{str(self.path)!r}: {name} are {dtype} {shape}, expected ({self.count},) ids")
        labels = file.read(name)
        # Compared as they are: as int64 an id beyond it would be another one.
        for label in (labels.min(initial=0), labels.max(initial=0)):
            if not 0 <= int(label) <= np.iinfo(np.int64).max - 1:
                raise ValueError(f"{str(self.path)!r}: {name} are {dtype} and have {label}, which is no class id")
        return labels.astype(np.int64)

    def fingerprint(self) -> str:
        return file_sha256(self.path)

    def stream(self, positions: np.ndarray | None = None) -> Iterator[tuple[int | None, Callable[[], Pixels]]]:
        wanted = _wanted(self.count, positions)
        last = self.count - 1 if positions is None else int(positions[-1])
        with Npz(self.path) as file:
            for index, pixels in enumerate(file.rows("arr_0")):
                if wanted[index]:
                    label = None if self.labels is None else int(self.labels[index])
                    yield label, lambda pixels=pixels: self._coloured(pixels)
                # Beyond the last one of all the checksum is compared.
                if index == last < self.count - 1:
                    return

    def _coloured(self, pixels: Pixels) -> Pixels:
        return np.repeat(pixels, 3, axis=2) if (pixels.shape[2], self.image_channels) == (1, 3) else pixels


class ShardImages(ImageSet):
    """Images of a folder of webdataset shards, found and read as `ImageShards` does.

    Without the manifest of `discrete-lit shards` they have no labels.
    """

    def __init__(self, path: Path, image_size: ImageSize, *, image_channels: int = 3, apply_exif: bool = False) -> None:
        self.path, self.image_size, self.image_channels, self.apply_exif = path, image_size, image_channels, apply_exif
        found = find_shards(str(path))
        self._shards, self.count, self.classes = found.shards, found.count, found.classes
        self.num_classes = len(found.classes) or None

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        for shard in tqdm(self._shards, desc="hash of the shards", unit="shard", disable=None):
            with shard.open() as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def stream(self, positions: np.ndarray | None = None) -> Iterator[tuple[int | None, Callable[[], Pixels]]]:
        wanted, first = _wanted(self.count, positions), 0
        for shard in self._shards:
            inside, first = wanted[first : first + shard.count], first + shard.count
            if not inside.any():
                continue
            for _, sample in read_samples(shard, inside):
                problem = sample.problem
                if problem is None and sample.label is None and self.num_classes is not None:
                    problem = "it has no .cls entry"
                label = label_of(sample, self.num_classes or 0) if problem is None else None
                yield label, lambda sample=sample, problem=problem: self._decode(sample, problem)

    def _decode(self, sample: RawSample, problem: str | None) -> Pixels:
        if problem is not None:
            raise UndecodableImage(f"sample {sample.key!r} of {sample.shard}: {problem}")
        return self._decoded(sample.image)


class FolderImages(ImageSet):
    """Images of a folder with one subfolder per class, or without labels; classes and images in sorted order."""

    def __init__(self, path: Path, image_size: ImageSize, *, image_channels: int = 3, apply_exif: bool = False) -> None:
        self.path, self.image_size, self.image_channels, self.apply_exif = path, image_size, image_channels, apply_exif
        self._source = ClassFolders(path)
        self.count, self.classes = len(self._source), tuple(self._source.classes)
        self.num_classes = len(self.classes) or None
        if self.classes:
            self.labels = np.array([entry.label for entry in self._source.entries], np.int64)

    def fingerprint(self) -> str:
        # Names, sizes and classes first: they separate the contents that follow.
        digest = hashlib.sha256(self._source.fingerprint().encode())
        for index in tqdm(range(self.count), desc="hash of the images", unit="image", disable=None):
            try:
                digest.update(self._read(index))
            except UndecodableSample as error:
                digest.update(str(error).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def stream(self, positions: np.ndarray | None = None) -> Iterator[tuple[int | None, Callable[[], Pixels]]]:
        for index in range(self.count) if positions is None else positions.tolist():
            yield self._source.entries[index].label, lambda index=index: self._decoded(self._read(index))

    def _read(self, index: int) -> bytes:
        try:
            return self._source.read(index)
        except OSError as error:
            raise UndecodableImage(f"image {self._source.entries[index].key!r}: {error}") from error


def _wanted(count: int, positions: np.ndarray | None) -> np.ndarray:
    """Mark some of `count` images, all by default: bool `(count,)`."""
    wanted = np.full(count, positions is None)
    if positions is not None:
        wanted[positions] = True
    return wanted
