"""What a CUDA graph does, on any device: a draw's operations, recorded once and made again on the same memory."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from discrete_lit.core.synchronisation import reads_numbers, tensors

aten = torch.ops.aten
# Operators that start nothing on a device.
EMPTY = {
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten.empty_strided,
    aten.new_empty_strided,
    aten.lift_fresh,
    aten.promote_types,
}


def starts_something(func: Any, args: Any, result: Any) -> bool:
    """Whether an operator starts anything on a device: it does not make memory or give another name to some."""
    if func.namespace == "prim" or getattr(func, "overloadpacket", func) in EMPTY:
        return False
    named = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
    if not named:
        return True
    # In inference mode `reshape` and its like come as they are: they may copy.
    inputs = {each.untyped_storage()._cdata for each in tensors(args)}
    return any(each.untyped_storage()._cdata not in inputs for each in tensors(result))


class RecordedGraph(TorchDispatchMode):
    """Records the operators inside with their tensors; `replay` makes them again, into the same tensors.

    As in a CUDA graph, all that is not a tensor stays what it was: numbers, shapes, decisions. On a CPU it cannot tell
    the host's own tensors from the device's: it takes for the host's what is made of nothing from outside.

    Raises:
        RuntimeError: an operator that a host waits for, which a graph cannot hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._of_the_host: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lifted = func is aten.lift_fresh.default
        of_the_host = lifted or all(id(each) in self._of_the_host for each in tensors((args, kwargs)))
        if reads_numbers(func, args) and not of_the_host:
            raise RuntimeError(f"{func} is not permitted while a stream is captured")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))  # all tensors stay, and so their names
        if of_the_host:
            self._of_the_host.update(id(each) for each in tensors(result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            if not starts_something(func, args, result):
                continue
            with torch.autocast("cpu", enabled=False):  # what it casts was recorded with the rest
                again = func(*args, **kwargs)
            for held, new in zip(tensors(result), tensors(again), strict=True):
                if held is not new and held.data_ptr() != new.data_ptr():
                    held.copy_(new)

    def operators(self) -> Counter[str]:
        """How often each operator is made that starts something."""
        return Counter(str(func) for func, args, _, result in self.calls if starts_something(func, args, result))


class RecordedGraphs:
    """A recorder for `GraphedDraw` on a CPU; it counts what it was asked for."""

    def __init__(self) -> None:
        self.warmed_up, self.graphs = 0, list[RecordedGraph]()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        self.warmed_up += 1
        return run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = RecordedGraph()
        with graph:
            run()
        self.graphs.append(graph)
        return graph.replay
