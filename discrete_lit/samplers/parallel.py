"""What samplers of bidirectional backbones share: several tokens at each step."""

from collections.abc import Iterable
from math import floor
from typing import Any

import torch
from torch import Tensor

from discrete_lit.processes import MaskSchedule
from discrete_lit.processes.reverse import is_absorbing
from discrete_lit.samplers.drawing import Drawing
from discrete_lit.samplers.sampler import Sampler


class ParallelSampler(Sampler):
    """Fills a sequence in a number of steps. It can keep tokens at any places.

    Args:
        steps: T, at least 1; of samplers that reveal so many tokens at a step, at most N.
        settings: of `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    attention = "bidirectional"

    def __init__(self, steps: int, **settings: Any) -> None:
        super().__init__(**settings)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps

    def check_steps(self, drawing: Drawing) -> None:
        """Raises ValueError where there are more steps than tokens, or noise that does more than mask."""
        if drawing.denoiser is not None and not is_absorbing(drawing.denoiser.process):
            raise ValueError(
                f"{type(self).__name__} needs a generator of masked tokens, {type(drawing.denoiser.process).__name__} "
                "does more than mask: use AncestralSampler"
            )
        if self.steps > drawing.layout.length:
            raise ValueError(
                f"steps={self.steps} exceeds the {drawing.layout.length} tokens of a sequence: "
                "each step reveals at least one"
            )

    def choose_at(
        self, logits: Tensor, where: Tensor, width: int, uniforms: Tensor, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Draw at some of the places alone: a draw over the vocabulary costs far more than its gathering.

        Args:
            logits: `(B, N, K)` guided.
            where: `(B, N)` bool.
            width: the most places of a row.
            uniforms: `(B, N)` float64.
            progress: the share of the steps that is done after this one.

        Returns:
            Ids `(B, N)` and what they are ordered by `(B, N)` float64; of no meaning elsewhere.
        """
        places = where.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        chosen = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
        ids, score = self.choose_with_score(chosen, uniforms.gather(1, places), progress)
        return (
            ids.new_zeros(where.shape).scatter(1, places, ids),
            score.new_zeros(where.shape, dtype=torch.float64).scatter(1, places, score.double()),
        )

    def choose_with_score(self, logits: Tensor, uniforms: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Ids `(B, n)` of guided logits `(B, n, K)`, and what they are ordered by: their log-probability."""
        return self.choose(logits, uniforms)


def masked_counts(schedule: MaskSchedule, steps: int, unknown: int) -> list[int]:
    """Tokens still masked after each of the T steps where `unknown` were masked at the start.

    `floor(unknown m(1 - (i + 1) / T))` after step i, but at most one fewer than before and at least one for each step
    to come, as far as there are so many; none after the last.
    """
    counts, masked = [], unknown
    for step in range(1, steps):
        t = torch.tensor(1 - step / steps, dtype=torch.float64)
        # Rounding must not decide a count: 128 of 256 tokens, not 127, where m is 0.5 - 6e-17.
        wanted = floor(unknown * float(schedule.mask_probability(t)) + 1e-9)
        masked = max(min(steps - step, masked), min(wanted, masked - 1))
        counts.append(masked)
    return [*counts, 0]


def column(counts: Iterable[int], like: Tensor) -> Tensor:
    """`(B, 1)` int64 of one count for each row."""
    return torch.tensor(list(counts), dtype=torch.int64, device=like.device)[:, None]
