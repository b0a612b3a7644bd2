"""Work that goes on beside training, one piece after the other."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BackgroundQueue:
    """A thread that does one piece of work after the other, in the order in which they are given.

    It starts with the first piece. Each piece may weigh something, such as the memory that it holds, so that whoever
    gives more can wait until less is held. An error is raised to whoever waits next.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[Future[None], int]] = deque()

    def __bool__(self) -> bool:
        """Whether something may be undone: it was given since the last `wait`."""
        return bool(self._pending)

    def submit(self, work: Callable[..., None], *arguments: Any, weight: int = 0) -> None:
        """Give a piece of work, and return at once."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._pending.append((self._thread.submit(work, *arguments), weight))

    def wait(self, most: int = 0) -> None:
        """Wait until what is not done weighs at most so much; 0 waits for all of it, also for what weighs nothing.

        Raises:
            Exception: what the work raised.
        """
        while self._pending and (not most or sum(weight for _, weight in self._pending) > most):
            self._pending.popleft()[0].result()

    def close(self) -> None:
        """Wait for all work, and end the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._thread = None
