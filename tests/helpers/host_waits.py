"""Finds where a computation would make the host wait for a GPU, while it runs on a CPU.

The host runs ahead of a GPU: it queues operations and goes on. It waits where it needs a number that is not there yet:
a size that the data decide (`nonzero`, an index by a mask, `unique`), a branch on a tensor, `item`, `tolist`, `cpu`;
and where a tensor is made of Python numbers on the device, for the copy from memory that is not pinned. On a CPU all
these run without a wait, and are counted all the same.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import discrete_lit
from discrete_lit.core.synchronisation import reads_numbers

_PACKAGE = Path(discrete_lit.__file__).parent
_aten = torch.ops.aten
_METHODS = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__}


class CountedWaits:
    """Counts the waits of what runs inside, by operation and by the place in this package that asks for it.

    `found` counts `"operation at file.py:function"`; a place outside of the package, as in Lightning, is named by its
    module.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._modes = (_Methods(self), _Operators(self))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def count(self, operation: str) -> None:
        self.found[f"{operation} at {_place()}"] += 1


class _Methods(TorchFunctionMode):
    def __init__(self, waits: CountedWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS:
            self.waits.count(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, waits: CountedWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        # A known size is read of nothing; `lift_fresh` makes a tensor of the host's numbers.
        sized = packet is _aten.repeat_interleave and kwargs.get("output_size") is not None
        if (reads_numbers(func, args) and not sized) or packet is _aten.lift_fresh:
            self.waits.count("index by a mask" if "index" in packet.__name__ else packet.__name__)
        return func(*args, **kwargs)


def _place() -> str:
    """The innermost function of the package on the stack, else the innermost module that is not torch's own."""
    frame, outside = sys._getframe(2), ""
    while frame is not None:
        file, name = Path(frame.f_code.co_filename), str(frame.f_globals.get("__name__", ""))
        if _PACKAGE in file.parents:
            return f"{file.relative_to(_PACKAGE)}:{frame.f_code.co_name}"
        if not outside and not name.startswith(("torch.utils", "torch._ops", "torch.overrides", "helpers")):
            outside = f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return outside
