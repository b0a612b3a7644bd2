"""The speed of this machine: products of matrices, and copies of memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_SIDE = 1024
_BYTES = 2**27
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, kw_only=True)
class MachineSpeed:
    """The most that a device reaches, measured on it."""

    device: str
    """Its name."""
    products: dict[str, float]
    """Operations a second in products of large matrices, two for a multiply-add, by precision."""
    bandwidth: float
    """Bytes a second that a copy reads and writes, together."""


def measure_speed(device: torch.device, *, seconds: float = 1.0) -> MachineSpeed:
    """Measure products of 1,024 x 1,024 matrices (4,096 on a GPU) and a copy of 128 MiB, each the best of its runs.

    Args:
        device: to measure.
        seconds: for each precision and the copy.
    """
    on_gpu = device.type != "cpu"
    side = 4 * _SIDE if on_gpu else _SIDE
    products = {}
    for dtype in (torch.float32, torch.bfloat16, *((torch.float16,) if on_gpu else ())):
        left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
        products[_NAMES[dtype]] = 2 * side**3 / _best(lambda a=left, b=right: a @ b, device, seconds)
    source = torch.ones(_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return MachineSpeed(
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads of a CPU",
        products=products,
        bandwidth=2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds),
    )


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Time a run, with all that the device has still to do."""
    begin = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


def _best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Give the least time of a run, of as many as fit into the seconds; three at least, behind one that warms up."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        times.append(seconds_of(run, device))
    return min(times[1:])
