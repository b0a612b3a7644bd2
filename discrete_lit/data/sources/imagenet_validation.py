"""The ILSVRC2012 validation archive and its ground truth."""

import os
import re
from collections import Counter

from discrete_lit.data.sources.imagenet_ground_truth import read_ground_truth
from discrete_lit.data.sources.source import Entry, Source
from discrete_lit.data.sources.tar_index import Extent, TarIndex

_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


class ImageNetValidation(Source):
    """`ILSVRC2012_img_val.tar`: a flat tar of `ILSVRC2012_val_00000001.JPEG` and so on, without labels.

    Labels are the positions of the sorted WordNet ids, as in training. Keys are the original names without `.JPEG`; the
    bytes are untouched.

    Args:
        archive: The tar file.
        ground_truth: What says the class of each image, in one of the forms that name classes by WordNet id:
            the development kit `ILSVRC2012_devkit_t12.tar.gz`; Kaggle's `LOC_val_solution.csv`; lines of
            `ILSVRC2012_val_00000001.JPEG n01751748`; or one WordNet id a line, in the order of the image numbers.
            A text file of integers is refused: see `read_ground_truth`.
        expected_count: Number of images that the archive must hold; null accepts any.
        expected_classes: Number of classes that the ground truth must have; null accepts any. If both numbers are
            given, every class must have the same number of images.

    Raises:
        ValueError: It is another archive, is damaged, the counts differ, or the ground truth cannot be read or does not
            belong to these images.
    """

    def __init__(
        self,
        archive: str | os.PathLike[str],
        ground_truth: str | os.PathLike[str],
        expected_count: int | None = 50_000,
        expected_classes: int | None = 1000,
    ) -> None:
        self._index = TarIndex(archive)
        path = self._index.path
        numbered: dict[int, Extent] = {}
        for file in self._index.files():
            match = _IMAGE.fullmatch(file.name)
            if match is None:
                hint = "is the training archive" if re.fullmatch(r"n\d{8}\.tar", file.name) else "is another archive"
                raise ValueError(
                    f"{path} {hint}: it holds {file.name}, where ILSVRC2012_img_val.tar holds images named "
                    "ILSVRC2012_val_00000001.JPEG and so on"
                )
            numbered[int(match[1])] = file
        if not numbered:
            raise ValueError(f"{path} is empty: it is damaged or cut off; download it again")
        if expected_count is not None and len(numbered) != expected_count:
            raise ValueError(
                f"{path} holds {len(numbered):,} images, expected {expected_count:,}: it is cut off or is not the "
                "released archive. Download it again, or set expected_count to null to go on with what there is"
            )
        truth = read_ground_truth(ground_truth)
        if set(truth.class_of) != set(numbered):
            strangers = sorted(set(truth.class_of) ^ set(numbered))
            raise ValueError(
                f"{ground_truth} gives classes for {len(truth.class_of):,} images and {path} holds {len(numbered):,}: "
                f"they do not belong together; image number {strangers[0]} is in only one of them"
            )
        if expected_classes is not None and len(truth.classes) != expected_classes:
            raise ValueError(
                f"{ground_truth} has {len(truth.classes)} classes, expected {expected_classes}; set expected_classes "
                "to null for a ground truth of your own"
            )
        if expected_count is not None and expected_classes is not None:
            each = expected_count // expected_classes
            uneven = [item for item in Counter(truth.class_of.values()).items() if item[1] != each]
            if uneven:
                raise ValueError(
                    f"{ground_truth} gives {uneven[0][1]} images to class {uneven[0][0]}, where every class has {each}"
                    ": it is damaged or belongs to another set"
                )
        label_of = {name: label for label, name in enumerate(truth.classes)}
        self._extents = list(numbered.values())
        entries = [
            Entry(file.name.removesuffix(".JPEG"), "jpeg", label_of[truth.class_of[number]], file.size)
            for number, file in numbered.items()
        ]
        super().__init__(f"ImageNet validation archive {path.name}", truth.classes, entries)

    def read(self, index: int) -> bytes:
        return self._index.read(self._extents[index])
