"""The noisy sequences of a draw on their way to images.

What samplers that undo noise step by step share.

The exact reverse step of every token: D3PM's and MDLM's ancestral sampler, SEDD's analytic one (Tweedie).

Steps along the reverse rates at their start: Euler and tau-leaping.

The exact sampler of absorbing processes (Zheng et al., "Masked Diffusion Models are Secretly Time-Agnostic Masked
Models and Exploit Inaccurate Categorical Sampling", ICLR 2025).
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
from discrete_lit.diffusion import MaskSchedule
from discrete_lit.diffusion.parameterization import Denoiser, positive_weights, score_from_leave_one_out
from discrete_lit.diffusion.processes import DenseProcess, is_absorbing
from discrete_lit.diffusion.reverse import (
    Jumps,
    analytic_weights,
    denoise_weights,
    euler_weights,
    jumps_from_clean,
    jumps_from_weights,
    reverse_rates,
    unmask_probability,
)
from discrete_lit.diffusion.schedules import NoiseLevel
from discrete_lit.samplers.categorical import draw_categorical, filter_logits
from discrete_lit.samplers.diffusion_guidance import Prediction, guide_jumps
from discrete_lit.samplers.sampler import Sampler, SamplingContext


def denoiser_of(context: SamplingContext, sampler: Sampler) -> Denoiser:
    """What a sampler of diffusion needs of the generator.

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


class Trajectory:
    """States of all tokens, those that are given kept in their place.

    Attributes:
        drawing: passes and random numbers.
        denoiser: process, schedule and head.
        states: `(B, N)` int64, x_t.
        fixed: `(B, N)` bool, tokens that are given.
        log_probability: `(B, N)` float64, that of each id when it was drawn; 0 where none was.
    """

    def __init__(self, context: SamplingContext, denoiser: Denoiser, level: NoiseLevel) -> None:
        self.context = context
        self.denoiser = denoiser
        self.fixed = ~context.unknown()
        self.log_probability = torch.zeros(self.fixed.shape, dtype=torch.float64, device=self.fixed.device)
        process, length = denoiser.process, context.layout.length
        self.states = context.start()
        if not is_absorbing(process):
            prior = process.draw_prior(context.random.uniform(Purpose.ORDER, length))
            self.states = torch.where(self.fixed, self.states, prior)
            self.fix(level)
            context.begin(self.states)

    @property
    def masked(self) -> Tensor:
        """`(B, N)` bool, where the mask stands."""
        return self.states == self.context.layout.mask_id

    def fix(self, level: NoiseLevel) -> None:
        """Put the tokens that are given to their places, with the noise of a level where noise is not masks alone."""
        if is_absorbing(self.denoiser.process) or not bool(self.fixed.any()):
            return
        given = torch.where(self.fixed, self.context.start(), 0)
        # The same numbers at every level: what is given gets rid of its noise as the rest does.
        uniforms = self.context.random.uniform(Purpose.MASK_ORDER, given.shape[1])
        noisy = self.denoiser.process.corrupt(given, level.alpha, uniforms)
        self.states = torch.where(self.fixed, noisy, self.states)

    def mask(self, forgotten: Tensor) -> None:
        """Mask tokens again, `(B, N)` bool."""
        self.states = self.states.masked_fill(forgotten, self.context.layout.mask_id)

    def move(self, moved: Tensor, states: Tensor, log_probability: Tensor) -> None:
        """Note what a pass did.

        Args:
            moved: `(B, N)` bool, tokens that were drawn.
            states: `(B, N)` after it.
            log_probability: `(B, N)` of what was drawn.
        """
        self.states = torch.where(moved, states, self.states)
        self.log_probability = torch.where(moved, log_probability.double(), self.log_probability)
        self.context.record(self.states, log_probability.double().masked_fill(~moved, torch.nan))


GuidanceLaw = Literal["clean", "transition", "score"]


# Less of a token than this is not left at the start: scores and the total noise stay finite where a schedule ends in
# pure noise. It changes a law by as much.
_LEAST_ALPHA = 1e-8


@dataclass(frozen=True)
class Interval:
    """One step of the time grid."""

    number: int
    """From 0; it names the random numbers."""
    before: NoiseLevel
    """At the step's start, the noisier."""
    after: NoiseLevel
    """At its end."""
    slope: Tensor
    """`(B, 1)` float64, m'(t) at the start."""
    last: bool
    """Whether it takes all noise away."""

    @property
    def seen(self) -> NoiseLevel:
        """`before`, of finite noise, as networks and scores need it."""
        alpha, noise = self.before.alpha.clamp(min=_LEAST_ALPHA), self.before.noise.clamp(max=1 - _LEAST_ALPHA)
        return replace(self.before, alpha=alpha, noise=noise)

    def corrected(self, number: int) -> "Interval":
        """Of no length, at the end of this one, with the random numbers of `number`."""
        return Interval(number, self.after, self.after, torch.zeros_like(self.slope), last=False)


class DiffusionSampler(Sampler):
    """Goes from noise to an image in T steps, in each of which all tokens may change.

    Each token first decides whether it leaves its state, then, if so, where to: float64 decides both. The last step
    takes away all noise that is left, whatever the sampler. Where a step of an absorbing process reveals nothing, the
    network is not asked.

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
        settings: of `Sampler`. Temperature and filters act on the distribution of the clean id; r of the guidance
            schedules is i / T at step i.

    Raises:
        ValueError: a setting out of its range; in use, a generator without a denoiser, guidance on a model without
            classes, logits that are no numbers, or temperature or filters without a clean distribution to act on.
    """

    def __init__(
        self,
        steps: int = 64,
        grid: MaskSchedule | None = None,
        guidance_law: GuidanceLaw = "clean",
        clean_up: Literal["sample", "argmax"] = "sample",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if guidance_law not in ("clean", "transition", "score"):
            raise ValueError(f"guidance_law must be 'clean', 'transition' or 'score', got {guidance_law!r}")
        if clean_up not in ("sample", "argmax"):
            raise ValueError(f"clean_up must be 'sample' or 'argmax', got {clean_up!r}")
        self.steps = steps
        self.grid = grid
        self.guidance_law: GuidanceLaw = guidance_law
        self.clean_up = clean_up

    attention = "bidirectional"

    @abstractmethod
    def reveal(self, interval: Interval, weight: Tensor) -> Tensor:
        """The probability that a masked token of an absorbing process is revealed.

        Args:
            interval: the step.
            weight: `(B, 1)` or `(B, N)` float64, the sum of `Prediction.clean_weights`: 1 where they are normalised.
        """

    @abstractmethod
    def jumps_from_clean(self, clean: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        """The step of a process that does more than mask, of log-probabilities `(B, N, K)` of the clean ids."""

    @abstractmethod
    def jumps_from_scores(self, scores: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        """The same, of log-scores `(B, N, S)`."""

    @property
    def filters(self) -> bool:
        """Whether anything acts on the distribution of the clean id."""
        return self.temperature != 1 or self.top_k is not None or self.top_p not in (None, 1.0)

    def check(self, denoiser: Denoiser) -> None:
        """Refuse what this sampler has no step for."""
        if self.filters and self.guidance_law != "clean" and not is_absorbing(denoiser.process):
            raise ValueError(
                "temperature, top_k and top_p act on the distribution of the clean id, which the steps of "
                f"guidance_law={self.guidance_law!r} have only where noise masks: use guidance_law='clean' with "
                f"{type(denoiser.process).__name__}"
            )

    def draw(self, context: SamplingContext) -> Tensor:
        denoiser = denoiser_of(context, self)
        self.check(denoiser)
        intervals, scales = self.intervals(denoiser.schedule, context), self.scales(self.steps)
        trajectory = Trajectory(context, denoiser, intervals[0].before)
        if bool(trajectory.fixed.all()):
            return context.start()
        for interval, scale in zip(intervals, scales, strict=True):
            self.step(trajectory, interval, scale)
            trajectory.fix(interval.after)
        return trajectory.states

    def times(self, schedule: MaskSchedule) -> Tensor:
        """`(T + 1,)` float64, from 0 to 1."""
        times = torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)
        if self.grid is None:
            return times
        ends = schedule.mask_probability(times[[0, -1]])
        times[1:-1] = schedule.inverse(self.grid.mask_probability(times[1:-1]).clamp(ends[0], ends[1]))
        return times

    def intervals(self, schedule: MaskSchedule, context: SamplingContext) -> list[Interval]:
        """The steps in turn, the noisiest first."""
        times = self.times(schedule).flip(0).to(context.labels.device)
        moments = [time.expand(len(context.labels), 1) for time in times]
        levels = [NoiseLevel.at(schedule, moment) for moment in moments]
        # Schedules that keep away from 0 would leave masks at the end.
        clean = torch.ones_like(levels[-1].alpha)
        levels[-1] = replace(levels[-1], alpha=clean, noise=torch.zeros_like(clean))
        return [
            Interval(number, before, after, schedule.derivative(before.t), number == self.steps - 1)
            for number, (before, after) in enumerate(pairwise(levels))
        ]

    def step(self, trajectory: Trajectory, interval: Interval, scale: float) -> None:
        """Move the trajectory to the end of an interval."""
        context, denoiser, states = trajectory.context, trajectory.denoiser, trajectory.states
        coins = context.random.uniform(Purpose.CONFIDENCE, states.shape[1], interval.number)
        forgotten = self.forget(trajectory, interval, coins)
        if is_absorbing(denoiser.process) and self.guidance_law == "clean":
            # The network has no say in which tokens are revealed.
            certain = self.reveal(interval, torch.ones_like(interval.before.alpha))
            if not bool((trajectory.masked & (coins < certain)).any()):
                trajectory.mask(forgotten)
                return
        prediction = Prediction.of(context, denoiser, states, interval.seen, scale)
        jumps = self.jumps(prediction, interval)
        uniforms = context.random.uniform(Purpose.TOKEN, states.shape[1], interval.number)
        if interval.last and self.clean_up == "argmax":
            ids = jumps.most_probable(states)
            jumping, log_probability = ids != states, jumps.log_probability(ids)
        else:
            jumping = (coins < jumps.probability) & ~trajectory.fixed
            ids, log_probability = self.land(trajectory, jumps, jumping, uniforms, interval)
        trajectory.mask(forgotten)
        trajectory.move(jumping, ids, log_probability)

    def forget(self, trajectory: Trajectory, interval: Interval, coins: Tensor) -> Tensor:
        """`(B, N)` bool, revealed tokens that are masked again, by uniform `coins (B, N)`; none, as a rule."""
        return torch.zeros_like(trajectory.fixed)

    def jumps(self, prediction: Prediction, interval: Interval) -> Jumps:
        """The step of every token, by this sampler's guidance law."""
        denoiser, states = prediction.denoiser, prediction.states
        absorbing = is_absorbing(denoiser.process)
        if self.guidance_law == "transition":
            parts = [self._natural_jumps(part, interval) for part in prediction.each()]
            return parts[0] if len(parts) == 1 else guide_jumps(parts[0], parts[1], prediction.scale)
        if self.guidance_law == "score":
            if absorbing:
                return self._revealing(prediction.clean_weights(), states, denoiser, interval)
            return self.jumps_from_scores(prediction.scores(), states, denoiser, interval)
        clean = prediction.clean()
        if absorbing:
            return self._revealing(clean, states, denoiser, interval)
        return self.jumps_from_clean(self.filtered(clean), states, denoiser, interval)

    def filtered(self, clean: Tensor) -> Tensor:
        """Log-probabilities of clean ids at this sampler's temperature and after its filters."""
        if not self.filters:
            return clean
        return filter_logits(clean / self.temperature, self.top_k, self.top_p).log_softmax(dim=-1)

    def land(
        self, trajectory: Trajectory, jumps: Jumps, jumping: Tensor, uniforms: Tensor, interval: Interval
    ) -> tuple[Tensor, Tensor]:
        """Draw where the `jumping (B, N)` tokens go to.

        Returns:
            Their states `(B, N)` and log-probabilities `(B, N)` float64; of no meaning elsewhere.
        """
        targets, chosen = jumps.targets[jumping], uniforms[jumping]
        if is_absorbing(trajectory.denoiser.process):
            ids, log_probability = self.choose(targets, chosen)
        else:
            ids = draw_categorical(targets, chosen)
            log_probability = targets.log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]
        return (
            trajectory.states.masked_scatter(jumping, ids),
            torch.zeros_like(uniforms).masked_scatter(jumping, log_probability.double()),
        )

    def _natural_jumps(self, prediction: Prediction, interval: Interval) -> Jumps:
        """Of an unguided prediction, in the terms of its head."""
        denoiser, states = prediction.denoiser, prediction.states
        if is_absorbing(denoiser.process):
            return self._revealing(prediction.clean_weights(), states, denoiser, interval)
        if denoiser.head.kind == "score":
            return self.jumps_from_scores(prediction.scores(), states, denoiser, interval)
        return self.jumps_from_clean(prediction.clean(), states, denoiser, interval)

    def _revealing(self, weights: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        """Of an absorbing process."""
        if self.guidance_law == "clean":
            weight = torch.ones_like(interval.before.alpha)
        else:
            weight = weights.double().logsumexp(dim=-1).exp()
        masked = states == denoiser.process.mask_id
        return Jumps(torch.where(masked, self.reveal(interval, weight), 0.0), weights)


class AncestralSampler(DiffusionSampler):
    """Draws each token from its exact law one level cleaner, given all others as they are.

    `sum over x_0 of q(x_s | x_t, x_0) p(x_0 | x_t)` (Austin et al., D3PM, 2021, eq. 4; Sahoo et al., MDLM, 2024, eq. 6;
    Schiff et al., UDLM, 2024), which in terms of scores is SEDD's analytic step (Lou et al., 2024, eq. 19). What it
    misses is that tokens of one step are drawn apart: the law approaches the model's with the number of steps.

    Args:
        settings: of `DiffusionSampler` and `Sampler`.
    """

    def reveal(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last:
            return torch.ones_like(weight)
        return (unmask_probability(interval.after.alpha, interval.before.alpha) * weight).clamp(max=1)

    def jumps_from_clean(self, clean: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        return jumps_from_clean(clean, states, denoiser.process, interval.after.alpha, interval.before.alpha)

    def jumps_from_scores(self, scores: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        process, ratio = denoiser.process, interval.seen.alpha / interval.after.alpha
        # What multiplies all weights of a token does not matter, but infinite ones do.
        score = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        if not interval.last:
            return jumps_from_weights(analytic_weights(score, states, process, ratio), states)
        ids = positive_weights(denoise_weights(score, states, process, ratio), scores)
        return jumps_from_weights(process.widen(ids), states)


class EulerSampler(AncestralSampler):
    """Jumps with the probability dt times the reverse rate at the step's start, at most 1 (Lou et al., SEDD, 2024).

    A masked token is revealed with probability `dt m'(t) / m(t)`. The last step is the ancestral one.

    Args:
        settings: of `DiffusionSampler` and `Sampler`.
    """

    def reveal(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last:
            return super().reveal(interval, weight)
        return (self._hazard(interval) * weight).clamp(max=1)

    def jumps_from_clean(self, clean: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        if interval.last:
            return super().jumps_from_clean(clean, states, denoiser, interval)
        scores = score_from_leave_one_out(clean.double(), states, denoiser.process, interval.seen)
        return self.jumps_from_scores(scores, states, denoiser, interval)

    def jumps_from_scores(self, scores: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        if interval.last:
            return super().jumps_from_scores(scores, states, denoiser, interval)
        weights = euler_weights(scores.exp(), states, denoiser.process, self._noise(interval))
        return jumps_from_weights(weights, states)

    def _hazard(self, interval: Interval) -> Tensor:
        """`dt m' / m`, `(B, 1)`."""
        return (interval.before.t - interval.after.t) * interval.slope / (1 - interval.before.alpha)

    def _noise(self, interval: Interval) -> Tensor:
        """`dt d sigma / dt`, `(B, 1)`."""
        return (interval.before.t - interval.after.t) * interval.slope / interval.seen.alpha


class TauLeapingSampler(EulerSampler):
    """A Poisson number of jumps of every token, at the reverse rates of the step's start (Campbell et al., 2022).

    Of ids in an order (the dense processes: grey levels) all jumps of a step add up, and what leaves the range is put
    to its end. Ids that have none cannot be added: there the last of the jumps counts, so that a token moves with
    probability `1 - exp(-dt rate)`. The last step is the ancestral one.

    Args:
        settings: of `DiffusionSampler` and `Sampler`.

    Raises:
        ValueError: in use, an order of ids with a schedule that ends in pure noise, where rates are infinite.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.guidance_law == "transition":
            raise ValueError("TauLeapingSampler steps along rates, not laws: guidance_law must be 'clean' or 'score'")

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        ends = denoiser.schedule.mask_probability(torch.ones(1))
        if isinstance(denoiser.process, DenseProcess) and float(ends) == 1:
            raise ValueError(
                f"TauLeapingSampler cannot begin where rates are infinite: {type(denoiser.schedule).__name__} leaves "
                f"nothing of a token at t = 1; train with a schedule of finite noise, or use AncestralSampler"
            )

    def reveal(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last:
            return super().reveal(interval, weight)
        return -torch.expm1(-self._hazard(interval) * weight)

    def jumps_from_scores(self, scores: Tensor, states: Tensor, denoiser: Denoiser, interval: Interval) -> Jumps:
        if interval.last:
            return super().jumps_from_scores(scores, states, denoiser, interval)
        rates = reverse_rates(scores.exp(), states, denoiser.process).scatter(-1, states[..., None], 0.0)
        return Jumps(-torch.expm1(-self._noise(interval) * rates.sum(dim=-1)), rates.log())

    def land(
        self, trajectory: Trajectory, jumps: Jumps, jumping: Tensor, uniforms: Tensor, interval: Interval
    ) -> tuple[Tensor, Tensor]:
        if interval.last or not isinstance(trajectory.denoiser.process, DenseProcess):
            return super().land(trajectory, jumps, jumping, uniforms, interval)
        states, length = trajectory.states, trajectory.states.shape[1]
        random, number = trajectory.context.random, interval.number
        coins = random.uniform(Purpose.CONFIDENCE, length, number)
        counts = poisson(-torch.log1p(-jumps.probability), coins) * jumping
        moved, total = states.clone(), torch.zeros_like(coins)
        for jump in range(int(counts.max()) if counts.numel() else 0):
            if jump > 0:
                uniforms = random.uniform(Purpose.TOKEN, length, number + jump * self.steps)
            here = counts > jump
            ids, log_probability = super().land(trajectory, jumps, here, uniforms, interval)
            moved = torch.where(here, moved + ids - states, moved)
            total = total + log_probability
        return moved.clamp(0, trajectory.denoiser.process.vocab_size - 1), total


def poisson(mean: Tensor, uniforms: Tensor) -> Tensor:
    """Poisson counts, int64, by inversion: 0 where the uniform number is at least 1 - exp(-mean).

    Args:
        mean: float64 >= 0, finite.
        uniforms: float64 in (0, 1).
    """
    term = torch.exp(-mean)
    above, count = 1 - term, torch.zeros_like(mean, dtype=torch.int64)
    while True:
        more = uniforms < above
        if not bool(more.any()):
            return count
        count = count + more
        term = term * mean / count.clamp(min=1)
        above = torch.where(more, above - term, 0.0)


class FirstHittingSampler(Sampler):
    """Goes from one reveal to the next: one token, and one network evaluation, at a time.

    With n tokens masked at the mask probability m the next is revealed at `m U^(1 / n)`, U uniform, and is equally
    likely to be any of them. Nothing is left to discretise: where the network's conditionals are those of one law, the
    samples follow it. The guidance is that of the clean law; r of its schedules is n / N at reveal n from 0.

    Args:
        settings: of `Sampler`.

    Raises:
        ValueError: in use, a generator whose noise does more than mask, guidance on a model without classes, or logits
            that are no numbers.
    """

    attention = "bidirectional"

    def draw(self, context: SamplingContext) -> Tensor:
        denoiser = denoiser_of(context, self)
        if not is_absorbing(denoiser.process):
            raise ValueError(
                "FirstHittingSampler reveals masked tokens, the process must be absorbing: "
                f"{type(denoiser.process).__name__} is not"
            )
        schedule, length = denoiser.schedule, context.layout.length
        scales = self.scales(length)
        start = NoiseLevel.at(schedule, torch.ones(len(context.labels), 1, device=context.labels.device))
        trajectory = Trajectory(context, denoiser, start)
        lowest = schedule.mask_probability(start.t.new_zeros(()))
        mask_probability = start.noise
        order = context.random.uniform(Purpose.ORDER, length).masked_fill(trajectory.fixed, 2.0)
        rank = order.argsort(dim=1).argsort(dim=1)
        masked = trajectory.masked.sum(dim=1, keepdim=True)
        hits = context.random.uniform(Purpose.CONFIDENCE, length)
        uniforms = context.random.uniform(Purpose.TOKEN, length)
        for number in range(int(masked.max()) if masked.numel() else 0):
            left = (masked - number).clamp(min=1)
            mask_probability = mask_probability * hits[:, number : number + 1] ** (1 / left)
            level = NoiseLevel.at(schedule, schedule.inverse(mask_probability.clamp(min=lowest)))
            prediction = Prediction.of(context, denoiser, trajectory.states, level, scales[number])
            here = trajectory.masked & (rank == number)
            ids, log_probability = self.choose(prediction.clean()[here], uniforms[here])
            values = torch.zeros_like(uniforms).masked_scatter(here, log_probability.double())
            trajectory.move(here, trajectory.states.masked_scatter(here, ids), values)
        return trajectory.states
