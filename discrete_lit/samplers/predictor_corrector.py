"""Steps that go back in time, each followed by steps that stay at its level and mend what was drawn apart."""

from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose, random_subset
from discrete_lit.diffusion.parameterization import score_from_leave_one_out
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.diffusion.reverse import Jumps, reverse_rates
from discrete_lit.samplers.categorical import draw_categorical
from discrete_lit.samplers.diffusion import AncestralSampler, Interval, Trajectory
from discrete_lit.samplers.diffusion_guidance import Prediction


class PredictorCorrectorSampler(AncestralSampler):
    """Ancestral steps, and after each but the last some that leave p_s of its end unchanged where the network is exact.

    - `forward_backward`: forward and reverse jumps at once, whose rates add up to ones that keep p_s (Campbell et al.,
      "A Continuous Time Framework for Discrete Denoising Models", 2022, section 4.4), for the time of some noise: exact
      as it goes to 0.
    - `gibbs`: some tokens of each sequence, chosen at random, are drawn again given all others and the level; exact
      where it is one at a time (Zhao et al., "Informed Correctors for Discrete Diffusion Models", 2024).

    Args:
        corrector: one of the two.
        corrector_steps: after each step, at least 0; each costs a pass.
        corrector_noise: total noise sigma of a forward-backward step, > 0.
        corrector_tokens: drawn again by a Gibbs step, at least 1.
        settings: of `DiffusionSampler` and `Sampler`.

    Raises:
        ValueError: a setting out of its range; a guidance law other than `"clean"`.
    """

    def __init__(
        self,
        corrector: Literal["forward_backward", "gibbs"] = "forward_backward",
        corrector_steps: int = 1,
        corrector_noise: float = 0.05,
        corrector_tokens: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if corrector not in ("forward_backward", "gibbs"):
            raise ValueError(f"corrector must be 'forward_backward' or 'gibbs', got {corrector!r}")
        if corrector_steps < 0:
            raise ValueError(f"corrector_steps must be >= 0, got {corrector_steps}")
        if corrector_noise <= 0:
            raise ValueError(f"corrector_noise must be > 0, got {corrector_noise}")
        if corrector_tokens < 1:
            raise ValueError(f"corrector_tokens must be at least 1, got {corrector_tokens}")
        if self.guidance_law != "clean":
            raise ValueError(f"correctors are guided by the clean law, got guidance_law={self.guidance_law!r}")
        self.corrector = corrector
        self.corrector_steps = corrector_steps
        self.corrector_noise = corrector_noise
        self.corrector_tokens = corrector_tokens

    def step(self, trajectory: Trajectory, interval: Interval, scale: float) -> None:
        super().step(trajectory, interval, scale)
        if interval.last:
            return
        trajectory.fix(interval.after)
        correct = self.forward_backward if self.corrector == "forward_backward" else self.gibbs
        for number in range(self.corrector_steps):
            place = self.steps + interval.number * self.corrector_steps + number
            correct(trajectory, interval.corrected(place), scale)

    def forward_backward(self, trajectory: Trajectory, interval: Interval, scale: float) -> None:
        """One step at the level of `interval`, with its random numbers."""
        context, denoiser, states = trajectory.context, trajectory.denoiser, trajectory.states
        coins = context.random.uniform(Purpose.CONFIDENCE, states.shape[1], interval.number)
        uniforms = context.random.uniform(Purpose.TOKEN, states.shape[1], interval.number)
        level = interval.seen
        if is_absorbing(denoiser.process):
            forgotten = ~trajectory.masked & ~trajectory.fixed & (coins < -torch.expm1(-self._noise(coins)))
            jumping = trajectory.masked & (coins < -torch.expm1(-self._noise(coins) * level.odds))
            if not bool(jumping.any()):
                trajectory.mask(forgotten)
                return
            jumps = Jumps(jumping.double(), Prediction.of(context, denoiser, states, level, scale).clean())
        else:
            jumps = self.rate_jumps(Prediction.of(context, denoiser, states, level, scale))
            forgotten = torch.zeros_like(trajectory.fixed)
            jumping = (coins < jumps.probability) & ~trajectory.fixed
        ids, log_probability = self.land(trajectory, jumps, jumping, uniforms, interval)
        trajectory.mask(forgotten)
        trajectory.move(jumping, ids, log_probability)

    def rate_jumps(self, prediction: Prediction) -> Jumps:
        """Forward and reverse jumps of a process that does more than mask."""
        states, process = prediction.states, prediction.denoiser.process
        clean = self.filtered(prediction.clean()).double()
        score = score_from_leave_one_out(clean, states, process, prediction.level).exp()
        rates = (reverse_rates(score, states, process) + process.rates_from(states)).scatter(-1, states[..., None], 0.0)
        return Jumps(-torch.expm1(-self.corrector_noise * rates.sum(dim=-1)), rates.log())

    def gibbs(self, trajectory: Trajectory, interval: Interval, scale: float) -> None:
        """Draw `corrector_tokens` tokens of each sequence again at the level of `interval`."""
        context, denoiser = trajectory.context, trajectory.denoiser
        process, length = denoiser.process, trajectory.states.shape[1]
        order = context.random.uniform(Purpose.ORDER, length, interval.number).masked_fill(trajectory.fixed, 2.0)
        chosen = random_subset(order, self.corrector_tokens) & ~trajectory.fixed
        coins = context.random.uniform(Purpose.CONFIDENCE, length, interval.number)
        uniforms = context.random.uniform(Purpose.TOKEN, length, interval.number)
        alpha = interval.before.alpha
        if is_absorbing(process):
            # What a network says of a token that it sees is of no use: it must not.
            trajectory.mask(chosen)
            chosen = chosen & (coins < alpha)
            if not bool(chosen.any()):
                return
            clean = Prediction.of(context, denoiser, trajectory.states, interval.seen, scale).clean()
            ids, log_probability = self.choose(clean[chosen], uniforms[chosen])
        else:
            prediction = Prediction.of(context, denoiser, trajectory.states, interval.seen, scale)
            marginal = process.marginal(self.filtered(prediction.clean()).exp(), alpha)[chosen].log()
            ids = draw_categorical(marginal, uniforms[chosen])
            log_probability = marginal.gather(-1, ids[:, None])[:, 0]
        values = torch.zeros_like(uniforms).masked_scatter(chosen, log_probability.double())
        trajectory.move(chosen, trajectory.states.masked_scatter(chosen, ids), values)

    def _noise(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.corrector_noise)
