"""Token arrays of clips beside those of their sounds: row i of both belongs to one sample."""

from typing import Any

import numpy as np
import torch

from discrete_lit.data.encoded_arrays import EncodedFolder
from discrete_lit.data.loaders import Batch
from discrete_lit.data.token_arrays import TokenArrays, TokenFolder


class PairedTokenFolder(TokenFolder):
    """A folder of clips' tokens, with the one of their sounds.

    Args:
        folder: of the clips, as `discrete-lit tokenize` writes it.
        audio: of their sounds, row by row.
        context: as of `TokenFolder`.

    Raises:
        ValueError: one is no finished token array, or they have other numbers of rows.
    """

    def __init__(self, folder: str, audio: str, *, context: bool = False) -> None:
        super().__init__(folder, context=context)
        self.audio = TokenFolder(audio)
        if self.audio.count != self.count:
            raise ValueError(
                f"{folder} has {self.count:,} rows and {audio} {self.audio.count:,}: row i of both must be one sample"
            )
        if not np.array_equal(self.audio.labels, self.labels):
            raise ValueError(f"the labels of {folder} and {audio} differ: row i of both must be one sample")

    def batch(self, samples: np.ndarray, index: np.ndarray, **others: Any) -> Batch:
        stored, keys = self.audio.codes[samples], torch.from_numpy(others["keys"])
        return {
            **super().batch(samples, index, **others),
            "audio_tokens": self.audio.values(stored, samples, keys),
        }


class PairedTokenArrays(TokenArrays):
    """Batches of the tokens of clips and of their sounds, `"tokens"` and `"audio_tokens"`, the rest as `TokenArrays`.

    `discrete-lit tokenize` makes both: with `VideoClips` on the clips, and with `AudioClips` on the sounds, which stand
    in another folder, or in other shards, under the same names.

    Args:
        train: folder of the clips' tokens; captions and labels are read there.
        validation: the same of validation.
        audio_train: folder of the sounds' tokens, row by row.
        audio_validation: the same of validation.
        batch_size, num_workers, seed, persistent_workers: as of `TokenArrays`.

    Raises:
        ValueError: a folder without the other one. Reading them raises what `PairedTokenFolder` does.
    """

    def __init__(
        self,
        train: str | None,
        validation: str | None = None,
        *,
        audio_train: str | None = None,
        audio_validation: str | None = None,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        persistent_workers: bool = False,
    ) -> None:
        super().__init__(
            train,
            validation,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            persistent_workers=persistent_workers,
        )
        if (train is None) != (audio_train is None) or (validation is None) != (audio_validation is None):
            raise ValueError(
                "the tokens of clips and of their sounds are given together, got "
                f"{train=}, {audio_train=}, {validation=}, {audio_validation=}"
            )
        if train is not None and train == validation and audio_train != audio_validation:
            raise ValueError(f"train and validation are one folder, {train}, with two of sounds")
        self._audio = {train: audio_train, validation: audio_validation}

    def open_folder(self, folder: str) -> EncodedFolder:  # type: ignore[override]
        audio = self._audio[folder]
        assert audio is not None
        return PairedTokenFolder(folder, audio)
