"""Discrete diffusion backwards: from noise to tokens, with the laws of one step in the papers' words.

`DiffusionSampler` holds the loop over a time grid from t = 1 (noise) to t = 0: each step takes the tokens x_t to x_s,
s < t, every token for itself. The samplers differ in the law of that step:

- `AncestralSampler`: the exact reverse step (D3PM, MDLM, UDLM), in terms of scores SEDD's analytic or Tweedie step;
- `EulerSampler` and `TauLeapingSampler` (`reverse_rates.py`): along the reverse rates at t (SEDD; Campbell et al.);
- `RemaskingSampler` (ReMDM, `remasking.py`), `PredictorCorrectorSampler` (`predictor_corrector.py`) and
  `SelfCorrectionSampler` (GIDD, `self_correction.py`), which draw tokens again.

`FirstHittingSampler` needs no grid: it goes from one unmasking to the next. Guidance is in `diffusion_guidance.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
from discrete_lit.core.synchronisation import forbid, host_sees
from discrete_lit.diffusion import MaskSchedule
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import Denoiser, positive_weights
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.diffusion.reverse import (
    Jumps,
    analytic_weights,
    denoise_weights,
    jumps_from_clean,
    jumps_from_weights,
    unmask_probability,
    without_rare,
)
from discrete_lit.samplers.categorical import draw_categorical, filter_logits
from discrete_lit.samplers.diffusion_guidance import Prediction, guide_jumps
from discrete_lit.samplers.sampler import Sampler, SamplingContext

GuidanceLaw = Literal["clean", "transition", "score"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One step of the time grid, from the noise at t back to that at s < t; all sequences are at the same."""

    number: int
    """From 0 for the noisiest; it names the step's random numbers."""
    t: NoiseLevel
    """The noise at the step's start."""
    s: NoiseLevel
    """The noise at its end."""
    slope: Tensor
    """`(1, 1)` float64, m'(t)."""
    last: bool
    """Whether the step takes all noise away."""

    @property
    def alpha_t(self) -> Tensor:
        """`(1, 1)` float64, the probability that noise has left a token alone at the start."""
        return self.t.alpha

    @property
    def alpha_s(self) -> Tensor:
        """`(1, 1)` float64, the same at the end."""
        return self.s.alpha

    @property
    def dt(self) -> Tensor:
        """`(1, 1)` float64, t - s."""
        return self.t.t - self.s.t


class DiffusionSampler(Sampler):
    """Go from noise to an image in T steps, in each of which all tokens may change.

    Each token first decides whether it leaves its state, then, if so, where to: float64 decides both. The law of a step
    is the ancestral one, unless a subclass says otherwise; that of the last step, which takes away all noise that is
    left, always is. Where a step of an absorbing process unmasks nothing, the network is not asked on a CPU; a GPU,
    which would have to wait for the answer, asks it and draws the same.

    Known tokens are kept as they are by absorbing processes, which is the model's own conditional law. Other processes
    see them with the noise of each step (Song et al., "Score-Based Generative Modeling", 2021, appendix I.2), which is
    not: what is drawn fits them the better the more steps there are, but not exactly.

    Args:
        steps: T, at least 1.
        grid: where the steps are: at step i from the end the mask probability is that of `grid` at i / T. The times
            i / T of the training schedule by default.
        guidance_law: what the step is made of, and what guidance multiplies: the distribution of the clean id
            (`"clean"`), the law of the step (`"transition"`), or the scores (`"score"`); see `Prediction`. Without
            guidance they differ for score heads alone, whose scores only `"clean"` normalises; SEDD's own samplers
            are those of `"score"`.
        clean_up: the last step draws from what is left (`"sample"`), or takes the most probable id (`"argmax"`).
        min_p: states that a step would lead to with a smaller probability are left out, in [0, 1); it acts on the law
            of the step, of which staying is a part (GIDD).
        settings: of `Sampler`. Temperature and filters act on the distribution of the clean id; r of the guidance
            schedules is i / T at step i.

    Raises:
        ValueError: a setting out of its range; in use, a generator without a denoiser, guidance on a model without
            classes, logits that are no numbers, or temperature or filters without a clean distribution to act on.
    """

    attention = "bidirectional"

    def __init__(
        self,
        steps: int = 64,
        grid: MaskSchedule | None = None,
        *,
        guidance_law: GuidanceLaw = "clean",
        clean_up: Literal["sample", "argmax"] = "sample",
        min_p: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if guidance_law not in ("clean", "transition", "score"):
            raise ValueError(f"guidance_law must be 'clean', 'transition' or 'score', got {guidance_law!r}")
        if clean_up not in ("sample", "argmax"):
            raise ValueError(f"clean_up must be 'sample' or 'argmax', got {clean_up!r}")
        if not 0 <= min_p < 1:
            raise ValueError(f"min_p must lie in [0, 1), got {min_p}")
        if min_p and self.filters:
            raise ValueError(
                f"min_p={min_p} acts on the law of a step, temperature, top_k and top_p on that of the clean id before "
                "it: give one of the two"
            )
        self.min_p = min_p
        self.steps = steps
        self.grid = grid
        self.guidance_law: GuidanceLaw = guidance_law
        self.clean_up = clean_up

    # The loop.

    def draw(self, context: SamplingContext) -> Tensor:
        denoiser = checked_denoiser(context, self)
        self.check(denoiser)
        intervals = self.intervals(denoiser.schedule, context)
        scales = self.scales(len(intervals))
        x = NoisyTokens(context, denoiser, level=intervals[0].t, steps=self.last_number(len(intervals)) + 1)
        if not any(context.unknown_counts()):
            return context.start()
        for interval, scale in zip(intervals, scales, strict=True):
            self.step(x, interval, scale)  # x_t to x_s
            x.restore_known(interval.s)
        return self.finish(x)

    def finish(self, x: "NoisyTokens") -> Tensor:
        """Give the tokens `(B, N)` after the last step: as they are, unless a subclass goes on with them."""
        return x.tokens

    def last_number(self, steps: int) -> int:
        """The largest number that names the random numbers of a step, of so many steps."""
        return steps - 1

    def step(self, x: "NoisyTokens", interval: Interval, scale: float) -> None:
        """Take the tokens x_t of `x` to x_s, with the guidance scale `scale`."""
        # One uniform number a token decides whether it leaves its state, or is masked again.
        uniforms = x.random.uniform(Purpose.CONFIDENCE, x.length, interval.number)
        remasked = self.remask(x, interval, uniforms)
        if x.absorbing and self.guidance_law == "clean" and not self.min_p and host_sees(uniforms):
            # Which tokens are unmasked is not the network's to say: where none is, it is not asked.
            certain = self.unmask_probability(interval, torch.ones_like(interval.alpha_t))
            if not bool((x.masked & (uniforms < certain)).any()):
                x.mask(remasked)
                return
        jumps = self.jumps(x.predict(finite_noise(interval.t), scale), interval)
        if self.min_p:
            jumps = without_rare(jumps, x.tokens, x.denoiser.process, self.min_p)
        if interval.last and self.clean_up == "argmax":
            ids = jumps.most_probable(x.tokens)
            jumping, log_probability = ids != x.tokens, jumps.log_probability(ids)
        else:
            jumping = (uniforms < jumps.probability) & ~x.known
            ids, log_probability = self.draw_targets(x, jumps, jumping, interval.number)
        x.mask(remasked)
        x.write(jumping, ids, log_probability)

    def draw_targets(self, x: "NoisyTokens", jumps: Jumps, jumping: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Draw the ids that tokens jump to.

        Args:
            x: the tokens before.
            jumps: where each token may go to.
            jumping: `(B, N)` bool, the tokens that leave their state.
            number: names the random numbers.

        Returns:
            The ids `(B, N)`, and their log-probabilities `(B, N)`; without meaning where no token jumps.
        """
        uniforms = x.random.uniform(Purpose.TOKEN, x.length, number)
        return draw_where(jumping, self.choose if x.absorbing else draw_jumps, jumps.targets, uniforms)

    def remask(self, x: "NoisyTokens", interval: Interval, uniforms: Tensor) -> Tensor:
        """`(B, N)` bool: the unmasked tokens that a step masks again, by `uniforms (B, N)`."""
        return uniforms < self.remask_probability(x, interval)

    def remask_probability(self, x: "NoisyTokens", interval: Interval) -> Tensor:
        """The probability `(B, N)` float64 that a step masks each token again: 0, as a rule."""
        return torch.zeros_like(x.known, dtype=torch.float64)

    # The law of a step: ancestral, unless a subclass says otherwise.

    def unmask_probability(self, interval: Interval, weight: Tensor) -> Tensor:
        """The probability that a masked token of an absorbing process is unmasked in a step.

        `(alpha_s - alpha_t) / (1 - alpha_t)` (Sahoo et al., MDLM, 2024, eq. 6).

        Args:
            interval: the step.
            weight: `(1, 1)` or `(B, N)` float64, the sum of `Prediction.clean_weights`: 1 where they are normalised.

        Returns:
            `weight`'s shape, float64.
        """
        if interval.last:
            return torch.ones_like(weight)
        return (unmask_probability(interval.alpha_s, interval.alpha_t) * weight).clamp(max=1)

    def jumps_from_clean(self, clean: Tensor, prediction: Prediction, interval: Interval) -> Jumps:
        """The step of a process that does more than mask, from log-probabilities `(B, N, K)` of the clean ids.

        `sum over x_0 of q(x_s | x_t, x_0) p(x_0 | x_t)` (Austin et al., D3PM, 2021, eq. 4).
        """
        process = prediction.denoiser.process
        return jumps_from_clean(clean, prediction.x_t, process, interval.alpha_s, interval.alpha_t)

    def jumps_from_scores(self, scores: Tensor, prediction: Prediction, interval: Interval) -> Jumps:
        """The step of a process that does more than mask, from log-scores `(B, N, S)` (Lou et al., SEDD, eq. 19)."""
        x_t, process, ratio = prediction.x_t, prediction.denoiser.process, prediction.level.alpha / interval.alpha_s
        # A factor of all weights of a token does not matter, but infinite ones do.
        score = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        if not interval.last:
            return jumps_from_weights(analytic_weights(score, x_t, process, ratio), x_t)
        ids = positive_weights(denoise_weights(score, x_t, process, ratio), scores)
        return jumps_from_weights(process.widen(ids), x_t)

    # Guidance and filters.

    def jumps(self, prediction: Prediction, interval: Interval) -> Jumps:
        """The step of every token, guided by this sampler's law."""
        if self.guidance_law == "transition":
            each = [self._unguided_jumps(part, interval) for part in prediction.each()]
            return each[0] if len(each) == 1 else guide_jumps(each[0], each[1], prediction.scale)
        absorbing = is_absorbing(prediction.denoiser.process)
        if self.guidance_law == "score":
            if absorbing:
                return self._unmasking(prediction.clean_weights(), prediction, interval)
            return self.jumps_from_scores(prediction.scores(), prediction, interval)
        if absorbing:
            return self._unmasking(prediction.clean(), prediction, interval)
        clean = prediction.clean(self.filtered if self.filters else None)
        return self.jumps_from_clean(clean, prediction, interval)

    def _unguided_jumps(self, prediction: Prediction, interval: Interval) -> Jumps:
        """The step that an unguided prediction leads to, in the terms of its head."""
        if is_absorbing(prediction.denoiser.process):
            return self._unmasking(prediction.clean_weights(), prediction, interval)
        if prediction.denoiser.head.kind == "score":
            return self.jumps_from_scores(prediction.scores(), prediction, interval)
        return self.jumps_from_clean(prediction.clean(), prediction, interval)

    def _unmasking(self, weights: Tensor, prediction: Prediction, interval: Interval) -> Jumps:
        """The step of an absorbing process, from log-weights `(B, N, K)` of the clean ids."""
        if self.guidance_law == "clean":
            weight = torch.ones_like(interval.alpha_t)
        else:
            weight = weights.double().logsumexp(dim=-1).exp()
        masked = prediction.x_t == prediction.denoiser.process.mask_id
        return Jumps(torch.where(masked, self.unmask_probability(interval, weight), 0.0), weights)

    @property
    def filters(self) -> bool:
        """Whether temperature, top-k or top-p act on the distribution of the clean id."""
        return self.temperature != 1 or self.top_k is not None or self.top_p not in (None, 1.0)

    def filtered(self, clean: Tensor) -> Tensor:
        """Log-probabilities of the clean ids at this sampler's temperature, after its filters."""
        if not self.filters:
            return clean
        return filter_logits(clean / self.temperature, self.top_k, self.top_p).log_softmax(dim=-1)

    def check(self, denoiser: Denoiser) -> None:
        """Refuse generators that this sampler has no step for.

        Raises:
            ValueError: filters without a clean distribution to act on, or steps of scores where rates change.
        """
        if self.guidance_law == "score" and not denoiser.process.homogeneous:
            raise ValueError(
                f"guidance_law='score' is for noise whose rates do not change, those of "
                f"{type(denoiser.process).__name__} do: use 'clean' or 'transition'"
            )
        if self.filters and self.guidance_law != "clean" and not is_absorbing(denoiser.process):
            raise ValueError(
                "temperature, top_k and top_p act on the distribution of the clean id, which the steps of "
                f"guidance_law={self.guidance_law!r} have only where noise masks: use guidance_law='clean' with "
                f"{type(denoiser.process).__name__}"
            )

    # The time grid.

    def fractions(self, device: torch.device | None = None) -> Tensor:
        """The fractions i / T of the steps that are left, `(T + 1,)` float64, from 0 to 1."""
        return torch.linspace(0, 1, self.steps + 1, dtype=torch.float64, device=device)

    def times(self, schedule: MaskSchedule, device: torch.device | None = None) -> Tensor:
        """The `(T + 1,)` times of the grid, float64, from 0 to 1."""
        times = self.fractions(device)
        if self.grid is None:
            return times
        first, last = schedule.mask_probability(times[:: len(times) - 1])
        times[1:-1] = schedule.inverse(self.grid.mask_probability(times[1:-1]).clamp(first, last))
        return times

    def levels(self, schedule: MaskSchedule, times: Tensor) -> tuple[NoiseLevel, NoiseLevel]:
        """The levels at the start and at the end of each step, `(T, 1, 1)`, of falling times `(T + 1, 1, 1)`."""
        levels = NoiseLevel.at(schedule, times)
        return levels.take(slice(-1)), levels.take(slice(1, None))

    def intervals(self, schedule: MaskSchedule, context: SamplingContext) -> list[Interval]:
        """The T steps in turn, the noisiest first."""
        # Made on the device, all in one: a copy would wait for it, and each level of its own takes many operations.
        times = self.times(schedule, context.labels.device).flip(0)[:, None, None]
        starts, ends = self.levels(schedule, times)
        slopes, steps = schedule.derivative(times), len(times) - 1
        intervals = [
            Interval(
                number=number,
                t=starts.take(number),
                s=ends.take(number),
                slope=slopes[number],
                last=number == steps - 1,
            )
            for number in range(steps)
        ]
        # Schedules that keep away from 0 would leave masks at the end.
        end = intervals[-1].s
        clean = torch.ones_like(end.alpha)
        intervals[-1] = replace(intervals[-1], s=replace(end, alpha=clean, noise=torch.zeros_like(clean)))
        return intervals


def draw_where(
    where: Tensor, draw: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw ids at some positions: at these alone where the host sees which they are, else at all of them.

    Args:
        where: `(B, N)` bool, n positions.
        draw: makes ids and log-probabilities `(...)` of logits `(..., K)` and uniform numbers `(...)`, and is told by
            `where` which rows are needed.
        logits: `(B, N, K)`.
        uniforms: `(B, N)` float64.

    Returns:
        Ids `(B, N)` int64, and their log-probabilities `(B, N)`; without meaning at other positions.
    """
    if not host_sees(where):
        return draw(logits, uniforms, where=where)
    ids, log_probability = draw(logits[where], uniforms[where])
    return (
        torch.zeros_like(where, dtype=ids.dtype).masked_scatter(where, ids),
        torch.zeros_like(where, dtype=log_probability.dtype).masked_scatter(where, log_probability),
    )


def draw_jumps(targets: Tensor, uniforms: Tensor, *, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw states, unfiltered, with their log-probabilities; arguments as of `draw_categorical`."""
    ids = draw_categorical(targets, uniforms, where=where)
    return ids, targets.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


class AncestralSampler(DiffusionSampler):
    """Draw each token from its exact law one level cleaner, given all others as they are.

    `sum over x_0 of q(x_s | x_t, x_0) p(x_0 | x_t)` (Austin et al., D3PM, 2021, eq. 4; Sahoo et al., MDLM, 2024, eq. 6;
    Schiff et al., UDLM, 2024), which in terms of scores is SEDD's analytic step (Lou et al., 2024, eq. 19): the plain
    law of `DiffusionSampler`. What it misses is that tokens of one step are drawn apart: the law approaches the model's
    with the number of steps.

    Args:
        settings: of `DiffusionSampler` and `Sampler`.
    """


class FirstHittingSampler(Sampler):
    """Go from one unmasking to the next: one token, and one network evaluation, at a time.

    The exact sampler of absorbing processes (Zheng et al., "Masked Diffusion Models are Secretly Time-Agnostic Masked
    Models and Exploit Inaccurate Categorical Sampling", ICLR 2025). With n tokens masked at the mask probability m the
    next is unmasked at `m U^(1 / n)`, U uniform, and is equally likely to be any of them. No time is left to
    discretise: where the network's conditionals are those of one law, the samples follow it. Any positions may be
    known. The guidance is that of the clean law; r of its schedules is n / N at unmasking n from 0.

    Args:
        settings: of `Sampler`.

    Raises:
        ValueError: in use, a generator whose noise does more than mask, guidance on a model without classes, or logits
            that are no numbers.
    """

    attention = "bidirectional"

    def draw(self, context: SamplingContext) -> Tensor:
        denoiser = checked_denoiser(context, self)
        if not is_absorbing(denoiser.process):
            raise ValueError(
                "FirstHittingSampler unmasks tokens, the process must be absorbing: "
                f"{type(denoiser.process).__name__} is not"
            )
        schedule, random, length = denoiser.schedule, context.random, context.layout.length
        scales = self.scales(length)
        start = NoiseLevel.at(schedule, torch.ones(len(context.labels), 1, device=context.labels.device))
        x = NoisyTokens(context, denoiser, level=start)
        order = random.uniform(Purpose.ORDER, length).masked_fill(x.known, 2.0).argsort(dim=1)
        hits = random.uniform(Purpose.CONFIDENCE, length)
        uniforms = random.uniform(Purpose.TOKEN, length)
        masked = x.masked.sum(dim=1, keepdim=True)
        mask_probability, lowest = start.noise, schedule.mask_probability(start.t.new_zeros(()))
        for number in range(max(context.unknown_counts(), default=0)):
            # The next hitting time, of n masked tokens: m U^(1 / n).
            n = (masked - number).clamp(min=1).double()
            mask_probability = mask_probability * hits[:, number : number + 1] ** (1 / n)
            level = NoiseLevel.at(schedule, schedule.inverse(mask_probability.clamp(min=lowest)))
            # The token that is unmasked there, if its sequence has one left.
            clean = x.predict(level, scales[number]).clean()
            place = order[:, number : number + 1]
            logits = clean.gather(1, place[..., None].expand(-1, -1, clean.shape[-1]))
            ids, log_probability = self.choose(logits, uniforms.gather(1, place))
            here = torch.zeros_like(x.known).scatter(1, place, True) & x.masked
            x.write(here, ids.expand(here.shape), log_probability.expand(here.shape))
        return x.tokens


class NoisyTokens:
    """The tokens x_t of a batch on their way from noise to images.

    Known tokens stand from the start on: as they are where the noise masks, with the noise of each level elsewhere.

    Args:
        context: of this call.
        denoiser: process, schedule and head.
        level: the noise at the start.
        steps: how many numbers name the random numbers of steps.

    Attributes:
        steps: that number.
        random: the streams of the steps.
        tokens: `(B, N)` int64, x_t.
        known: `(B, N)` bool, the tokens that are given.
        log_probability: `(B, N)` float64, that of each id when it was drawn; 0 where none was.
        absorbing: whether the noise is masks alone.
        length: N.
    """

    def __init__(self, context: SamplingContext, denoiser: Denoiser, *, level: NoiseLevel, steps: int = 1) -> None:
        self.context = context
        self.steps = steps
        self.random = context.random.ahead(steps)
        self.denoiser = denoiser
        self.absorbing = is_absorbing(denoiser.process)
        self.length = context.layout.length
        self.tokens = context.start()
        self.known = ~context.unknown()
        self.log_probability = torch.zeros(self.known.shape, dtype=torch.float64, device=self.known.device)
        if not self.absorbing:
            prior = denoiser.process.draw_prior(context.random.uniform(Purpose.ORDER, self.length))
            self.tokens = torch.where(self.known, self.tokens, prior)
            self.restore_known(level)
            context.begin(self.tokens)

    @property
    def masked(self) -> Tensor:
        """`(B, N)` bool: where the mask stands."""
        return self.tokens == self.context.layout.mask_id

    def predict(self, level: NoiseLevel, scale: float) -> Prediction:
        """Ask the network about x_t at a level of noise: one pass, of two evaluations where the scale is not 1.

        Raises:
            ValueError: logits that are no numbers.
        """
        outputs = []
        for logits in self.context.evaluate(self.tokens, scale != 1, level):
            if logits is None:
                continue
            forbid(
                logits.sum(dim=-1).isnan().any(),
                lambda: (
                    f"the backbone's logits are NaN at t = {float(level.t.max()):.4g}: its weights or its precision "
                    "are broken, nothing can be drawn from them"
                ),
            )
            outputs.append(self.denoiser.head(logits, self.tokens, level))
        return Prediction(denoiser=self.denoiser, x_t=self.tokens, level=level, outputs=tuple(outputs), scale=scale)

    def mask(self, where: Tensor) -> None:
        """Mask tokens again, `where (B, N)` bool."""
        self.tokens = self.tokens.masked_fill(where, self.context.layout.mask_id)

    def write(self, where: Tensor, ids: Tensor, log_probability: Tensor) -> None:
        """Put the ids that a pass drew, and record the step.

        Args:
            where: `(B, N)` bool, the positions.
            ids: `(B, N)` int64, of which those at the positions are taken.
            log_probability: `(B, N)`, that of each when it was drawn.
        """
        self.tokens = torch.where(where, ids, self.tokens)
        self.log_probability = torch.where(where, log_probability.double(), self.log_probability)
        if self.context.traced:
            self.context.record(self.tokens, log_probability.double().masked_fill(~where, torch.nan))

    def restore_known(self, level: NoiseLevel) -> None:
        """Put the known tokens back, with the noise of a level, where noise is not masks alone."""
        if self.absorbing or self.context.known is None:
            return
        given = torch.where(self.known, self.context.start(), 0)
        # The same numbers at every level: what is given gets rid of its noise as the rest does.
        uniforms = self.context.random.uniform(Purpose.MASK_ORDER, self.length)
        noisy = self.denoiser.process.corrupt(given, level.alpha, uniforms, level.noise)
        self.tokens = torch.where(self.known, noisy, self.tokens)


# At least this much of a token is left at the start: scores and the total noise stay finite where a schedule ends in
# pure noise. It changes a law by as much.
_LEAST_ALPHA = 1e-8


def finite_noise(level: NoiseLevel) -> NoiseLevel:
    """The level with alpha at least 1e-8, so that its total noise is finite, as networks and scores need it."""
    alpha, noise = level.alpha.clamp(min=_LEAST_ALPHA), level.noise.clamp(max=1 - _LEAST_ALPHA)
    return replace(level, alpha=alpha, noise=noise)


def checked_denoiser(context: SamplingContext, sampler: Sampler) -> Denoiser:
    """The denoiser of a call, which samplers of diffusion cannot do without.

    Raises:
        ValueError: the generator did not learn to undo noise, or guidance has nothing to tell apart.
    """
    name = type(sampler).__name__
    if context.denoiser is None:
        raise ValueError(f"{name} needs a generator that learned to undo noise, as Masked and DiscreteDiffusion do")
    if sampler.guidance_scale != 1 and context.layout.num_classes < 2:
        raise ValueError(
            f"guidance_scale={sampler.guidance_scale} needs a generator of several classes, this one has "
            f"{context.layout.num_classes}: leave it at 1"
        )
    return context.denoiser
