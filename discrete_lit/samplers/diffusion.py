"""What samplers that undo noise step by step share."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.processes import MaskSchedule, Purpose
from discrete_lit.processes.denoiser import Denoiser
from discrete_lit.processes.noise_level import NoiseLevel
from discrete_lit.processes.reverse import Jumps, is_absorbing
from discrete_lit.samplers.categorical import draw_categorical, filter_logits
from discrete_lit.samplers.drawing import Drawing
from discrete_lit.samplers.parallel import ParallelSampler
from discrete_lit.samplers.prediction import Prediction, guide_jumps
from discrete_lit.samplers.trajectory import Trajectory, denoiser_of

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


class DiffusionSampler(ParallelSampler):
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
        super().__init__(steps, **settings)
        if guidance_law not in ("clean", "transition", "score"):
            raise ValueError(f"guidance_law must be 'clean', 'transition' or 'score', got {guidance_law!r}")
        if clean_up not in ("sample", "argmax"):
            raise ValueError(f"clean_up must be 'sample' or 'argmax', got {clean_up!r}")
        self.grid = grid
        self.guidance_law: GuidanceLaw = guidance_law
        self.clean_up = clean_up

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

    def draw(self, drawing: Drawing) -> Tensor:
        denoiser = denoiser_of(drawing, self)
        self.check(denoiser)
        intervals, scales = self.intervals(denoiser.schedule, drawing), self.scales(self.steps)
        trajectory = Trajectory(drawing, denoiser, intervals[0].before)
        if bool(trajectory.fixed.all()):
            return drawing.start()
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

    def intervals(self, schedule: MaskSchedule, drawing: Drawing) -> list[Interval]:
        """The steps in turn, the noisiest first."""
        times = self.times(schedule).flip(0).to(drawing.labels.device)
        moments = [time.expand(len(drawing.labels), 1) for time in times]
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
        drawing, denoiser, states = trajectory.drawing, trajectory.denoiser, trajectory.states
        coins = drawing.random.uniform(Purpose.CONFIDENCE, states.shape[1], interval.number)
        forgotten = self.forget(trajectory, interval, coins)
        if is_absorbing(denoiser.process) and self.guidance_law == "clean":
            # The network has no say in which tokens are revealed.
            certain = self.reveal(interval, torch.ones_like(interval.before.alpha))
            if not bool((trajectory.masked & (coins < certain)).any()):
                trajectory.mask(forgotten)
                return
        prediction = Prediction.of(drawing, denoiser, states, interval.seen, scale)
        jumps = self.jumps(prediction, interval)
        uniforms = drawing.random.uniform(Purpose.TOKEN, states.shape[1], interval.number)
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
