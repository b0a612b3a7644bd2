"""Confidence-ordered parallel decoding (Chang et al., "MaskGIT", CVPR 2022, section 3.2)."""

from math import floor

import torch
from torch import Tensor

from discrete_lit.backbones import Backbone
from discrete_lit.processes import CosineSchedule, CounterRandom, MaskSchedule, Purpose
from discrete_lit.samplers.guidance import GuidanceSchedule
from discrete_lit.samplers.sampler import Sampler, SamplerOutput


class MaskGITSampler(Sampler):
    """All masked tokens are drawn at each step; the most confident of them stay.

    At step i of T the confidence of a drawn token is its log-probability plus Gumbel noise times
    `choice_temperature * (1 - (i + 1) / T)`; the number left masked is `floor(N m(1 - (i + 1) / T))`, at most one fewer
    than before and at least one for each step to come, and none after the last step. Other settings as in `Sampler`.

    Args:
        steps: T, from 1 to N; the paper uses 8.
        choice_temperature: of the confidence noise, >= 0; the paper's code uses 4.5.
        mask_schedule: m; the cosine by default, as in the paper. It need not be the one trained with.

    Raises:
        ValueError: a setting out of its range, or more steps than tokens.
    """

    attention = "bidirectional"

    def __init__(
        self,
        steps: int = 8,
        choice_temperature: float = 4.5,
        mask_schedule: MaskSchedule | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
    ) -> None:
        super().__init__(temperature, top_k, top_p, guidance_scale, guidance_schedule)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if choice_temperature < 0:
            raise ValueError(f"choice_temperature must be >= 0, got {choice_temperature}")
        self.steps = steps
        self.choice_temperature = choice_temperature
        self.mask_schedule = mask_schedule or CosineSchedule()

    def masked_counts(self, length: int) -> list[int]:
        """Tokens still masked after each of the T steps, for sequences of N = `length`.

        Raises:
            ValueError: more steps than tokens.
        """
        if self.steps > length:
            raise ValueError(
                f"steps={self.steps} exceeds the {length} tokens of a sequence: each step reveals at least one"
            )
        counts, masked = [], length
        for step in range(1, self.steps):
            t = torch.tensor(1 - step / self.steps, dtype=torch.float64)
            # Rounding must not decide a count: 128 of 256 tokens, not 127, where m is 0.5 - 6e-17.
            wanted = floor(length * float(self.mask_schedule.mask_probability(t)) + 1e-9)
            masked = max(self.steps - step, min(wanted, masked - 1))
            counts.append(masked)
        return [*counts, 0]

    def draw(self, backbone: Backbone, labels: Tensor, random: CounterRandom) -> SamplerOutput:
        layout = backbone.layout
        length, mask_id = layout.length, layout.mask_id
        tokens = labels.new_full((len(labels), length), mask_id)
        calls = 0
        for step, masked_after in enumerate(self.masked_counts(length)):
            logits, evaluations = self.predict(backbone, tokens, labels, progress=step / self.steps)  # (B, N, K)
            calls += evaluations
            drawn, log_probability = self.choose(logits, random.uniform(Purpose.TOKEN, length, step))
            masked = tokens == mask_id
            noise = self.choice_temperature * (1 - (step + 1) / self.steps)
            confidence = log_probability.double() + noise * random.gumbel(Purpose.CONFIDENCE, length, step)
            confidence = confidence.masked_fill(~masked, torch.inf)
            tokens = torch.where(masked, drawn, tokens)
            least_confident = confidence.argsort(dim=1)[:, :masked_after]
            tokens = tokens.scatter(1, least_confident, mask_id)
        return SamplerOutput(tokens, network_calls=calls, sequential_passes=self.steps)
