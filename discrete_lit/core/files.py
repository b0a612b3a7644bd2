"""Files that are whole or absent, and the hash that names their content.

A reader must never meet half a file, whenever the writer was killed and however full the disk was. So a file is
written under a temporary name in the folder where it belongs, brought to the disk, and only then given its name.

npz files may come from anywhere: they are read without pickles, and every way in which one can be broken is one error.
"""

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np


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
