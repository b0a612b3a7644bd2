"""The order of a training epoch of shards, and the readers that give out its samples.

The shards in the order of (seed, epoch) form one stream of samples. It is cut into equal splits, one for each worker of
each rank, wherever that falls inside a shard; so every sample is read once in an epoch however uneven the shards are. A
split is read in order and mixed within a window.

The ranks and workers of that cut are those that the run began with, its *layout*. A run that goes on with others keeps
it: which sample stands at a position of the epoch stays the same (`ShardOrder`), and each worker now reads the samples
of its batches from every split that holds some (`SplitReader`). Where each lies is computed, so nothing is read to get
there but the headers of the shard that it is in.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from discrete_lit.core.random import numpy_stream, sample_order
from discrete_lit.data.loaders import complete_batches
from discrete_lit.data.shard_set import Shard, ShardSet
from discrete_lit.data.tars import RawSample, read_samples

_log = logging.getLogger(__name__)
# Samples that a worker passes over for each that it uses, above which a run says so.
_MUCH_PASSED_OVER = 4
_LARGEST = 2**24


class Layout(NamedTuple):
    """The ranks and workers that an epoch is cut for, and the samples of a batch on each rank."""

    batch_size: int
    world_size: int
    workers: int

    @classmethod
    def of_state(cls, saved: Mapping[str, int]) -> "Layout":
        """Read the layout of a saved state.

        Raises:
            ValueError: an entry is missing or out of range; a checkpoint may come from anybody.
        """
        numbers = [saved.get(name) for name in cls._fields]
        if not all(isinstance(number, int) and 0 < number <= _LARGEST for number in numbers):
            raise ValueError(
                f"the checkpoint's data state has the layout {dict(saved)!r}, accepted: numbers in 1..{_LARGEST:,} as "
                f"{', '.join(cls._fields)}"
            )
        return cls(*(int(number or 0) for number in numbers))


class ShardOrder:
    """Which sample of the stream stands at each position of an epoch.

    Global batch g of the layout holds the positions [g * G, (g + 1) * G), rank 0's batch first; worker g mod workers of
    each rank makes it.

    Args:
        count: samples of the set.
        layout: what the epoch is cut for.
        shuffle_window: samples of a split that are mixed with each other.
        seed: decides the order.

    Raises:
        ValueError: the set is smaller than one batch over all ranks.
    """

    def __init__(self, count: int, layout: Layout, *, shuffle_window: int, seed: int):
        self.layout = layout
        self.shuffle_window = shuffle_window
        self.seed = seed
        self.rank_samples = complete_batches(count, layout.batch_size, layout.world_size) * layout.batch_size

    @property
    def samples(self) -> int:
        """Positions of the epoch: at least all those of whole global batches."""
        return self.rank_samples * self.layout.world_size

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the split of each position of the epoch, and its place among those that the split gives out."""
        batch, world, workers = self.layout
        number, row = np.divmod(positions, batch * world)
        rank, place = np.divmod(row, batch)
        return rank * workers + number % workers, number // workers * batch + place

    def given_out(self, epoch: int, split: int) -> np.ndarray:
        """Positions in the stream of a split's samples, int64, in the order in which they are given out."""
        batch, _, workers = self.layout
        rank, worker = divmod(split, workers)
        start, stop = worker_range(worker, workers, samples=self.rank_samples, batch_size=batch)
        mixed = window_shuffle(stop - start, self.shuffle_window, self.seed, epoch, rank, worker)
        return rank * self.rank_samples + start + mixed


def worker_range(worker: int, workers: int, *, samples: int, batch_size: int) -> tuple[int, int]:
    """The samples [start, stop) that one worker reads, of a rank's `samples`.

    Batch b of the rank is made by worker b mod `workers`, so the first workers may have a batch more than the
    others; only the last batch of the last split may be incomplete.
    """
    batches = -(-samples // batch_size)
    batches_of = [len(range(number, batches, workers)) for number in range(workers)]
    start = min(sum(batches_of[:worker]) * batch_size, samples)
    return start, min(start + batches_of[worker] * batch_size, samples)


def window_shuffle(count: int, window: int, *words: int) -> np.ndarray:
    """A permutation of 0..count-1 that moves nothing by more than `window` positions.

    So a reader holds at most about `window` samples at a time. `window` 0 keeps the order.

    Args:
        count: number of samples.
        window: positions.
        words: integers that decide the permutation.
    """
    if window == 0:
        return np.arange(count)
    shifts = numpy_stream(*words).random_sample(count) * window
    return np.argsort(np.arange(count) + shifts, kind="stable")


@dataclass(frozen=True)
class SampleStream:
    """All samples of a split of the data, shard after shard.

    Args:
        shards: the shards of the data's split.
        order: int64 `(len(shards.shards),)`, the order of the shards.
        captions: the extension of the caption files that are read; None reads none.
    """

    shards: ShardSet
    order: np.ndarray
    captions: str | None = None

    @classmethod
    def of_epoch(cls, shards: ShardSet, *, seed: int, epoch: int, captions: str | None = None) -> "SampleStream":
        """The stream of a training epoch, its shards in an order of (seed, epoch)."""
        return cls(shards, sample_order(seed, epoch, len(shards.shards)), captions)

    @classmethod
    def in_order(cls, shards: ShardSet, *, captions: str | None = None) -> "SampleStream":
        """The stream of an evaluation, its shards in the order that numbers the samples."""
        return cls(shards, np.arange(len(shards.shards)), captions)

    def read(self, start: int, wanted: np.ndarray) -> Iterator[tuple[int, RawSample]]:
        """Read the wanted samples among those at `start` and after: position in the stream and sample.

        Args:
            start: the first position.
            wanted: bool, for each position from `start` on.
        """
        stop = start + len(wanted)
        end = 0
        needed: list[tuple[Shard, int, np.ndarray]] = []
        for number in self.order:
            shard = self.shards.shards[number]
            begin, end = end, end + shard.count
            if end <= start or begin >= stop:
                continue
            in_shard = np.zeros(shard.count, dtype=bool)
            low, high = max(begin, start), min(end, stop)
            in_shard[low - begin : high - begin] = wanted[low - start : high - start]
            if in_shard.any():
                needed.append((shard, begin, in_shard))
        for (shard, begin, in_shard), following in zip(needed, [*needed[1:], None], strict=True):
            if following is not None:
                following[0].keep()
            samples = read_samples(shard, in_shard, captions=self.captions, kind=self.shards.kind)
            for position, sample in samples:
                yield begin + position, sample


class SplitReader:
    """Gives out samples of the stream in a given order, which is near to the one that they lie in.

    Args:
        stream: all samples.
        positions: int64, those of the samples, in the order in which they are given out; no others are read.
    """

    def __init__(self, stream: SampleStream, positions: np.ndarray):
        self._positions = positions
        self._taken = 0
        self._read_ahead: dict[int, RawSample] = {}
        self._start = int(positions.min()) if len(positions) else 0
        self._left = np.zeros(int(positions.max()) - self._start + 1 if len(positions) else 0, dtype=bool)
        self._left[positions - self._start] = True
        self._reader = stream.read(self._start, self._left.copy())

    def __len__(self) -> int:
        """Samples that are left."""
        return len(self._positions) - self._taken

    def holds(self, positions: np.ndarray) -> np.ndarray:
        """Tell of positions in the stream whether their samples are still to be given out: bool."""
        inside = (positions >= self._start) & (positions < self._start + len(self._left))
        return inside & self._left[np.where(inside, positions - self._start, 0)] if len(self._left) else inside

    def look(self, position: int) -> RawSample:
        """Look at a sample that is still to be given out."""
        while position not in self._read_ahead:
            read, sample = next(self._reader)
            self._read_ahead[read] = sample
        return self._read_ahead[position]

    def take(self) -> tuple[int, RawSample]:
        """Give out the next sample and its position in the stream."""
        position = int(self._positions[self._taken])
        sample = self.look(position)
        del self._read_ahead[position]
        self._left[position - self._start] = False
        self._taken += 1
        return position, sample


class EpochReader:
    """Gives out the samples of one worker's batches, in the order of an epoch.

    Args:
        stream: all samples of the epoch.
        order: of the epoch.
        epoch: its number.
        positions: int64, the positions in the epoch that the worker will ask for, in order.
    """

    def __init__(self, stream: SampleStream, order: ShardOrder, *, epoch: int, positions: np.ndarray):
        self._stream, self._order, self._epoch = stream, order, epoch
        splits, places = order.locate(positions)
        self._places = {int(split): places[splits == split] for split in np.unique(splits)}
        self._readers: dict[int, SplitReader] = {}

    def take(self, position: int) -> RawSample:
        """Give out the sample at a position of the epoch, which must be the next one of its split."""
        return self._reader(self._split_and_place(position)[0]).take()[1]

    def following(self, position: int) -> Iterator[RawSample]:
        """Look at the samples that the position's split gives out behind it, then at those before it.

        None of them is given out by that, so that no later batch moves.
        """
        split, place = self._split_and_place(position)
        reader, given_out = self._reader(split), self._order.given_out(self._epoch, split)
        for part in (given_out[place + 1 :], given_out[:place]):
            own = reader.holds(part)
            # Of other workers, or given out before.
            others = SplitReader(self._stream, part[~own])
            for where, is_own in zip(part.tolist(), own.tolist(), strict=True):
                yield reader.look(where) if is_own else others.take()[1]

    def _reader(self, split: int) -> SplitReader:
        if split not in self._readers:
            given_out = self._order.given_out(self._epoch, split)
            self._readers[split] = SplitReader(self._stream, given_out[self._places[split]])
        return self._readers[split]

    def _split_and_place(self, position: int) -> tuple[int, int]:
        split, place = self._order.locate(np.array([position]))
        return int(split[0]), int(place[0])


def say_what_is_passed_over(order: ShardOrder, own: Layout) -> None:
    """Warn where the workers of a layout read far more than they use, since the order is of another one."""
    batch, world, workers = own
    batches = np.arange(order.layout.workers) * workers  # of rank 0's first worker, till its splits come again
    positions = batches[:, None] * batch * world + np.arange(batch)
    splits = len(np.unique(order.locate(positions.reshape(-1))[0]))
    times = splits * world * workers / (order.layout.world_size * order.layout.workers)
    if times > _MUCH_PASSED_OVER:
        _log.warning(
            "the run keeps the order of %d ranks with %d workers that it began with: on %d ranks with %d workers each "
            "worker passes over %.0f samples for one that it uses, which costs time with shards of a server",
            order.layout.world_size,
            order.layout.workers,
            world,
            workers,
            times,
        )
