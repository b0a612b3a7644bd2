"""Peak memory of a call: of the process, in one that holds nothing else, or of torch's allocator."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_of(run: Callable[[], object]) -> int:
    """Bytes held at most during a call above what was held before it: of the process, or of the GPU in use."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            done.wait(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak - before


def allocated_peak(run: Callable[[], object]) -> int:
    """Bytes that torch's allocator gave at most during a call, without what was held before it.

    On a CPU each allocation is counted by torch's profiler, so that the number is the same in every run; memory that
    libraries take for themselves is not in it.
    """
    if torch.cuda.is_available():
        return peak_of(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with TemporaryDirectory() as folder:
        recorded.export_chrome_trace(str(trace := Path(folder) / "trace.json"))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def in_own_process(function: Callable[..., int], *arguments: Any) -> int:
    """What a module's function returns in a fresh process with as many threads as this one."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, arguments)


def saved_bytes(forward: Callable[[], Tensor], network: nn.Module) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    # What is kept stays allocated while the result is held, so that no storage takes the place of another.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        result = forward()
    total = sum(kept.values())
    del result
    return total
