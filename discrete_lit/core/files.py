"""Files that are whole or absent, and the hash that names their content.

A reader must never meet half a file, whenever the writer was killed and however full the disk was. So a file is
written under a temporary name in the folder where it belongs, brought to the disk, and only then given its name.

npz files may come from anywhere: they are read without pickles, and every way in which one can be broken is one error.
"""

import errno
import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from discrete_lit.core.locks import check_locks

UNFINISHED_SUFFIX = ".tmp"
"""Ends the name that a file has while it is written."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a binary file that gets its name when the block ends, and never where the block fails.

    Until then it is `<path>.tmp`; a failure removes that and leaves an earlier file of the name as it was. There must
    be one writer at a time.

    Example:

        with atomic_write("samples.npz") as file:
            numpy.savez(file, arr_0=images)

    Raises:
        OSError: the disk is full, the folder read-only, and the like; it names the file.
    """
    temporary = Path(f"{os.fspath(path)}{UNFINISHED_SUFFIX}")
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                yield file
            publish(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the disk in the block say which file it was met at."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save hides it behind an error of its own.
        disk = error if isinstance(error, OSError) else error.__context__
        if not isinstance(disk, OSError) or disk.errno is None or disk.filename is not None:
            raise
        raise OSError(disk.errno, disk.strerror, os.fspath(path)) from error


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, as `atomic_write` does."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def publish(temporary: Path, path: str | os.PathLike[str]) -> None:
    """Give a finished file, or a finished folder of files, its name in the place of an earlier one.

    Args:
        temporary: the finished file, in the same file system.
        path: its name from now on.

    Raises:
        FolderInUse: another process has taken over a folder that this one holds, and writes there.
    """
    check_locks()
    if temporary.is_dir():
        # No file system replaces a folder that holds something.
        if Path(path).is_dir():
            shutil.rmtree(path)
    else:
        # Without this a power failure may leave the name with nothing behind it.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, path)


def content_sha256(content: bytes | str | Iterable[bytes | str]) -> str:
    """SHA-256, in hexadecimal, of bytes, of text in UTF-8, or of several of these one after the other."""
    digest = hashlib.sha256()
    for piece in [content] if isinstance(content, bytes | str) else content:
        digest.update(piece.encode("utf-8") if isinstance(piece, str) else piece)
    return digest.hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256, in hexadecimal, of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_npz(path: str | Path, names: Iterable[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Read some arrays of an npz file: the names of all its arrays, and those of the asked ones that it has.

    Raises:
        ValueError: no npz file, a truncated one, or an asked array of pickled objects.
    """
    try:
        # np.load leaves a file that it opened itself open when it fails.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return list(file.files), {name: file[name] for name in names if name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is not a readable npz file: {error}") from error


class RowFile:
    """An array on disk whose rows several processes write, each its own: an .npy file.

    Rows are written with `pwrite` and not through a shared memory map: two machines that map one file of a network file
    system overwrite each other's rows where they lie in one page, and a map ends the process by SIGBUS, without a word,
    where the disk is full.

    Args:
        path: a file that `create` made.

    Raises:
        ValueError: no such array, or a truncated one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                np.lib.format.read_magic(file)
                shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
                self.offset = file.tell()
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is not a readable .npy file: {error}") from error
        self.row_shape = shape[1:]
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.row_shape, dtype=np.int64))
        self.descriptor = os.open(self.path, os.O_RDWR)

    @staticmethod
    def create(path: str | os.PathLike[str], dtype: np.dtype | type, shape: tuple[int, ...]) -> None:
        """Make an array of zeros; it takes place on the disk as its rows are written."""
        dtype = np.dtype(dtype)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with naming(path), open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + dtype.itemsize * int(np.prod(shape, dtype=np.int64)))

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write the rows of some numbers, int64 `(B,)`.

        Raises:
            OSError: the disk is full; it names the file.
        """
        # Rows of a batch are mostly neighbours: one call writes them all.
        for run in _runs(rows):
            data = memoryview(np.ascontiguousarray(values[run], dtype=self.dtype).tobytes())
            start = self._offset(rows[run][0])
            with naming(self.path):
                while data:
                    written = os.pwrite(self.descriptor, data, start)
                    if written == 0:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    data, start = data[written:], start + written

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read the rows of some numbers, int64 `(B,)`."""
        runs = [
            np.frombuffer(
                os.pread(self.descriptor, len(rows[run]) * self.row_bytes, self._offset(rows[run][0])), self.dtype
            )
            for run in _runs(rows)
        ]
        return np.concatenate(runs).reshape(len(rows), *self.row_shape)

    def close(self) -> None:
        """Bring everything that was written to the disk."""
        try:
            with naming(self.path):
                os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)

    def _offset(self, row: int) -> int:
        return self.offset + int(row) * self.row_bytes


def _runs(rows: np.ndarray) -> list[slice]:
    """Slices of `rows` in which each entry is the one before plus one."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [slice(start, stop) for start, stop in zip([0, *breaks], [*breaks, len(rows)], strict=True)]
