"""Parallel decoding in an order that does not depend on what is drawn."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from discrete_lit.processes import CosineSchedule, MaskSchedule, Purpose
from discrete_lit.samplers.drawing import Drawing
from discrete_lit.samplers.parallel import ParallelSampler, column, masked_counts


class OrderedSampler(ParallelSampler):
    """Draws the next few places of an order at each step. Known places are left out of the order.

    Args:
        steps: T, from 1 to N.
        settings: of `Sampler`.
    """

    @abstractmethod
    def order(self, drawing: Drawing) -> Tensor:
        """`(B or 1, N)` int64: the places in turn."""

    @abstractmethod
    def revealed_counts(self, unknown: int) -> list[int]:
        """Tokens that are known after each of the T steps, of `unknown` to be drawn."""

    def rewrites(self) -> bool:
        """Whether a step draws the places of the steps before again."""
        return False

    def draw(self, drawing: Drawing) -> Tensor:
        self.check_steps(drawing)
        scales, tokens, to_draw = self.scales(self.steps), drawing.start(), drawing.unknown()
        length = drawing.layout.length
        rank = self._rank(self.order(drawing), to_draw)
        unknown: list[int] = to_draw.sum(dim=1).tolist()
        schedules = {count: self.revealed_counts(count) for count in set(unknown)}
        before = [0] * len(unknown)
        for step in range(self.steps):
            after = [schedules[count][step] for count in unknown]
            first = [0] * len(unknown) if self.rewrites() else before
            width = max((end - begin for begin, end in zip(first, after, strict=True)), default=0)
            before = after
            if width == 0:
                continue
            where = (rank >= column(first, tokens)) & (rank < column(after, tokens))
            logits = drawing.predict(tokens, scales[step])  # (B, N, K)
            uniforms = drawing.random.uniform(Purpose.TOKEN, length, step)
            drawn, score = self.choose_at(logits, where, width, uniforms, (step + 1) / self.steps)
            tokens = torch.where(where, drawn, tokens)
            drawing.record(tokens, score.masked_fill(~where, torch.nan))
        return tokens

    def _rank(self, order: Tensor, to_draw: Tensor) -> Tensor:
        """`(B, N)`: when each place comes, those that are not to be drawn last."""
        order = order.expand(to_draw.shape)
        given_last = to_draw.gather(1, order).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        return order.gather(1, given_last).argsort(dim=1)


class RandomOrderSampler(OrderedSampler):
    """Each sequence is drawn in a uniformly random order of its own.

    With one token a step its law is the model's any-order one: the mixture over all orders of their exact laws.

    Args:
        steps: T, from 1 to N.
        mask_schedule: how many tokens are still masked after each step; the cosine by default.
        settings: of `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    def __init__(self, steps: int = 8, mask_schedule: MaskSchedule | None = None, **settings: Any) -> None:
        super().__init__(steps, **settings)
        self.mask_schedule = mask_schedule or CosineSchedule()

    def order(self, drawing: Drawing) -> Tensor:
        return drawing.random.uniform(Purpose.CONFIDENCE, drawing.layout.length).argsort(dim=1)

    def revealed_counts(self, unknown: int) -> list[int]:
        return [unknown - masked for masked in masked_counts(self.mask_schedule, self.steps, unknown)]
