"""MaskBit's sampler (Weber et al., "MaskBit: Embedding-free Image Generation via Bit Tokens", 2024)."""

from typing import Any

from discrete_lit.processes import ArccosSchedule, MaskSchedule
from discrete_lit.samplers.confidence import ConfidenceSampler
from discrete_lit.samplers.guidance import GuidanceSchedule


class MaskBitSampler(ConfidenceSampler):
    """Confidence-ordered decoding of the groups of bits at all places together, with the settings of the 14-bit model.

    The groups are the sequence's tokens: one group of a place may be known while the other is still masked. Confidence
    is the log-probability plus Gumbel noise. The released code takes the number of masked tokens of the batch's first
    image for all of them; here each has its own, which differs only where known tokens are given.

    Args:
        steps: T, from 1 to N; published with 64, 128 and 256.
        choice_temperature: of the confidence noise, >= 0.
        mask_schedule: the arccosine by default.
        guidance_scale: 1 plus the scale of the released code.
        guidance_schedule, guidance_power: as in `Sampler`.
        settings: of `ConfidenceSampler` and `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    def __init__(
        self,
        steps: int = 64,
        choice_temperature: float = 7.8,
        mask_schedule: MaskSchedule | None = None,
        guidance_scale: float = 8.1,
        guidance_schedule: GuidanceSchedule = "power_cosine",
        guidance_power: float = 3.0,
        **settings: Any,
    ) -> None:
        super().__init__(
            steps,
            choice_temperature,
            mask_schedule or ArccosSchedule(),
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            **settings,
        )
