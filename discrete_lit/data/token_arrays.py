"""Token arrays: images that a frozen tokenizer has encoded once, as memory-mapped files.

A folder holds one split: `tokens.npy` (uint16 or uint32, `(count, *token_shape)`, or `(count, variants, *token_shape)`
of several crops of each image), `labels.npy` (int64, `(count,)`), and `manifest.json`. Row i is sample i of the image
set that was encoded. `TokenWriter` makes such a folder.
"""

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from discrete_lit.data import keyed_random
from discrete_lit.data.bad_samples import BadSample
from discrete_lit.data.data_module import ResumableDataModule, Split
from discrete_lit.data.loaders import Batch, BatchSource
from discrete_lit.data.map_order import EvaluationOrder, OrderedSource, TrainingOrder
from discrete_lit.data.token_writer import FORMAT, MANIFEST, UNFINISHED, row_shape


class TokenFolder:
    """One folder of tokens, opened and checked.

    Args:
        folder: as the `tokenize` command writes it.

    Raises:
        ValueError: there is no finished token array, or its parts do not fit each other.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self._tokens: np.ndarray | None = None
        expected = (self.count, *row_shape(self.manifest))
        if self.tokens.shape != expected or self.tokens.dtype not in (np.uint16, np.uint32):
            raise ValueError(
                f"{self.folder / 'tokens.npy'} holds {self.tokens.dtype} {self.tokens.shape}; its manifest "
                f"says uint16 or uint32 {expected}"
            )
        self.labels = np.load(self.folder / "labels.npy")
        if self.labels.shape != (self.count,) or self.labels.dtype != np.int64:
            raise ValueError(
                f"{self.folder / 'labels.npy'} holds {self.labels.dtype} {self.labels.shape}; it must be "
                f"int64 {(self.count,)}"
            )
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(outside):
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
            self._tokens = np.load(self.folder / "tokens.npy", mmap_mode="r")
        assert self._tokens is not None
        return self._tokens

    def __getstate__(self) -> dict[str, Any]:
        # A memory map pickles as the whole array.
        return {**self.__dict__, "_tokens": None}

    def rows(self, samples: np.ndarray, variants: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `(B, *token_shape)` of the crops `variants (B,)`, by default the first, and labels `(B,)`; int64."""
        place = samples
        if "variants" in self.manifest:
            place = (samples, np.zeros_like(samples) if variants is None else variants)
        tokens = self.tokens[place].astype(np.int64)
        if tokens.size and tokens.max() >= self.vocab_size:
            raise ValueError(
                f"{self.folder / 'tokens.npy'} holds token {tokens.max()} in one of the rows {samples.tolist()}; its "
                f"vocabulary is 0..{self.vocab_size - 1}"
            )
        return torch.from_numpy(tokens), torch.from_numpy(self.labels[samples])


class TokenArrays(ResumableDataModule):
    """Batches of tokens: `{"tokens": int64 (B, *token_shape), "label": int64 (B,), "index": int64 (B,)}`.

    Training order depends on (seed, epoch) alone: a run may be resumed with other numbers of ranks and workers as
    long as `batch_size` times ranks stays. Of several crops of an image training draws one in each epoch, a function of
    (seed, epoch, row) alone; evaluation takes the first. In training `index` is the sample's place in the run,
    epoch * count + place in the epoch; in evaluation it is the row.

    Args:
        train: folder of the training tokens; None where only the other split is used.
        validation: folder of the validation tokens, made by the same tokenizer.
        batch_size: samples of a batch on each rank.
        num_workers: processes that load. Reading rows costs little: 0 is usually fastest.
        seed: of the order.
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
            batch_size,
            num_workers,
            seed,
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
    def image_size(self) -> int:
        """Side in pixels of the images that were encoded."""
        return int(self._manifest["image_size"])

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
        order = TrainingOrder(folder.count, self.batch_size, rank, world_size, self.seed)
        return _TrainingTokens(folder, order)

    def evaluation_source(self, split: Split, rank: int, world_size: int) -> BatchSource:
        folder = self.folders[split]
        return _EvaluationTokens(folder, EvaluationOrder(folder.count, self.batch_size, rank, world_size))


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
        draws = (keyed_random.uniforms(self.order.seed, epoch, f"crop of {sample}")[0] for sample in samples)
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


def _batch(tokens: torch.Tensor, labels: torch.Tensor, index: np.ndarray) -> Batch:
    return {"tokens": tokens, "label": labels, "index": torch.from_numpy(index)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / UNFINISHED).is_file():
            raise ValueError(
                f"the token array in {folder} is incomplete: `discrete-lit tokenize` was interrupted. Run it again."
            )
        raise ValueError(f"{folder} holds no token array (no {MANIFEST}): make one with `discrete-lit tokenize`")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}; a token array has {FORMAT!r}")
    return manifest
