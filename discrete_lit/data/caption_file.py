"""Captions of many images in two files, of which any row is read without the others.

`captions.jsonl` holds the captions of row i, a list of texts, as JSON on line i, and `caption_starts.npy` (int64,
`(count + 1,)`) the byte at which each line begins, and the length of the file.
"""

import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from discrete_lit.core.bounded_reading import open_array, parse_json
from discrete_lit.core.files import atomic_write

_LINES, _STARTS = "captions.jsonl", "caption_starts.npy"
_PART = "captions.part-*.jsonl"


class CaptionParts:
    """The part of a folder's captions that one process writes, in any order of rows.

    Args:
        folder: where `join` makes one file of all parts.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _PART.replace("*", uuid4().hex)
        self._file: Any = None

    def write(self, rows: Sequence[int], captions: Sequence[Sequence[str]]) -> None:
        """Write the captions of some rows.

        Raises:
            ValueError: a row without a caption.
        """
        if empty := [row for row, texts in zip(rows, captions, strict=True) if not texts]:
            raise ValueError(f"row {empty[0]} has no caption; an empty text stands for none")
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
        for row, texts in zip(rows, captions, strict=True):
            self._file.write(json.dumps([row, list(texts)], ensure_ascii=False) + "\n")

    def sync(self) -> None:
        """Bring everything that was written to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Bring everything that was written to the disk, and write no more."""
        if self._file is not None:
            self.sync()
            self._file.close()

    @staticmethod
    def clear(folder: Path) -> None:
        """Delete the parts of an earlier, unfinished array."""
        for part in folder.glob(_PART):
            part.unlink()

    @staticmethod
    def join(folder: Path, count: int) -> None:
        """Make one file of all parts, in the order of the rows.

        Args:
            folder: of the parts, which are deleted.
            count: rows.

        Raises:
            ValueError: rows without captions.
        """
        lines: list[bytes] = [b""] * count
        for part in sorted(folder.glob(_PART)):
            with part.open(encoding="utf-8") as file:
                for line in file:
                    if not line.endswith("\n"):
                        break  # The writer was killed here: its rows were not counted, and were written again.
                    row, texts = json.loads(line)
                    lines[row] = json.dumps(texts, ensure_ascii=False).encode() + b"\n"
        if missing := [row for row, line in enumerate(lines) if not line]:
            raise ValueError(f"{len(missing)} of {count} rows of {folder} have no captions, the first is {missing[0]}")
        with atomic_write(folder / _LINES) as joined:
            joined.writelines(lines)
        with atomic_write(folder / _STARTS) as starts:
            np.save(starts, np.cumsum([0, *map(len, lines)], dtype=np.int64))
        CaptionParts.clear(folder)


class CaptionFile:
    """The captions of a finished folder, read row by row.

    Args:
        folder: that `CaptionParts.join` has filled.
        count: its rows.

    Raises:
        ValueError: a file is missing or does not fit the other.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.path = folder / _LINES
        self._lines: mmap.mmap | None = None
        try:
            starts = open_array(folder / _STARTS)
            size = self.path.stat().st_size
        except (OSError, ValueError) as error:
            raise ValueError(f"the captions in {folder} cannot be read ({error}): copy the folder again") from error
        fits = starts.shape == (count + 1,) and starts.dtype == np.int64 and starts[0] == 0 and starts[-1] == size
        if not fits or (np.diff(starts) < 1).any():
            raise ValueError(f"{self.path} and {_STARTS} are not of the same {count} rows: copy the folder again")
        self._starts = starts

    def __getitem__(self, row: int) -> list[str]:
        """Read the captions of a row, one at least.

        Raises:
            ValueError: the line is no list of texts.
        """
        if self._lines is None:
            with self.path.open("rb") as file:
                self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        line = self._lines[int(self._starts[row]) : int(self._starts[row + 1])]
        texts = parse_json(line, f"copy the folder again: row {row} of {self.path}")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"row {row} of {self.path} is no list of texts: copy the folder again")
        return texts

    def __getstate__(self) -> dict[str, Any]:
        # A memory map does not pickle.
        return {**self.__dict__, "_lines": None}
