"""Reading tars: their files in order, where each lies, and the samples that webdataset groups them to.

An uncompressed tar on the disk is read at any offset (`TarIndex`); anything else, a pipe or a compressed tar, from its
front. A sample is the files that stand together under one name up to its first dot (webdataset's convention): an image
and `<key>.cls`. Only these two are ever read: a `.pyd`, `.pickle` or `.pth` entry, which other decoders would unpickle,
is passed over.
"""

import os
import re
import tarfile
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Protocol

import numpy as np

from discrete_lit.data.transforms import IMAGE_EXTENSIONS

# A transfer that breaks is taken up again at the sample where it broke; a local file would only break again.
_REMOTE_ATTEMPTS = 3
# Entries about the archive itself, by webdataset's convention.
_META = re.compile(r"__[^/]*__(/|$)")
# All the ways in which a tar that is cut off or damaged shows it.
_BROKEN = (OSError, EOFError, tarfile.TarError, zlib.error)


class BrokenShard(ValueError):
    """A shard cannot be read: not one sample of it, or not all of it where all are needed."""


class RawSample(NamedTuple):
    """A sample as it lies in its shard; `problem` says why there is no image."""

    key: str
    shard: str
    image: bytes
    label: bytes
    problem: str | None = None


class ShardFile(Protocol):
    """A shard that can be opened, see `shard_set.Shard`."""

    @property
    def url(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def local(self) -> bool: ...
    def open(self) -> IO[bytes]: ...


def read_samples(shard: ShardFile, wanted: np.ndarray) -> Iterator[tuple[int, RawSample]]:
    """Read the wanted samples of a shard in order, each with its position; the others are passed over unread.

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
            with _closing(shard.open()) as stream:
                groups = _groups(_open(shard, stream), wanted)
                for position, key, entries in groups:
                    if position == shard.count - 1 and next(groups, None) is not None:
                        raise ValueError(
                            f"{shard.url} holds more samples than the {shard.count} declared by its manifest or count; "
                            "declare the number of each shard"
                        )
                    if position >= next_position and wanted[position]:
                        yield position, _sample(shard.url, key, entries)
                    next_position = max(next_position, position + 1)
                    if position == last:
                        return
                error = None
        except _BROKEN as broken:
            error = broken
    if next_position == 0:
        raise BrokenShard(f"cannot read {shard.url}: {error or 'there are no samples in it'}") from error
    reason = f"the shard ends after {next_position} of {shard.count} samples" + (f" ({error})" if error else "")
    for position in np.flatnonzero(wanted[next_position:]) + next_position:
        yield int(position), RawSample(f"sample {position}", shard.url, b"", b"", reason)


def all_samples(path: str | os.PathLike[str]) -> Iterator[RawSample]:
    """Read every sample of an uncompressed shard on the disk in order; what has neither image nor label is no sample.

    Raises:
        BrokenShard: it cannot be read to its end.
    """
    try:
        with tarfile.open(path, mode="r:") as tar:
            for _, key, entries in _groups(tar, None):
                if entries:
                    yield _sample(os.fspath(path), key, entries)
    except _BROKEN as error:
        raise BrokenShard(f"cannot read {os.fspath(path)}: {error}") from error


def count_samples(shard: ShardFile) -> int:
    """Count the samples of a local shard, by its headers alone.

    Raises:
        BrokenShard: it cannot be read to its end.
    """
    try:
        with _closing(shard.open()) as stream:
            return sum(1 for _ in _groups(_open(shard, stream), np.zeros(0, dtype=bool)))
    except _BROKEN as error:
        raise BrokenShard(f"cannot read {shard.url}: {error}") from error


class Extent(NamedTuple):
    """A file inside an archive."""

    name: str
    """Last part of its path."""
    offset: int
    """First byte of its content, counted from the start of the outermost archive."""
    size: int
    """In bytes."""


class TarIndex:
    """Files of an uncompressed tar, and of the tars inside it, by their offsets: read in any order without unpacking.

    Args:
        path: the archive.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no archive {self.path}; give the path of the downloaded .tar file")
        self._descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def files(self) -> Iterator[Extent]:
        """Every file of the archive, in the order in which they lie in it; reads the headers only.

        Raises:
            ValueError: the archive is compressed, damaged or cut off.
        """
        with self._opened() as archive:
            for member in tar_files(archive):
                yield _extent(member, 0)

    def files_in_members(self) -> Iterator[tuple[str, list[Extent]]]:
        """The name and the files of every member, each a tar itself; reads the headers only.

        Raises:
            ValueError: the archive or a member is compressed, damaged or cut off, or a member is not a tar.
        """
        with self._opened() as archive:
            for member in tar_files(archive):
                content = archive.extractfile(member)
                assert content is not None
                with content, self._inner(content, member.name) as inner:
                    files = [_extent(file, member.offset_data) for file in tar_files(inner)]
                yield _extent(member, 0).name, files

    def read(self, extent: Extent) -> bytes:
        """Read the content of a file.

        Raises:
            ValueError: the archive ends inside the file.
        """
        data = os.pread(self._descriptor, extent.size, extent.offset)
        if len(data) != extent.size:
            raise ValueError(f"{self.path} ends inside {extent.name}: it is cut off; download it again")
        return data

    @contextmanager
    def _opened(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.path, mode="r:") as archive:
                yield archive
        except tarfile.TarError as error:
            raise ValueError(
                f"{self.path} cannot be read as an uncompressed tar ({error}). If it is compressed, uncompress it "
                "first; otherwise it is damaged or cut off: compare its size and checksum with the download page"
            ) from error

    @contextmanager
    def _inner(self, content: IO[bytes], name: str) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(fileobj=content, mode="r:") as archive:
                yield archive
        except tarfile.TarError as error:
            raise ValueError(
                f"member {name} of {self.path} is not a readable tar ({error}): the archive is damaged "
                "or cut off; download it again"
            ) from error


def tar_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of an opened tar in order, without folders and links, in memory that does not grow with them."""
    while (member := tar.next()) is not None:
        # The archive remembers every member that it has seen.
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isfile():
            yield member


def read_file(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read the content of a file, which must be the one that `tar_files` gave last where the tar is a stream.

    Raises:
        tarfile.ReadError: the tar ends inside the file.
    """
    file = tar.extractfile(member)
    assert file is not None
    data = file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return data


def _extent(member: tarfile.TarInfo, start: int) -> Extent:
    return Extent(PurePosixPath(member.name).name, start + member.offset_data, member.size)


def _open(shard: ShardFile, stream: IO[bytes]) -> tarfile.TarFile:
    # Only an uncompressed local file can be jumped about in; all else is read from the front.
    seekable = shard.local and shard.url.endswith(".tar")
    return tarfile.open(fileobj=stream, mode="r:" if seekable else "r|*")


def _groups(tar: tarfile.TarFile, wanted: np.ndarray | None) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """Position, key, and entries by extension of each sample; without `wanted` the entries of all are read."""
    position, key = -1, None
    entries: dict[str, bytes] = {}
    for member in tar_files(tar):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot or _META.match(member.name):
            continue
        if folder + slash + stem != key:
            if key is not None:
                yield position, key, entries
            position, key, entries = position + 1, folder + slash + stem, {}
        extension = extension.lower()
        if extension == "cls" or extension in IMAGE_EXTENSIONS:
            if wanted is None or (position < len(wanted) and wanted[position]):
                entries[extension] = read_file(tar, member)
    if key is not None:
        yield position, key, entries


def _sample(shard: str, key: str, entries: dict[str, bytes]) -> RawSample:
    label = entries.pop("cls", None)
    problem = None
    if label is None:
        problem = "it has no .cls entry"
    elif len(entries) != 1:
        problem = f"it has {len(entries)} images" if entries else "it has no image"
    image = next(iter(entries.values()), b"")
    return RawSample(key, shard, image, label or b"", problem)


@contextmanager
def _closing(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """Close a stream that may be the output of a command, which fails when it is not read to the end."""
    try:
        yield stream
    finally:
        with suppress(OSError):
            stream.close()
