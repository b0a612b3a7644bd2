"""Random numbers that are a function of what they are for, not of when or where they are drawn.

A data order depends on (seed, epoch) and an augmentation on (seed, epoch, sample key), so a resume, another number of
workers, or another number of ranks draws the same numbers.
"""

import hashlib

import numpy as np


def generator(*words: int) -> np.random.RandomState:
    """A generator for non-negative integers such as (seed, epoch).

    `RandomState`, because numpy promises never to change its streams: a run can be resumed after an upgrade.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(words)))  # type: ignore[arg-type]


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` samples in one epoch: int64 `(count,)`."""
    return generator(seed, epoch).permutation(count).astype(np.int64, copy=False)


def uniforms(seed: int, epoch: int, key: str) -> tuple[float, float, float, float]:
    """Four independent numbers in [0, 1) for the sample `key` in `epoch`."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    first, second, third, fourth = (
        int.from_bytes(digest[start : start + 4], "little") / 2**32 for start in (0, 4, 8, 12)
    )
    return first, second, third, fourth
