"""What the device does at most: bytes moved and products of large matrices a second, measured on it."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from statistics import median
from time import perf_counter
from typing import Any

import torch

from gpu_parts.part import Machine


def device_limits(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Measure a device: yields the versions and the settings of a `Machine`, as plain values.

    Raises:
        RuntimeError: there is no such device.
    """
    cuda = device.type == "cuda"
    # A copy of a process that has touched the GPU cannot touch it: the caller starts again with a fresh one.
    poisoned = cuda and torch.cuda._is_in_bad_fork()
    if poisoned or (cuda and not torch.cuda.is_available()):
        yield {"poisoned": poisoned, "absent": not poisoned}
        return
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = _processor(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    megabytes, side = (16, 256) if tiny else (1024, 8192) if cuda else (256, 512)
    machine = Machine(name=name, memory=memory, bandwidth=_bandwidth(device, megabytes), rates=_rates(device, side))
    yield asdict(machine)


def seconds_of(run: Callable[[], object], device: torch.device, *, repeats: int = 10, warmup: int = 3) -> float:
    """Time a call: the median of some, by events on a GPU and by the clock elsewhere."""
    for _ in range(warmup):
        run()
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            began = perf_counter()
            run()
            taken.append(perf_counter() - began)
    return median(taken)


def _bandwidth(device: torch.device, megabytes: int) -> float:
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def _rates(device: torch.device, side: int) -> dict[str, float]:
    """Of random matrices: those of zeros are faster than real ones."""
    rates = {}
    for name in ("bfloat16", "float16", "tf32", "float32", "float64"):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        # float32 and float64 are slow on some cards, and reach their rate with less.
        width = side // 2 if name in ("float32", "float64") else side
        left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        product = lambda left=left, right=right, out=out: torch.mm(left, right, out=out)  # noqa: E731
        rates[name] = 2 * width**3 / seconds_of(product, device, repeats=10 if device.type == "cuda" else 3)
    torch.set_float32_matmul_precision("highest")
    return rates


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            named = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        named = []
    return f"{named[0] if named else 'a processor'}, {torch.get_num_threads()} threads"
