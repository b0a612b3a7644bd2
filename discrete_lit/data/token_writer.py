"""Writing token arrays from several processes, each sample to its own row.

Rows are written with `pwrite` and not through a shared memory map: two machines that map one file of a network
file system overwrite each other's rows where they share a page.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = "discrete-lit-tokens-1"
MANIFEST = "manifest.json"
UNFINISHED = "manifest.unfinished.json"
_WRITTEN = "written.npy"


class TokenWriter:
    """Writes one folder of tokens. One process calls `create`; then every process, that one too, makes a `TokenWriter`.

    Example, with a barrier of the caller's where it says so:

        if rank == 0:
            TokenWriter.create(folder, count=..., token_shape=..., ...)
        barrier()
        writer = TokenWriter(folder)
        for batch in loader:
            writer.write(batch["index"], tokens, batch["label"])
        writer.close()
        barrier()
        if rank == 0:
            TokenWriter.finalise(folder)

    The folder has no `manifest.json`, and is refused by readers, until `finalise` has seen every row written once.

    Raises:
        ValueError: `create` was not called for this folder.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.manifest = _unfinished_manifest(self.folder)
        self._tokens = _RowFile(self.folder / "tokens.npy")
        self._labels = _RowFile(self.folder / "labels.npy")
        self._written = _RowFile(self.folder / _WRITTEN)

    @staticmethod
    def create(
        folder: str | os.PathLike[str],
        *,
        count: int,
        token_shape: tuple[int, ...],
        vocab_size: int,
        image_size: int,
        num_classes: int,
        classes: list[str],
        tokenizer: str,
        source: str,
        variants: int | None = None,
    ) -> None:
        """Lay out an empty array, in place of an unfinished one.

        Args:
            folder: made where it is not there.
            count: rows.
            token_shape: shape of one image's tokens.
            vocab_size: tokens are in 0..vocab_size-1; up to 65,536 they take two bytes.
            image_size: side in pixels of the images that are encoded.
            num_classes: labels are in 0..num_classes-1.
            classes: name of each label.
            tokenizer: content hash of the tokenizer (`Tokenizer.fingerprint()`).
            source: where the images come from.
            variants: crops of each image, the second dimension of the tokens; by default one, without a dimension.

        Raises:
            ValueError: the folder holds a finished array, or there is nothing to write.
        """
        path = Path(folder)
        if (path / MANIFEST).exists():
            raise ValueError(f"{path} already holds a finished token array: choose another folder, or delete it")
        if count < 1:
            raise ValueError(f"count is {count}; a token array has at least one row")
        path.mkdir(parents=True, exist_ok=True)
        (path / UNFINISHED).unlink(missing_ok=True)
        manifest = {
            "format": FORMAT,
            "count": count,
            "token_shape": list(token_shape),
            "vocab_size": vocab_size,
            "image_size": image_size,
            "num_classes": num_classes,
            "classes": list(classes),
            "tokenizer": tokenizer,
            "source": source,
            **({} if variants is None else {"variants": variants}),
        }
        token_type = np.uint16 if vocab_size <= 2**16 else np.uint32
        _zeros(path / "tokens.npy", token_type, (count, *row_shape(manifest)))
        _zeros(path / "labels.npy", np.int64, (count,))
        _zeros(path / _WRITTEN, np.uint8, (count,))
        (path / UNFINISHED).write_text(json.dumps(manifest, indent=2) + "\n")

    def write(self, index: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """Write some rows.

        Args:
            index: int64 `(B,)`, the rows.
            tokens: integers `(B, *token_shape)` in [0, vocab_size); `(B, variants, *token_shape)` of several crops.
            labels: integers `(B,)` in [0, num_classes).

        Raises:
            ValueError: a shape, row, token or label does not fit, or a row was written before.
        """
        rows = index.cpu().numpy()
        count, vocab_size, num_classes = (self.manifest[name] for name in ("count", "vocab_size", "num_classes"))
        expected = (len(rows), *row_shape(self.manifest))
        if tuple(tokens.shape) != expected or tuple(labels.shape) != (len(rows),):
            raise ValueError(
                f"got tokens {tuple(tokens.shape)} and labels {tuple(labels.shape)} for rows of {expected}"
            )
        if len(rows) == 0:
            return
        token_values, label_values = tokens.cpu().numpy(), labels.cpu().numpy()
        for name, values, size in (("row", rows, count), ("token", token_values, vocab_size)):
            if values.min() < 0 or values.max() >= size:
                raise ValueError(f"{name}s {values.min()}..{values.max()} are outside 0..{size - 1}")
        if label_values.min() < 0 or label_values.max() >= num_classes:
            raise ValueError(f"labels {label_values.min()}..{label_values.max()} are outside 0..{num_classes - 1}")
        again = rows[self._written.read(rows) > 0]
        if len(again) or len(np.unique(rows)) < len(rows):
            raise ValueError(
                f"rows were written twice in {self.folder}: {(again if len(again) else rows)[:5].tolist()}"
            )
        self._tokens.write(rows, token_values)
        self._labels.write(rows, label_values)
        self._written.write(rows, np.ones(len(rows)))

    def close(self) -> None:
        """Bring everything that was written to the disk."""
        for file in (self._tokens, self._labels, self._written):
            file.close()

    @staticmethod
    def finalise(folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Check that every row was written and make the array readable; called by one process after all have closed.

        Returns:
            The manifest.

        Raises:
            ValueError: rows are missing; the message counts them and names the first.
        """
        path = Path(folder)
        manifest = _unfinished_manifest(path)
        missing = np.flatnonzero(np.load(path / _WRITTEN) == 0)
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {manifest['count']} rows of {path} were never written, the first are "
                f"{missing[:5].tolist()}: images that could not be read, or a process that ended early. "
                "The array stays unfinished."
            )
        os.replace(path / UNFINISHED, path / MANIFEST)
        (path / _WRITTEN).unlink()
        return manifest


def row_shape(manifest: dict[str, Any]) -> tuple[int, ...]:
    """Shape of one row of the tokens: of one image, or of its crops."""
    variants = (manifest["variants"],) if "variants" in manifest else ()
    return *variants, *manifest["token_shape"]


class _RowFile:
    """An existing .npy file whose rows are read and written in place."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self.offset = file.tell()
        self.row_shape = shape[1:]
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.row_shape, dtype=np.int64))
        self.descriptor = os.open(path, os.O_RDWR)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        # Rows of an evaluation batch are neighbours: one call writes them all.
        for run in _runs(rows):
            data = np.ascontiguousarray(values[run], dtype=self.dtype).tobytes()
            written = os.pwrite(self.descriptor, data, self._place(rows[run][0]))
            if written != len(data):
                raise OSError(f"wrote {written} of {len(data)} bytes: the disk is full")

    def read(self, rows: np.ndarray) -> np.ndarray:
        parts = [
            np.frombuffer(
                os.pread(self.descriptor, len(rows[run]) * self.row_bytes, self._place(rows[run][0])), self.dtype
            )
            for run in _runs(rows)
        ]
        return np.concatenate(parts).reshape(len(rows), *self.row_shape)

    def close(self) -> None:
        os.fsync(self.descriptor)
        os.close(self.descriptor)

    def _place(self, row: int) -> int:
        return self.offset + int(row) * self.row_bytes


def _runs(rows: np.ndarray) -> list[slice]:
    """Slices of `rows` in which each entry is the one before plus one."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [slice(start, stop) for start, stop in zip([0, *breaks], [*breaks, len(rows)], strict=True)]


def _zeros(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape, version=(1, 0)).flush()


def _unfinished_manifest(folder: Path) -> dict[str, Any]:
    path = folder / UNFINISHED
    if not path.is_file():
        raise ValueError(f"{folder} has no token array in the making: call TokenWriter.create first")
    return json.loads(path.read_text())
