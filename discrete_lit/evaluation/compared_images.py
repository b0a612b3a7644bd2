"""The protocol of a comparison: which labels of several sets mean the same class, and which images of each are taken.

`match_classes` says the first. `Selection` takes the same count of images from every set that is compared, and the same
count of each class.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.data.media import UndecodableSample
from discrete_lit.evaluation.image_sets import ImageSet, Pixels, counted

_log = logging.getLogger(__name__)

MAX_BROKEN_FRACTION = 0.01
"""The largest fraction of a selection's images that may be unreadable."""

NO_CLASS = -1
"""The label of an image without a class, such as one that was sampled with a generator's null label."""

MOST_CLASSES = 2**20
"""Labels above this are no class ids; statistics of as many classes would fill the memory."""


@dataclass(frozen=True, kw_only=True)
class ClassMatch:
    """The classes of a comparison, and which of them each label of each set means."""

    count: int | None
    """K; None where no set says how many there are."""
    numbering: Mapping[str, np.ndarray]
    """Name of a set with labels to the class `(labels,)` in [0, K), or `NO_CLASS`, of each of its labels."""
    notes: tuple[str, ...]
    """How labels were matched, in words."""


def match_classes(
    real: Mapping[str, ImageSet | None], samples: Mapping[str, ImageSet], num_classes: int | None = None
) -> ClassMatch:
    """Say which labels of several sets mean the same class.

    The first set with class names numbers the classes. Others with names are matched by name; those without, such as
    samples, by position. Of samples the label K, a generator's null label, means no class.

    Args:
        real: name to set of real images, the one that numbers the classes first.
        samples: name to set of samples. Sets without labels, and None, are passed over.
        num_classes: K, of a classifier, where no set has class names.

    Raises:
        ValueError: a set has a class that the first does not know, or a label beyond the classes.
    """
    both: dict[str, ImageSet | None] = {**real, **samples}
    sets = {name: images for name, images in both.items() if images is not None and images.num_classes is not None}
    first = next((name for name, images in sets.items() if images.classes), None)
    classes: Sequence[str] = [] if first is None else sets[first].classes
    unnamed = [images.num_classes for name, images in sets.items() if name in real and images.num_classes is not None]
    count = len(classes) or num_classes or max(unnamed, default=None)
    if count is not None and count > MOST_CLASSES:
        raise ValueError(f"labels up to {count - 1:,} are more than class ids can be: at most {MOST_CLASSES:,} classes")
    numbering: dict[str, np.ndarray] = {}
    notes: list[str] = []
    by_position: list[str] = []
    for name, images in sets.items():
        if images.classes:
            assert first is not None
            numbering[name] = _by_name(name, images, first, classes, notes)
        elif count is not None:
            numbering[name] = np.arange(count) if name in real else np.append(np.arange(count), NO_CLASS)
            by_position.append(name)
            assert images.num_classes is not None
            if images.num_classes > len(numbering[name]):
                null = "" if name in real else f", and {count} would be no class"
                raise ValueError(
                    f"{name}: {str(images.path)!r} has label {images.num_classes - 1}, there are {count} classes: "
                    f"labels are 0 to {count - 1}{null}"
                )
    if by_position and first is not None:
        notes.append(
            f"the labels of {', '.join(by_position)} have no names and are matched by position: 0 is taken for "
            f"{classes[0]!r}, the first class of {sets[first].path}"
        )
    return ClassMatch(count=count, numbering=numbering, notes=tuple(notes))


def _by_name(name: str, images: ImageSet, first: str, classes: Sequence[str], notes: list[str]) -> np.ndarray:
    if len(classes) == len(images.classes) == 1:
        # There is nothing to confuse, and the folder of a set without classes may have any name.
        return np.zeros(1, np.int64)
    position = {known: label for label, known in enumerate(classes)}
    if unknown := [found for found in images.classes if found not in position]:
        raise ValueError(
            f"{name}: {len(unknown)} of the {len(images.classes)} classes of {str(images.path)!r} are not among the "
            f"{len(classes)} of {first}, such as {unknown[0]!r} (those begin with {classes[0]!r}): classes are matched "
            "by name. Give the same names to the same classes, or put the images of one set in a folder without "
            "subfolders, to measure it without classes"
        )
    if missing := [known for known in classes if known not in images.classes]:
        notes.append(f"{name} has {len(images.classes)} of the {len(classes)} classes of {first}, not {missing[0]!r}")
    return np.array([position[found] for found in images.classes], np.int64)


class Selection:
    """Take `num_images` of a set: of one with classes equally many of each, of one without the first.

    Of each class the first are taken, in order. Where `num_images / num_classes` leaves a remainder r, the first r
    classes give one image more. Where that is the whole set it is taken as it is, whatever its labels. A broken image
    is left out and logged, and the next of its class is taken instead. `positions` says which images these are before
    one is decoded, so that several processes can share them; `read` decodes some.

    Args:
        images: the set.
        num_images: how many; None takes all.
        num_classes: of the comparison; None where it is unknown, which takes the set's own labels for the classes.
        numbering: class of each label of the set, see `ClassMatch`; by default the label itself.
        allow_uneven: take images at even distances over the whole set where a class has too few, as it may of samples
            with random labels; otherwise that is refused.

    Raises:
        ValueError: fewer images than asked, of the set or of a class; fewer than two; or a label that is no class.
    """

    def __init__(
        self,
        images: ImageSet,
        num_images: int | None,
        *,
        num_classes: int | None,
        numbering: np.ndarray | None = None,
        allow_uneven: bool = False,
    ) -> None:
        self.images = images
        self.count = images.count if num_images is None else num_images
        self.broken = 0
        """Images that could not be read when the selection was measured."""
        self.unturned = 0
        """Images whose EXIF orientation was not applied."""
        self.uneven = False
        """Whether images are taken at even distances, because a class has too few."""
        self.by_class: Counter[int] = Counter()
        """Images of each class that were measured; those without one under `NO_CLASS`."""
        self._whole = num_images is None
        self._num_classes, self._numbering = num_classes, numbering
        if images.count < self.count:
            raise ValueError(
                f"{str(images.path)!r} has {images.count:,} images, num_images is {self.count:,}: "
                "every set is measured at the same count"
            )
        if self.count < 2:
            raise ValueError(f"{str(images.path)!r} has {images.count} images, at least 2 are needed to be measured")
        labels = (
            None if images.labels is None else np.array([self._class_of(label) for label in images.labels.tolist()])
        )
        self._quota: Counter[int] | None = None
        classless = images.num_classes is None or (labels is not None and bool((labels == NO_CLASS).all()))
        if self.count < images.count and not classless:
            classes = self._classes(labels)
            if classes:
                each, rest = divmod(self.count, len(classes))
                self._quota = Counter({label: each + (place < rest) for place, label in enumerate(classes)})
            if labels is not None:
                available = Counter(labels.tolist())
                if allow_uneven and any(available[label] < needed for label, needed in (self._quota or {}).items()):
                    self._quota, self.uneven = None, True
                self._check_classes(available)

    @property
    def settings(self) -> tuple[object, ...]:
        """All that decides which images of the set are taken: it changes when they do."""
        quota = None if self._quota is None else sorted(self._quota.items())
        numbering = None if self._numbering is None else self._numbering.tolist()
        return self.count, quota, numbering, self.uneven

    def _classes(self, labels: np.ndarray | None) -> list[int]:
        """The classes that images are taken of, in order."""
        if self._numbering is not None:
            return sorted(set(self._numbering.tolist()) - {NO_CLASS})
        if self._num_classes is not None:
            return list(range(self._num_classes))
        assert labels is not None, "a set that states its classes leaves none unknown"
        return np.unique(labels).tolist()

    def _class_of(self, label: int) -> int:
        known = self._num_classes if self._numbering is None else len(self._numbering)
        if known is not None and not 0 <= label < known:
            raise ValueError(f"{str(self.images.path)!r} has label {label}, there are {known} classes")
        return int(label if self._numbering is None else self._numbering[label])

    def _check_classes(self, available: Counter[int]) -> None:
        for label, needed in (self._quota or {}).items():
            if available[label] < needed:
                raise ValueError(
                    f"{str(self.images.path)!r} has {available[label]} images of class {label}, needs {needed}: "
                    f"{self.count:,} images are taken evenly from {len(self._quota or {})} classes"
                )

    def notes(self, name: str) -> list[str]:
        """Say what limits a measurement of the images, for a report.

        Args:
            name: of the set.
        """
        notes = []
        if self.broken:
            notes.append(f"{name}: {self.broken:,} broken images were left out, {self.by_class.total():,} measured")
        if self.uneven:
            notes.append(
                f"{name}: a class has fewer images than {self.count:,} over the number of classes, so images were "
                "taken at even distances over the whole set, whatever their labels"
            )
        if self.unturned:
            notes.append(
                f"{name}: {self.unturned:,} images were read without turning them as their EXIF orientation "
                "says; set apply_exif where the data of the training did"
            )
        return notes

    def positions(self, broken: Collection[int] = ()) -> np.ndarray:
        """Find the images that are taken, int64 in ascending order, given those that are known to be broken.

        Where more become known, those that stay are the same: each broken one is replaced by a later one of its class.

        Raises:
            ValueError: too few images of a class.
        """
        left_out = set(broken)
        if self._quota is None and not self.uneven:
            kept = (index for index in range(self.images.count) if index not in left_out)
            return np.fromiter(islice(kept, self.count), np.int64)
        taken: list[int] = []
        by_class: Counter[int] = Counter()
        counted = 0
        for index, own_label in enumerate(self._labels()):
            label = NO_CLASS if own_label is None else self._class_of(own_label)
            if self._quota is not None and own_label is not None and by_class[label] >= self._quota[label]:
                continue
            if (self.uneven and counted > index * self.count // self.images.count) or index in left_out:
                continue
            taken.append(index)
            # A sample of a labelled set without a label cannot be read: it takes nobody's place.
            counted += own_label is not None
            by_class[label] += 1
            if counted == self.count:
                break
        if counted < self.count:
            self._check_classes(by_class)
        return np.array(taken, np.int64)

    def _labels(self) -> Iterator[int | None]:
        """Give the label of every image in order; those of shards are read for it."""
        if self.images.labels is not None:
            yield from self.images.labels.tolist()
        else:
            yield from (label for label, _ in self.images.stream())

    def read(self, positions: np.ndarray, batch_size: int, *, ahead: int = 0) -> Iterator["ImageBatch"]:
        """Decode images of the set, batch by batch; what cannot be decoded is logged and missing from its batch.

        Files are decoded by as many threads as torch has.

        Args:
            positions: which, int64 in ascending order.
            batch_size: images of a batch, of which broken ones are missing.
            ahead: batches that are decoded while who reads is busy with one.
        """
        for taken in self._decoding(positions, batch_size, ahead=ahead):
            pixels: list[np.ndarray] = []
            labels: list[int] = []
            broken: dict[int, str] = {}
            unturned = 0
            for position, own_label, decoded in taken:
                try:
                    values, count = decoded()
                except UndecodableSample as error:
                    broken[position] = str(error)
                    _log.warning("left out a broken image of %s: %s", self.images.path, error)
                    continue
                pixels.append(values)
                unturned += count
                labels.append(NO_CLASS if own_label is None else self._class_of(own_label))
            images = None
            if pixels:
                images = rearrange(torch.from_numpy(np.stack(pixels)), "b h w c -> b c h w").contiguous()
            known = None if self.images.num_classes is None else torch.tensor(labels)
            yield ImageBatch(images, known, broken, unturned)

    def _decoding(self, positions: np.ndarray, batch_size: int, *, ahead: int) -> Iterator[list["_Decoding"]]:
        """Give what waits for the images of each batch, while those of some further ones are being decoded."""
        if not len(positions):
            return
        stream = self.images.stream(positions)
        numbered = zip(positions.tolist(), stream, strict=False)
        waiting: deque[list[_Decoding]] = deque()
        pool = ThreadPoolExecutor(torch.get_num_threads())  # has no threads before it is given something

        def begun(decode: Callable[[], Pixels]) -> Callable[[], tuple[Pixels, int]]:
            return pool.submit(counted, decode).result if self.images.in_files else partial(counted, decode)

        try:
            while batch := [
                (position, label, begun(decode)) for position, (label, decode) in islice(numbered, batch_size)
            ]:
                waiting.append(batch)
                if len(waiting) > ahead:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(cancel_futures=True)
        # Behind the last one the checksum of a file is compared.
        next(stream, None)

    def finish(self, classes: np.ndarray, broken: Mapping[int, str], unturned: int) -> None:
        """Take down what a measurement of the whole selection met.

        Args:
            classes: int64, of each image that was measured; `NO_CLASS` for those without one.
            broken: position of each image that could not be read, and why.
            unturned: images whose EXIF orientation was not applied.

        Raises:
            ValueError: more than 1% broken images, or too few readable ones.
        """
        self.by_class, self.broken, self.unturned = Counter(classes.tolist()), len(broken), unturned
        total = len(classes)
        if unturned:
            _log.warning(
                "%d images of %s say by EXIF that they are stored turned, and were read as they are stored; apply_exif "
                "turns them",
                unturned,
                self.images.path,
            )
        if self.broken > MAX_BROKEN_FRACTION * (total + self.broken):
            raise ValueError(
                f"{str(self.images.path)!r}: {self.broken} of {total + self.broken} images are broken, the last: "
                f"{broken[max(broken)]}"
            )
        if total < self.count and not self._whole:
            raise ValueError(f"{str(self.images.path)!r} gave {total:,} readable images, {self.count:,} are needed")


_Decoding = tuple[int, int | None, Callable[[], tuple[Pixels, int]]]
"""Position and label of an image, and what waits for its pixels, and for 1 if it was not turned."""


class ImageBatch(NamedTuple):
    """A batch of a selection."""

    images: Tensor | None
    """uint8 `(B, C, H, W)`; None where every one is broken."""
    labels: Tensor | None
    """int64 `(B,)`, the class of each or `NO_CLASS`; None of a set without labels."""
    broken: dict[int, str]
    """Position of each image that cannot be read, and why."""
    unturned: int
    """Images whose EXIF orientation was not applied."""
