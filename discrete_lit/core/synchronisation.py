"""What makes the host wait for its device, and how sampling does without.

What goes wrong in a draw is noted on its device, and asked for once, at the draw's end.

To ask a GPU whether a logit is NaN, the host waits until the GPU has done all that it was given, and the GPU then waits
for the host: at each of hundreds of steps this takes longer than the step. So a sampler notes a flag (`forbid`) and
goes on, with ids that stay in range whatever the numbers are, and `raise_noted` asks for all flags together.

A copy from the host to the device waits too: fixed tables are copied once (`on_device`).

`host_sees` is the other half: what a sampler saves by looking at its tensors, it saves only where looking is free.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


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


# They stay: a recorded draw goes on reading them.
_tables: dict[Hashable, Tensor] = {}


def on_device(make: Callable[..., Tensor], *arguments: Hashable, device: torch.device) -> Tensor:
    """Give the fixed table `make(*arguments)` on a device; it is made, and copied there, at its first use."""
    key = make, arguments, device
    if key in _tables:
        return _tables[key]
    with torch.inference_mode(False):
        host = torch.device("cpu")
        table = make(*arguments) if device == host else on_device(make, *arguments, device=host).to(device)
    if has_data(table):
        _tables[key] = table
    return table
