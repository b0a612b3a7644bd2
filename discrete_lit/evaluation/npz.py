"""npz files from anywhere: no pickles, and one kind of error for all the ways in which a file can be broken."""

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def read_npz(path: str | Path, names: Iterable[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of all arrays in an npz file, and those of the asked arrays that it has; others are not read.

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
