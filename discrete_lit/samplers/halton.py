"""Parallel decoding in an order that does not depend on what is drawn.

Halton-MaskGIT's sampler (Besnier et al., "Halton Scheduler for Masked Generative Image Transformer", ICLR 2025).
"""

from abc import abstractmethod
from math import acos, pi
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
from discrete_lit.diffusion import CosineSchedule, MaskSchedule
from discrete_lit.samplers.sampler import ParallelSampler, SamplingContext, column, masked_counts


class OrderedSampler(ParallelSampler):
    """Draws the next few places of an order at each step. Known places are left out of the order.

    Args:
        steps: T, from 1 to N.
        settings: of `Sampler`.
    """

    @abstractmethod
    def order(self, context: SamplingContext) -> Tensor:
        """`(B or 1, N)` int64: the places in turn."""

    @abstractmethod
    def unmasked_counts(self, unknown: int) -> list[int]:
        """Tokens that are known after each of the T steps, of `unknown` to be drawn."""

    def rewrites(self) -> bool:
        """Whether a step draws the places of the steps before again."""
        return False

    def draw(self, context: SamplingContext) -> Tensor:
        self.check_steps(context)
        scales, tokens, to_draw = self.scales(self.steps), context.start(), context.unknown()
        length = context.layout.length
        rank = self._rank(self.order(context), to_draw)
        unknown: list[int] = to_draw.sum(dim=1).tolist()
        schedules = {count: self.unmasked_counts(count) for count in set(unknown)}
        before = [0] * len(unknown)
        for step in range(self.steps):
            after = [schedules[count][step] for count in unknown]
            first = [0] * len(unknown) if self.rewrites() else before
            width = max((end - begin for begin, end in zip(first, after, strict=True)), default=0)
            before = after
            if width == 0:
                continue
            where = (rank >= column(first, tokens)) & (rank < column(after, tokens))
            logits = context.predict(tokens, scales[step])  # (B, N, K)
            uniforms = context.random.uniform(Purpose.TOKEN, length, step)
            drawn, score = self.choose_at(logits, where, width, uniforms, (step + 1) / self.steps)
            tokens = torch.where(where, drawn, tokens)
            context.record(tokens, score.masked_fill(~where, torch.nan))
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

    def order(self, context: SamplingContext) -> Tensor:
        return context.random.uniform(Purpose.CONFIDENCE, context.layout.length).argsort(dim=1)

    def unmasked_counts(self, unknown: int) -> list[int]:
        return [unknown - masked for masked in masked_counts(self.mask_schedule, self.steps, unknown)]


_POINTS_AT_ONCE = 10_000


class HaltonSampler(OrderedSampler):
    """Parallel decoding in the order of the Halton points, which spreads the places of each step over the image.

    After step i of T, max(i + 1, floor(N (1 - arccos((i + 1) / T) 2 / pi))) tokens are known. The released code divides
    logits by 1 / its temperature; here, as everywhere, `temperature` divides.

    Args:
        steps: T, from 1 to N; published with 32.
        variant: `"newer"` draws the new places of each step alone, as the released code does since February 2025;
            `"older"` draws all places up to there again at each step, from what the steps before put there.
        roll: begin the order at a random place of it, another for each image.
        settings: of `Sampler`; guidance is published as constant, 1 + w with w from 0.5 to 1.5.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens, or a sequence that is no grid of rows
            and columns with one id at a place.
    """

    def __init__(
        self, steps: int = 32, variant: Literal["newer", "older"] = "newer", roll: bool = False, **settings: Any
    ) -> None:
        super().__init__(steps, **settings)
        if variant not in ("newer", "older"):
            raise ValueError(f"variant must be 'newer' or 'older', got {variant!r}")
        self.variant = variant
        self.roll = roll

    def rewrites(self) -> bool:
        return self.variant == "older"

    def order(self, context: SamplingContext) -> Tensor:
        layout = context.layout
        if len(layout.grid) != 2 or layout.sub_tokens != 1:
            raise ValueError(
                f"HaltonSampler needs a grid of rows and columns with one id at a place, "
                f"this generator has the grid {tuple(layout.grid)} and {layout.sub_tokens} ids at a place"
            )
        order = halton_order(*layout.grid).to(context.labels.device)[None]
        if not self.roll:
            return order
        length = layout.length
        shift = (context.random.uniform(Purpose.CONFIDENCE, 1) * length).long()
        places = torch.arange(length, device=order.device)
        return order.expand(len(shift), -1).gather(1, (places - shift) % length)

    def unmasked_counts(self, unknown: int) -> list[int]:
        shares = (1 - acos((step + 1) / self.steps) * 2 / pi for step in range(self.steps))
        # Rounding must not decide a count.
        return [min(unknown, max(step + 1, int(unknown * share + 1e-9))) for step, share in enumerate(shares)]


def halton_order(rows: int, columns: int) -> Tensor:
    """`(rows * columns,)` int64: places of a grid by the first Halton point in each, base 2 down and base 3 across.

    The released code stops after 10,000 points, which miss 6 places of a 64 x 64 grid; here all are reached.
    """
    places, seen = [], set()
    start = 1
    while len(places) < rows * columns:
        numbers = torch.arange(start, start + _POINTS_AT_ONCE)
        row = (radical_inverse(2, numbers) * rows).long()
        column = (radical_inverse(3, numbers) * columns).long()
        for place in (row * columns + column).tolist():
            if place not in seen:
                seen.add(place)
                places.append(place)
        start += _POINTS_AT_ONCE
    return torch.tensor(places)


def radical_inverse(base: int, numbers: Tensor) -> Tensor:
    """The digits of each number, > 0, mirrored at the point: float64 in (0, 1), correctly rounded below 2^53."""
    numerator, denominator, rest = torch.zeros_like(numbers), 1, numbers
    while bool((rest > 0).any()):
        numerator = numerator * base + rest % base
        rest, denominator = rest // base, denominator * base
    return numerator.double() / denominator
