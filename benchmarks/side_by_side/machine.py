"""What the machine can do at most, measured in the same run."""

from statistics import median

import torch

from side_by_side.timing import timed


def bandwidth(device: torch.device, dtype: torch.dtype, megabytes: int = 400) -> float:
    """Bytes a second that a sum reads of an array far larger than the caches."""
    values = torch.ones(megabytes * 2**20 // dtype.itemsize, dtype=dtype, device=device)
    taken = [timed(values.sum).wall for _ in range(7)]
    return values.numel() * dtype.itemsize / median(taken[2:])


def matmul_peak(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """Floating-point operations a second of a square matrix product."""
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    taken = [timed(lambda: torch.mm(left, right, out=out)).wall for _ in range(9)]
    return 2 * side**3 / median(taken[2:])
