"""What the host does for a device: the kernels that it launches, and how often it waits for one to end.

On a GPU both are calls of CUDA's runtime that `torch.profiler` records. On a CPU, where nothing is launched, the
operations that would be kernels on a GPU are counted, and those that would wait there.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

# By the beginning of their names. The profiler itself waits for the device (cudaDeviceSynchronize).
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel", "cudaMemsetAsync")
_COPIES, _GRAPHS = "cudaMemcpyAsync", "cudaGraphLaunch"
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuEventSynchronize")
# Operations of a CPU that hand out memory or another view of it: nothing runs.
_VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "as_strided view reshape _unsafe_view _reshape_alias expand select slice narrow transpose t permute unsqueeze "
        "squeeze split chunk unbind unflatten flatten detach alias lift_fresh lift_fresh_copy empty empty_like "
        "empty_strided resize_ set_ split_with_sizes result_type item is_nonzero numpy_T mT view_as expand_as to"
    ).split()
)
_CPU_WAITS = ("aten::_local_scalar_dense", "aten::nonzero")


class HostWork(NamedTuple):
    """Counts of one call."""

    launches: int
    """Kernels and copies that were launched one by one; on a CPU, operations."""
    graphs: int
    """Graphs that were launched."""
    waits: int
    """Times that the host waited for the device."""


def of_runtime_calls(names: Iterable[str]) -> HostWork:
    """Count the calls of CUDA's runtime and driver among the names of events."""
    calls = Counter(names)

    def count(*beginnings: str) -> int:
        return sum(times for name, times in calls.items() if name.startswith(beginnings))

    return HostWork(count(*_LAUNCHES, _COPIES), count(_GRAPHS), count(*_WAITS) + calls["cudaMemcpy"])


class _Counting:
    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.profile = profile(activities=activities)

    def start(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.profile.start()

    def stop(self) -> HostWork:
        self.profile.stop()
        events = self.profile.events()
        assert events is not None
        if self.on_gpu:
            return of_runtime_calls(event.name for event in events)
        leaves = [event.name for event in events if event.name.startswith("aten::") and not _operations_in(event)]
        waits = sum(name in _CPU_WAITS for name in leaves)
        return HostWork(sum(name not in _VIEWS for name in leaves) - waits, 0, waits)


def _operations_in(event: Any) -> bool:
    return any(child.name.startswith("aten::") for child in event.cpu_children)


def host_work(run: Callable[[], object], device: torch.device) -> HostWork:
    """Count what the host does in a call, which should have been made once before."""
    counting = _Counting(device)
    counting.start()
    run()
    return counting.stop()


def host_work_between_passes(
    network: nn.Module, run: Callable[[], object], device: torch.device, *, passes: tuple[int, int]
) -> HostWork:
    """Count what the host does in a call from one pass of a network to another, by their numbers from 0.

    What a call checks before its loop, and what it does behind it, is left out.

    Args:
        network: whose passes are counted.
        run: makes the passes, in Python: not by replaying a graph.
        device: that it runs on.
        passes: the pass before which counting begins, and the one before which it ends.
    """
    counting, number, counted = _Counting(device), 0, []

    def note(*_: object) -> None:
        nonlocal number
        if number == passes[0]:
            counting.start()
        elif number == passes[1]:
            counted.append(counting.stop())
        number += 1

    handle = network.register_forward_pre_hook(note)
    try:
        run()
    finally:
        handle.remove()
        if passes[0] < number <= passes[1]:
            counting.stop()
    if not counted:
        raise ValueError(f"passes {passes[0]} and {passes[1]} were to be compared, and only {number} were made")
    return counted[0]
