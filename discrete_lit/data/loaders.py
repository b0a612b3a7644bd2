"""Loaders that continue in the middle of an epoch with exactly the batches that would have come.

The whole design rests on one rule: a batch is a pure function of (epoch, number of the batch in the epoch) and of fixed
settings. Then a resume only has to remember two integers, and nothing in the workers needs saving.

Lightning saves and restores any iterable that has `state_dict` and `load_state_dict`. It writes rank 0's state only,
so the state here is the same on every rank. It asks for one batch ahead of the state unless the loader has `__len__`.

Which samples a batch holds, where a set can be read in any order (`TrainingOrder`, `EvaluationOrder`):

Training: one permutation of the whole set from (seed, epoch); global batch g is its slice [g * G, (g + 1) * G), where G
is the samples of an optimizer step: batch size x ranks x accumulated batches. Each of the A accumulated batches is the
next A-th of it, of which rank r of R takes the r-th of R equal parts. So one process with a batch of 2 B sees the same
global batches as two with B, or as one that accumulates two of B, and the number of workers decides nothing. The last,
incomplete global batch of an epoch is dropped. A resume inside an epoch asks for the same G and nothing else.

Evaluation: rank r reads [r * count / R, (r + 1) * count / R) in order; every sample once, nothing padded.

Samples that cannot be read are logged one by one, counted, and fatal past a set fraction.
"""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from multiprocessing.util import get_temp_dir
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from discrete_lit.core.random import sample_order

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
_FORMAT = "discrete-lit-loader-1"
_LAYOUT = ("batch_size", "world_size", "workers")


class BadSample(NamedTuple):
    """A sample that could not be used: its key, the file or shard it is in, and why."""

    key: str
    source: str
    reason: str


class TooManyBadSamples(ValueError):
    """More samples were unreadable than the run accepts."""


class BatchSource(Protocol):
    """The batches that a loader draws from. It is copied to the workers, so it must pickle."""

    batches: int
    """Batches of one epoch on this rank."""
    samples: int
    """Samples of one epoch on this rank."""
    samples_per_step: int
    """Samples of one batch over all ranks; of several accumulated ones, one."""

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        """Batch `number` of `epoch`, and the samples that could not be used for it."""
        ...

    def identity(self) -> Mapping[str, int | str]:
        """The settings that decide what is in a global batch: a state is accepted only where they are equal."""
        ...

    def layout(self) -> Mapping[str, int]:
        """The ranks and workers whose order the global batches have; empty where they have no part in it."""
        ...

    def follow(self, layout: Mapping[str, int]) -> None:
        """Give global batches in the order of another layout, the one that the run began with."""
        ...


class _Loader:
    """Workers that compute the batches of a source in order.

    It is not a `DataLoader` and shows none to Lightning, which would put its own `DistributedSampler` into it and pad
    the evaluation; `Trainer(use_distributed_sampler=...)` has no effect here.
    """

    def __init__(
        self,
        source: BatchSource,
        num_workers: int = 0,
        *,
        max_bad_fraction: float = 0.01,
        persistent_workers: bool = False,
    ):
        self.source = source
        self.max_bad_fraction = max_bad_fraction
        BadSampleCount(source.samples, max_bad_fraction)
        self._requests = _Requests()
        self._workers = DataLoader(
            _Computed(source),
            batch_size=None,
            sampler=self._requests,
            num_workers=num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_end_with_the_training,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=persistent_workers and num_workers > 0,
            # Without its own generator, starting an epoch would draw from the global one and change the run.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return self.source.batches

    def _compute(self, epoch: int, first: int) -> Iterator[Batch]:
        bad_samples = BadSampleCount(self.source.samples, self.max_bad_fraction)
        self._requests.epoch, self._requests.first, self._requests.stop = epoch, first, len(self)
        for computed in self._workers:
            if isinstance(computed, ValueError):
                raise computed
            batch, bad = computed
            bad_samples.add(bad)
            yield batch


class TrainingLoader(_Loader):
    """A loader with a state: the epoch and how much of it was consumed.

    Every `iter()` after a batch was taken starts the next epoch; the first one after `load_state_dict` continues.

    Args:
        source: the batches.
        num_workers: processes that compute them; 0 computes them in this one.
        max_bad_fraction: fraction of an epoch's samples that may be unreadable before the run fails.
        persistent_workers: keep the processes between epochs.
        start_epoch: epoch of the first iteration.
        batches_per_epoch: batches after which the trainer ends an epoch, where that is before the data's end
            (`Trainer(limit_train_batches=...)`).
        repeat_epoch: every epoch is epoch 0 again (`Trainer(overfit_batches=...)`).
        accumulated: batches of an optimizer step (`Trainer(accumulate_grad_batches=...)`); an epoch has whole steps.

    Raises:
        ValueError: an epoch is smaller than one optimizer step.
    """

    def __init__(
        self,
        source: BatchSource,
        num_workers: int = 0,
        *,
        max_bad_fraction: float = 0.01,
        persistent_workers: bool = False,
        start_epoch: int = 0,
        batches_per_epoch: int | None = None,
        repeat_epoch: bool = False,
        accumulated: int = 1,
    ):
        super().__init__(source, num_workers, max_bad_fraction=max_bad_fraction, persistent_workers=persistent_workers)
        self.accumulated = accumulated
        if len(self) == 0:
            raise ValueError(
                f"{source.batches * source.samples_per_step} training samples do not fill one optimizer step of "
                f"{self._split_up()}: use a smaller batch_size or accumulate_grad_batches"
            )
        self.batches_per_epoch = min(len(self), batches_per_epoch or len(self))
        self.repeat_epoch = repeat_epoch
        self.epoch = start_epoch
        self.consumed = 0
        self._continue = False

    def __len__(self) -> int:
        return self.source.batches // self.accumulated * self.accumulated

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step: batch size x ranks x accumulated batches."""
        return self.source.samples_per_step * self.accumulated

    # A generator: nothing happens before the first batch is asked for, so that `iter(loader)` alone, which Lightning
    # does to look whether it can, changes nothing.
    def __iter__(self) -> Iterator[Batch]:
        if self.consumed >= self.batches_per_epoch or (self.consumed and not self._continue):
            self.epoch, self.consumed = self.epoch + 1, 0
        for batch in self._compute(0 if self.repeat_epoch else self.epoch, self.consumed):
            self._continue = False
            self.consumed += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Describe the position of the run in its data, in terms that are the same on every rank."""
        return {
            "format": _FORMAT,
            "epoch": self.epoch,
            "samples": self.consumed * self.source.samples_per_step,
            "finished": self.consumed >= self.batches_per_epoch,
            "global_batch": self.global_batch,
            "identity": dict(self.source.identity()),
            "layout": dict(self.source.layout()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken: inside an epoch with the batches that were left, else with the next epoch.

        Ranks, workers, batch size and accumulated batches may be others, as long as the samples of an optimizer step
        are as many: then its global batches are the same. Between two epochs data and global batch may be others too.

        Raises:
            ValueError: the state is of another kind of loader, or was taken inside an epoch with other data, seed or
                global batch, so that the batches would not be the ones that were left.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"the checkpoint's data state has format {state.get('format')!r}, not {_FORMAT!r}: it was saved with a "
                "DataModule that is not of discrete_lit.data"
            )
        saved = _Saved.read(state, self.accumulated)
        current = dict(self.source.identity())
        names = sorted(
            name for name in saved.identity.keys() | current if saved.identity.get(name) != current.get(name)
        )
        same = not names and saved.global_batch == self.global_batch
        self._continue = True
        if _is_finished(state) or state["samples"] == 0:
            self.epoch = state["epoch"] + (state["samples"] > 0)
            self.consumed = 0
        elif same and state["samples"] % self.source.samples_per_step == 0:
            self.epoch = state["epoch"]
            self.consumed = state["samples"] // self.source.samples_per_step
        else:
            self._continue = False
            raise ValueError(self._refusal(saved, names))
        if same and saved.layout:
            self.source.follow(saved.layout)

    def _refusal(self, saved: "_Saved", names: list[str]) -> str:
        """Say why a state inside an epoch cannot be continued, and what would."""
        current = self.source.identity()
        differences = [f"{name} was {saved.identity.get(name)!r}, is {current.get(name)!r}" for name in names]
        if saved.global_batch != self.global_batch:
            differences.insert(
                0, f"the global batch was {saved.global_batch}, is {self._split_up()}{self._advice(saved.global_batch)}"
            )
        if not differences:
            return (
                "the checkpoint was written between two accumulated batches of an optimizer step, of "
                f"{saved.global_batch} samples: it goes on only with the ranks and the batch_size that it was written "
                "with. An earlier or a later one goes on with any"
            )
        return (
            f"cannot continue inside an epoch with other data settings: {'; '.join(differences)}. Resume with the "
            "settings of the checkpoint, or start a new run from its weights: `discrete-lit fit --init_from CHECKPOINT`"
        )

    def _split_up(self) -> str:
        """Say what the global batch is made of."""
        ranks = self.source.samples_per_step // self._batch_size
        return (
            f"{self.global_batch} (batch_size {self._batch_size} x {ranks} {'rank' if ranks == 1 else 'ranks'} x "
            f"accumulate_grad_batches {self.accumulated})"
        )

    @property
    def _batch_size(self) -> int:
        return self.source.samples // self.source.batches

    def _advice(self, global_batch: int) -> str:
        """Say which batch size on these ranks makes another global batch, of at most as many samples at a time."""
        ranks = self.source.samples_per_step // self._batch_size
        of_rank = global_batch // ranks
        if of_rank * ranks != global_batch:
            return (
                f", and {ranks} ranks cannot share {global_batch} samples equally: use a number of them that divides it"
            )
        most = min(self._batch_size, of_rank)
        batch_size = next(size for size in range(most, 0, -1) if of_rank % size == 0)
        return f"; batch_size {batch_size} with accumulate_grad_batches {of_rank // batch_size} makes it {global_batch}"


class EvaluationLoader(_Loader):
    """A loader without a state: every iteration yields the whole split, each sample once over all ranks.

    The ranks' numbers of batches may differ by one. A batch may be smaller than the others; a sample that cannot be
    read is left out of it.
    """

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._compute(epoch=0, first=0):
            if len(batch["index"]):
                yield batch


class TrainingOrder:
    """The order of a training set on one rank.

    Args:
        count: samples of the set.
        batch_size: samples of a batch on one rank.
        rank: this rank.
        world_size: number of ranks.
        seed: decides the permutation.

    Raises:
        ValueError: the set is smaller than one batch over all ranks.
    """

    def __init__(self, count: int, batch_size: int, *, rank: int, world_size: int, seed: int):
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
        """Positions, in the epoch's order, of this rank's batch `number`: int64 `(batch_size,)`."""
        start = number * self.samples_per_step + self.rank * self.batch_size
        return np.arange(start, start + self.batch_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """The sample at each position of the epoch's order: int64 `(count,)`."""
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, sample_order(self.seed, epoch, self.count)
        return self._permutation

    def identity(self) -> Mapping[str, int | str]:
        return {"count": self.count, "seed": self.seed}


class EvaluationOrder:
    """The order of an evaluated set on one rank.

    Args:
        count: samples of the set.
        batch_size: samples of a batch.
        rank: this rank.
        world_size: number of ranks.
        batches: int64, ascending: the numbers of the batches that this rank computes, batch b of which holds the
            samples from b * batch_size on, in place of the rank's share.
    """

    def __init__(self, count: int, batch_size: int, *, rank: int, world_size: int, batches: np.ndarray | None = None):
        self.positions = np.arange(*rank_range(count, rank, world_size))
        """int64 `(samples,)`, the samples in the order in which they are read."""
        if batches is not None:
            self.positions = (batches[:, None] * batch_size + np.arange(batch_size)).ravel()
            self.positions = self.positions[self.positions < count]
        self.batch_size = batch_size
        self.samples = len(self.positions)
        self.samples_per_step = batch_size * world_size
        self.batches = -(-self.samples // batch_size)

    def samples_of(self, number: int) -> np.ndarray:
        """The samples of batch `number`: int64, at most `batch_size` of them."""
        return self.positions[number * self.batch_size : (number + 1) * self.batch_size]

    def identity(self) -> Mapping[str, int | str]:
        return {}


class OrderedSource:
    """A source in one of the two orders: it takes its counts, and what a resume compares, from the order."""

    def __init__(self, order: TrainingOrder | EvaluationOrder):
        self.batches = order.batches
        self.samples = order.samples
        self.samples_per_step = order.samples_per_step
        self._identity = order.identity()

    def identity(self) -> Mapping[str, int | str]:
        return self._identity

    def layout(self) -> Mapping[str, int]:
        return {}

    def follow(self, layout: Mapping[str, int]) -> None:
        assert not layout, "the order is of the whole set"


class _Saved(NamedTuple):
    """Holds what a state says of the global batches that are left."""

    global_batch: int
    identity: dict[str, Any]
    layout: dict[str, int]

    @classmethod
    def read(cls, state: Mapping[str, Any], accumulated: int) -> "_Saved":
        """Read a state; one of an earlier version says nothing of accumulation, so that it is taken for today's."""
        identity = dict(state["identity"])
        if "global_batch" in state:
            return cls(state["global_batch"], identity, dict(state["layout"]))
        layout = {name: identity.pop(name) for name in _LAYOUT if name in identity}
        step = identity.pop("samples_per_step", 0) or layout.get("batch_size", 0) * layout.get("world_size", 0)
        return cls(step * accumulated, identity, layout)


def _is_finished(state: Mapping[str, Any]) -> bool:
    """Tell whether the epoch of a state was over; states of earlier versions do not say it, the counts do."""
    if "finished" in state:
        return bool(state["finished"])
    identity = state["identity"]
    step = identity.get("samples_per_step") or identity.get("batch_size", 0) * identity.get("world_size", 0)
    return bool(step) and state["samples"] >= identity.get("count", 0) // step * step > 0


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


class BadSampleCount:
    """Counts the bad samples in one epoch of one rank.

    Args:
        samples: how many samples the epoch has on this rank.
        maximum_fraction: fraction of them that may be bad before the run fails; 0 fails at the first.
    """

    def __init__(self, samples: int, maximum_fraction: float):
        if not 0 <= maximum_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {maximum_fraction}; it must be between 0 and 1")
        self.samples = samples
        self.maximum_fraction = maximum_fraction
        self.count = 0

    def add(self, bad: Iterable[BadSample]) -> None:
        """Log and count.

        Raises:
            TooManyBadSamples: the accepted fraction is passed.
        """
        for sample in bad:
            self.count += 1
            logger.warning(
                "skipped bad sample %r of %s: %s (%d of %d in this epoch)", *sample, self.count, self.samples
            )
            if self.count > self.maximum_fraction * self.samples:
                advice = (
                    "Repair or remove the files, or raise max_bad_fraction."
                    if self.maximum_fraction > 0
                    else "Repair or remove the files: here every sample is needed, whatever max_bad_fraction is."
                )
                raise TooManyBadSamples(
                    f"{self.count} of {self.samples} samples are bad, more than max_bad_fraction = "
                    f"{self.maximum_fraction} accepts; the last is {sample.key!r} of {sample.source}: {sample.reason}. "
                    f"{advice}"
                )


class _Computed(Dataset):
    def __init__(self, source: BatchSource):
        self.source = source

    def __getitem__(self, request: tuple[int, int]) -> tuple[Batch, list[BadSample]] | ValueError:
        try:
            batch, bad = self.source.batch(*request)
            if get_worker_info() is not None:
                _check_temporary_folder()
                _share(batch)
        # Raised in a worker it would reach the user as many lines, with the worker's traceback for its message.
        except ValueError as error:
            return error
        return batch, bad


def _share(batch: Batch) -> None:
    """Put the tensors of a batch into shared memory, where the training process reads them.

    PyTorch does it after the worker has handed the batch over, in a thread whose errors nobody hears: where there is no
    room, the training waits for ever.
    """
    for value in batch.values():
        if isinstance(value, torch.Tensor):
            try:
                value.share_memory_()
            except RuntimeError as error:
                raise ValueError(
                    f"/dev/shm has no room for a batch of a loader's worker ({value.nbytes:,} bytes): give the "
                    "container more shared memory (docker run --shm-size=8g), or set num_workers or batch_size lower; "
                    f"num_workers: 0 needs none. {str(error).splitlines()[0]}"
                ) from error


@cache
def _check_temporary_folder() -> None:
    """Check once in each worker that there is room for the socket through which PyTorch hands tensors over.

    It makes that in the same thread, whose errors nobody hears.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=get_temp_dir()) as file:
            file.write(b"room")
    except OSError as error:
        raise ValueError(
            f"the folder for temporary files, {tempfile.gettempdir()}, has no room, and a loader's worker needs some: "
            f"set the environment variable TMPDIR to another folder; num_workers: 0 needs none. {error.strerror}"
        ) from error


class _Requests(Sampler):
    """The (epoch, batch number) pairs of the iteration that starts next; read in the main process."""

    epoch = 0
    first = 0
    stop = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in range(self.first, self.stop):
            yield self.epoch, number

    def __len__(self) -> int:
        return self.stop - self.first


def _unchanged(item: Any) -> Any:
    return item


def _end_with_the_training(worker: int) -> None:
    """Let SIGTERM end a worker only where the process that trains sends it.

    SLURM sends it to every process of a job, and torch's workers die of it: the training that was about to save itself
    would end with an error. Without its training process a worker ends by itself.
    """
    training = os.getppid()

    def listen() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != training:
            pass
        os._exit(0)

    # Of this thread, and of those that it starts; what a shard is read by is told of it in `remote`.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=listen, daemon=True).start()
