"""Parallel decoding that keeps the most confident tokens (Chang et al., "MaskGIT", CVPR 2022, section 3.2)."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.processes import CosineSchedule, MaskSchedule, Purpose
from discrete_lit.samplers.drawing import Drawing
from discrete_lit.samplers.parallel import ParallelSampler, column, masked_counts


class ConfidenceSampler(ParallelSampler):
    """All masked tokens are drawn at each step; the most confident of them stay.

    The confidence is what a subclass orders ids by, plus Gumbel noise times `choice_temperature (1 - r)`, with
    r = (i + 1) / T after step i of T. Each sequence has its own number of masked tokens, counted from those that were
    masked in it at the start.

    Args:
        steps: T, from 1 to N.
        choice_temperature: of the noise, >= 0.
        mask_schedule: m of `masked_counts`; the cosine by default. It need not be the one trained with.
        temperature_annealing: multiply the temperature by 0.5 + 0.8 (1 - r).
        settings: of `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    def __init__(
        self,
        steps: int,
        choice_temperature: float,
        mask_schedule: MaskSchedule | None = None,
        temperature_annealing: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(steps, **settings)
        if choice_temperature < 0:
            raise ValueError(f"choice_temperature must be >= 0, got {choice_temperature}")
        self.choice_temperature = choice_temperature
        self.mask_schedule = mask_schedule or CosineSchedule()
        self.temperature_annealing = temperature_annealing

    def masked_counts(self, unknown: int) -> list[int]:
        """Tokens still masked after each of the T steps, for sequences that begin with `unknown` masked ones."""
        return masked_counts(self.mask_schedule, self.steps, unknown)

    def noise_scale(self, step: int) -> float:
        """What the Gumbel noise of a step, counted from 0, is multiplied by."""
        return self.choice_temperature * (1 - (step + 1) / self.steps)

    def temperature_at(self, progress: float) -> float:
        """The temperature at r = `progress`."""
        return self.temperature * (0.5 + 0.8 * (1 - progress) if self.temperature_annealing else 1.0)

    def choose_with_score(self, logits: Tensor, uniforms: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        return self.choose(logits, uniforms, self.temperature_at(progress))

    def draw(self, drawing: Drawing) -> Tensor:
        self.check_steps(drawing)
        scales, tokens = self.scales(self.steps), drawing.start()
        unknown: list[int] = drawing.unknown().sum(dim=1).tolist()
        schedules = {count: self.masked_counts(count) for count in set(unknown)}
        before = unknown
        for step in range(self.steps):
            after = [schedules[count][step] for count in unknown]
            if after == before:
                continue
            logits = drawing.predict(tokens, scales[step])  # (B, N, K)
            tokens = self.fill(drawing, tokens, logits, step, max(before), after)
            before = after
        return tokens

    def fill(
        self, drawing: Drawing, tokens: Tensor, logits: Tensor, step: int, most_masked: int, after: list[int]
    ) -> Tensor:
        """One step: draw the masked tokens `(B, N)`, then mask the `after` least confident of each row again."""
        length, mask_id, random = drawing.layout.length, drawing.layout.mask_id, drawing.random
        masked = tokens == mask_id
        uniforms = random.uniform(Purpose.TOKEN, length, step)
        drawn, score = self.choose_at(logits, masked, most_masked, uniforms, (step + 1) / self.steps)
        confidence = score + self.noise_scale(step) * random.gumbel(Purpose.CONFIDENCE, length, step)
        confidence = confidence.masked_fill(~masked, torch.inf)
        rank = confidence.argsort(dim=1).argsort(dim=1)
        tokens = torch.where(masked, drawn, tokens).masked_fill(rank < column(after, tokens), mask_id)
        drawing.record(tokens, confidence)
        return tokens
