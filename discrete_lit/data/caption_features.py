"""Vectors of captions, made once by a frozen text encoder and kept beside the captions of token or latent arrays.

Equal captions are encoded once. `context.npy` (float16, `(S, E)`) holds the valid vectors of all different captions one
after another; `context_index.npz` says where those of each begin (`starts`), which of them a caption has
(`of_caption`), and which number the first caption of each row has (`firsts`); `context.json`, written last, says whose
vectors they are.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete_lit.core.bounded_reading import open_array, read_json
from discrete_lit.core.files import Npz, atomic_write, atomic_write_text
from discrete_lit.data.caption_file import CaptionFile

_FORMAT = "discrete-lit-context-1"
_VECTORS, _INDEX, _MANIFEST = "context.npy", "context_index.npz", "context.json"
# More captions of an image on average, or tokens of a caption, than any data set has.
_MOST_CAPTIONS, _LONGEST_CAPTION = 1000, 2**16


def write_caption_features(
    folder: Path,
    captions: CaptionFile,
    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
    *,
    count: int,
    length: int,
    dim: int,
    encoder: str,
    batch_size: int,
) -> dict[str, Any]:
    """Encode every different caption of a folder, and keep the vectors there.

    Args:
        folder: of the arrays.
        captions: theirs.
        encode: B texts to vectors `(B, M, E)` and which are valid `(B, M)`, the first of each text.
        count: rows of the arrays.
        length: M.
        dim: E.
        encoder: its fingerprint.
        batch_size: captions that are encoded together.

    Returns:
        What `context.json` holds.

    Raises:
        ValueError: vectors that are no finite numbers of float16.
    """
    (folder / _MANIFEST).unlink(missing_ok=True)
    number_of: dict[str, int] = {}
    of_caption: list[int] = []
    firsts = [0]
    for row in range(count):
        of_caption += [number_of.setdefault(text, len(number_of)) for text in captions[row]]
        firsts.append(len(of_caption))
    texts = list(number_of)
    lengths: list[int] = []

    def vectors() -> Iterator[np.ndarray]:
        for start in range(0, len(texts), batch_size):
            made, valid = encode(texts[start : start + batch_size])
            lengths.extend(valid.sum(dim=1).tolist())
            kept = made[valid].cpu().half()
            if not bool(kept.isfinite().all()):
                raise ValueError(f"{folder}: vectors of captions that float16 cannot hold")
            yield kept.numpy()

    with atomic_write(folder / _VECTORS) as file:
        np.save(file, np.concatenate([*vectors(), np.zeros((0, dim), np.float16)]))
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    with atomic_write(folder / _INDEX) as file:
        np.savez(file, starts=starts, of_caption=np.array(of_caption, np.int64), firsts=np.array(firsts, np.int64))
    manifest = {
        "format": _FORMAT,
        "encoder": encoder,
        "length": length,
        "dim": dim,
        "captions": len(of_caption),
        "different": len(texts),
    }
    atomic_write_text(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


class CaptionFeatures:
    """The vectors of the captions of a folder.

    Args:
        folder: of the arrays.
        count: its rows.

    Raises:
        ValueError: there are none, or their files do not fit each other.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        path = folder / _MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no vectors of captions (no {_MANIFEST}): make them by `discrete-lit encode_captions`, "
                "or set data.init_args.context to false"
            )
        try:
            self.manifest = read_json(path)
            with Npz(folder / _INDEX) as index:
                for name in ("starts", "of_caption", "firsts"):
                    shape, dtype, _ = index.headers[name]
                    if len(shape) != 1 or dtype != np.int64 or shape[0] > _MOST_CAPTIONS * (count + 1):
                        raise ValueError(f"{name} is {dtype} {shape} for {count} rows")
                self._starts, self._of_caption, self._firsts = map(index.read, ("starts", "of_caption", "firsts"))
            if any((np.diff(numbers) < 0).any() or numbers[0] != 0 for numbers in (self._starts, self._firsts)):
                raise ValueError("its captions do not follow one another")
            self._vectors: np.ndarray | None = None
            size = self._opened().shape
            fits = (
                self.manifest["format"] == _FORMAT
                and self._firsts.shape == (count + 1,)
                and self._firsts[-1] == len(self._of_caption)
                and int(self._of_caption.max()) + 2 == len(self._starts)
                and size == (self._starts[-1], self.manifest["dim"])
                and int(self._of_caption.min()) >= 0
                and int(np.diff(self._starts).max()) <= self.manifest["length"] <= _LONGEST_CAPTION
            )
        except (OSError, ValueError, EOFError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"the vectors of captions in {folder} cannot be read ({error}): make them anew") from error
        if not fits:
            raise ValueError(f"the vectors of captions in {folder} are of other arrays: make them anew")

    @property
    def encoder(self) -> str:
        """The fingerprint of the encoder that made them."""
        return str(self.manifest["encoder"])

    def batch(self, rows: Sequence[int], chosen: Sequence[int]) -> dict[str, Tensor]:
        """Give `"context": (B, M, E)` float32 and `"context_mask": (B, M)` of caption `chosen[i]` of row `rows[i]`."""
        context = torch.zeros(len(rows), self.manifest["length"], self.manifest["dim"])
        mask = torch.zeros(context.shape[:2], dtype=torch.bool)
        vectors = self._opened()
        for place, (row, number) in enumerate(zip(rows, chosen, strict=True)):
            text = self._of_caption[self._firsts[row] + number]
            start, stop = self._starts[text], self._starts[text + 1]
            context[place, : stop - start] = torch.from_numpy(vectors[start:stop].astype(np.float32))
            mask[place, : stop - start] = True
        return {"context": context, "context_mask": mask}

    def _opened(self) -> np.ndarray:
        """The memory-mapped vectors, opened once in every process."""
        if self._vectors is None:
            self._vectors = open_array(self.folder / _VECTORS, mapped=True)
        assert self._vectors is not None
        return self._vectors

    def __getstate__(self) -> dict[str, Any]:
        # A memory map pickles as the whole array.
        return {**self.__dict__, "_vectors": None}
