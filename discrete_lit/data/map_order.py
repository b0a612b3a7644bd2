"""Which samples a batch holds, for data that can be read in any order.

Training: one permutation of the whole set from (seed, epoch); global batch g is its slice [g * G, (g + 1) * G), and
rank r of R takes the r-th of R equal parts. So one process with a batch of 2 B sees the same global batches as two
with B, and the number of workers decides nothing. The last, incomplete global batch of an epoch is dropped.

Evaluation: rank r reads [r * count / R, (r + 1) * count / R) in order; every sample once, nothing padded.
"""

from collections.abc import Mapping

import numpy as np

from discrete_lit.data import keyed_random


class TrainingOrder:
    """The order of a training set on one rank.

    Args:
        count: samples of the set.
        batch_size: samples of a batch on one rank.
        rank: this rank.
        world_size: number of ranks.
        seed: of the permutation.

    Raises:
        ValueError: the set is smaller than one batch over all ranks.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int, seed: int):
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.seed = seed
        self.samples_per_step = batch_size * world_size
        self.batches = complete_batches(count, batch_size, world_size)
        self.samples = self.batches * batch_size
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def positions(self, number: int) -> np.ndarray:
        """Places in the epoch's order of this rank's batch `number`: int64 `(batch_size,)`."""
        start = number * self.samples_per_step + self.rank * self.batch_size
        return np.arange(start, start + self.batch_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """The sample at each place of the epoch's order: int64 `(count,)`."""
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, keyed_random.permutation(self.seed, epoch, self.count)
        return self._permutation

    def identity(self) -> Mapping[str, int | str]:
        return {"samples_per_step": self.samples_per_step, "count": self.count, "seed": self.seed}


class EvaluationOrder:
    """The order of an evaluated set on one rank."""

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int):
        self.start, self.stop = rank_range(count, rank, world_size)
        self.batch_size = batch_size
        self.samples = self.stop - self.start
        self.samples_per_step = batch_size * world_size
        self.batches = -(-self.samples // batch_size)

    def samples_of(self, number: int) -> np.ndarray:
        """The samples of batch `number`: int64, at most `batch_size` of them."""
        start = self.start + number * self.batch_size
        return np.arange(start, min(start + self.batch_size, self.stop))

    def identity(self) -> Mapping[str, int | str]:
        return {}


def rank_range(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The samples [start, stop) that a rank evaluates."""
    return rank * count // world_size, (rank + 1) * count // world_size


def complete_batches(count: int, batch_size: int, world_size: int) -> int:
    """Batches of one epoch on every rank.

    Raises:
        ValueError: there is not one.
    """
    batches = count // (batch_size * world_size)
    if batches == 0:
        raise ValueError(
            f"{count} training samples do not fill one batch of {batch_size} on each of {world_size} ranks: "
            "use a smaller batch_size"
        )
    return batches


class OrderedSource:
    """What every source in a map-style order takes from the order: its counts, and what a resume compares."""

    def __init__(self, order: TrainingOrder | EvaluationOrder):
        self.batches = order.batches
        self.samples = order.samples
        self.samples_per_step = order.samples_per_step
        self._identity = order.identity()

    def identity(self) -> Mapping[str, int | str]:
        return self._identity
