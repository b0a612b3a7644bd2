"""Which samples of the shards each worker reads in an epoch, and in what order; then the reading.

The shards in the order of the epoch form one line of samples. It is cut into equal pieces, one for each worker of each
rank, wherever that falls inside a shard; so every sample is read once in an epoch however uneven the shards are. A
piece is read in order and mixed within a window. Which sample comes when is known before anything is read, so a
resume goes straight to the samples that are left, and only opens the shards that hold them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from discrete_lit.data import keyed_random
from discrete_lit.data.shard_set import ShardSet
from discrete_lit.data.tars import RawSample, read_samples


@dataclass(frozen=True)
class Line:
    """All samples, shard after shard.

    Args:
        shards: the split.
        order: int64 `(len(shards.shards),)`, the order of the shards.
    """

    shards: ShardSet
    order: np.ndarray

    @classmethod
    def of_epoch(cls, shards: ShardSet, seed: int, epoch: int) -> "Line":
        return cls(shards, keyed_random.permutation(seed, epoch, len(shards.shards)))

    @classmethod
    def in_order(cls, shards: ShardSet) -> "Line":
        return cls(shards, np.arange(len(shards.shards)))

    def read(self, start: int, wanted: np.ndarray) -> Iterator[tuple[int, RawSample]]:
        """The wanted samples among those at `start` and after: place in the line and sample.

        Args:
            start: the first place.
            wanted: bool, for each place from `start` on.
        """
        stop = start + len(wanted)
        end = 0
        for number in self.order:
            shard = self.shards.shards[number]
            begin, end = end, end + shard.count
            if end <= start or begin >= stop:
                continue
            in_shard = np.zeros(shard.count, dtype=bool)
            low, high = max(begin, start), min(end, stop)
            in_shard[low - begin : high - begin] = wanted[low - start : high - start]
            if in_shard.any():
                for position, sample in read_samples(shard, in_shard):
                    yield begin + position, sample


def piece_of(worker: int, workers: int, samples: int, batch_size: int) -> tuple[int, int]:
    """The samples [start, stop), of a rank's `samples`, that one worker reads.

    Batch b of the rank is made by worker b mod `workers`, so the first workers may have a batch more than the
    others; only the last batch of the last piece may be incomplete.
    """
    batches = -(-samples // batch_size)
    batches_of = [len(range(number, batches, workers)) for number in range(workers)]
    start = min(sum(batches_of[:worker]) * batch_size, samples)
    return start, min(start + batches_of[worker] * batch_size, samples)


def window_shuffle(count: int, window: int, *words: int) -> np.ndarray:
    """A permutation of 0..count-1 that moves nothing by more than `window` places.

    So a reader holds at most about `window` samples at a time. `window` 0 keeps the order.

    Args:
        count: number of samples.
        window: places.
        words: integers that decide the permutation.
    """
    if window == 0:
        return np.arange(count)
    shifts = keyed_random.generator(*words).random_sample(count) * window
    return np.argsort(np.arange(count) + shifts, kind="stable")


class Piece:
    """One worker's part of a line, given out sample by sample.

    Args:
        line: all samples.
        start: first place of the piece.
        order: int64, the places of the piece, counted from `start`, in the order in which they are given out.
        taken: how many of them were given out before.
    """

    def __init__(self, line: Line, start: int, order: np.ndarray, taken: int):
        self._order = order + start
        self._taken = taken
        self._read_ahead: dict[int, RawSample] = {}
        wanted = np.zeros(len(order), dtype=bool)
        wanted[order[taken:]] = True
        self._reader = line.read(start, wanted)

    def __len__(self) -> int:
        """Samples that are left."""
        return len(self._order) - self._taken

    def peek(self, distance: int) -> RawSample:
        """The sample that will be given out after `distance` others."""
        place = int(self._order[self._taken + distance])
        while place not in self._read_ahead:
            read, sample = next(self._reader)
            self._read_ahead[read] = sample
        return self._read_ahead[place]

    def take(self) -> RawSample:
        """Give out the next sample."""
        sample = self.peek(0)
        del self._read_ahead[int(self._order[self._taken])]
        self._taken += 1
        return sample

    def next_place(self) -> int:
        """Place in the line of the sample that `take` gives out next."""
        return int(self._order[self._taken])
