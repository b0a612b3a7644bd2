"""Tokens that `discrete-lit sample` keeps: the first frames of a clip to be continued, the rows of a picture."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from discrete_lit.data.token_arrays import TokenFolder
from discrete_lit.generators import Generator


class KnownTokens:
    """Give each sample the tokens that it keeps, of a row of a token array; the others are to be drawn.

    Sample i belongs to row i of the array, which begins again after its last.

    Args:
        folder: as `discrete-lit tokenize` writes it, by the generator's tokenizer.
        positions: which positions of the first axis of a row's tokens are kept: frames of a clip, rows of an image.
        generator: draws the samples.
        fingerprint: of the generator's tokenizer.

    Raises:
        ValueError: a generator of anything but ids, an array by another tokenizer or of another shape, or positions
            that are not there, or are all of them.
    """

    def __init__(self, folder: str, positions: Sequence[int], *, generator: object, fingerprint: str) -> None:
        if not isinstance(generator, Generator):
            raise ValueError(f"known tokens are for generators of ids, and this one is a {type(generator).__name__}")
        self.folder = TokenFolder(folder)
        shape = tuple(self.folder.manifest["token_shape"])
        if self.folder.manifest["tokenizer"] != fingerprint:
            raise ValueError(
                f"the tokens in known={folder!r} were made by the tokenizer {self.folder.manifest['tokenizer']}, and "
                f"this generator's is {fingerprint}: make them by `discrete-lit tokenize` with that one"
            )
        if shape != tuple(generator.token_shape):
            raise ValueError(
                f"the tokens in known={folder!r} are {list(shape)}, and this generator draws "
                f"{list(generator.token_shape)}"
            )
        given = sorted(set(positions))
        if not given or given[0] < 0 or given[-1] >= shape[0] or len(given) == shape[0]:
            raise ValueError(
                f"known_positions={list(positions)} must be some, and not all, of the {shape[0]} positions 0 to "
                f"{shape[0] - 1} along the first axis of the tokens {list(shape)}"
            )
        self.positions = given
        self._masked = torch.ones(shape, dtype=torch.bool)
        self._masked[given] = False

    @property
    def labels(self) -> list[int]:
        """The label of each row; [0] where they have none."""
        return self.folder.labels.tolist() if self.folder.num_classes else [0]

    def of(self, indices: Tensor) -> Tensor:
        """Give the tokens `(B, *token_shape)` that samples `indices (B,)` keep, -1 where one is to be drawn."""
        rows = indices.cpu().numpy() % self.folder.count
        tokens = self.folder.batch(rows, rows, keys=rows.astype(np.int64), variants=None, draws=None)["tokens"]
        return tokens.masked_fill(self._masked, -1).to(indices.device)
