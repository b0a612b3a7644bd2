"""What a source of labelled images is: a table of entries, and a way to read the bytes of each."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from discrete_lit.data.decoding import IMAGE_EXTENSIONS

# webdataset groups the files of a sample by the path up to the first dot of its last part, and skips every path that
# begins with a `__name__` part.
_KEY = re.compile(r"(?!__[^/]*__(?:/|$))(?:[^/.]+/)*[^/.]+")


class Entry(NamedTuple):
    """What is known of a sample without reading it."""

    key: str
    """Unique name in the source, without dots; `/` separates folders."""
    extension: str
    """One of `discrete_lit.data.decoding.IMAGE_EXTENSIONS`: lower case, without the dot."""
    label: int
    """Class index in `[0, len(classes))`."""
    size: int
    """Bytes that the sample takes where it is stored."""


class Sample(NamedTuple):
    """An entry with its file content."""

    key: str
    extension: str
    label: int
    data: bytes
    """The encoded image file, exactly as it was stored."""


class Source(ABC):
    """Labelled images that can be read in any order.

    A source of your own calls this constructor with its table of entries and defines `read`.

    Args:
        description: One line for people, written into the manifest.
        classes: Class names; the position is the label.
        entries: One entry a sample, best in the order in which they lie on the disk: a shard's samples are read in
            this order, whatever the shuffle.

    Raises:
        ValueError: There is no entry, two entries have the same key, a label is out of range, or a key or an
            extension would not be read back from a shard.
    """

    def __init__(self, description: str, classes: Sequence[str], entries: Sequence[Entry]) -> None:
        if not entries:
            raise ValueError(f"{description} holds no image")
        self.description = description
        self.classes = list(classes)
        self.entries = entries
        seen: set[str] = set()
        for key, extension, label, _ in entries:
            if not _KEY.fullmatch(key):
                raise ValueError(
                    f"key {key!r} of {description} cannot be read back from a shard: a key has no empty part, no dot "
                    "and no leading __name__ folder; build keys with discrete_lit.data.sources.keys.key_from_path"
                )
            if extension not in IMAGE_EXTENSIONS:
                raise ValueError(
                    f"extension {extension!r} of {key!r} is not one that images are read from: "
                    f"{', '.join(sorted(IMAGE_EXTENSIONS))}"
                )
            if not 0 <= label < len(classes):
                raise ValueError(f"label {label} of {key!r} is not in [0, {len(classes)})")
            if key in seen:
                raise ValueError(f"two images of {description} have the key {key!r}: rename one of the files")
            seen.add(key)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        """Read sample `index` in `[0, len(self))`."""
        key, extension, label, _ = self.entries[index]
        return Sample(key, extension, label, self.read(index))

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image file of sample `index`, untouched.

        Raises:
            ValueError: The file changed since the source was opened.
        """

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the classes and of every entry.

        It is the same wherever the data is stored, and changes when an image is added, removed, renamed, moved to
        another class or changes its size. It does not read the images.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for entry in self.entries:
            digest.update(json.dumps(entry).encode())
        return digest.hexdigest()
