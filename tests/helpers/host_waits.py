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

_PACKAGE = Path(discrete_lit.__file__).parent
_aten = torch.ops.aten
# Operators that need a number of their input on the host, or make a tensor of the host's numbers.
_WAITING = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten.equal,
    _aten.is_nonzero,
    _aten.bincount,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.lift_fresh,
}
_METHODS = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__}


class HostWaits:
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
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS:
            self.waits.count(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        masked = packet in (_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index_put) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counted = func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if packet in _WAITING or masked or counted:
            self.waits.count("index by a mask" if masked else packet.__name__)
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
