"""Files that are whole or absent, and the hash that names their content.

A reader must never meet half a file, whenever the writer was killed and however full the disk was. So a file is
written under a temporary name in the folder where it belongs, brought to the disk, and only then given its name.

npz files may come from anywhere: `Npz` reads them without pickles, and every way in which one can be broken is one
error. Files of `torch.save` are checked record by record before PyTorch maps them, which looks at no checksum.
"""

import ctypes
import errno
import hashlib
import math
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, Self

import numpy as np

from discrete_lit.core.locks import check_locks

# Of a zip file, PKWARE's APPNOTE 4.3.7 and 4.4.4.
_LOCAL_HEADER, _LOCAL_HEADER_SIZE, _ENCRYPTED = b"PK\x03\x04", 30, 0x1
_CHUNK = 1 << 24
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
        if Path(path).is_dir():
            # No file system replaces a folder that holds something. Exchanged, one of the two is there at any moment.
            if _exchange(temporary, path):
                shutil.rmtree(temporary)
                return
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)
    else:
        # Without this a power failure may leave the name with nothing behind it.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, path)


def _exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Exchange two names at once; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    at_current, exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    return rename(at_current, os.fsencode(one), at_current, os.fsencode(other), exchange) == 0


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


def check_records(path: str | os.PathLike[str]) -> None:
    """Check that a file of `torch.save`, a zip file, is whole: every record's place, size and CRC-32.

    The sizes come first, from the directory, so that nothing is unpacked; then the file is read once, at the speed of
    the disk or about 2 GB/s. PyTorch, which maps such a file, takes a compressed record for weights as it is, and
    notices no changed bit.

    Raises:
        ValueError: no such zip file, a compressed record, one that does not fit the file, or one that was damaged; the
            message lacks its first word, the name of the file.
    """
    size = os.stat(path).st_size
    if size == 0:
        raise ValueError("is empty")
    with open(path, "rb") as file:
        if file.read(len(_LOCAL_HEADER)) != _LOCAL_HEADER:
            raise ValueError("is no file of torch.save: those are zip files since 2020")
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, EOFError) as error:
            raise ValueError(f"is truncated: copy it again ({error})") from error
        names = [record.orig_filename for record in records]
        if len(set(names)) < len(names):
            raise ValueError("has two records of one name")
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & _ENCRYPTED:
                raise ValueError(
                    f"was packed again, its record {record.filename[:100]!a} is compressed or encrypted: unpack it and "
                    "pack it without compression (zip -0 -r)"
                )
            if record.file_size != record.compress_size or record.header_offset + record.file_size > size:
                raise ValueError(f"has a record {record.filename[:100]!a} that does not fit into the file")
        # Without any checksum (torch.serialization.set_crc32_options) all are 0.
        checked = records if any(record.CRC for record in records) else []
        damaged = [record.filename for record in checked if _stored_crc(file, record) != record.CRC]
    if damaged:
        first = damaged[0][:100]
        raise ValueError(f"has {len(damaged)} damaged records of {len(records)}, the first is {first!a}: copy it again")


def check_published(path: str | os.PathLike[str]) -> bool:
    """Check a file that `torch.save` wrote at any time, as `check_records` does; tell whether it is a zip file.

    Before 2020 it wrote pickles, which have no checksums.

    Raises:
        ValueError: as `check_records`.
    """
    with open(path, "rb") as file:
        zipped = file.read(len(_LOCAL_HEADER)) == _LOCAL_HEADER
    if zipped:
        check_records(path)
    return zipped


def _stored_crc(file: BinaryIO, record: zipfile.ZipInfo) -> int | None:
    """Compute the CRC-32 of an uncompressed record; None if it is not there."""
    file.seek(record.header_offset)
    header = file.read(_LOCAL_HEADER_SIZE)
    if len(header) < _LOCAL_HEADER_SIZE or not header.startswith(_LOCAL_HEADER):
        return None
    name_length, extra_length = struct.unpack("<HH", header[-4:])
    file.seek(name_length + extra_length, os.SEEK_CUR)
    left, crc, buffer = record.file_size, 0, memoryview(bytearray(min(record.file_size, _CHUNK)))
    while left:
        count = file.readinto(buffer[:left])  # type: ignore[attr-defined]
        if not count:
            return None
        crc, left = zlib.crc32(buffer[:count], crc), left - count
    return crc


class ArrayHeader(NamedTuple):
    """The shape and type of an array of an npz file, known before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Npz:
    """Read an npz file, which may come from anywhere: the headers of its arrays first, then the arrays that are wanted.

    Nothing is unpickled, and no array has to be read before its shape is known: a small compressed file can hold more
    than the memory does.

        with Npz("samples.npz") as file:
            if file.headers["labels"].shape == (50,):
                labels = file.read("labels")

    Args:
        path: the file.

    Raises:
        ValueError: no npz file, or a damaged or encrypted one. Whatever is wrong with the file, here and in what is
            read of it, is a ValueError that names the file and the array.
    """

    headers: dict[str, ArrayHeader]
    """Name of each array to its header."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with ExitStack() as opened:
            with self._errors():
                self._archive = opened.enter_context(zipfile.ZipFile(self.path))
            members = [name for name in self._archive.namelist() if name.endswith(".npy")]
            self.headers = {name.removesuffix(".npy"): self._read_header(name) for name in members}
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _read_header(self, member: str) -> ArrayHeader:
        with self._errors(member), self._archive.open(member) as file:
            header = read_npy_header(file)
            values = self._archive.getinfo(member).file_size - file.tell()
            # A header that claims more than there is would make the reader set aside memory for it.
            if not header.dtype.hasobject and header.size != values:
                raise ValueError(f"{header.dtype} {header.shape} takes {header.size:,} bytes, there are {values:,}")
            return header

    def read(self, name: str) -> np.ndarray:
        """Read an array whole."""
        with self._errors(name), self._archive.open(f"{name}.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # beyond the last byte: there the checksum is compared
            return array

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """Read an array of at least one dimension row by row, in the memory of one row."""
        with self._errors(name), self._archive.open(f"{name}.npy") as file:
            shape, dtype, fortran_order = read_npy_header(file)
            if fortran_order:
                raise ValueError("it is in Fortran order; save it with np.ascontiguousarray")
            if math.prod(shape[1:]) == 0 or dtype.itemsize == 0:
                raise ValueError(f"{dtype} {shape} has rows of no bytes, however many it claims")
            size = math.prod(shape[1:]) * dtype.itemsize
            for index in range(shape[0]):
                data = file.read(size)
                if len(data) != size:
                    raise ValueError(f"it ends after {index} of {shape[0]} rows")
                yield np.frombuffer(data, dtype).reshape(shape[1:])

    @contextmanager
    def _errors(self, name: str | None = None) -> Iterator[None]:
        # A broken file raises almost anything: OSError, BadZipFile, zlib.error, EOFError, RuntimeError (encrypted),
        # NotImplementedError (an unknown compression), TypeError, OverflowError, MemoryError, ...
        try:
            yield
        except Exception as error:
            array = "" if name is None else f": {name.removesuffix('.npy')}"
            reason = str(error) or type(error).__name__
            raise ValueError(f"{self.path!r} is not a readable npz file{array}: {reason}") from error


def read_npy_header(file: IO[bytes]) -> ArrayHeader:
    """Read the header of an array, up to its first value.

    Raises:
        ValueError: it is none, or of another version; a broken one may raise almost anything.
    """
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"its format has version {version}, known are {list(readers)}")
    shape, fortran_order, dtype = readers[version](file)
    return ArrayHeader(shape, dtype, fortran_order)


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

    def sync(self) -> None:
        """Bring everything that was written to the disk."""
        with naming(self.path):
            os.fsync(self.descriptor)

    def close(self) -> None:
        """Bring everything that was written to the disk, and write no more."""
        try:
            self.sync()
        finally:
            os.close(self.descriptor)

    def _offset(self, row: int) -> int:
        return self.offset + int(row) * self.row_bytes


def unwritten_batches(written: RowFile, batches: np.ndarray, batch_size: int, *, count: int) -> np.ndarray:
    """Find the batches of rows that are not all marked as written, and take the marks of those away.

    Args:
        written: uint8 `(count,)`, 1 of a row that was written.
        batches: int64, numbers of batches; batch b holds the rows from b * batch_size on.
        batch_size: rows of every batch but the last.
        count: rows.
    """
    left = []
    for batch in batches.tolist():
        rows = np.arange(batch * batch_size, min((batch + 1) * batch_size, count))
        marks = written.read(rows)
        if not marks.all():
            left.append(batch)
            if marks.any():
                written.write(rows, np.zeros(len(rows)))
    return np.array(left, dtype=np.int64)


def _runs(rows: np.ndarray) -> list[slice]:
    """Slices of `rows` in which each entry is the one before plus one."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [slice(start, stop) for start, stop in zip([0, *breaks], [*breaks, len(rows)], strict=True)]
