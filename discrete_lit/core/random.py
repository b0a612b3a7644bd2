"""Counter-based random numbers: a pure function of what they are for, not of when or where they are drawn.

- Corruption, label dropout and sampling draw from `CounterRandom`, by (seed, sample index, purpose, step): this is
  Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) in int64 tensors, with the same
  bits on every device.
- The order of an epoch depends on (seed, epoch) and an augmentation on (seed, epoch, sample key): `sample_order` and
  `augmentation_uniforms`, in numpy.

So neither the batch size, nor the number of ranks or workers, nor a resume changes what is drawn.
"""

import hashlib
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

# `CounterRandom.ahead` draws blocks of at most so many numbers (8 MB of float64), unless one step needs more, and keeps
# as many as the purposes of a loop and of the corrector steps inside it.
_NUMBERS_AHEAD = 2**20
_BLOCKS_KEPT = 8


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32: four 32-bit words for each counter.

    Args:
        counter: four int64 tensors that broadcast together, words in [0, 2^32).
        key: two words in [0, 2^32).
        rounds: 10 is the published generator.

    Returns:
        Four int64 tensors with words in [0, 2^32).
    """
    # Each word is of its own shape as long as it can be: the first rounds then have little to compute.
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which keeps every bit; masking makes the arithmetic shift a logical one.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _WORD, product0 & _WORD
        high1, low1 = (product1 >> 32) & _WORD, product1 & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3


class Purpose(IntEnum):
    """Names what random numbers are drawn for; two purposes never share numbers."""

    LABEL_DROPOUT = 0
    MASK_RATIO = 1
    MASK_ORDER = 2
    TOKEN = 3
    CONFIDENCE = 4
    LIKELIHOOD = 5
    CODE_START = 6
    CODE_REVIVAL = 7
    CODE_NOISE = 8
    LATENT_NOISE = 9
    ORDER = 10
    DIFFUSION_TIME = 11
    DIFFUSION_NOISE = 12
    DIFFUSION_START = 13
    DIFFUSION_STEP = 14
    EXPOSURE = 15
    ID_PERTURBATION = 16
    RESIDUAL = 17
    STOCHASTIC_CODE = 18
    DECODER_START = 20
    DECODER_STEP = 21
    AUGMENTATION = 22
    AUGMENTATION_CROP = 23


class CounterRandom:
    """Holds independent random streams, one for each sample of a batch.

    Args:
        seed: any integer; its low 64 bits are the key.
        indices: `(B,)` int64 >= 0, what identifies each sample: its index among all that are generated, or its
            position in the whole training run.

    A draw is named by `purpose` and `step`: the same name gives the same numbers, another name independent ones.
    """

    def __init__(self, seed: int, indices: Tensor) -> None:
        if indices.dtype != torch.int64 or indices.ndim != 1:
            raise ValueError(f"indices must be a 1-D int64 tensor, got {indices.dtype} {tuple(indices.shape)}")
        self.seed = seed
        self.indices = indices
        self.key = (seed & _WORD, (seed >> 32) & _WORD)

    def uniform(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        """Draw uniform numbers in the open interval (0, 1) with 52 random bits: the midpoints of 2^52 equal cells.

        Below 2^-12 they have 64 bits, so that what happens with a probability of 1e-11 still has many values to be
        decided by.

        Args:
            purpose: what the numbers are for.
            count: numbers for each sample, at most 2^32.
            step: in [0, 2^24), the sampling step.

        Returns:
            `(B, count)` float64 on the device of the indices.
        """
        return self._uniform(purpose, count, step, 1)[0]

    def _uniform(self, purpose: Purpose, count: int, first: int, steps: int) -> Tensor:
        """Draw the numbers of some steps that follow one another: `(steps, B, count)`."""
        assert 0 <= first <= first + steps <= 2**24, (first, steps)
        # Nothing here is copied from the host: that would make it wait for the device.
        device, stream = self.indices.device, int(purpose) << 24 | first
        pairs = torch.arange((count + 1) // 2, device=device)
        streams = torch.arange(stream, stream + steps, device=device)[:, None, None]
        index = self.indices[:, None]
        words = philox4x32((pairs, streams, index & _WORD, (index >> 32) & _WORD), self.key)
        high = torch.stack((words[0], words[2]), dim=-1).flatten(-2)[..., :count]
        low = torch.stack((words[1], words[3]), dim=-1).flatten(-2)[..., :count]
        # 32 + 20 bits: a 53rd would round the last midpoint up to 1. Of all 64, float64 holds those of numbers that
        # begin with 12 zeros.
        coarse = (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52
        fine = (((high << 32) | low).double() + 0.5) * 2.0**-64
        return torch.where(high < 2**20, fine, coarse)

    def ahead(self, steps: int) -> "CounterRandom":
        """Give the same streams for a loop over the steps 0 to `steps` - 1: they draw the numbers of many at once.

        Philox is some 150 operations, whatever it draws; in a loop of its own each step would make them again.
        """
        return _AheadRandom(self.seed, self.indices, steps=steps)

    def gumbel(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        """Draw standard Gumbel numbers -log(-log u), `(B, count)` float64; arguments as for `uniform`."""
        return -torch.log(-torch.log(self.uniform(purpose, count, step)))

    def normal(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        """Draw standard normal numbers Phi^-1(u), `(B, count)` float64; arguments as for `uniform`."""
        return torch.special.ndtri(self.uniform(purpose, count, step))


def streams_of(samples: Any, *, seed: int, indices: Tensor | None = None) -> CounterRandom:
    """Give a stream of random numbers for each of B samples.

    Args:
        samples: what they are given, which has a length and a device.
        seed: with an index, it alone decides a stream.
        indices: `(B,)` int64, each sample's index among all that are drawn; 0 to B - 1 by default.
    """
    if indices is None:
        indices = torch.arange(len(samples), device=samples.device)
    return CounterRandom(seed, indices)


class _AheadRandom(CounterRandom):
    """Draws the numbers of a block of steps when one of them is asked for, and keeps the blocks that a loop is at."""

    def __init__(self, seed: int, indices: Tensor, *, steps: int) -> None:
        super().__init__(seed, indices)
        self._steps = steps
        self._blocks: dict[tuple[Purpose, int, int], Tensor] = {}

    def uniform(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        size = max(1, min(self._steps, _NUMBERS_AHEAD // max(1, len(self.indices) * count)))
        first = step - step % size
        key = purpose, count, first
        block = self._blocks.pop(key, None)
        if block is None:
            block = self._uniform(purpose, count, first, min(size, 2**24 - first))
        self._blocks[key] = block  # the last to be forgotten
        if len(self._blocks) > _BLOCKS_KEPT:
            del self._blocks[next(iter(self._blocks))]
        return block[step - first]


def random_subset(uniforms: Tensor, counts: Tensor | int) -> Tensor:
    """Draw a uniformly random subset of each row: its entries are the `counts` smallest of the row.

    Args:
        uniforms: `(..., n)`, independent of one another.
        counts: `(..., 1)`, or one for all rows.

    Returns:
        `(..., n)` bool.
    """
    return uniforms.argsort(dim=-1).argsort(dim=-1) < counts


def places_of(subset: Tensor, count: int) -> Tensor:
    """List the first `count` places of each subset `(B, n)` bool in rising order, `(B, count)` int64.

    Of a smaller subset the places that follow are not in it.
    """
    return subset.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def indices_of_ids(ids: Tensor) -> Tensor:
    """Hash ids `(B, N)` int64 to indices of streams, `(B,)` int64 in [0, 2^63): what is drawn belongs to the ids."""
    # Each id is mixed by itself, then with its place; products are modulo 2^64.
    mixed = (ids + 1) * 0x1E3779B97F4A7C15
    places = 2 * torch.arange(mixed.shape[1], device=mixed.device) + 1
    mixed = (mixed ^ (mixed >> 31)) * (places * 0x3F58476D1CE4E5B9)
    return (mixed ^ (mixed >> 29)).sum(dim=1) & (2**63 - 1)


def numpy_stream(*words: int) -> np.random.RandomState:
    """Open numpy's random stream that belongs to non-negative integers such as (seed, epoch).

    `RandomState`, because numpy promises never to change its streams: a run can be resumed after an upgrade.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(words)))


def sample_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Draw the order of `count` samples in one epoch: int64 `(count,)`."""
    return numpy_stream(seed, epoch).permutation(count).astype(np.int64, copy=False)


def augmentation_uniforms(seed: int, epoch: int, key: str) -> tuple[float, float, float, float]:
    """Draw four independent uniform numbers in [0, 1) for the sample `key` in `epoch`."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(errors="surrogatepass"), digest_size=16).digest()
    first, second, third, fourth = (
        int.from_bytes(digest[start : start + 4], "little") / 2**32 for start in (0, 4, 8, 12)
    )
    return first, second, third, fourth
