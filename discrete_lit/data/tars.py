"""Samples in a tar file, read in order, without the ones that nobody wants.

A sample is what stands together under one name up to its first dot (webdataset's convention): an image and `<key>.cls`.
Only these two are ever read: a `.pyd`, `.pickle` or `.pth` entry, which other decoders would unpickle, is passed over.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, NamedTuple, Protocol

import numpy as np

from discrete_lit.data.decoding import IMAGE_EXTENSIONS

# A transfer that breaks is taken up again at the sample where it broke; a local file would only break again.
_REMOTE_ATTEMPTS = 3
# Entries about the archive itself, by webdataset's convention.
_META = re.compile(r"__[^/]*__(/|$)")


class ShardFile(Protocol):
    """What is read: see `shard_set.Shard`."""

    @property
    def url(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def local(self) -> bool: ...
    def open(self) -> IO[bytes]: ...


class RawSample(NamedTuple):
    """A sample as it lies in its shard; `problem` says why there is no image."""

    key: str
    shard: str
    image: bytes
    label: bytes
    problem: str | None = None


class BrokenShard(ValueError):
    """Not one sample of a shard can be read."""


def read_samples(shard: ShardFile, wanted: np.ndarray) -> Iterator[tuple[int, RawSample]]:
    """The wanted samples of a shard in order, each with its position; unwanted ones are passed over unread.

    A shard that ends or breaks early yields every wanted sample that it lacks as one with a `problem`.

    Args:
        shard: the file.
        wanted: bool `(shard.count,)`.

    Raises:
        BrokenShard: nothing can be read.
        ValueError: the shard holds more samples than was declared, so that some would never be used.
    """
    last = int(np.flatnonzero(wanted)[-1])
    next_position = 0
    error: Exception | None = None
    for _ in range(1 if shard.local else _REMOTE_ATTEMPTS):
        try:
            with _Closing(shard.open()) as stream:
                groups = _groups(_tar(shard, stream), wanted)
                for position, key, entries in groups:
                    if position == shard.count - 1 and next(groups, None) is not None:
                        raise ValueError(
                            f"{shard.url} holds more samples than the {shard.count} declared by its manifest or count; "
                            "declare the number of each shard"
                        )
                    if position >= next_position and wanted[position]:
                        yield position, _sample(shard, key, entries)
                    next_position = max(next_position, position + 1)
                    if position == last:
                        return
                error = None
        except (OSError, EOFError, tarfile.TarError, zlib.error) as broken:
            error = broken
    if next_position == 0:
        raise BrokenShard(f"cannot read {shard.url}: {error or 'there are no samples in it'}") from error
    reason = f"the shard ends after {next_position} of {shard.count} samples" + (f" ({error})" if error else "")
    for position in np.flatnonzero(wanted[next_position:]) + next_position:
        yield int(position), RawSample(f"sample {position}", shard.url, b"", b"", reason)


def count_samples(shard: ShardFile) -> int:
    """Number of samples in a local shard, by its headers alone.

    Raises:
        BrokenShard: it cannot be read to its end.
    """
    try:
        with _Closing(shard.open()) as stream:
            return sum(1 for _ in _groups(_tar(shard, stream), np.zeros(0, dtype=bool)))
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise BrokenShard(f"cannot read {shard.url}: {error}") from error


def _tar(shard: ShardFile, stream: IO[bytes]) -> tarfile.TarFile:
    # Only an uncompressed local file can be jumped about in; all else is read from the front.
    seekable = shard.local and shard.url.endswith(".tar")
    return tarfile.open(fileobj=stream, mode="r:" if seekable else "r|*")


def _groups(tar: tarfile.TarFile, wanted: np.ndarray) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """Position, key, and the read entries by extension of each sample."""
    position, key = -1, None
    entries: dict[str, bytes] = {}
    while (member := tar.next()) is not None:
        # The archive remembers every member that it has seen.
        tar.members.clear()  # type: ignore[attr-defined]
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not member.isreg() or not stem or not dot or _META.match(member.name):
            continue
        if folder + slash + stem != key:
            if key is not None:
                yield position, key, entries
            position, key, entries = position + 1, folder + slash + stem, {}
        extension = extension.lower()
        if position < len(wanted) and wanted[position] and (extension == "cls" or extension in IMAGE_EXTENSIONS):
            entries[extension] = _content(tar, member)
    if key is not None:
        yield position, key, entries


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    data = file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return data


def _sample(shard: ShardFile, key: str, entries: dict[str, bytes]) -> RawSample:
    label = entries.pop("cls", None)
    problem = None
    if label is None:
        problem = "it has no .cls entry"
    elif len(entries) != 1:
        problem = f"it has {len(entries)} images" if entries else "it has no image"
    image = next(iter(entries.values()), b"")
    return RawSample(key, shard.url, image, label or b"", problem)


class _Closing:
    """Closes a stream that may be the output of a command, which fails when it is not read to the end."""

    def __init__(self, stream: IO[bytes]):
        self.stream = stream

    def __enter__(self) -> IO[bytes]:
        return self.stream

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self.stream.close()
