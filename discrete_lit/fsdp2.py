"""Sharded training (FSDP2) and its sharded checkpoints: how they are written, checked, and read as one.

A sharded checkpoint is a folder: each rank's part of the weights, their averages and the optimizer's state, as
`torch.distributed.checkpoint` writes them, and `meta.pt` with all else. Each rank reads what its own part needs, so any
number of ranks goes on from it; `read_shards` puts the whole together in one process.
"""

import io
import logging
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor

from discrete_lit.core.background import BackgroundQueue
from discrete_lit.core.files import UNFINISHED_SUFFIX, atomic_write, publish
from discrete_lit.core.lightning_internals import saves_one_file
from discrete_lit.core.modules import RunningStatistics
from discrete_lit.core.trust import printable

_log = logging.getLogger(__name__)
META = "meta.pt"
"""The file of a sharded checkpoint with all that is no shard, by Lightning's convention."""
WEIGHTS = ("state_dict", "current_model_state")
"""Entries of a checkpoint that are weights by their names: those that are published, and with an EMA the raw ones."""
_OPTIMIZER = "optimizer_"


class FSDP2Strategy(ModelParallelStrategy):
    """Split parameters, gradients, optimizer and averages over the ranks; sharded checkpoints are whole or absent.

    Lightning's `ModelParallelStrategy` with three differences. All processes share one model, whereas `"auto"` there
    means one part for each node. A sharded checkpoint holds the averages of `ExponentialMovingAverage` too. And it is
    written beside its name by a thread of each rank while training goes on, from a copy in the host's memory; when all
    have brought theirs to the disk, rank 0 gives it its name. The one before stays until then.

    Args:
        data_parallel_size: processes that share one model; by default all.
        save_distributed_checkpoint: write folders of shards; False gathers one ordinary file on rank 0.
        process_group_backend: NCCL for GPUs and gloo for processors by default.
        timeout: after which a collective is given up, as in `"1:00:00"`; see `CollectiveTimeout`.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = True,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(data_parallel_size, 1, save_distributed_checkpoint, process_group_backend, timeout)
        self._saving_group: Any = None
        self._queue = BackgroundQueue("checkpoints")

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if saves_one_file(self) or storage_options is not None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        from torch.distributed.checkpoint.state_dict_saver import async_save

        path = Path(self.broadcast(filepath))
        self.wait()
        unfinished = Path(f"{path}{UNFINISHED_SUFFIX}")
        if self.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self.barrier()
        shards = {name: checkpoint.pop(name) for name in WEIGHTS if name in checkpoint}
        optimizers = checkpoint.pop("optimizer_states", [])
        shards |= {f"{_OPTIMIZER}{number}": state for number, state in enumerate(optimizers)}
        rest = io.BytesIO()
        torch.save({**checkpoint, "sharded": list(shards)}, rest)
        if self._saving_group is None:
            # Of its own, for its collectives are those of a thread, and on the host.
            self._saving_group = dist.new_group(backend="gloo", timeout=self._timeout)
        written = async_save(shards, checkpoint_id=unfinished, process_group=self._saving_group)
        self._queue.submit(self._publish, cast(Future[Any], written), unfinished, path, rest.getvalue())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        self.wait()
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = super().load_checkpoint(path, weights_only)
        if path.is_dir() and WEIGHTS[1] in checkpoint.get("sharded", ()):
            assert self.model is not None
            # What a state dictionary holds is the model's own memory, where the averages are now.
            raw = {name: cast(torch.Tensor, value).clone() for name, value in get_model_state_dict(self.model).items()}
            load({WEIGHTS[1]: raw}, checkpoint_id=path)
            checkpoint[WEIGHTS[1]] = raw
        return checkpoint

    def remove_checkpoint(self, filepath: Any) -> None:
        if self._queue:
            self._queue.submit(super().remove_checkpoint, filepath)
        else:
            super().remove_checkpoint(filepath)

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            OSError: a checkpoint could not be written.
        """
        self._queue.wait()
        if (wait := getattr(self.checkpoint_io, "wait", None)) is not None:
            wait()

    def teardown(self) -> None:
        try:
            self._queue.close()
        finally:
            super().teardown()

    def _publish(self, written: Future[Any], unfinished: Path, path: Path, rest: bytes) -> None:
        """Give a checkpoint its name; on rank 0 `written` says that the shards of all ranks are on the disk."""
        written.result()
        if self.is_global_zero:
            with atomic_write(unfinished / META) as file:
                file.write(rest)
            publish(unfinished, path)


_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def shard_steps(module: LightningModule, mesh: DeviceMesh) -> None:
    """Shard all trained weights of a module as one: whole within its steps, and in shards from the backward pass on.

    For modules whose steps use their parts by many methods and take gradients on the way, as an adversarial loss does:
    what lies outside a step goes into `whole_weights`. Frozen weights stay whole on every rank.

    Args:
        module: whose steps they are; `isinstance(module, FSDPModule)` from then on.
        mesh: of the ranks, one-dimensional.
    """
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    for step in _STEPS:
        register_fsdp_forward_method(module, step)
    # While the weights are whole, the shards are not among the module's parameters.
    module._written = [  # type: ignore[assignment]
        (part, name, shards)
        for part in module.modules()
        if isinstance(part, RunningStatistics)
        for name, shards in part.named_parameters(recurse=False)
    ]


@torch.no_grad()
def keep_written(module: LightningModule) -> None:
    """Bring to the shards what `RunningStatistics` wrote into whole weights, such as codes that it revived.

    Nothing where `shard_steps` was not called. All ranks wrote the same.
    """
    for part, name, shards in module.__dict__.get("_written", ()):
        whole = getattr(part, name)
        if whole is not shards:
            shards.copy_(distribute_tensor(whole, shards.device_mesh, shards.placements, src_data_rank=None))


@contextmanager
def whole_weights(module: LightningModule) -> Iterator[None]:
    """Gather the weights of `shard_steps` for what lies outside a step: all ranks have to come here.

    Nothing happens where it was not called, as for generators, whose networks gather their own.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a folder, as sharded checkpoints are."""
    return Path(path).is_dir()


def read_shards(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read all weights and optimizer states of a sharded checkpoint in one process, on the CPU.

    `check_shards` must have passed: PyTorch unpickles what is no tensor.

    Returns:
        `state_dict`, with an EMA `current_model_state`, and `optimizer_states` with parameters by their names.
    """
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    _load_state_dict(found, storage_reader=FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    numbers = sorted(int(name.removeprefix(_OPTIMIZER)) for name in found if name.startswith(_OPTIMIZER))
    states = [found.pop(f"{_OPTIMIZER}{number}") for number in numbers]
    return {**found, "optimizer_states": states} if states else found


def by_number(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Give an optimizer's state by the numbers of parameters, as files of one process have it, in place of their names.

    Args:
        state: `state` and `param_groups`.
        names: of all parameters of the module, in its order.
    """
    number = {name: place for place, name in enumerate(names)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {number[name]: value for name, value in state["state"].items()}, "param_groups": groups}


class _MetadataUnpickler(pickle.Unpickler):
    """Read the description of a sharded checkpoint: classes that `torch.distributed.checkpoint` writes, no others."""

    def find_class(self, module: str, name: str) -> Any:
        from torch.distributed.checkpoint import filesystem, metadata

        if module == metadata.__name__ and name in (*metadata.__all__, "_MEM_FORMAT_ENCODING"):
            return getattr(metadata, name)
        if (module, name) == (filesystem.__name__, "_StorageInfo"):
            return filesystem._StorageInfo
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
            return Path
        raise ValueError(f"it names {module}.{name}, which no sharded checkpoint holds: it may be code")


def check_shards(folder: Path) -> None:
    """Check that PyTorch executes no code when it reads a sharded checkpoint: it unpickles what is no tensor.

    Raises:
        ValueError: the description names anything but its own classes, or a value is more than plain data.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    for file in folder.glob("*.metadata"):  # of ranks too; `glob` finds `.metadata` itself
        with file.open("rb") as opened:
            found = _MetadataUnpickler(opened).load()
        stored = found.storage_data if isinstance(found, Metadata) else None
        entries = found.state_dict_metadata if isinstance(found, Metadata) else None
        if not isinstance(stored, dict) or not isinstance(entries, dict):
            raise ValueError(f"{file.name} describes no sharded checkpoint")
        for index, place in stored.items():
            if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
                raise ValueError(f"{file.name} describes no sharded checkpoint")
            shard = folder / str(place.relative_path)
            if shard.parent != folder or not shard.is_file() or getattr(place, "transform_descriptors", None):
                raise ValueError(f"{printable(place.relative_path)} is missing, elsewhere or compressed")
            if not 0 <= place.offset <= place.offset + place.length <= shard.stat().st_size:
                raise ValueError(f"{shard.name} is truncated")
            if isinstance(entries.get(index.fqn), BytesStorageMetadata):
                with shard.open("rb") as opened:
                    opened.seek(place.offset)
                    torch.load(io.BytesIO(opened.read(place.length)), map_location="cpu", weights_only=True)
