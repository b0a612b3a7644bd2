"""Waits of the host for its device, and how sampling does without.

What goes wrong in a draw is noted on its device, and asked for once, at the draw's end.

To ask a GPU whether a logit is NaN, the host waits until the GPU has done all that it was given, and the GPU then waits
for the host: at each of hundreds of steps this takes longer than the step. So a sampler notes a flag (`forbid`) and
goes on, with ids that stay in range whatever the numbers are, and `raise_noted` asks for all flags together.

A copy from the host to the device waits too: fixed tables are copied once (`on_device`).

`host_sees` is the other half: what a sampler saves by looking at its tensors, it saves only where looking is free.
`HostWaits` finds what still waits.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Checks:
    """Notes what must not be, as flags on a device.

    Args:
        blind: the host reads nothing before the end, on a CPU neither: what is computed is recorded for other inputs.
    """

    def __init__(self, *, blind: bool = False) -> None:
        self.blind = blind
        self._noted: list[tuple[Tensor, Callable[[], str]]] = []

    def note(self, flag: Tensor, message: Callable[[], str]) -> None:
        """Remember a flag, bool `()`, and the message of its error, which may read tensors."""
        self._noted.append((flag, message))

    def flags(self) -> Tensor:
        """All flags that were noted, bool `(n,)`, on their device."""
        return torch.stack([flag for flag, _ in self._noted]) if self._noted else torch.zeros(0, dtype=torch.bool)

    def raise_noted(self, flags: Tensor | None = None) -> None:
        """Wait for the device, once.

        Args:
            flags: what `flags` gave, where the operations behind it have run again.

        Raises:
            ValueError: a flag is set; the message is that of the first.
        """
        for wrong, (_, message) in zip((self.flags() if flags is None else flags).tolist(), self._noted, strict=True):
            if wrong:
                raise ValueError(message())


_running: ContextVar[Checks | None] = ContextVar("the checks of the draw that runs", default=None)


@contextmanager
def noting(checks: Checks) -> Iterator[Checks]:
    """Note flags in `checks` inside, or in those of a draw around this one."""
    around = _running.get()
    token = _running.set(around or checks)
    try:
        yield around or checks
    finally:
        _running.reset(token)


@contextmanager
def checked_at_the_end() -> Iterator[None]:
    """Note flags inside, and raise what they say behind; or leave that to a draw around this one.

    Raises:
        ValueError: a flag is set.
    """
    own = Checks()
    with noting(own):
        yield
    own.raise_noted()


def forbid(flag: Tensor, message: Callable[[], str]) -> None:
    """Say that a flag, bool `()`, must not be set: noted where a draw runs, asked for at once where none does.

    Raises:
        ValueError: it is set, and no draw runs.
    """
    checks = _running.get()
    if checks is not None:
        checks.note(flag, message)
    elif bool(flag):
        raise ValueError(message())


def host_sees(tensor: Tensor) -> bool:
    """Tell whether a tensor's numbers can be read without waiting: on a CPU, unless the draw is recorded."""
    checks = _running.get()
    return tensor.device.type == "cpu" and has_data(tensor) and not (checks is not None and checks.blind)


def host_may_wait(tensor: Tensor) -> bool:
    """Tell whether a tensor's numbers may be read: anywhere but in a draw, and there as `host_sees` says."""
    return has_data(tensor) if _running.get() is None else host_sees(tensor)


class NotRecordableError(RuntimeError):
    """A draw cannot be recorded: the host has to read what was drawn to know what comes next."""


def refuse_recording(reason: str) -> None:
    """Say, before the host reads what it cannot do without, that this draw is not to be recorded.

    Raises:
        NotRecordableError: it is being recorded.
    """
    checks = _running.get()
    if checks is not None and checks.blind:
        raise NotRecordableError(reason)


def has_data(tensor: Tensor) -> bool:
    """Tell whether a tensor's entries can be read, which they cannot while operations are counted."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


_copying_tables: ContextVar[bool] = ContextVar("whether a table is copied", default=False)
# They stay: a recorded draw goes on reading them.
_tables: dict[Hashable, Tensor] = {}


@contextmanager
def copying_tables() -> Iterator[None]:
    """Say that what is copied inside is copied once, and stays."""
    token = _copying_tables.set(True)
    try:
        yield
    finally:
        _copying_tables.reset(token)


def on_device(make: Callable[..., Tensor], *arguments: Hashable, device: torch.device) -> Tensor:
    """Give the fixed table `make(*arguments)` on a device; it is made, and copied there, at its first use."""
    key = make, arguments, device
    if key in _tables:
        return _tables[key]
    with torch.inference_mode(False), copying_tables():
        host = torch.device("cpu")
        table = make(*arguments) if device == host else on_device(make, *arguments, device=host).to(device)
    if has_data(table):
        _tables[key] = table
    return table


# --- What waits ---

_aten = torch.ops.aten
_READING = {
    _aten._local_scalar_dense,
    _aten.item,
    _aten.nonzero,
    _aten.masked_select,
    _aten.equal,
    _aten.is_nonzero,
    _aten.unique_consecutive,
    _aten.unique_dim,
    _aten._unique,
    _aten._unique2,
    _aten.bincount,
    _aten.repeat_interleave,
    _aten.argwhere,
}
_INDEXING = {
    _aten.index,
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
    _aten._unsafe_index,
    _aten._unsafe_index_put,
}
_COPYING = {_aten._to_copy, _aten.copy_}


def reads_numbers(operator: Any, arguments: Any) -> bool:
    """Tell whether an operator gives the host a number of a tensor, or a shape that its numbers decide, as masks do."""
    packet = getattr(operator, "overloadpacket", None)
    if packet in _INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
    return packet in _READING


def tensors(tree: Any) -> list[Tensor]:
    """Give the tensors among nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class HostWaits(TorchDispatchMode):
    """Lists the operators inside for which the host waits for a GPU: `seen`.

    They are those that read numbers of its tensors, and copies between it and the host but of `on_device`'s tables. In
    a `FakeTensorMode`, tensors can say that they are on a GPU where there is none; to read one then raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_gpu = any(each.is_cuda for each in tensors((args, kwargs)))
        if on_gpu and reads_numbers(func, args):
            self.seen.append(str(func))
        result = func(*args, **(kwargs or {}))
        if getattr(func, "overloadpacket", None) in _COPYING and not _copying_tables.get():
            devices = {each.device.type for each in tensors((args, kwargs, result))}
            if len(devices) > 1:
                self.seen.append(f"{func} between {' and '.join(sorted(devices))}")
        return result
