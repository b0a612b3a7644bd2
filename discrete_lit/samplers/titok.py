"""The sampler of TiTok's generator (Yu et al., "An Image is Worth 32 Tokens", 2024)."""

from typing import Any

from torch import Tensor

from discrete_lit.processes import ArccosSchedule, MaskSchedule
from discrete_lit.samplers.categorical import draw_categorical, filter_logits
from discrete_lit.samplers.confidence import ConfidenceSampler


class TiTokSampler(ConfidenceSampler):
    """Confidence-ordered decoding by raw logits, with one noise temperature for the ids and their order.

    With tau = `choice_temperature (1 - r)`, r = (i + 1) / T, the id is argmax(logit + tau Gumbel), which is a draw from
    softmax(logit / tau), and the most probable id at the last step, where tau is 0. Its confidence is the guided logit
    itself plus tau times another Gumbel draw. Logits are divided by the temperature before. The released code takes the
    number of masked tokens of the batch's first image for all of them; here each has its own, which differs only where
    known tokens are given.

    Args:
        steps: T, from 1 to N; 8 for the models of 32 and 64 tokens, 64 for that of 128.
        choice_temperature: of both noises, >= 0; 9.5 for 32 tokens, 11 for 64, 2.8 for 128.
        mask_schedule: the arccosine by default.
        settings: of `ConfidenceSampler` and `Sampler`; the published evaluation has `temperature_annealing`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    def __init__(
        self,
        steps: int = 8,
        choice_temperature: float = 9.5,
        mask_schedule: MaskSchedule | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(steps, choice_temperature, mask_schedule or ArccosSchedule(), **settings)

    def choose_with_score(self, logits: Tensor, uniforms: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        logits = logits / self.temperature_at(progress)
        noise = self.choice_temperature * (1 - progress)
        if noise == 0:
            ids = logits.argmax(dim=-1)
        else:
            ids = draw_categorical(filter_logits(logits, self.top_k, self.top_p) / noise, uniforms)
        return ids, logits.gather(-1, ids[..., None])[..., 0]
