"""The C library's memory: what a batch frees on a processor, the next one needs again."""

import ctypes
import os
import platform

import torch

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGEST = 2**30
"""The largest block, in bytes, that is kept."""
_MOST = 2**31 - 1
"""How many bytes are kept at most: as many as an int of C counts."""


def keep_freed_memory(device: torch.device) -> bool:
    """Let this process keep the memory that it frees, up to 2 GB, where it computes on a processor.

    glibc gives blocks above 32 MB back to the system at once, which clears every page of them before it gives it out
    again. Networks on a processor make such blocks in every layer: kept, EfficientNet-Lite0 takes 30% less time.

    Args:
        device: that computes.

    Returns:
        Whether anything was set: not on other devices, with other C libraries, or where the environment sets the same
        (`MALLOC_MMAP_THRESHOLD_` or `MALLOC_TRIM_THRESHOLD_`).
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    if os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _MOST))
