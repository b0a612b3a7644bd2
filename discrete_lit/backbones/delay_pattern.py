"""The delay pattern of MusicGen: several codes of a frame in one sequence (Copet et al., 2023, section 2.2).

With K codebooks the code of book k of frame t stands at position t + d_k, d = (0, 1, ..., K - 1):

    position    0    1    2    3    4    5
    book 0     0,0  0,1  0,2  0,3   -    -
    book 1      -   1,0  1,1  1,2  1,3   -
    book 2      -    -   2,0  2,1  2,2  2,3

The codes of a position are predicted together, from the positions before. So a frame's code of book k is predicted with
those of books 0 to k - 1 of its own frame known, and N frames take N + K - 1 passes, not N K.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class DelayPattern:
    """Lay out codes `(B, T, K)` by their delays, and take them back.

    Args:
        frames: T.
        delays: d_k of each of the K books, 0 or more; one at least is 0.

    Raises:
        ValueError: no frames, no books, or other delays.
    """

    def __init__(self, frames: int, delays: Sequence[int]) -> None:
        if frames < 1 or not delays or min(delays) != 0:
            raise ValueError(
                f"a delay pattern needs frames, and delays of 0 or more of which one is 0; got {frames} frames and "
                f"delays={list(delays)}"
            )
        self.frames, self.delays = frames, tuple(delays)
        self.positions = frames + max(delays)

    def present(self, device: torch.device | None = None) -> Tensor:
        """Say where a code stands: `(positions, K)` bool."""
        position = torch.arange(self.positions, device=device)
        frame = torch.stack([position - delay for delay in self.delays], dim=-1)  # nothing is copied to the device
        return (frame >= 0) & (frame < self.frames)

    def lay_out(self, codes: Tensor) -> Tensor:
        """Delay codes `(B, T, K)`: `(B, positions, K)`, -1 where no code stands."""
        laid = codes.new_full((len(codes), self.positions, len(self.delays)), -1)
        for book, delay in enumerate(self.delays):
            laid[:, delay : delay + self.frames, book] = codes[..., book]
        return laid

    def codes(self, laid: Tensor) -> Tensor:
        """Take the codes `(B, T, K)` of `(B, positions, K)`."""
        books = [laid[:, delay : delay + self.frames, book] for book, delay in enumerate(self.delays)]
        return torch.stack(books, dim=-1)
