"""RandAR's parallel decoding (Pang et al., "RandAR: Decoder-only Autoregressive Visual Generation in Random Orders",
2024)."""

from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
from discrete_lit.samplers.guidance import GuidanceSchedule, guided_steps
from discrete_lit.samplers.raster import Order, RasterSampler, common_prefix
from discrete_lit.samplers.sampler import CachedDecoder, SamplingContext


class RandARSampler(RasterSampler):
    """Sample an autoregressive generator in random orders, several tokens at a step.

    After step k of T, counted from 1, `min(N, floor((1 - cos(pi k / 2 T)) N + 1))` tokens are drawn, one more at least
    than before. The tokens of a step are drawn apart: each is given the tokens of the steps before, and the positions
    that the step draws before its own, but not their tokens. Known tokens are read in one pass, and the steps begin
    behind them.

    Args:
        steps: T; by default one for each token. 88 for 256 tokens is published.
        guidance_start: guidance scale of the first token; with the schedule `linear` that at n of N tokens is
            `start + (scale - start) n / N`.
        order: `"random"`, or what `RasterSampler` accepts.
        guidance_scale: the scale at the end; 4.0 is published.
        guidance_schedule: over the tokens; `linear` is RandAR's.
        settings: of `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, a backbone without position instructions, or more steps than
            tokens.
    """

    def __init__(
        self,
        steps: int | None = None,
        *,
        guidance_start: float = 1.0,
        order: Order = "random",
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "linear",
        **settings: Any,
    ) -> None:
        super().__init__(order, guidance_scale=guidance_scale, guidance_schedule=guidance_schedule, **settings)
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if guidance_start != 1 and guidance_schedule != "linear":
            raise ValueError(f"guidance_start={guidance_start} is of the schedule 'linear', got {guidance_schedule!r}")
        self.steps = steps
        self.guidance_start = guidance_start

    def draw(self, context: SamplingContext) -> Tensor:
        if not getattr(context.backbone, "instructed", False):
            raise ValueError(
                "RandARSampler asks for several positions at a step, which needs a Transformer with "
                "position_instructions=true"
            )
        length, mask_id = context.layout.length, context.layout.mask_id
        if self.steps is not None and self.steps > length:
            raise ValueError(
                f"steps={self.steps} exceeds the {length} tokens of a sequence: each step draws at least one"
            )
        order = self._order(context)
        scales = self.scales(length)
        uniforms = context.random.uniform(Purpose.TOKEN, length)
        decoder = CachedDecoder(context, guided_steps(scales), order=order)
        tokens = context.start() if order is None else context.start().gather(1, order)  # in the order drawn
        known = tokens != mask_id
        read, first = 0, 0 if context.known is None else common_prefix(known)
        while first < length:
            here = slice(first, first + self.step_size(first, length))
            count = here.stop - here.start
            rows = decoder(tokens[:, read:first], first, ahead=count - 1)[:, -count:]  # (B, count, K)
            drawn, log_probability = self.choose(decoder.guide(rows, scales[first]), uniforms[:, here])
            tokens[:, here] = torch.where(known[:, here], tokens[:, here], drawn)
            if context.traced:
                confidence = torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device)
                confidence[:, here] = log_probability.masked_fill(known[:, here], torch.nan).double()
                context.record(self.to_raster(tokens, order), self.to_raster(confidence, order))
            read, first = first, here.stop
        return self.to_raster(tokens, order)

    def step_size(self, drawn: int, length: int) -> int:
        """Count the tokens of the step that begins when `drawn` of `length` tokens are there."""
        if self.steps is None:
            return 1
        for step in range(1, self.steps):
            target = min(length, int((1 - cos(pi / 2 * step / self.steps)) * length + 1))
            if target > drawn:
                return target - drawn
        return length - drawn

    def scales(self, steps: int) -> list[float]:
        start, end = self.guidance_start, self.guidance_scale
        usual = super().scales(steps)
        if self.guidance_schedule != "linear" or end == 1:
            return usual
        first, last = self.guidance_interval or (0, steps)
        return [start + (end - start) * n / steps if first <= n < last else 1.0 for n in range(steps)]
