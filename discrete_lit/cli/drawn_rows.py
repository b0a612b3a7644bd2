"""The samples that `discrete-lit sample` has drawn, while not all of them are there.

They lie in `rows.npy.partial`, row i is sample i, and the thoughts before them in `thoughts.npy.partial`; a mark for
each row that is on the disk is in `drawn.npy.partial`. All processes and all jobs of an array write into these.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from discrete_lit.core.array_parts import Part, PartsFolder, in_ranges
from discrete_lit.core.files import RowFile, content_sha256, unwritten_batches

_BYTES_AT_ONCE = 2**26
_MARKED_EVERY = 30.0  # Seconds after which rows are brought to the disk and marked: an interruption loses no more.


class DrawnRows:
    """Rows that several processes draw, each whole batches.

    Args:
        folder: of the samples.
        parts: who draws which.
        count: rows.
        batch_size: rows of every batch but the last.
    """

    def __init__(self, folder: Path, parts: PartsFolder, *, count: int, batch_size: int) -> None:
        self.folder, self.parts, self.count, self.batch_size = folder, parts, count, batch_size
        self.path, self.thoughts_path, self._marks_path = (
            folder / f"{name}.npy.partial" for name in ("rows", "thoughts", "drawn")
        )
        self._files: list[RowFile] = []
        self._unmarked: list[np.ndarray] = []
        self._marked = time.monotonic()

    @property
    def has_thoughts(self) -> bool:
        """Whether there are thoughts before the samples."""
        return self.thoughts_path.is_file()

    def unfinished(self, batches: np.ndarray) -> np.ndarray:
        """Find the batches, of some numbers, that are not drawn yet; one process asks, while none draws them."""
        if not self._marks_path.is_file():
            return batches
        marks = RowFile(self._marks_path)
        left = unwritten_batches(marks, batches, self.batch_size, count=self.count)
        marks.close()
        return left

    def write(self, rows: np.ndarray, samples: np.ndarray, thoughts: np.ndarray | None) -> None:
        """Write the samples, and the thoughts if there are any, of some rows.

        Raises:
            ValueError: the disk has no room for all of them, or they have another shape than those of other jobs.
        """
        if not self._files:
            self._open(samples, thoughts)
        for file, values in zip(self._files[1:], (samples, thoughts), strict=False):
            if values is not None and (values.shape[1:], values.dtype) != (file.row_shape, file.dtype):
                raise ValueError(
                    f"a row is {values.dtype} {values.shape[1:]}, and those in {file.path} are {file.dtype} "
                    f"{file.row_shape}: remove {self.parts.folder} to begin anew"
                )
            if values is not None:
                file.write(rows, values)
        self._unmarked.append(rows)
        if time.monotonic() - self._marked > _MARKED_EVERY:
            self._mark()

    def close(self) -> None:
        """Bring everything that was written to the disk."""
        if self._files:
            self._mark()
        for file in self._files:
            file.close()
        self._files = []

    def finish(self, part: Part, run: dict[str, Any]) -> None:
        """Write down that a part is drawn, by which run, and the hash of its rows."""
        self.parts.finish(part, {"run": run, "sha256": self._sha256(part)})

    def joined(self, parts: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Check that all parts are there and as they were drawn, and give the record of a run that drew all.

        Args:
            parts: how many.
            settings: of the command that joins them.

        Raises:
            ValueError: parts are missing, have other settings, or were damaged.
        """
        self.parts.check_complete(parts, settings)
        each = [Part(number, parts) for number in range(1, parts + 1)]
        facts = [self.parts.facts(part) or {} for part in each]
        damaged = [part for part, found in zip(each, facts, strict=True) if found.get("sha256") != self._sha256(part)]
        if damaged:
            marks = RowFile(self._marks_path)
            for part in damaged:
                rows = part.rows(self.count, self.batch_size)
                marks.write(np.arange(rows.start, rows.stop), np.zeros(len(rows)))
                self.parts.reopen(part)
            marks.close()
            raise ValueError(
                f"the rows of {len(damaged)} of {parts} parts in {str(self.folder)!r} are not those that were drawn, "
                f"such as of part {damaged[0].number}: a damaged file, or a file system that lost them. Run these "
                f"again: `sbatch --array={in_ranges(part.number for part in damaged)}`, or `--part {damaged[0]}`"
            )
        runs = [found["run"] for found in facts]
        # A part that had drawn everything before it was interrupted has no speed, and no calls.
        drew = [run for run in runs if run["images_per_second"]] or runs
        speeds = {
            name: len(drew) / sum(1 / run[name] for run in drew) if all(run[name] for run in drew) else 0.0
            for name in ("images_per_second", "images_per_second_without_decoding")
        }
        return {**drew[-1], **speeds, "parts": parts}

    def clear(self) -> None:
        """Remove all rows, and forget all parts."""
        for path in (self._marks_path, self.path, self.thoughts_path):
            path.unlink(missing_ok=True)
        self.parts.clear()

    def _sha256(self, part: Part) -> str:
        """Hash the rows of a part as they are in their files."""
        rows = part.rows(self.count, self.batch_size)
        paths = [self.path, *([self.thoughts_path] if self.has_thoughts else [])]
        arrays = [np.load(path, mmap_mode="r") for path in paths]
        step = max(1, _BYTES_AT_ONCE // max(1, arrays[0][0].nbytes))
        starts = range(rows.start, rows.stop, step)
        return content_sha256(
            array[start : min(start + step, rows.stop)].tobytes() for array in arrays for start in starts
        )

    def _open(self, samples: np.ndarray, thoughts: np.ndarray | None) -> None:
        """Open the files, which the first process of all that has a batch makes: only a batch tells the shapes."""
        with self.parts.locked():
            # The marks are made last: where they are, the others are whole.
            if not self._marks_path.is_file():
                self._check_room(samples)
                RowFile.create(self.path, samples.dtype, (self.count, *samples.shape[1:]))
                if thoughts is not None:
                    RowFile.create(self.thoughts_path, thoughts.dtype, (self.count, *thoughts.shape[1:]))
                RowFile.create(self._marks_path, np.uint8, (self.count,))
        paths = [self._marks_path, self.path, *([] if thoughts is None else [self.thoughts_path])]
        self._files = [RowFile(path) for path in paths]

    def _check_room(self, samples: np.ndarray) -> None:
        needed = 2 * self.count * math.prod(samples.shape[1:]) * samples.dtype.itemsize
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise ValueError(
                f"{self.folder} has {free:,} bytes of free space, and {self.count:,} samples take {needed:,} while "
                "they are drawn and written into samples.npz"
            )

    def _mark(self) -> None:
        marks, *files = self._files
        for file in files:
            file.sync()
        for rows in self._unmarked:
            marks.write(rows, np.ones(len(rows)))
        self._unmarked, self._marked = [], time.monotonic()
