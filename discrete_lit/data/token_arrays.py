"""Token arrays: images that a frozen tokenizer has encoded once, as memory-mapped files.

A folder holds one split: `tokens.npy` (uint16, uint32 or int64, the narrowest that holds the vocabulary, `(count,
*token_shape)`, or `(count, variants, *token_shape)` of several crops of each image), `labels.npy` (int64, `(count,)`;
-1 of images without labels, whose number of classes is 0), and `manifest.json`. Row i is sample i of the image set that
was encoded.

`TokenWriter` makes such a folder, from several processes, each sample in its own row. `TokenFolder` reads it, and
`TokenArrays` is its DataModule.
"""

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from discrete_lit.core.files import RowFile, atomic_write_text, publish
from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.random import augmentation_uniforms
from discrete_lit.data.data_module import ResumableDataModule, Split
from discrete_lit.data.loaders import BadSample, Batch, BatchSource, EvaluationOrder, OrderedSource, TrainingOrder

FORMAT = "discrete-lit-tokens-1"
MANIFEST = "manifest.json"
_UNFINISHED = "manifest.unfinished.json"
_WRITTEN = "written.npy"
# The types of ids, by the largest vocabulary of each.
_TOKEN_TYPES: dict[int, type[np.integer[Any]]] = {2**16: np.uint16, 2**32: np.uint32, 2**63: np.int64}
_ENTRIES = ("count", "token_shape", "vocab_size", "image_size", "num_classes", "classes", "tokenizer")


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
        self._tokens = RowFile(self.folder / "tokens.npy")
        self._labels = RowFile(self.folder / "labels.npy")
        self._written = RowFile(self.folder / _WRITTEN)

    @staticmethod
    def create(
        folder: str | os.PathLike[str],
        *,
        count: int,
        token_shape: tuple[int, ...],
        vocab_size: int,
        image_size: ImageSize,
        num_classes: int,
        classes: list[str],
        tokenizer: str,
        source: str,
        variants: int | None = None,
        precision: str | None = None,
    ) -> None:
        """Lay out an empty array, in place of an unfinished one.

        Args:
            folder: made where it is not there.
            count: rows.
            token_shape: shape of one image's tokens.
            vocab_size: tokens are in 0..vocab_size-1, at most 2^63; up to 2^16 they take two bytes, up to 2^32 four.
            image_size: of the images that are encoded, in pixels; of text, characters.
            num_classes: labels are in 0..num_classes-1; 0 where the images have none.
            classes: name of each label.
            tokenizer: content hash of the tokenizer (`Tokenizer.fingerprint()`).
            source: where the images come from.
            variants: crops of each image, the second dimension of the tokens; by default one, without a dimension.
            precision: that the tokenizer computed in, as Lightning calls it; for the record.

        Raises:
            ValueError: the folder holds a finished array, there is nothing to write, or ids that no integer holds.
        """
        path = Path(folder)
        if (path / MANIFEST).exists():
            raise ValueError(f"{path} already holds a finished token array: choose another folder, or delete it")
        if count < 1:
            raise ValueError(f"count is {count}; a token array has at least one row")
        token_type = _narrowest_type(vocab_size)
        path.mkdir(parents=True, exist_ok=True)
        (path / _UNFINISHED).unlink(missing_ok=True)
        manifest = {
            "format": FORMAT,
            "count": count,
            "token_shape": list(token_shape),
            "vocab_size": vocab_size,
            "image_size": normal_size(image_size),
            "num_classes": num_classes,
            "classes": list(classes),
            "tokenizer": tokenizer,
            "source": source,
            **({} if variants is None else {"variants": variants}),
            **({} if precision is None else {"precision": precision}),
        }
        RowFile.create(path / "tokens.npy", token_type, (count, *_row_shape(manifest)))
        RowFile.create(path / "labels.npy", np.int64, (count,))
        RowFile.create(path / _WRITTEN, np.uint8, (count,))
        atomic_write_text(path / _UNFINISHED, json.dumps(manifest, indent=2) + "\n")

    def write(self, index: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Write some rows.

        Args:
            index: int64 `(B,)`, the rows.
            tokens: integers `(B, *token_shape)` in [0, vocab_size); `(B, variants, *token_shape)` of several crops.
            labels: integers or bool `(B,)` in [0, num_classes); None where the images have none.

        Raises:
            ValueError: a shape, row, token or label does not fit, or a row was written before.
        """
        rows = index.cpu().numpy()
        count, vocab_size, num_classes = (self.manifest[name] for name in ("count", "vocab_size", "num_classes"))
        if (labels is None) != (num_classes == 0):
            raise ValueError(
                f"{self.folder} was laid out for {num_classes} classes, and the images "
                f"{'have no labels' if labels is None else 'have labels'}"
            )
        if labels is None:
            labels = torch.full((len(rows),), -1)
        expected = (len(rows), *_row_shape(self.manifest))
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
        if num_classes and (label_values.min() < 0 or label_values.max() >= num_classes):
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
        publish(path / _UNFINISHED, path / MANIFEST)
        (path / _WRITTEN).unlink()
        return manifest


class TokenFolder:
    """One folder of tokens, opened and checked.

    Args:
        folder: as the `tokenize` command writes it.

    Raises:
        ValueError: there is no finished token array, or its files do not fit each other.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).expanduser()
        self.manifest = _read_manifest(self.folder)
        self._tokens: np.ndarray | None = None
        expected = (self.count, *_row_shape(self.manifest))
        # Ids of 2^32 and more were cut to uint32 once: such an array is refused.
        wide = self.vocab_size > 2**32
        types = [kind for most, kind in _TOKEN_TYPES.items() if self.vocab_size <= most and (kind is np.int64) == wide]
        if self.tokens.shape != expected or self.tokens.dtype not in types:
            raise ValueError(
                f"{self.folder / 'tokens.npy'} holds {self.tokens.dtype} {self.tokens.shape}; its manifest "
                f"says {' or '.join(kind.__name__ for kind in types)} {expected}"
            )
        self.labels = _opened(self.folder / "labels.npy")
        if self.labels.shape != (self.count,) or self.labels.dtype.kind not in "iub":
            raise ValueError(
                f"{self.folder / 'labels.npy'} holds {self.labels.dtype} {self.labels.shape}; it must be "
                f"int64 {(self.count,)}"
            )
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        self.labels = self.labels.astype(np.int64)
        if len(outside) and self.num_classes:
            raise ValueError(
                f"row {outside[0]} of {self.folder / 'labels.npy'} has label {self.labels[outside[0]]}; labels must be "
                f"in 0..{self.num_classes - 1}"
            )

    count = property(lambda self: int(self.manifest["count"]))
    token_shape = property(lambda self: tuple(int(side) for side in self.manifest["token_shape"]))
    vocab_size = property(lambda self: int(self.manifest["vocab_size"]))
    num_classes = property(lambda self: int(self.manifest["num_classes"]))
    variants = property(lambda self: int(self.manifest.get("variants", 1)))

    @property
    def tokens(self) -> np.ndarray:
        """The memory-mapped tokens, opened once in every process."""
        if self._tokens is None:
            self._tokens = _opened(self.folder / "tokens.npy", mmap_mode="r")
        assert self._tokens is not None
        return self._tokens

    def __getstate__(self) -> dict[str, Any]:
        # A memory map pickles as the whole array.
        return {**self.__dict__, "_tokens": None}

    def rows(self, samples: np.ndarray, variants: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read tokens `(B, *token_shape)` of the crops `variants (B,)`, or of the first, and labels `(B,)`; int64.

        The labels are None where the images have none.
        """
        index = samples
        if "variants" in self.manifest:
            index = (samples, np.zeros_like(samples) if variants is None else variants)
        tokens = self.tokens[index].astype(np.int64)
        if tokens.size and not (0 <= tokens.min() and tokens.max() < self.vocab_size):
            outside = tokens.max() if tokens.max() >= self.vocab_size else tokens.min()
            raise ValueError(
                f"{self.folder / 'tokens.npy'} holds token {outside} in one of the rows {samples.tolist()}; its "
                f"vocabulary is 0..{self.vocab_size - 1}"
            )
        return torch.from_numpy(tokens), torch.from_numpy(self.labels[samples]) if self.num_classes else None


class TokenArrays(ResumableDataModule):
    """Batches of tokens: `{"tokens": int64 (B, *token_shape), "label": int64 (B,), "index": int64 (B,)}`.

    The tokens of images without labels make batches without `"label"`.

    Training order depends on (seed, epoch) alone: a run may be resumed with other numbers of ranks and workers as
    long as `batch_size` times ranks stays. Of several crops of an image training draws one in each epoch, a function of
    (seed, epoch, row) alone; evaluation takes the first. In training `index` is the sample's position in the run,
    epoch * count + position in the epoch; in evaluation it is the row.

    Args:
        train: folder of the training tokens; None where only the other split is used.
        validation: folder of the validation tokens, made by the same tokenizer.
        batch_size: samples of a batch on each rank.
        num_workers: processes that load. Reading rows costs little: 0 is usually fastest.
        seed: decides the order and the crop.
        persistent_workers: keep the processes between epochs.

    Raises:
        ValueError: neither folder is given. Reading them raises what `TokenFolder` does, and where the two were made by
            different tokenizers or have different shapes.
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

    @cached_property
    def folders(self) -> dict[Split, TokenFolder]:
        """The opened folders, by split."""
        folders: dict[Split, TokenFolder] = {
            split: TokenFolder(path) for split, path in self.locations.items() if path is not None
        }
        first = next(iter(folders.values()))
        for folder in folders.values():
            for name in ("tokenizer", "token_shape", "vocab_size", "image_size", "num_classes"):
                if folder.manifest[name] != first.manifest[name]:
                    raise ValueError(
                        f"{first.folder} and {folder.folder} do not belong together: {name} is "
                        f"{first.manifest[name]!r} in "
                        f"the one and {folder.manifest[name]!r} in the other"
                    )
        return folders

    @property
    def _manifest(self) -> dict[str, Any]:
        return next(iter(self.folders.values())).manifest

    @property
    def vocab_size(self) -> int:
        """K: tokens are in 0..K-1."""
        return int(self._manifest["vocab_size"])

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of one image's tokens."""
        return tuple(int(side) for side in self._manifest["token_shape"])

    @property
    def image_size(self) -> ImageSize:
        """Size in pixels of the images that were encoded: the side of a square, or (H, W)."""
        return normal_size(self._manifest["image_size"])

    @property
    def num_classes(self) -> int:
        """Labels are in 0..num_classes-1."""
        return int(self._manifest["num_classes"])

    @property
    def classes(self) -> list[str]:
        """Name of each label."""
        return list(self._manifest["classes"])

    @property
    def tokenizer_fingerprint(self) -> str:
        """Content hash of the tokenizer that made the tokens."""
        return str(self._manifest["tokenizer"])

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise `ValueError` unless `fingerprint` is of the tokenizer that made the tokens."""
        if fingerprint != self.tokenizer_fingerprint:
            folder = next(iter(self.folders.values())).folder
            raise ValueError(
                f"the tokens in {folder} were made by the tokenizer {self.tokenizer_fingerprint}, not by "
                f"{fingerprint}: use that tokenizer's checkpoint, or make the tokens anew with `discrete-lit tokenize`"
            )

    def training_source(self, rank: int, world_size: int) -> BatchSource:
        folder = self.folders["train"]
        order = TrainingOrder(folder.count, self.batch_size, rank=rank, world_size=world_size, seed=self.seed)
        return _TrainingTokens(folder, order)

    def evaluation_source(self, split: Split, rank: int, world_size: int) -> BatchSource:
        folder = self.folders[split]
        order = EvaluationOrder(folder.count, self.batch_size, rank=rank, world_size=world_size)
        return _EvaluationTokens(folder, order)


class _TrainingTokens(OrderedSource):
    def __init__(self, folder: TokenFolder, order: TrainingOrder):
        super().__init__(order)
        self.folder = folder
        self.order = order

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        positions = self.order.positions(number)
        samples = self.order.permutation(epoch)[positions]
        tokens, labels = self.folder.rows(samples, self._variants(epoch, samples))
        return _batch(tokens, labels, positions + epoch * self.order.count), []

    def _variants(self, epoch: int, samples: np.ndarray) -> np.ndarray | None:
        """The crop of each sample in this epoch."""
        count = self.folder.variants
        if count == 1:
            return None
        draws = (augmentation_uniforms(self.order.seed, epoch, f"crop of {sample}")[0] for sample in samples)
        return np.array([int(draw * count) for draw in draws])

    def identity(self) -> Mapping[str, int | str]:
        several = {"variants": self.folder.variants} if self.folder.variants > 1 else {}
        return {**super().identity(), "tokenizer": str(self.folder.manifest["tokenizer"]), **several}


class _EvaluationTokens(OrderedSource):
    def __init__(self, folder: TokenFolder, order: EvaluationOrder):
        super().__init__(order)
        self.folder = folder
        self.order = order

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        samples = self.order.samples_of(number)
        return _batch(*self.folder.rows(samples), samples), []


def _batch(tokens: torch.Tensor, labels: torch.Tensor | None, index: np.ndarray) -> Batch:
    return {"tokens": tokens, **({} if labels is None else {"label": labels}), "index": torch.from_numpy(index)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / _UNFINISHED).is_file():
            raise ValueError(
                f"the token array in {folder} is incomplete: `discrete-lit tokenize` was interrupted. Run it again."
            )
        raise ValueError(f"{folder} holds no token array (no {MANIFEST}): make one with `discrete-lit tokenize`")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ValueError(f"{path} has format {found!r}; a token array has {FORMAT!r}")
    if missing := [name for name in _ENTRIES if name not in manifest]:
        raise ValueError(f"{path} has no {missing[0]!r}: it is not whole, copy the folder again")
    return manifest


def _narrowest_type(vocab_size: int) -> type[np.integer[Any]]:
    """The narrowest type of `tokens.npy` for ids in 0..vocab_size-1.

    Raises:
        ValueError: there is none.
    """
    for most, kind in _TOKEN_TYPES.items():
        if vocab_size <= most:
            return kind
    raise ValueError(f"vocab_size={vocab_size}: ids of 2^63 and more fit into no int64")


def _row_shape(manifest: dict[str, Any]) -> tuple[int, ...]:
    """The shape of one row of the tokens: one image's, or its crops'."""
    variants = (manifest["variants"],) if "variants" in manifest else ()
    return *variants, *manifest["token_shape"]


def _opened(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Open an array of a finished folder."""
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"is not a whole .npy file ({error})"
        raise ValueError(
            f"{path} {why}: the token array beside its manifest was copied or written in part; copy the folder again"
        ) from error


def _unfinished_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _UNFINISHED
    if not path.is_file():
        raise ValueError(f"{folder} has no token array in the making: call TokenWriter.create first")
    return json.loads(path.read_text())
