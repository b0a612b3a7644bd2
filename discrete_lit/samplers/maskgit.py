"""MaskGIT's own sampler (Chang et al., CVPR 2022)."""

from typing import Any

from discrete_lit.processes import MaskSchedule
from discrete_lit.samplers.confidence import ConfidenceSampler


class MaskGITSampler(ConfidenceSampler):
    """Confidence-ordered decoding with the settings of the paper's code.

    A drawn token's confidence is its log-probability plus Gumbel noise. The released code masks what is strictly below
    a cut-off, which is the same but for ties.

    Args:
        steps: T, from 1 to N; the paper uses 8.
        choice_temperature: of the confidence noise, >= 0; the paper's code uses 4.5.
        mask_schedule: the cosine by default, as in the paper.
        settings: of `ConfidenceSampler` and `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    def __init__(
        self,
        steps: int = 8,
        choice_temperature: float = 4.5,
        mask_schedule: MaskSchedule | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(steps, choice_temperature, mask_schedule, **settings)
