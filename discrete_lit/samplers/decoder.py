"""Passes of a causal backbone, one after another on one cache, with guidance where a step has it."""

import torch
from torch import Tensor

from discrete_lit.samplers.drawing import Drawing
from discrete_lit.samplers.guidance import guide


class GuidedDecoder:
    """What follows the tokens so far, step by step, given the labels and, behind them in the batch, the null label.

    The null rows' keys and values must be there from the first step on, also where the scale is still 1; after the last
    guided step those rows are left out.

    Args:
        drawing: its backbone, labels and counts.
        guided_steps: steps until the last guided one, itself included.
        order: `(B, N)` of an any-order backbone.
    """

    def __init__(self, drawing: Drawing, guided_steps: int, order: Tensor | None = None) -> None:
        self.drawing = drawing
        self.guided_steps = guided_steps
        self.doubled = guided_steps > 0
        self.labels, self.cache = drawing.prepare(self.doubled)
        self.order = None if order is None else order.repeat(1 + self.doubled, 1)

    def __call__(self, tokens: Tensor, step: int) -> Tensor:
        """What the backbone makes of `tokens (B, n)` or their vectors, which follow those of the calls before.

        Returns:
            `(B, rows, K)` logits, or hidden states for a place head; or `(2 B, rows, ...)`, the null rows last.
        """
        if self.doubled and step >= self.guided_steps:
            batch = len(tokens)
            self.doubled, self.labels, self.cache = False, self.labels[:batch], self.cache.first_rows(batch)
            self.order = None if self.order is None else self.order[:batch]
        self.drawing.count(1 + self.doubled, tokens.shape[1], self.cache)
        return self.drawing.backbone(self.rows(tokens), self.labels, self.cache, self.order)

    def rows(self, values: Tensor) -> Tensor:
        """`(B, ...)` for each row of this step, those of the null label included."""
        return torch.cat((values, values)) if self.doubled else values

    def guide(self, logits: Tensor, scale: float) -> Tensor:
        """Logits of every row to guided, unnormalised log-probabilities `(B, ..., K)`."""
        if not self.doubled:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, scale)
