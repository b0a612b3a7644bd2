"""Halton-MaskGIT's sampler (Besnier et al., "Halton Scheduler for Masked Generative Image Transformer", ICLR 2025)."""

from math import acos, pi
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.processes import Purpose
from discrete_lit.samplers.drawing import Drawing
from discrete_lit.samplers.ordered import OrderedSampler

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

    def order(self, drawing: Drawing) -> Tensor:
        layout = drawing.layout
        if len(layout.grid) != 2 or layout.parts != 1:
            raise ValueError(
                f"HaltonSampler needs a grid of rows and columns with one id at a place, "
                f"this generator has the grid {tuple(layout.grid)} and {layout.parts} ids at a place"
            )
        order = halton_order(*layout.grid).to(drawing.labels.device)[None]
        if not self.roll:
            return order
        length = layout.length
        shift = (drawing.random.uniform(Purpose.CONFIDENCE, 1) * length).long()
        places = torch.arange(length, device=order.device)
        return order.expand(len(shift), -1).gather(1, (places - shift) % length)

    def revealed_counts(self, unknown: int) -> list[int]:
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
