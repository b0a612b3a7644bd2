"""Parallel decoding that keeps the most confident tokens (Chang et al., "MaskGIT", CVPR 2022, section 3.2).

MaskGIT's own sampler (Chang et al., CVPR 2022).

The sampler of TiTok's generator (Yu et al., "An Image is Worth 32 Tokens", 2024).

MaskBit's sampler (Weber et al., "MaskBit: Embedding-free Image Generation via Bit Tokens", 2024).

The confidence sampler of Halton-MaskGIT's repository, which the Halton order is compared with there.
"""

from math import floor
from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
from discrete_lit.diffusion import ArccosSchedule, CosineSchedule, MaskSchedule
from discrete_lit.samplers.categorical import draw_categorical, filter_logits
from discrete_lit.samplers.guidance import GuidanceSchedule
from discrete_lit.samplers.sampler import ParallelSampler, SamplingContext, column, masked_counts


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

    def draw(self, context: SamplingContext) -> Tensor:
        self.check_steps(context)
        scales, tokens = self.scales(self.steps), context.start()
        unknown: list[int] = context.unknown().sum(dim=1).tolist()
        schedules = {count: self.masked_counts(count) for count in set(unknown)}
        before = unknown
        for step in range(self.steps):
            after = [schedules[count][step] for count in unknown]
            if after == before:
                continue
            logits = context.predict(tokens, scales[step])  # (B, N, K)
            tokens = self.fill(context, tokens, logits, step, max(before), after)
            before = after
        return tokens

    def fill(
        self, context: SamplingContext, tokens: Tensor, logits: Tensor, step: int, most_masked: int, after: list[int]
    ) -> Tensor:
        """One step: draw the masked tokens `(B, N)`, then mask the `after` least confident of each row again."""
        length, mask_id, random = context.layout.length, context.layout.mask_id, context.random
        masked = tokens == mask_id
        uniforms = random.uniform(Purpose.TOKEN, length, step)
        drawn, score = self.choose_at(logits, masked, most_masked, uniforms, (step + 1) / self.steps)
        confidence = score + self.noise_scale(step) * random.gumbel(Purpose.CONFIDENCE, length, step)
        confidence = confidence.masked_fill(~masked, torch.inf)
        rank = confidence.argsort(dim=1).argsort(dim=1)
        tokens = torch.where(masked, drawn, tokens).masked_fill(rank < column(after, tokens), mask_id)
        context.record(tokens, confidence)
        return tokens


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
