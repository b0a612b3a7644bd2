"""Passes of a causal backbone, one after another on one cache, with guidance where a step has it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from discrete_lit.samplers.drawing import Drawing
from discrete_lit.samplers.guidance import guide


class GuidedDecoder:
    """Guided log-probabilities of what follows, step by step.

    The null rows' keys and values must be there from the first step on, also where the scale is still 1; after the last
    guided step those rows are left out.

    Args:
        drawing: its backbone, labels and counts.
        scales: guidance scale of each step.
        order: `(B, N)` of an any-order backbone.
    """

    def __init__(self, drawing: Drawing, scales: Sequence[float], order: Tensor | None = None) -> None:
        self.drawing = drawing
        self.scales = scales
        self.guided_steps = max((step + 1 for step, scale in enumerate(scales) if scale != 1), default=0)
        self.doubled = self.guided_steps > 0
        self.labels, self.cache = drawing.prepare(self.doubled)
        self.order = None if order is None else order.repeat(1 + self.doubled, 1)

    def __call__(self, tokens: Tensor, step: int) -> Tensor:
        """Logits `(B, rows, K)` after `tokens (B, n)` or their vectors, which follow those of the calls before."""
        if self.doubled and step >= self.guided_steps:
            batch = len(tokens)
            self.doubled, self.labels, self.cache = False, self.labels[:batch], self.cache.first_rows(batch)
            self.order = None if self.order is None else self.order[:batch]
        inputs = torch.cat((tokens, tokens)) if self.doubled else tokens
        self.drawing.count(1 + self.doubled, tokens.shape[1], self.cache)
        logits = self.drawing.backbone(inputs, self.labels, self.cache, self.order)
        if not self.doubled:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, self.scales[step])
