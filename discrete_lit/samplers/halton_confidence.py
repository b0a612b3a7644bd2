"""The confidence sampler of Halton-MaskGIT's repository, which the Halton order is compared with there."""

from math import floor
from typing import Any

import torch

from discrete_lit.processes import ArccosSchedule, MaskSchedule
from discrete_lit.samplers.confidence import ConfidenceSampler
from discrete_lit.samplers.guidance import GuidanceSchedule


class HaltonConfidenceSampler(ConfidenceSampler):
    """Confidence-ordered decoding whose steps are counted to T - 1, not T.

    Before step i, r = i / (T - 1): after it `max(i + 1, floor(N (1 - m(1 - r))))` tokens are known, the noise is
    `choice_temperature (1 - r)`, and guidance grows with r (`scale_linear`).

    Args:
        steps: T, from 1 to N.
        choice_temperature: of the confidence noise, >= 0.
        mask_schedule: the arccosine by default.
        guidance_scale: 1 + w.
        guidance_schedule: as in `Sampler`.
        settings: of `Sampler`; the annealing of `ConfidenceSampler` keeps its own r.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    def __init__(
        self,
        steps: int = 32,
        choice_temperature: float = 4.5,
        mask_schedule: MaskSchedule | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "scale_linear",
        **settings: Any,
    ) -> None:
        super().__init__(
            steps,
            choice_temperature,
            mask_schedule or ArccosSchedule(),
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            **settings,
        )

    def masked_counts(self, unknown: int) -> list[int]:
        counts = []
        for step in range(self.steps):
            t = torch.tensor(1 - self._progress(step), dtype=torch.float64)
            share = 1 - float(self.mask_schedule.mask_probability(t))
            counts.append(unknown - min(unknown, max(step + 1, floor(unknown * share + 1e-9))))
        return counts

    def noise_scale(self, step: int) -> float:
        return self.choice_temperature * (1 - self._progress(step))

    def _progress(self, step: int) -> float:
        return step / (self.steps - 1) if self.steps > 1 else 1.0
