"""Halton order: parallel decoding in an order that does not depend on what is drawn, and the random order beside it.

Halton-MaskGIT (Besnier et al., "Halton Scheduler for Masked Generative Image Transformer", ICLR 2025).
"""

from collections.abc import Callable
from math import acos, pi
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
from discrete_lit.core.synchronisation import on_device
from discrete_lit.diffusion import CosineSchedule, MaskSchedule
from discrete_lit.samplers.maskgit import as_columns, check_masked_decoding, draw_at, masked_counts
from discrete_lit.samplers.sampler import Sampler, SamplingContext

# The loop, which both samplers share.


def unmask_in_order(
    context: SamplingContext,
    sampler: Sampler,
    steps: int,
    order: Tensor,
    unmasked_counts: Callable[[int], list[int]],
    rewrite: bool = False,
) -> Tensor:
    """Draw the next few positions of an order at each step, given all before; known positions are left out of it.

    Args:
        context: of this call.
        sampler: its guidance, temperature and filters.
        steps: T.
        order: `(B, N)` or `(1, N)` int64, the positions in turn.
        unmasked_counts: how many tokens are unmasked after each of the T steps, given how many are to be drawn.
        rewrite: draw the positions of the steps before again at each step.

    Returns:
        `(B, N)` int64.
    """
    scales, tokens, to_draw = sampler.scales(steps), context.start(), context.unknown()
    rank, random = _rank(order, to_draw), context.random.ahead(steps)
    unknown = context.unknown_counts()
    schedules = {count: unmasked_counts(count) for count in set(unknown)}
    counts = [[schedules[count][step] for count in unknown] for step in range(steps)]
    columns = as_columns([[0] * len(unknown), *counts], tokens)
    before = [0] * len(unknown)
    for step, after in enumerate(counts):
        first = [0] * len(unknown) if rewrite else before
        before = after
        most = max((end - begin for begin, end in zip(first, after, strict=True)), default=0)
        if most == 0:
            continue
        now = (rank >= columns[0 if rewrite else step]) & (rank < columns[step + 1])
        logits = context.predict(tokens, scales[step])  # (B, N, K)
        uniforms = random.uniform(Purpose.TOKEN, context.layout.length, step)
        drawn, log_probability = draw_at(now, most, logits, uniforms, sampler.choose)
        tokens = torch.where(now, drawn, tokens)
        context.record(tokens, log_probability.masked_fill(~now, torch.nan))
    return tokens


def _rank(order: Tensor, to_draw: Tensor) -> Tensor:
    """`(B, N)`: when each position comes, those that are not to be drawn last."""
    order = order.expand(to_draw.shape)
    known_last = to_draw.gather(1, order).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return order.gather(1, known_last).argsort(dim=1)


class HaltonSampler(Sampler):
    """Sample in the order of the Halton points, which spreads the positions of each step over the image.

    After step i of T, max(i + 1, floor(N (1 - arccos((i + 1) / T) 2 / pi))) tokens are unmasked. Any positions may be
    known. The released code divides logits by 1 / its temperature; here, as everywhere, `temperature` divides.

    Args:
        steps: T, from 1 to N; published with 32.
        variant: `"newer"` draws the new positions of each step alone, as the released code does since February 2025;
            `"older"` draws all positions up to there again at each step, given what the steps before drew.
        roll: begin the order at a random position of it, another for each image.
        settings: of `Sampler`; guidance is published as constant, 1 + w with w from 0.5 to 1.5.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens, or a sequence that is no grid of rows
            and columns with one id at a position.
    """

    attention = "bidirectional"

    def __init__(
        self, steps: int = 32, variant: Literal["newer", "older"] = "newer", *, roll: bool = False, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if variant not in ("newer", "older"):
            raise ValueError(f"variant must be 'newer' or 'older', got {variant!r}")
        self.steps = steps
        self.variant = variant
        self.roll = roll

    def draw(self, context: SamplingContext) -> Tensor:
        check_masked_decoding(context, self, self.steps)
        layout = context.layout
        if len(layout.grid) != 2 or layout.sub_tokens != 1:
            raise ValueError(
                f"HaltonSampler needs a grid of rows and columns with one id at a position, "
                f"this generator has the grid {tuple(layout.grid)} and {layout.sub_tokens} ids at a position"
            )
        order = on_device(halton_order, *layout.grid, device=context.labels.device)[None]
        if self.roll:
            shift = (context.random.uniform(Purpose.CONFIDENCE, 1) * layout.length).long()
            turns = torch.arange(layout.length, device=order.device)
            order = order.expand(len(shift), -1).gather(1, (turns - shift) % layout.length)
        return unmask_in_order(context, self, self.steps, order, self.unmasked_counts, rewrite=self.variant == "older")

    def unmasked_counts(self, unknown: int) -> list[int]:
        """Count the tokens that are unmasked after each of the T steps, of `unknown` to be drawn."""
        fractions = (1 - acos((step + 1) / self.steps) * 2 / pi for step in range(self.steps))
        # Rounding must not decide a count.
        return [min(unknown, max(step + 1, int(unknown * fraction + 1e-9))) for step, fraction in enumerate(fractions)]


class RandomOrderSampler(Sampler):
    """Sample each sequence in a uniformly random order of its own.

    With one token a step the law is the model's any-order one: the mixture over all orders of their exact laws. Any
    positions may be known.

    Args:
        steps: T, from 1 to N.
        mask_schedule: how many tokens are still masked after each step; the cosine by default.
        settings: of `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    attention = "bidirectional"

    def __init__(self, steps: int = 8, mask_schedule: MaskSchedule | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        self.mask_schedule = mask_schedule or CosineSchedule()

    def draw(self, context: SamplingContext) -> Tensor:
        check_masked_decoding(context, self, self.steps)
        order = context.random.uniform(Purpose.CONFIDENCE, context.layout.length).argsort(dim=1)
        return unmask_in_order(context, self, self.steps, order, self.unmasked_counts)

    def unmasked_counts(self, unknown: int) -> list[int]:
        """Count the tokens that are unmasked after each of the T steps, of `unknown` to be drawn."""
        return [unknown - masked for masked in masked_counts(self.mask_schedule, self.steps, unknown)]


# The Halton points.

_POINTS_AT_ONCE = 10_000


def halton_order(rows: int, columns: int) -> Tensor:
    """The positions of a grid, `(rows * columns,)` int64, in the order in which the Halton points first hit them.

    The points have base 2 down and base 3 across. The released code stops after 10,000 of them, which miss 6 positions
    of a 64 x 64 grid; here all are reached.
    """
    positions, seen = [], set()
    start = 1
    while len(positions) < rows * columns:
        numbers = torch.arange(start, start + _POINTS_AT_ONCE)
        row = (radical_inverse(2, numbers) * rows).long()
        column = (radical_inverse(3, numbers) * columns).long()
        for position in (row * columns + column).tolist():
            if position not in seen:
                seen.add(position)
                positions.append(position)
        start += _POINTS_AT_ONCE
    return torch.tensor(positions)


def radical_inverse(base: int, numbers: Tensor) -> Tensor:
    """Mirror the digits of each number, > 0, at the point: float64 in (0, 1), correctly rounded below 2^53."""
    numerator, denominator, rest = torch.zeros_like(numbers), 1, numbers
    while bool((rest > 0).any()):
        numerator = numerator * base + rest % base
        rest, denominator = rest // base, denominator * base
    return numerator.double() / denominator
