"""Latent arrays: images that a frozen continuous tokenizer has encoded once, in memory-mapped files.

A folder is one of `encoded_arrays.py`; its codes are `latents.npy`, of scaled latents as `ContinuousTokenizer.encode`
gives them. A row is the moments of an image's latents, `(2, D, *grid)`: means, then logarithms of variances; or one
sample of them, `(D, *grid)`. In front stands `variants` where there are several crops, such as an image and its mirror
image. The numbers are float16, or the bits of bfloat16 as uint16, which numpy has not. `manifest.json` also holds the
mean and deviation of every channel over the whole array.

`LatentWriter` makes such a folder, `LatentFolder` reads it, and `LatentArrays` is its DataModule.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from discrete_lit.core.images import ImageSize
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.data.array_manifest import ArrayKind
from discrete_lit.data.encoded_arrays import EncodedArrays, EncodedFolder, EncodedWriter
from discrete_lit.metrics.latent_statistics import LatentStatistics

LatentStorage = Literal["moments", "sample"]
"""The content of a row: moments of the latents, of which training draws anew in each epoch, or one sample of them."""
LatentPrecision = Literal["float16", "bfloat16"]
_BYTES_AT_ONCE = 2**26
"""The size of the rows that are measured at a time."""
# As torch computes with them, and as numpy stores them.
_TYPES: dict[str, tuple[torch.dtype, type[np.generic]]] = {
    "float16": (torch.float16, np.float16),
    "bfloat16": (torch.bfloat16, np.uint16),
}


class LatentWriter(EncodedWriter):
    """Writes one folder of latents, as `TokenWriter` one of tokens: `create` once, then a writer in every process.

    The folder has no `manifest.json`, and is refused by readers, until `finalise` has seen every row written once and
    has measured the channels.

    Raises:
        ValueError: `create` was not called for this folder.
    """

    kind = ArrayKind(
        format="discrete-lit-latents-1",
        word="latent array",
        content="latents",
        entries=("latent_shape", "storage", "dtype"),
    )

    @staticmethod
    def create(
        folder: str | os.PathLike[str],
        *,
        count: int,
        latent_shape: tuple[int, ...],
        storage: LatentStorage,
        dtype: LatentPrecision,
        image_size: ImageSize,
        num_classes: int,
        classes: list[str],
        tokenizer: str,
        source: str,
        variants: int | None = None,
        precision: str | None = None,
        captions: bool = False,
    ) -> None:
        """Lay out an empty array, in place of an unfinished one.

        Args:
            folder: made where it is not there.
            count: rows.
            latent_shape: `(D, *grid)` of one image's latents.
            storage: what a row holds.
            dtype: of the numbers; float16 keeps 11 bits of each, bfloat16 8 and the range of float32.
            image_size, num_classes, classes, source, variants, precision, captions: as for `TokenWriter.create`.
            tokenizer: content hash of the tokenizer (`ContinuousTokenizer.fingerprint()`).

        Raises:
            ValueError: the folder holds a finished array, there is nothing to write, or an unknown storage or dtype.
        """
        for name, given, known in (("storage", storage, ("moments", "sample")), ("dtype", dtype, tuple(_TYPES))):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        LatentWriter.lay_out(
            folder,
            _TYPES[dtype][1],
            count=count,
            row={"latent_shape": list(latent_shape), "storage": storage, "dtype": dtype},
            image_size=image_size,
            num_classes=num_classes,
            classes=classes,
            tokenizer=tokenizer,
            source=source,
            variants=variants,
            precision=precision,
            captions=captions,
        )

    @staticmethod
    def code_shape(manifest: Mapping[str, Any]) -> tuple[int, ...]:
        shape = tuple(int(side) for side in manifest["latent_shape"])
        return (2, *shape) if manifest["storage"] == "moments" else shape

    def stored(self, codes: Tensor) -> np.ndarray:
        dtype = self.manifest["dtype"]
        if not codes.is_floating_point():
            raise ValueError(
                f"latents are floating-point numbers, got {codes.dtype}: are these the ids of a Tokenizer?"
            )
        values = codes.detach().cpu().to(_TYPES[dtype][0])
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"latents up to {float(codes.abs().max()):.4g} are not finite numbers of {dtype}: scale them by the "
                "tokenizer's scale_factor, or store them in bfloat16, which has float32's range"
            )
        return as_stored(values)

    @classmethod
    def measured(cls, manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """The mean and deviation of every channel, of latents as they are stored and, of moments, as they are drawn."""
        codes = np.load(folder / "latents.npy", mmap_mode="r")
        statistics = LatentStatistics(manifest["latent_shape"][0])
        step = max(1, _BYTES_AT_ONCE // max(1, codes[0].nbytes))
        for first in range(0, len(codes), step):
            values = as_computed(codes[first : first + step], manifest["dtype"]).flatten(
                0, 1 if "variants" in manifest else 0
            )
            statistics.update(*(values.unbind(1) if manifest["storage"] == "moments" else (values,)))
        mean, deviation = statistics.compute()
        return {"latent_mean": mean.tolist(), "latent_std": deviation.tolist()}


def as_stored(values: Tensor) -> np.ndarray:
    """Numbers as numpy stores them: float16, or the bits of bfloat16 as uint16."""
    return values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()


def as_computed(stored: np.ndarray, dtype: LatentPrecision) -> Tensor:
    """Stored numbers in float32, which holds each of them."""
    if dtype == "bfloat16":
        # A float32 begins with the bits of its bfloat16.
        return torch.from_numpy((stored.astype(np.uint32) << 16).view(np.float32))
    return torch.from_numpy(stored.astype(np.float32))


class LatentFolder(EncodedFolder):
    """One folder of latents, opened and checked.

    Args:
        folder: as the `tokenize` command writes it with the checkpoint of a continuous tokenizer.
        seed: of the noise of latents that are stored by their moments.
        context: whether batches have the vectors of captions.

    Raises:
        ValueError: there is no finished latent array, or its files do not fit each other.
    """

    writer = LatentWriter

    def __init__(self, folder: str | os.PathLike[str], seed: int = 0, *, context: bool = False):
        super().__init__(folder, context=context)
        self.seed = seed

    def code_types(self) -> Sequence[type[np.generic]]:
        if self.manifest["dtype"] not in _TYPES or self.manifest["storage"] not in ("moments", "sample"):
            raise ValueError(
                f"the manifest of {self.folder} has storage {self.manifest['storage']!r} and dtype "
                f"{self.manifest['dtype']!r}; a latent array has moments or sample, and {' or '.join(_TYPES)}"
            )
        return [_TYPES[self.manifest["dtype"]][1]]

    def values(self, stored: np.ndarray, samples: np.ndarray, keys: Tensor) -> Tensor:
        values = as_computed(stored, self.manifest["dtype"])
        if self.manifest["storage"] == "moments":
            mean, logvar = values.unbind(1)
            noise = CounterRandom(self.seed, keys).normal(Purpose.LATENT_NOISE, mean[0].numel())
            values = mean + torch.exp(0.5 * logvar) * noise.reshape(mean.shape).to(mean.dtype)
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{self.code_file} holds numbers that are not finite in one of the rows {samples.tolist()}: make it "
                "anew with `discrete-lit tokenize`"
            )
        return values


class LatentArrays(EncodedArrays):
    """Batches of latents: `{"latents": float32 (B, D, *grid), "label": int64 (B,), "index": int64 (B,)}`.

    They are scaled, as `ContinuousTokenizer.encode` gives them. Of stored moments training draws a sample anew in each
    epoch, by noise that belongs to (seed, epoch, row) alone; evaluation draws one that belongs to (seed, row). The
    latents of images without labels make batches without `"label"`. Order, crops and `index` are those of
    `EncodedArrays`.

    Args:
        train: folder of the training latents; None where only the other split is used.
        validation: folder of the validation latents, made by the same tokenizer.
        batch_size: samples of a batch on each rank.
        num_workers: processes that load, and draw the noise.
        seed: decides the order, the crop and the noise.
        persistent_workers: keep the processes between epochs.

    Raises:
        ValueError: neither folder is given. Reading them raises what `LatentFolder` does, and where the two were made
            by different tokenizers or have different shapes.
    """

    def open_folder(self, folder: str) -> LatentFolder:
        return LatentFolder(folder, seed=self.seed, context=self.context)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """`(D, *grid)` of one image's latents."""
        return tuple(int(side) for side in self.manifest["latent_shape"])

    @property
    def latent_mean(self) -> list[float]:
        """The mean of each channel of the scaled latents of the first folder."""
        return list(self.manifest["latent_mean"])

    @property
    def latent_std(self) -> list[float]:
        """The deviation of each channel of the scaled latents of the first folder."""
        return list(self.manifest["latent_std"])
