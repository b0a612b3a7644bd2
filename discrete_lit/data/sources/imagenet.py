"""The ILSVRC2012 training archive."""

import os
import re

from tqdm import tqdm

from discrete_lit.data.sources.source import Entry, Source
from discrete_lit.data.sources.tar_index import Extent, TarIndex

_CLASS_ARCHIVE = re.compile(r"(n\d{8})\.tar")
_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG")


class ImageNetTrain(Source):
    """`ILSVRC2012_img_train.tar`: a tar of one tar per class, `n01440764.tar` of `n01440764_18.JPEG` and so on.

    The archive is read in place and never unpacked. Labels are the positions of the sorted WordNet ids, the order of
    every published model. Keys are the original names without `.JPEG`; the bytes are untouched (one image is a PNG by
    content and some are CMYK: that is for the reader of the shards).

    Args:
        archive: The tar file.
        expected_count: Number of images that the archive must hold; null accepts any.
        expected_classes: Number of classes that the archive must hold; null accepts any.

    Raises:
        ValueError: It is another archive, is damaged, or the counts differ.
    """

    def __init__(
        self,
        archive: str | os.PathLike[str],
        expected_count: int | None = 1_281_167,
        expected_classes: int | None = 1000,
    ) -> None:
        self._index = TarIndex(archive)
        path = self._index.path
        first = next(self._index.files(), None)
        if first is None:
            raise ValueError(f"{path} is empty: it is damaged or cut off; download it again")
        if not _CLASS_ARCHIVE.fullmatch(first.name):
            hint = "is the validation archive" if first.name.startswith("ILSVRC2012_val_") else "is another archive"
            raise ValueError(
                f"{path} {hint}: its first member is {first.name}, where ILSVRC2012_img_train.tar holds one tar per "
                "class, such as n01440764.tar"
            )
        classes: dict[str, list[Extent]] = {}
        members = tqdm(
            self._index.files_in_members(), f"indexing {path.name}", expected_classes, unit="class", disable=None
        )
        for name, files in members:
            match = _CLASS_ARCHIVE.fullmatch(name)
            if match is None:
                raise ValueError(f"{path} holds {name}, which is not the tar of a class such as n01440764.tar")
            classes[match[1]] = files
        names = sorted(classes)
        if expected_classes is not None and len(names) != expected_classes:
            raise ValueError(
                f"{path} holds {len(names)} classes, expected {expected_classes}. The classification task has "
                "ILSVRC2012_img_train.tar (tasks 1 and 2); set expected_classes to null for an archive of your own"
            )
        label_of = {name: label for label, name in enumerate(names)}
        entries: list[Entry] = []
        self._extents: list[Extent] = []
        for name, files in classes.items():
            for file in files:
                match = _IMAGE.fullmatch(file.name)
                if match is None or match[1] != name:
                    raise ValueError(
                        f"{path} holds {file.name} in the tar of class {name}; expected {name}_<number>.JPEG"
                    )
                entries.append(Entry(file.name.removesuffix(".JPEG"), "jpeg", label_of[name], file.size))
                self._extents.append(file)
        if expected_count is not None and len(entries) != expected_count:
            raise ValueError(
                f"{path} holds {len(entries):,} images, expected {expected_count:,}: it is cut off or is not the "
                "released archive. Download it again, or set expected_count to null to go on with what there is"
            )
        super().__init__(f"ImageNet training archive {path.name}", names, entries)

    def read(self, index: int) -> bytes:
        return self._index.read(self._extents[index])
