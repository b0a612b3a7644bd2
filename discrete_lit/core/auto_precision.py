"""The precision that a command computes in, where its user leaves it to the machine: `precision: auto`."""

from pathlib import Path

import torch

_CPU_FLAGS = Path("/proc/cpuinfo")
# Either multiplies pairs of bfloat16 numbers and adds up in float32: AMX by tiles, AVX-512 by vectors.
_BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16"}
# Ampere: older GPUs emulate bfloat16.
_FIRST_BFLOAT16_CAPABILITY = (8, 0)


def resolve_precision(precision: str, accelerator: str = "auto") -> str:
    """Give the precision that `"auto"` means here; any other comes back as it is.

    `"auto"` is `bf16-mixed` where products of bfloat16 are faster than those of float32: on GPUs of compute capability
    8.0 and above, and on processors with `avx512_bf16` or `amx_bf16` (Linux names them in /proc/cpuinfo; elsewhere
    none is known). It is `32-true` on everything else.

    Args:
        precision: Lightning's, or `"auto"`.
        accelerator: Lightning's: `"auto"`, `"cpu"`, `"gpu"`, `"cuda"` or another.
    """
    if precision != "auto":
        return precision
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        oldest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        return "bf16-mixed" if oldest >= _FIRST_BFLOAT16_CAPABILITY else "32-true"
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    return "bf16-mixed" if on_cpu and cpu_multiplies_bfloat16() else "32-true"


def cpu_multiplies_bfloat16() -> bool:
    """Say whether this processor has instructions that multiply bfloat16 numbers."""
    try:
        lines = _CPU_FLAGS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return not _BFLOAT16_FLAGS.isdisjoint(flags.split())
