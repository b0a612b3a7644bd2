"""Some rows of a stream, evenly spaced over it."""

import torch
from torch import Tensor


class EvenSample:
    """Keeps up to `limit` rows of a stream of known length, so that of sorted classes each is among them.

    Args:
        limit: the most rows to keep; all by default.
        total: rows of the stream.
    """

    def __init__(self, limit: int | None, total: int) -> None:
        self.limit = total if limit is None else min(limit, total)
        self.total = total
        self._seen = 0
        self._kept: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """The next rows `(B, D)` of the stream."""
        place = torch.arange(self._seen, self._seen + len(rows))
        # The first of every total / limit rows: there the whole part of place * limit / total goes up.
        chosen = (place * self.limit) // self.total != ((place - 1) * self.limit) // self.total
        self._seen += len(rows)
        self._kept.append(rows.detach().cpu()[chosen])

    def compute(self) -> Tensor:
        """The rows so far, `(n, D)` on the CPU; after the whole stream n is the limit."""
        return torch.cat(self._kept)
