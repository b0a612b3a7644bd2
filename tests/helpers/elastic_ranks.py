"""Ranks of a training that take batches together, for `several_ranks.on_ranks`."""

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from discrete_lit.callbacks import Preemption
from discrete_lit.data import TokenArrays


def take_steps(
    folder: str, batch_size: int, accumulated: int, steps: int, state: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Take the batches of some steps as this rank, after a resume where there is a state.

    Returns:
        `global`: the indices of each global batch, in the order of the ranks; `state` behind them; `same`: whether the
        state is that of every rank; `agreement`: seconds until all know, by `Preemption`, that none was told to end.
    """
    rank, count = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    data = TokenArrays(folder, batch_size=batch_size, num_workers=0)
    data.trainer = AccumulatingTrainer(accumulated)  # type: ignore[assignment]
    loader = data.training_loader()
    if state is not None:
        loader.load_state_dict(state)
    taken: list[list[int]] = []
    batches: Any = iter(())
    for _ in range(steps):
        step: list[int] = []
        for _ in range(accumulated):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            parts = [torch.empty_like(batch["index"]) for _ in range(count)]
            dist.all_gather(parts, batch["index"])
            step += torch.cat(parts).tolist()
        taken.append(step)
    states: list[Any] = [None] * count
    dist.all_gather_object(states, loader.state_dict())
    preemption = Preemption()
    preemption._group = dist.new_group(backend="gloo")
    preemption._agree()
    dist.barrier()
    begin, agreements = time.perf_counter(), 50
    for _ in range(agreements):
        assert preemption._agree() == 0
    seconds = (time.perf_counter() - begin) / agreements
    dist.destroy_process_group()
    same = all(other == states[0] for other in states)
    return {"global": taken, "state": states[0], "same": same, "agreement": seconds}


class AccumulatingTrainer:
    """What a DataModule asks of its trainer, of ranks that the process group has."""

    current_epoch, overfit_batches, limit_train_batches, distributed_sampler_kwargs = 0, 0.0, 1.0, None

    def __init__(self, accumulate_grad_batches: int) -> None:
        self.accumulate_grad_batches = accumulate_grad_batches
