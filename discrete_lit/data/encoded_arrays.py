"""Arrays of images that a frozen tokenizer has encoded once, as memory-mapped files: what tokens and latents share.

A folder holds one split: an array of codes (`tokens.npy` or `latents.npy`, `(count, *row)`, or `(count, variants,
*row)` of several crops of each image), `labels.npy` (int64, `(count,)`; -1 of images without labels, whose number of
classes is 0), and `manifest.json`, which says whose codes they are. Row i is sample i of the images that were encoded.
Where the images have captions, they are in a `caption_file.py` beside.

An `EncodedWriter` makes such a folder, from several processes, each sample in its own row. An `EncodedFolder` reads it,
and `EncodedArrays` is its DataModule. `token_arrays.py` and `latent_arrays.py` say what a row is.
"""

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from discrete_lit.core.bounded_reading import open_array, read_json
from discrete_lit.core.files import RowFile, atomic_write_text, content_sha256, publish, unwritten_batches
from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.random import augmentation_uniforms
from discrete_lit.data.array_manifest import MANIFEST, UNFINISHED_MANIFEST, ArrayKind, read_array_manifest
from discrete_lit.data.caption_features import CaptionFeatures
from discrete_lit.data.caption_file import CaptionFile, CaptionParts
from discrete_lit.data.captions import caption_batch
from discrete_lit.data.data_module import ResumableDataModule, Split
from discrete_lit.data.loaders import BadSample, Batch, BatchSource, EvaluationOrder, OrderedSource, TrainingOrder

_WRITTEN = "written.npy"
COUNTED_EVERY = 30.0
"""Seconds after which rows that were written are brought to the disk and counted: an interruption loses no more."""
_BYTES_AT_ONCE = 2**26


class EncodedWriter(ABC):
    """Writes one folder of codes. One process calls `create`; then every process, that one too, makes a writer.

    The folder has no `manifest.json`, and is refused by readers, until `finalise` has seen every row written once.

    Raises:
        ValueError: `create` was not called for this folder.
    """

    kind: ClassVar[ArrayKind]

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.manifest = self._unfinished_manifest(self.folder)
        self._codes = RowFile(self.folder / f"{self.kind.content}.npy")
        self._labels = RowFile(self.folder / "labels.npy")
        self._written = RowFile(self.folder / _WRITTEN)
        self._captions = CaptionParts(self.folder) if self.manifest.get("captions") else None
        self._uncounted: set[int] = set()
        self._counted = time.monotonic()

    @classmethod
    def lay_out(
        cls,
        folder: str | os.PathLike[str],
        codes: type[np.generic],
        *,
        count: int,
        row: Mapping[str, Any],
        image_size: ImageSize,
        num_classes: int,
        classes: list[str],
        tokenizer: str,
        source: str,
        variants: int | None,
        precision: str | None,
        captions: bool,
    ) -> None:
        """Lay out an empty array, in place of an unfinished one.

        Args:
            folder: made where it is not there.
            codes: the type of the numbers of the codes.
            count: rows.
            row: the entries of the manifest that say what a row is.
            image_size, num_classes, classes, tokenizer, source, variants, precision, captions: as in `create`.

        Raises:
            ValueError: the folder holds a finished array, or there is nothing to write.
        """
        path = Path(folder)
        if (path / MANIFEST).exists():
            raise ValueError(f"{path} already holds a finished {cls.kind.word}: choose another folder, or delete it")
        if count < 1:
            raise ValueError(f"count is {count}; a {cls.kind.word} has at least one row")
        path.mkdir(parents=True, exist_ok=True)
        (path / UNFINISHED_MANIFEST).unlink(missing_ok=True)
        manifest = {
            "format": cls.kind.format,
            "count": count,
            **row,
            "image_size": normal_size(image_size),
            "num_classes": num_classes,
            "classes": list(classes),
            "tokenizer": tokenizer,
            "source": source,
            **({} if variants is None else {"variants": variants}),
            **({} if precision is None else {"precision": precision}),
            **({"captions": True} if captions else {}),
        }
        CaptionParts.clear(path)
        RowFile.create(path / f"{cls.kind.content}.npy", codes, (count, *cls.row_shape(manifest)))
        RowFile.create(path / "labels.npy", np.int64, (count,))
        RowFile.create(path / _WRITTEN, np.uint8, (count,))
        atomic_write_text(path / UNFINISHED_MANIFEST, json.dumps(manifest, indent=2) + "\n")

    @staticmethod
    @abstractmethod
    def code_shape(manifest: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of the codes of one image, or of one of its crops, as a manifest says."""

    @classmethod
    def row_shape(cls, manifest: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of one row of the codes: one image's, or its crops'."""
        variants = (manifest["variants"],) if "variants" in manifest else ()
        return *variants, *cls.code_shape(manifest)

    @abstractmethod
    def stored(self, codes: Tensor) -> np.ndarray:
        """The codes `(B, *row)` as their file holds them.

        Raises:
            ValueError: some that no such array can hold.
        """

    def write(
        self,
        index: Tensor,
        codes: Tensor,
        labels: Tensor | None,
        *,
        captions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Write some rows.

        Args:
            index: int64 `(B,)`, the rows.
            codes: `(B, *row)`; `(B, variants, *row)` of several crops.
            labels: integers or bool `(B,)` in [0, num_classes); None where the images have none.
            captions: those of each image, one at least; None where the array was laid out without.

        Raises:
            ValueError: a shape, row, code, label or caption does not fit, or a row was written before.
        """
        rows = index.cpu().numpy()
        count, num_classes = (self.manifest[name] for name in ("count", "num_classes"))
        if (labels is None) != (num_classes == 0):
            raise ValueError(
                f"{self.folder} was laid out for {num_classes} classes, and the images "
                f"{'have no labels' if labels is None else 'have labels'}"
            )
        if (captions is None) != (self._captions is None) or (captions is not None and len(captions) != len(rows)):
            raise ValueError(
                f"{self.folder} was laid out {'without' if self._captions is None else 'with'} captions, and "
                f"{'none' if captions is None else len(captions)} were given for {len(rows)} rows"
            )
        if labels is None:
            labels = torch.full((len(rows),), -1)
        expected = (len(rows), *self.row_shape(self.manifest))
        if tuple(codes.shape) != expected or tuple(labels.shape) != (len(rows),):
            raise ValueError(
                f"got {self.kind.content} {tuple(codes.shape)} and labels {tuple(labels.shape)} for rows of {expected}"
            )
        if len(rows) == 0:
            return
        label_values = labels.cpu().numpy()
        if rows.min() < 0 or rows.max() >= count:
            raise ValueError(f"rows {rows.min()}..{rows.max()} are outside 0..{count - 1}")
        values = self.stored(codes)
        if num_classes and (label_values.min() < 0 or label_values.max() >= num_classes):
            raise ValueError(f"labels {label_values.min()}..{label_values.max()} are outside 0..{num_classes - 1}")
        again = rows[
            [mark > 0 or row in self._uncounted for row, mark in zip(rows, self._written.read(rows), strict=True)]
        ]
        if len(again) or len(np.unique(rows)) < len(rows):
            raise ValueError(
                f"rows were written twice in {self.folder}: {(again if len(again) else rows)[:5].tolist()}"
            )
        self._codes.write(rows, values)
        self._labels.write(rows, label_values)
        if self._captions is not None and captions is not None:
            self._captions.write(rows.tolist(), captions)
        self._uncounted.update(rows.tolist())
        if time.monotonic() - self._counted > COUNTED_EVERY:
            self._count()

    def _count(self) -> None:
        """Count rows as written once they are on the disk: after a power failure what is counted is there."""
        for file in (self._codes, self._labels, self._captions):
            if file is not None:
                file.sync()
        if self._uncounted:
            rows = np.array(sorted(self._uncounted))
            self._written.write(rows, np.ones(len(rows)))
            self._written.sync()
        self._uncounted, self._counted = set(), time.monotonic()

    def close(self) -> None:
        """Bring everything that was written to the disk."""
        self._count()
        for file in (self._codes, self._labels, self._written, self._captions):
            if file is not None:
                file.close()

    def unfinished(self, batches: np.ndarray, batch_size: int) -> np.ndarray:
        """Find the batches of which a row is not counted as written; called by one process while none writes them.

        Args:
            batches: int64, the numbers of batches; batch b holds the rows from b * batch_size on.
            batch_size: rows of every batch but the last.

        Returns:
            Those of `batches` that are to be written, again from their first row.
        """
        return unwritten_batches(self._written, batches, batch_size, count=self.manifest["count"])

    def rows_sha256(self, rows: range) -> str:
        """Hash codes and labels of some rows as they are in their files."""
        arrays = [np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in (self.kind.content, "labels")]
        step = max(1, _BYTES_AT_ONCE // max(1, arrays[0][0].nbytes))
        starts = range(rows.start, rows.stop, step)
        return content_sha256(
            array[start : min(start + step, rows.stop)].tobytes() for array in arrays for start in starts
        )

    def forget(self, rows: range) -> None:
        """Count some rows as not written."""
        self._written.write(np.arange(rows.start, rows.stop), np.zeros(len(rows)))

    @classmethod
    def finalise(cls, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Check that every row was written and make the array readable; called by one process after all have closed.

        Returns:
            The manifest.

        Raises:
            ValueError: rows are missing; the message counts them and names the first.
        """
        path = Path(folder)
        manifest = cls._unfinished_manifest(path)
        missing = np.flatnonzero(np.load(path / _WRITTEN) == 0)
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {manifest['count']} rows of {path} were never written, the first are "
                f"{missing[:5].tolist()}: images that could not be read, or a process that ended early. "
                "The array stays unfinished."
            )
        if manifest.get("captions"):
            CaptionParts.join(path, manifest["count"])
        found = cls.measured(manifest, path)
        if found:
            manifest |= found
            atomic_write_text(path / UNFINISHED_MANIFEST, json.dumps(manifest, indent=2) + "\n")
        publish(path / UNFINISHED_MANIFEST, path / MANIFEST)
        (path / _WRITTEN).unlink()
        return manifest

    @classmethod
    def measured(cls, manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Measure all codes together, once they are there, for the manifest: nothing by default."""
        return {}

    @classmethod
    def _unfinished_manifest(cls, folder: Path) -> dict[str, Any]:
        path = folder / UNFINISHED_MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} has no {cls.kind.word} in the making: call {cls.__name__}.create first")
        manifest = read_json(path)
        if (reason := cls.kind.refused(manifest, path)) is not None:
            raise ValueError(reason)
        return manifest


class EncodedFolder(ABC):
    """One folder of codes, opened and checked.

    Args:
        folder: as the `tokenize` command writes it.
        context: whether batches have the vectors of captions, as `encode_captions` made them.

    Raises:
        ValueError: there is no finished array of this kind, or its files do not fit each other.
    """

    writer: ClassVar[type[EncodedWriter]]
    """The writer of these folders."""

    def __init__(self, folder: str | os.PathLike[str], *, context: bool = False):
        self.folder = Path(folder).expanduser()
        self.manifest = self._read_manifest()
        self._codes: np.ndarray | None = None
        expected, types = (self.count, *self.writer.row_shape(self.manifest)), self.code_types()
        if self.codes.shape != expected or self.codes.dtype not in types:
            raise ValueError(
                f"{self.code_file} holds {self.codes.dtype} {self.codes.shape}; its manifest "
                f"says {' or '.join(kind.__name__ for kind in types)} {expected}"
            )
        self.labels = self._opened(self.folder / "labels.npy")
        if self.labels.shape != (self.count,) or self.labels.dtype.kind not in "iub":
            raise ValueError(
                f"{self.folder / 'labels.npy'} holds {self.labels.dtype} {self.labels.shape}; it must be "
                f"int64 {(self.count,)}"
            )
        self.captions = CaptionFile(self.folder, self.count) if self.manifest.get("captions") else None
        """The captions of each row; None where the images had none."""
        self.features = CaptionFeatures(self.folder, self.count) if context else None
        """The vectors of the captions; None where they are not asked for."""
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        self.labels = self.labels.astype(np.int64)
        if len(outside) and self.num_classes:
            raise ValueError(
                f"row {outside[0]} of {self.folder / 'labels.npy'} has label {self.labels[outside[0]]}; labels must be "
                f"in 0..{self.num_classes - 1}"
            )

    count = property(lambda self: int(self.manifest["count"]))
    num_classes = property(lambda self: int(self.manifest["num_classes"]))
    variants = property(lambda self: int(self.manifest.get("variants", 1)))

    @abstractmethod
    def code_types(self) -> Sequence[type[np.generic]]:
        """The types that the file of codes may have, as the manifest says."""

    @abstractmethod
    def values(self, stored: np.ndarray, samples: np.ndarray, keys: Tensor) -> Tensor:
        """The codes of a batch as batches hold them.

        Args:
            stored: `(B, *row)`, as their file holds them.
            samples: int64 `(B,)`, their rows, for messages.
            keys: int64 `(B,)`, what identifies each sample in its epoch; its noise belongs to that.
        """

    @property
    def code_file(self) -> Path:
        """The file of the codes."""
        return self.folder / f"{self.writer.kind.content}.npy"

    @property
    def codes(self) -> np.ndarray:
        """The memory-mapped codes, opened once in every process."""
        if self._codes is None:
            self._codes = self._opened(self.code_file, mapped=True)
        assert self._codes is not None
        return self._codes

    def __getstate__(self) -> dict[str, Any]:
        # A memory map pickles as the whole array.
        return {**self.__dict__, "_codes": None}

    def batch(
        self,
        samples: np.ndarray,
        index: np.ndarray,
        *,
        keys: np.ndarray,
        variants: np.ndarray | None,
        draws: np.ndarray | None,
    ) -> Batch:
        """Read codes, labels and captions of the rows `samples (B,)`.

        The batch has `"index"`, and no `"label"` or `"caption"` where the images have none.

        Args:
            samples: rows.
            index: int64 `(B,)`, the `"index"` of the batch.
            keys: int64 `(B,)`, what identifies each sample in its epoch.
            variants: `(B,)`, the crop of each; the first by default.
            draws: `(B,)` in [0, 1), which take one of several captions; the first by default.
        """
        rows = samples
        if "variants" in self.manifest:
            rows = (samples, np.zeros_like(samples) if variants is None else variants)
        stored = self.codes[rows]
        self._check_length()
        codes = self.values(stored, samples, torch.from_numpy(keys))
        labels = {"label": torch.from_numpy(self.labels[samples])} if self.num_classes else {}
        return {
            self.writer.kind.content: codes,
            **labels,
            **self._caption_entries(samples, draws),
            "index": torch.from_numpy(index),
        }

    def _check_length(self) -> None:
        """Notice a file that was cut short since it was opened: of what is missing a memory map reads zeros."""
        try:
            size = self.code_file.stat().st_size
        except OSError:  # deleted: what is mapped stays readable
            return
        if size < self.codes.nbytes:
            raise ValueError(f"{self.code_file} was cut short while it was read, it has {size:,} bytes left")

    def _caption_entries(self, samples: np.ndarray, draws: np.ndarray | None) -> Batch:
        if self.captions is None:
            return {}
        rows = samples.tolist()
        captions = [self.captions[row] for row in rows]
        if draws is None:
            chosen, entries = [0] * len(rows), caption_batch(captions, None)
        else:
            chosen = [int(draw * len(each)) for each, draw in zip(captions, draws, strict=True)]
            entries = caption_batch(captions, [each[number] for each, number in zip(captions, chosen, strict=True)])
        return entries if self.features is None else {**entries, **self.features.batch(rows, chosen)}

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        manifest = read_array_manifest(self.folder, self.writer.kind.word)
        if (reason := self.writer.kind.refused(manifest, path)) is not None:
            raise ValueError(reason)
        return manifest

    def _opened(self, path: Path, *, mapped: bool = False) -> np.ndarray:
        """Open an array of a finished folder."""
        try:
            return open_array(path, mapped=mapped)
        except (OSError, ValueError) as error:
            why = f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error)
            raise ValueError(
                f"{why}: the {self.writer.kind.word} beside its manifest was copied or written in part; copy the "
                "folder again"
            ) from error


class EncodedArrays(ResumableDataModule):
    """Batches of codes that a tokenizer made once: the DataModule of tokens and of latents.

    Training order depends on (seed, epoch) alone: a run may be resumed with other numbers of ranks and workers, other
    batch sizes and accumulation, as long as the global batch stays. Of several crops of an image, and of several
    captions, training draws one in each epoch, a function of (seed, epoch, row) alone; evaluation takes the first.
    Captions are the `"caption"` of batches, and all of them `"captions"` in evaluation. In training `index` is the
    sample's position in the run, epoch * count + position in the epoch; in evaluation it is the row.

    Args:
        train: folder of the training codes; None where only the other split is used.
        validation: folder of the validation codes, made by the same tokenizer.
        batch_size: samples of a batch on each rank.
        num_workers: processes that load. Reading rows costs little: 0 is usually fastest.
        seed: decides the order, the crop and the caption.
        persistent_workers: keep the processes between epochs.
        context: give the vectors of captions too, as `"context"` and `"context_mask"`; `discrete-lit encode_captions`
            makes them.

    Raises:
        ValueError: neither folder is given. Reading them raises what `EncodedFolder` does, and where the two were made
            by different tokenizers or have different shapes.
    """

    def __init__(
        self,
        train: str | None,
        validation: str | None = None,
        *,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        persistent_workers: bool = False,
        context: bool = False,
    ):
        super().__init__(
            train,
            validation,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            max_bad_fraction=0.0,
            persistent_workers=persistent_workers,
        )
        self.context = context

    @abstractmethod
    def open_folder(self, folder: str) -> EncodedFolder:
        """Open and check one folder."""

    @cached_property
    def folders(self) -> dict[Split, Any]:
        """The opened folders, by split."""
        folders: dict[Split, EncodedFolder] = {
            split: self.open_folder(path) for split, path in self.locations.items() if path is not None
        }
        first = next(iter(folders.values()))
        for folder in folders.values():
            for name in ("tokenizer", *first.writer.kind.entries, "image_size", "num_classes"):
                if folder.manifest[name] != first.manifest[name]:
                    raise ValueError(
                        f"{first.folder} and {folder.folder} do not belong together: {name} is "
                        f"{first.manifest[name]!r} in "
                        f"the one and {folder.manifest[name]!r} in the other"
                    )
        return folders

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the first folder."""
        return next(iter(self.folders.values())).manifest

    @property
    def content(self) -> str:
        """The name of the codes in batches: tokens or latents."""
        return next(iter(self.folders.values())).writer.kind.content

    @property
    def image_size(self) -> ImageSize:
        """Size in pixels of the images that were encoded: the side of a square, or (H, W)."""
        return normal_size(self.manifest["image_size"])

    @property
    def num_classes(self) -> int:
        """Labels are in 0..num_classes-1."""
        return int(self.manifest["num_classes"])

    @property
    def classes(self) -> list[str]:
        """Name of each label."""
        return list(self.manifest["classes"])

    @property
    def tokenizer_fingerprint(self) -> str:
        """Content hash of the tokenizer that made the codes."""
        return str(self.manifest["tokenizer"])

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise `ValueError` unless `fingerprint` is of the tokenizer that made the codes."""
        if fingerprint != self.tokenizer_fingerprint:
            folder = next(iter(self.folders.values()))
            content = folder.writer.kind.content
            raise ValueError(
                f"the {content} in {folder.folder} were made by the tokenizer {self.tokenizer_fingerprint}, not by "
                f"{fingerprint}: use that tokenizer's checkpoint, or make the {content} anew with "
                "`discrete-lit tokenize`"
            )

    def check_text_encoder(self, fingerprint: str) -> None:
        """Raise `ValueError` unless `fingerprint` is of the encoder that made the vectors of captions, if there are."""
        for folder in self.folders.values():
            features = folder.features
            if features is not None and features.encoder != fingerprint:
                raise ValueError(
                    f"the vectors of captions in {folder.folder} were made by the text encoder {features.encoder}, not "
                    f"by {fingerprint}: use that encoder, or make them anew with `discrete-lit encode_captions`"
                )

    def training_source(self, rank: int, world_size: int) -> BatchSource:
        folder = self.folders["train"]
        order = TrainingOrder(folder.count, self.batch_size, rank=rank, world_size=world_size, seed=self.seed)
        return _TrainingRows(folder, order)

    def evaluation_source(self, split: Split, rank: int, world_size: int) -> BatchSource:
        folder = self.folders[split]
        order = EvaluationOrder(folder.count, self.batch_size, rank=rank, world_size=world_size)
        return _EvaluationRows(folder, order)


class _TrainingRows(OrderedSource):
    def __init__(self, folder: EncodedFolder, order: TrainingOrder):
        super().__init__(order)
        self.folder = folder
        self.order = order

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        positions = self.order.positions(number)
        samples = self.order.permutation(epoch)[positions]
        first = epoch * self.order.count
        variants, draws = self._variants(epoch, samples), None
        if self.folder.captions is not None:
            draws = self._draws(epoch, "caption", samples)
        keys = samples + first
        return self.folder.batch(samples, positions + first, keys=keys, variants=variants, draws=draws), []

    def _variants(self, epoch: int, samples: np.ndarray) -> np.ndarray | None:
        """The crop of each sample in this epoch."""
        count = self.folder.variants
        if count == 1:
            return None
        return (self._draws(epoch, "crop", samples) * count).astype(np.int64)

    def _draws(self, epoch: int, purpose: str, samples: np.ndarray) -> np.ndarray:
        """A number in [0, 1) for each sample in this epoch."""
        seed = self.order.seed
        return np.array([augmentation_uniforms(seed, epoch, f"{purpose} of {sample}")[0] for sample in samples])

    def identity(self) -> Mapping[str, int | str]:
        several = {"variants": self.folder.variants} if self.folder.variants > 1 else {}
        return {**super().identity(), "tokenizer": str(self.folder.manifest["tokenizer"]), **several}


class _EvaluationRows(OrderedSource):
    def __init__(self, folder: EncodedFolder, order: EvaluationOrder):
        super().__init__(order)
        self.folder = folder
        self.order = order

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        samples = self.order.samples_of(number)
        return self.folder.batch(samples, samples, keys=samples, variants=None, draws=None), []
