"""Files that are whole or absent, and the hash that names their content.

A reader must never meet half a file, whenever the writer was killed and however full the disk was. So a file is
written under a temporary name in the folder where it belongs, brought to the disk, and only then given its name.

npz files may come from anywhere: they are read without pickles, and every way in which one can be broken is one error.
Files of `torch.save` are checked record by record before PyTorch maps them, which looks at no checksum.
"""

import hashlib
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Of a zip file, PKWARE's APPNOTE 4.3.7 and 4.4.4.
_LOCAL_HEADER, _LOCAL_HEADER_SIZE, _ENCRYPTED = b"PK\x03\x04", 30, 0x1
_CHUNK = 1 << 24


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a binary file that gets its name when the block ends, and never where the block fails.

    Until then it is `<path>.tmp`; a failure removes that and leaves an earlier file of the name as it was. There must
    be one writer at a time.

    Example:

        with atomic_write("samples.npz") as file:
            numpy.savez(file, arr_0=images)
    """
    temporary = Path(f"{os.fspath(path)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, as `atomic_write` does."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def publish(temporary: Path, path: str | os.PathLike[str]) -> None:
    """Give a finished file, or a finished folder of files, its name in the place of an earlier one.

    Args:
        temporary: the finished file, in the same file system.
        path: its name from now on.
    """
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
