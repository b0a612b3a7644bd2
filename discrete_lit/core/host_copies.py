"""Numbers of a device on the host, without a wait for what the device has yet to do.

The host queues work for a GPU ahead of it. `Tensor.item` puts its copy at the end of that queue and waits for all of
it; meanwhile nothing new is queued, and the GPU then has nothing to do. A `HostCopy` is queued where its tensor is
made, and read later: it waits for what came before it, and the GPU works on at what came after.
"""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Begins to copy a tensor to the host.

    Args:
        value: of any shape and device; it must not change in place before `values` is called.
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._copied = value.detach(), None
        if value.is_cuda:
            # A copy to other memory waits; and a default device may be set, which is not the host.
            pinned = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
            self._value = pinned.copy_(self._value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(value.device))

    def values(self) -> Any:
        """Wait for the copy alone, and give the tensor's numbers, as `Tensor.tolist` does: one, or nested lists."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.tolist()
