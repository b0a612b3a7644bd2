"""Which images of a set are measured: the same count for every set, and the same count of every class."""

import logging
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from discrete_lit.data.transforms import UndecodableImage
from discrete_lit.evaluation.image_sets import ImageSet

MAX_BROKEN_SHARE = 0.01

_log = logging.getLogger(__name__)


class Selection:
    """The first `num_images` of a set; of a labelled set, the first `num_images / num_classes` of each class, in order.

    Where the division leaves a remainder r, the first r classes give one image more. A broken image is left out,
    counted and logged, and the next of its class takes its place.

    Args:
        images: the set.
        num_images: how many; None takes all.
        num_classes: of the comparison; used for labelled sets.

    Raises:
        ValueError: fewer images than asked, of the set or of a class, or a label that is no class.
    """

    def __init__(self, images: ImageSet, num_images: int | None, num_classes: int | None) -> None:
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
            share, rest = divmod(num_images, num_classes)
            self._quota = Counter({label: share + (label < rest) for label in range(num_classes)})
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
        """uint8 `(B, 3, H, W)` and int64 `(B,)`, None for a set without labels.

        Raises:
            ValueError: too few readable images, or more than 1% broken ones.
        """
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        taken: Counter[int] = Counter()
        total = broken = 0
        for label, decode in self.images.stream():
            if self._quota is not None and label is not None:
                if label not in self._quota:
                    self._check_classes(Counter([label]))
                if taken[label] == self._quota[label]:
                    continue
            try:
                pixels.append(decode())
            except UndecodableImage as error:
                broken += 1
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
        if broken > MAX_BROKEN_SHARE * (total + broken):
            raise ValueError(f"{str(self.images.path)!r}: {broken} of {total + broken} images are broken")
        if total < self.count and not self._whole:
            if self._quota is not None:
                self._check_classes(taken)
            raise ValueError(f"{str(self.images.path)!r} gave {total:,} readable images, {self.count:,} are needed")


def _tensors(pixels: list[np.ndarray], labels: list[int]) -> tuple[Tensor, Tensor | None]:
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels) if labels else None
