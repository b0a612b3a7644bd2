"""Where the files of an uncompressed tar lie, so that they can be read in any order without unpacking."""

import os
import tarfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple


class Extent(NamedTuple):
    """A file inside an archive."""

    name: str
    """Last part of its path."""
    offset: int
    """First byte of its content, counted from the start of the outermost archive."""
    size: int
    """In bytes."""


class TarIndex:
    """Files of an uncompressed tar, and of the tars inside it, by their offsets.

    Args:
        path: The archive.

    Raises:
        ValueError: There is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no archive {self.path}; give the path of the downloaded .tar file")
        self._descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def files(self) -> Iterator[Extent]:
        """Every regular file of the archive, in the order in which they lie in it; reads the headers only.

        Raises:
            ValueError: The archive is compressed, damaged or cut off.
        """
        with self._opened() as archive:
            for member in archive:
                if member.isfile():
                    yield _extent(member, 0)

    def files_in_members(self) -> Iterator[tuple[str, list[Extent]]]:
        """(member name, its regular files) of every member, each a tar itself; reads the headers only.

        Raises:
            ValueError: The archive or a member is compressed, damaged or cut off, or a member is not a tar.
        """
        with self._opened() as archive:
            for member in archive:
                if not member.isfile():
                    continue
                content = archive.extractfile(member)
                assert content is not None
                with content, self._inner(content, member.name) as inner:
                    files = [_extent(file, member.offset_data) for file in inner if file.isfile()]
                yield _extent(member, 0).name, files

    def read(self, extent: Extent) -> bytes:
        """The content of a file.

        Raises:
            ValueError: The archive ends inside the file.
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


def _extent(member: tarfile.TarInfo, start: int) -> Extent:
    return Extent(PurePosixPath(member.name).name, start + member.offset_data, member.size)
