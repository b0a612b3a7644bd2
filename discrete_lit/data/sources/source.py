"""Sources of labelled images: a table of entries, and a way to read the bytes of each.

An entry's key is made from a file name by `key_from_path`, and `path_from_key` gives the name back.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple
from urllib.parse import unquote

from discrete_lit.core.files import content_sha256
from discrete_lit.data.media import MediaKind
from discrete_lit.data.transforms import IMAGES

# webdataset groups the files of a sample by the path up to the first dot of its last part, and skips every path that
# begins with a `__name__` part.
_KEY = re.compile(r"(?!__[^/]*__(?:/|$))(?:[^/.]+/)*[^/.]+")


class Entry(NamedTuple):
    """Describes a sample without reading it."""

    key: str
    """Unique name in the source, without dots; `/` separates folders."""
    extension: str
    """One of those of the source's `media`: lower case, without the dot."""
    label: int | None
    """Class index in `[0, len(classes))`; None where the source has no classes."""
    size: int
    """Bytes that the sample takes where it is stored."""


class Sample(NamedTuple):
    """Holds an entry with the content of its file."""

    key: str
    extension: str
    label: int | None
    data: bytes
    """The encoded image file, exactly as it was stored."""
    captions: tuple[str, ...] = ()
    """Its captions, each of one line; none where the source has none."""


class Source(ABC):
    """Labelled images that can be read in any order.

    A source of your own calls this constructor with its table of entries and defines `read`.

    Args:
        description: one line for people, written into the manifest.
        classes: class names; the position is the label. Empty where the images have no labels.
        entries: one entry a sample, best in the order in which they lie on the disk: a shard's samples are read in
            this order, whatever the shuffle.

    Raises:
        ValueError: there is no entry, two entries have the same key, a label is out of range, or a key or an
            extension would not be read back from a shard.
    """

    media: ClassVar[MediaKind] = IMAGES
    """The files that its samples are."""

    def __init__(self, description: str, *, classes: Sequence[str], entries: Sequence[Entry]) -> None:
        if not entries:
            raise ValueError(f"{description} holds no {self.media.name}")
        self.description = description
        self.classes = list(classes)
        self.entries = entries
        seen: set[str] = set()
        for key, extension, label, _ in entries:
            if not _KEY.fullmatch(key):
                raise ValueError(
                    f"key {key!r} of {description} cannot be read back from a shard: a key has no empty part, no dot "
                    "and no leading __name__ folder; build keys with discrete_lit.data.sources.source.key_from_path"
                )
            if extension not in self.media.extensions:
                raise ValueError(
                    f"extension {extension!r} of {key!r} is not one that {self.media.name}s are read from: "
                    f"{', '.join(sorted(self.media.extensions))}"
                )
            if not (0 <= label < len(classes) if label is not None else not classes):
                raise ValueError(f"label {label} of {key!r} is not in [0, {len(classes)})")
            if key in seen:
                raise ValueError(f"two images of {description} have the key {key!r}: rename one of the files")
            seen.add(key)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        """Read sample `index` in `[0, len(self))`."""
        key, extension, label, _ = self.entries[index]
        return Sample(key, extension, label, self.read(index), self.captions(index))

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Read the encoded image file of sample `index`, untouched.

        Raises:
            ValueError: The file changed since the source was opened.
        """

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of sample `index`, each of one line; none by default.

        A source that has captions adds them to its `fingerprint` too.
        """
        return ()

    def last_change(self, index: int) -> int:
        """The time in nanoseconds at which the file behind sample `index` last changed; 0 where it never does.

        A source of files that users may replace defines it: shards of images that changed later are then not kept.
        """
        return 0

    def fingerprint(self) -> str:
        """Hash the classes and every entry with SHA-256 (hexadecimal).

        It is the same wherever the data is stored, and changes when an image is added, removed, renamed, moved to
        another class or changes its size. It does not read the images.
        """
        return content_sha256(json.dumps(item) for item in (self.classes, *self.entries))


def shuffled(source: Source, seed: int) -> list[int]:
    """Order the samples by SHA-256 of seed and key, so that it depends on no library and not on the source's order."""
    return sorted(range(len(source)), key=lambda index: content_sha256(f"{seed} {source.entries[index].key}"))


def file_change(path: Path) -> int:
    """The time in nanoseconds of a file's last change, be it of its content or of its entry in the folder.

    The time of the content can be set at will, as copying does; that of the entry cannot.
    """
    state = path.stat()
    return max(state.st_mtime_ns, state.st_ctime_ns)


def key_from_path(parts: Sequence[str]) -> str:
    """Join the parts of a path (the last without its extension) to a key that survives in a shard.

    Dots, percent signs and unprintable characters are percent-encoded, for webdataset ends a key at the first dot;
    so is the first character of a leading `__name__`, which webdataset takes for a comment. Distinct paths give
    distinct keys.

    >>> key_from_path(["tabby cat", "img.v2_001"])
    'tabby cat/img%2Ev2_001'
    """
    key = "/".join("".join(map(_encode, part)) for part in parts)
    return f"%5F{key[1:]}" if re.match(r"__[^/]*__(/|$)", key) else key


def path_from_key(key: str) -> str:
    """Give back the path, without its extension, that `key_from_path` made this key from.

    >>> path_from_key('tabby cat/img%2Ev2_001')
    'tabby cat/img.v2_001'
    """
    return unquote(key, errors="surrogateescape")


def _encode(character: str) -> str:
    if character.isprintable() and character not in ".%":
        return character
    # Bytes of a file name that are not UTF-8 reach Python as lone surrogates.
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
