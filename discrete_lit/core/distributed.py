"""Collectives over ranks that are no-ops in a single process, decided when called, not when built.

Lightning starts the process group after the modules are constructed, so anything that looks at construction time
whether it must synchronise is silently local.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_is_alone = ContextVar("_is_alone", default=False)
_Result = TypeVar("_Result")


@contextmanager
def alone() -> Iterator[None]:
    """Let this process be the only rank meanwhile: for what it computes without the others."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def world_size() -> int:
    """Return the number of ranks; 1 outside a process group."""
    return dist.get_world_size() if _has_ranks() else 1


def rank() -> int:
    """Return this process's rank; 0 outside a process group."""
    return dist.get_rank() if _has_ranks() else 0


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and not _is_alone.get()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum `value` over ranks, as a new tensor without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def means_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average scalars over ranks, as new tensors without gradient; in a single process, give them back.

    One reduction serves all, and the host goes on meanwhile: for the metrics of a training step. (Lightning's
    `sync_dist` waits at a barrier for each of them.)

    Args:
        values: scalars, the same names in the same order on every rank.
    """
    if world_size() == 1 or not values:
        return values
    means = all_reduce_sum(torch.stack([value.detach().double() for value in values.values()])) / world_size()
    return {name: mean.to(value.dtype) for (name, value), mean in zip(values.items(), means.unbind(), strict=True)}


def logged_batch_size(count: int) -> int:
    """Give the `batch_size` to log a mean over `count` samples with, so that `sync_dist` makes it one over all ranks'.

    Lightning averages the ranks' numbers of samples as whole ones, and drops the fraction: of 2, 2 and 3 samples it
    divides by 2. Of multiples of the number of ranks there is none.
    """
    return count * world_size()


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows `(n_r, ...)` of every rank, in rank order; `n_r` may differ between ranks."""
    if world_size() == 1:
        return rows
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    longest = max(int(count) for count in counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])


def gather_objects(value: Any) -> list[Any]:
    """Give every rank the plain values of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def on_first_rank(compute: Callable[[], _Result]) -> _Result:
    """Compute plain values on rank 0 alone, and give them to every rank; an error is raised on every rank."""
    if world_size() == 1:
        return compute()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = compute()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


@contextmanager
def failing_together() -> Iterator[None]:
    """Run a block on every rank, and raise an error of one on all of them, instead of letting the others wait for it.

    All ranks meet at the end of the block; inside, none may wait for another.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    said = None if error is None else (isinstance(error, ValueError), str(error), type(error).__name__)
    everyone = gather_objects(said)
    if error is not None:
        raise error
    for number, found in enumerate(everyone):
        if found is not None:
            for_the_user, text, kind = found
            raise ValueError(text) if for_the_user else RuntimeError(f"rank {number}: {kind}: {text}")
