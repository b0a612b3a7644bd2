"""Token arrays: images that a frozen tokenizer has encoded once as ids, in memory-mapped files.

A folder is one of `encoded_arrays.py`; its codes are `tokens.npy`: uint16, uint32 or int64, the narrowest that holds
the vocabulary, `(count, *token_shape)`, or `(count, variants, *token_shape)` of several crops of each image.

`TokenWriter` makes such a folder, `TokenFolder` reads it, and `TokenArrays` is its DataModule.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete_lit.core.images import ImageSize
from discrete_lit.data.array_manifest import ArrayKind
from discrete_lit.data.encoded_arrays import EncodedArrays, EncodedFolder, EncodedWriter

# The types of ids, by the largest vocabulary of each.
_TOKEN_TYPES: dict[int, type[np.integer[Any]]] = {2**16: np.uint16, 2**32: np.uint32, 2**63: np.int64}


class TokenWriter(EncodedWriter):
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

    kind = ArrayKind(
        format="discrete-lit-tokens-1", word="token array", content="tokens", entries=("token_shape", "vocab_size")
    )

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
        captions: bool = False,
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
            captions: whether each row has captions, see `EncodedWriter.write`.

        Raises:
            ValueError: the folder holds a finished array, there is nothing to write, or ids that no integer holds.
        """
        TokenWriter.lay_out(
            folder,
            _narrowest_type(vocab_size),
            count=count,
            row={"token_shape": list(token_shape), "vocab_size": vocab_size},
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
        return tuple(int(side) for side in manifest["token_shape"])

    def stored(self, codes: Tensor) -> np.ndarray:
        if codes.is_floating_point():
            raise ValueError(f"tokens are integers, got {codes.dtype}: are these the latents of a ContinuousTokenizer?")
        values, vocab_size = codes.cpu().numpy(), self.manifest["vocab_size"]
        if values.min() < 0 or values.max() >= vocab_size:
            raise ValueError(f"tokens {values.min()}..{values.max()} are outside 0..{vocab_size - 1}")
        return values


class TokenFolder(EncodedFolder):
    """One folder of tokens, opened and checked.

    Args:
        folder: as the `tokenize` command writes it.

    Raises:
        ValueError: there is no finished token array, or its files do not fit each other.
    """

    writer = TokenWriter
    vocab_size = property(lambda self: int(self.manifest["vocab_size"]))

    def code_types(self) -> Sequence[type[np.generic]]:
        # Ids of 2^32 and more were cut to uint32 once: such an array is refused.
        wide = self.vocab_size > 2**32
        return [kind for most, kind in _TOKEN_TYPES.items() if self.vocab_size <= most and (kind is np.int64) == wide]

    def values(self, stored: np.ndarray, samples: np.ndarray, keys: Tensor) -> Tensor:
        tokens = stored.astype(np.int64)
        if tokens.size and not (0 <= tokens.min() and tokens.max() < self.vocab_size):
            outside = tokens.max() if tokens.max() >= self.vocab_size else tokens.min()
            raise ValueError(
                f"{self.code_file} holds token {outside} in one of the rows {samples.tolist()}; its "
                f"vocabulary is 0..{self.vocab_size - 1}"
            )
        return torch.from_numpy(tokens)


class TokenArrays(EncodedArrays):
    """Batches of tokens: `{"tokens": int64 (B, *token_shape), "label": int64 (B,), "index": int64 (B,)}`.

    The tokens of images without labels make batches without `"label"`; those of images with captions have them as
    `"caption": list[str]`. Order, crops and `index` are those of
    `EncodedArrays`.

    Args:
        train: folder of the training tokens; None where only the other split is used.
        validation: folder of the validation tokens, made by the same tokenizer.
        batch_size: samples of a batch on each rank.
        num_workers: processes that load. Reading rows costs little: 0 is usually fastest.
        seed: decides the order, the crop and the caption.
        persistent_workers: keep the processes between epochs.
        context: give the vectors of captions too, see `EncodedArrays`.

    Raises:
        ValueError: neither folder is given. Reading them raises what `TokenFolder` does, and where the two were made by
            different tokenizers or have different shapes.
    """

    def open_folder(self, folder: str) -> TokenFolder:
        return TokenFolder(folder, context=self.context)

    @property
    def vocab_size(self) -> int:
        """K: tokens are in 0..K-1."""
        return int(self.manifest["vocab_size"])

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of one image's tokens."""
        return TokenWriter.code_shape(self.manifest)


def _narrowest_type(vocab_size: int) -> type[np.integer[Any]]:
    """The narrowest type of `tokens.npy` for ids in 0..vocab_size-1.

    Raises:
        ValueError: there is none.
    """
    for most, kind in _TOKEN_TYPES.items():
        if vocab_size <= most:
            return kind
    raise ValueError(f"vocab_size={vocab_size}: ids of 2^63 and more fit into no int64")
