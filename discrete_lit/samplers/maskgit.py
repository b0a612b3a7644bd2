"""MaskGIT: parallel decoding that keeps the most confident tokens (Chang et al., CVPR 2022, section 3.2), and its kin.

`MaskGITSampler.draw` is the paper's algorithm. Variants change the settings, the score that orders the ids, or the
counting of steps: TiTok (Yu et al., 2024), MaskBit (Weber et al., 2024), and the confidence sampler of
Halton-MaskGIT's repository (Besnier et al., 2025). Decoding in an order that does not depend on the ids drawn is in
`halton.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import floor
from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose, places_of
from discrete_lit.diffusion import ArccosSchedule, CosineSchedule, MaskSchedule
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.samplers.categorical import draw_categorical, filter_logits
from discrete_lit.samplers.guidance import GuidanceSchedule
from discrete_lit.samplers.sampler import Sampler, SamplingContext


class MaskGITSampler(Sampler):
    """Sample by MaskGIT: each step draws all masked tokens, keeps the most confident and masks the others again.

    The confidence of a drawn id is its log-probability plus Gumbel noise times `choice_temperature (1 - r)`, with
    r = (i + 1) / T after step i of T. Each sequence has its own number of masked tokens, counted from those that were
    masked in it at the start; any positions may be known. The released code masks what is strictly below a cut-off,
    which is the same but for ties.

    Args:
        steps: T, from 1 to N; the paper uses 8.
        choice_temperature: of the Gumbel noise on the confidence, >= 0; the paper's code uses 4.5.
        mask_schedule: m(t) of `masked_counts`; the cosine by default, as in the paper. It need not be the one that the
            generator was trained with.
        temperature_annealing: multiply the temperature by 0.5 + 0.8 (1 - r).
        settings: of `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens, or a process that does more than mask.
    """

    attention = "bidirectional"

    def __init__(
        self,
        steps: int = 8,
        choice_temperature: float = 4.5,
        *,
        mask_schedule: MaskSchedule | None = None,
        temperature_annealing: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if choice_temperature < 0:
            raise ValueError(f"choice_temperature must be >= 0, got {choice_temperature}")
        self.steps = steps
        self.choice_temperature = choice_temperature
        self.mask_schedule = mask_schedule or CosineSchedule()
        self.temperature_annealing = temperature_annealing

    def draw(self, context: SamplingContext) -> Tensor:
        check_masked_decoding(context, self, self.steps)
        mask_id, length, random = context.layout.mask_id, context.layout.length, context.random.ahead(self.steps)
        scales, tokens = self.scales(self.steps), context.start()
        # Mask schedule: how many tokens of each sequence stay masked after each step.
        unknown = context.unknown_counts()
        schedules = {count: self.masked_counts(count) for count in set(unknown)}
        masked_after = [[schedules[count][step] for count in unknown] for step in range(self.steps)]
        columns = as_columns(masked_after, tokens)
        still_masked = unknown
        for step, stay_masked in enumerate(masked_after):
            if stay_masked == still_masked:
                continue  # fewer unknown tokens than steps: there is nothing left to draw

            # Predict every token, given those that are not masked.
            logits = context.predict(tokens, scales[step])  # (B, N, K)

            # Sample an id at every masked position.
            masked, r = tokens == mask_id, (step + 1) / self.steps
            uniforms = random.uniform(Purpose.TOKEN, length, step)
            drawn, score = draw_at(masked, max(still_masked), logits, uniforms, partial(self.draw_scored, r=r))

            # Confidence: the score plus Gumbel noise; tokens from the steps before are sure.
            noise = self.noise_scale(step) * random.gumbel(Purpose.CONFIDENCE, length, step)
            confidence = (score + noise).masked_fill(~masked, torch.inf)

            # Keep the drawn ids, but mask the least confident again.
            rank = confidence.argsort(dim=1).argsort(dim=1)
            tokens = torch.where(masked, drawn, tokens).masked_fill(rank < columns[step], mask_id)
            context.record(tokens, confidence)
            still_masked = stay_masked
        return tokens

    def masked_counts(self, unknown: int) -> list[int]:
        """Count the tokens still masked after each of the T steps, of `unknown` that were masked at the start."""
        return masked_counts(self.mask_schedule, self.steps, unknown)

    def draw_scored(self, logits: Tensor, uniforms: Tensor, r: float) -> tuple[Tensor, Tensor]:
        """Draw ids and score them; here the score is the log-probability.

        Args:
            logits: `(B, n, K)` guided.
            uniforms: `(B, n)` float64.
            r: fraction of the steps that is done after this one.

        Returns:
            Ids `(B, n)` and their scores `(B, n)`.
        """
        return self.choose(logits, uniforms, self.temperature_at(r))

    def temperature_at(self, r: float) -> float:
        """The temperature of the ids at the fraction r of the steps."""
        return self.temperature * (0.5 + 0.8 * (1 - r) if self.temperature_annealing else 1.0)

    def noise_scale(self, step: int) -> float:
        """The factor of the confidence's Gumbel noise at a step, counted from 0."""
        return self.choice_temperature * (1 - (step + 1) / self.steps)


class TiTokSampler(MaskGITSampler):
    """Sample by TiTok's MaskGIT (Yu et al., "An Image is Worth 32 Tokens", 2024): raw logits as the confidence.

    With tau = `choice_temperature (1 - r)`, r = (i + 1) / T, the id is argmax(logit + tau Gumbel), which is a draw from
    softmax(logit / tau), and the most probable id at the last step, where tau is 0. Its score is the guided logit
    itself, and tau times another Gumbel draw is added. Logits are divided by the temperature before. The released code
    takes the number of masked tokens of the batch's first image for all of them; here each has its own, which differs
    only where known tokens are given.

    Args:
        steps: T, from 1 to N; 8 for the models of 32 and 64 tokens, 64 for that of 128.
        choice_temperature: of both noises, >= 0; 9.5 for 32 tokens, 11 for 64, 2.8 for 128.
        mask_schedule: the arccosine by default.
        settings: of `MaskGITSampler` and `Sampler`; the published evaluation has `temperature_annealing`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    def __init__(
        self,
        steps: int = 8,
        choice_temperature: float = 9.5,
        *,
        mask_schedule: MaskSchedule | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(steps, choice_temperature, mask_schedule=mask_schedule or ArccosSchedule(), **settings)

    def draw_scored(self, logits: Tensor, uniforms: Tensor, r: float) -> tuple[Tensor, Tensor]:
        logits = logits / self.temperature_at(r)
        tau = self.choice_temperature * (1 - r)
        if tau == 0:
            ids = logits.argmax(dim=-1)
        else:
            ids = draw_categorical(filter_logits(logits, self.top_k, self.top_p) / tau, uniforms)
        return ids, logits.gather(-1, ids[..., None])[..., 0]


class MaskBitSampler(MaskGITSampler):
    """Sample groups of bits by MaskGIT (Weber et al., "MaskBit", 2024), with the settings of the 14-bit model.

    The groups are the sequence's tokens: one group of a position may be known while the other is still masked. The
    released code takes the number of masked tokens of the batch's first image for all of them; here each has its own,
    which differs only where known tokens are given.

    Args:
        steps: T, from 1 to N; published with 64, 128 and 256.
        choice_temperature: of the Gumbel noise on the confidence, >= 0.
        mask_schedule: the arccosine by default.
        guidance_scale: 1 plus the scale of the released code.
        guidance_schedule, guidance_power: as in `Sampler`.
        settings: of `MaskGITSampler` and `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    def __init__(
        self,
        steps: int = 64,
        choice_temperature: float = 7.8,
        *,
        mask_schedule: MaskSchedule | None = None,
        guidance_scale: float = 8.1,
        guidance_schedule: GuidanceSchedule = "power_cosine",
        guidance_power: float = 3.0,
        **settings: Any,
    ) -> None:
        super().__init__(
            steps,
            choice_temperature,
            mask_schedule=mask_schedule or ArccosSchedule(),
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            **settings,
        )


class HaltonConfidenceSampler(MaskGITSampler):
    """Sample by the MaskGIT of Halton-MaskGIT's repository, where r = i / (T - 1) at step i, not (i + 1) / T.

    After step i `max(i + 1, floor(N (1 - m(1 - r))))` tokens are unmasked, the noise is `choice_temperature (1 - r)`,
    and guidance grows with r (`scale_linear`).

    Args:
        steps: T, from 1 to N.
        choice_temperature: of the Gumbel noise on the confidence, >= 0.
        mask_schedule: the arccosine by default.
        guidance_scale: 1 + w.
        guidance_schedule: as in `Sampler`.
        settings: of `MaskGITSampler` and `Sampler`; `temperature_annealing` keeps MaskGIT's r.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    def __init__(
        self,
        steps: int = 32,
        choice_temperature: float = 4.5,
        *,
        mask_schedule: MaskSchedule | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "scale_linear",
        **settings: Any,
    ) -> None:
        super().__init__(
            steps,
            choice_temperature,
            mask_schedule=mask_schedule or ArccosSchedule(),
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            **settings,
        )

    def masked_counts(self, unknown: int) -> list[int]:
        counts = []
        for step in range(self.steps):
            t = torch.tensor(1 - self._r(step), dtype=torch.float64)
            fraction = 1 - float(self.mask_schedule.mask_probability(t))
            # Rounding must not decide a count, as in `masked_counts` below.
            counts.append(unknown - min(unknown, max(step + 1, floor(unknown * fraction + 1e-9))))
        return counts

    def noise_scale(self, step: int) -> float:
        return self.choice_temperature * (1 - self._r(step))

    def _r(self, step: int) -> float:
        return step / (self.steps - 1) if self.steps > 1 else 1.0


# Helpers, which the fixed orders of `halton.py` share.


def masked_counts(schedule: MaskSchedule, steps: int, unknown: int) -> list[int]:
    """Count the tokens still masked after each of the T steps, of `unknown` that were masked at the start.

    `floor(unknown m(1 - (i + 1) / T))` after step i, but at most one fewer than before and at least one for each step
    to come, as far as there are so many; none after the last.
    """
    counts, masked = [], unknown
    for step in range(1, steps):
        t = torch.tensor(1 - step / steps, dtype=torch.float64)
        # Rounding must not decide a count: 128 of 256 tokens, not 127, where m is 0.5 - 6e-17.
        wanted = floor(unknown * float(schedule.mask_probability(t)) + 1e-9)
        masked = max(min(steps - step, masked), min(wanted, masked - 1))
        counts.append(masked)
    return [*counts, 0]


def draw_at(
    where: Tensor,
    most: int,
    logits: Tensor,
    uniforms: Tensor,
    draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Draw ids at some positions alone: a draw over the vocabulary costs far more than gathering its logits.

    Args:
        where: `(B, N)` bool, the positions.
        most: how many positions the row with the most of them has.
        logits: `(B, N, K)` guided.
        uniforms: `(B, N)` float64.
        draw: makes ids and scores `(B, most)` from gathered logits `(B, most, K)` and uniform numbers `(B, most)`.

    Returns:
        Ids `(B, N)` int64 and scores `(B, N)` float64; without meaning where `where` is false.
    """
    if most == where.shape[1]:
        ids, score = draw(logits, uniforms)
        return ids, score.double()
    positions = places_of(where, most)
    gathered = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
    ids, score = draw(gathered, uniforms.gather(1, positions))
    return (
        ids.new_zeros(where.shape).scatter(1, positions, ids),
        score.new_zeros(where.shape, dtype=torch.float64).scatter(1, positions, score.double()),
    )


def as_columns(counts: Sequence[Sequence[int]], like: Tensor) -> Sequence[Tensor | int]:
    """Give the counts of each step: one for each sequence, `(B, 1)` int64, or a number where all have the same.

    What differs is copied to the device of `like`, once, before the loop: the host waits for such a copy.

    Args:
        counts: for each step one of each sequence.
        like: any tensor of the device.
    """
    if all(len(set(each)) == 1 for each in counts):
        return [each[0] for each in counts]
    return torch.tensor(counts, dtype=torch.int64).to(like.device)[..., None].unbind()


def check_masked_decoding(context: SamplingContext, sampler: Sampler, steps: int) -> None:
    """Refuse what cannot be decoded by unmasking at least one token in each of `steps` steps.

    Raises:
        ValueError: a process that does more than mask, or more steps than tokens.
    """
    if context.denoiser is not None and not is_absorbing(context.denoiser.process):
        raise ValueError(
            f"{type(sampler).__name__} needs a generator of masked tokens, {type(context.denoiser.process).__name__} "
            "does more than mask: use AncestralSampler"
        )
    if steps > context.layout.length:
        raise ValueError(
            f"steps={steps} exceeds the {context.layout.length} tokens of a sequence: each step unmasks at least one"
        )
