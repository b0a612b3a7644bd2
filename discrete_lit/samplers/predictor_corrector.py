"""Predictor-corrector sampling: steps back in time, each followed by steps at its end that mend what it drew apart."""

from math import expm1
from typing import Any, Literal

import torch

from discrete_lit.core.random import Purpose, random_subset
from discrete_lit.core.synchronisation import host_sees
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.reverse import Jumps, reverse_rates
from discrete_lit.samplers.diffusion import (
    DiffusionSampler,
    Interval,
    NoisyTokens,
    draw_jumps,
    draw_where,
    finite_noise,
)
from discrete_lit.samplers.diffusion_guidance import Prediction
from discrete_lit.samplers.reverse_rates import scores_of_clean


class PredictorCorrectorSampler(DiffusionSampler):
    """Sample by ancestral steps, each but the last followed by correctors at its end s.

    A corrector leaves the law p_s of the noisy tokens unchanged where the network is exact:

    - `forward_backward`: forward and reverse jumps at once, whose rates add up to ones that keep p_s (Campbell et al.,
      "A Continuous Time Framework for Discrete Denoising Models", 2022, section 4.4), for the time of some noise: exact
      as that goes to 0.
    - `gibbs`: some tokens of each sequence, chosen at random, are drawn again given all others and the level; exact
      where it is one at a time (Zhao et al., "Informed Correctors for Discrete Diffusion Models", 2024).

    Args:
        corrector: one of the two.
        corrector_steps: how many follow each step, at least 0; each costs a pass.
        corrector_noise: total noise sigma of a forward-backward step, > 0.
        corrector_tokens: how many tokens a Gibbs step draws again, at least 1.
        settings: of `DiffusionSampler` and `Sampler`.

    Raises:
        ValueError: a setting out of its range; a guidance law other than `"clean"`.
    """

    def __init__(
        self,
        corrector: Literal["forward_backward", "gibbs"] = "forward_backward",
        corrector_steps: int = 1,
        *,
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

    def last_number(self, steps: int) -> int:
        return steps * (1 + self.corrector_steps) - 1

    def step(self, x: NoisyTokens, interval: Interval, scale: float) -> None:
        super().step(x, interval, scale)  # the predictor
        if interval.last:
            return
        x.restore_known(interval.s)
        correct = self.forward_backward if self.corrector == "forward_backward" else self.gibbs
        # The predictor's random numbers are those of 0 to T - 1.
        first = self.steps + interval.number * self.corrector_steps
        for number in range(first, first + self.corrector_steps):
            correct(x, interval.s, number, scale)

    def forward_backward(self, x: NoisyTokens, level: NoiseLevel, number: int, scale: float) -> None:
        """Jump forwards and backwards at a level of noise.

        Args:
            x: the tokens.
            level: their noise, which stays.
            number: names the random numbers.
            scale: guidance scale.
        """
        uniforms, level = x.random.uniform(Purpose.CONFIDENCE, x.length, number), finite_noise(level)
        if x.absorbing:
            remasked = ~x.masked & ~x.known & (uniforms < -expm1(-self.corrector_noise))
            jumping = x.masked & (uniforms < -torch.expm1(-self.corrector_noise * level.odds))
            if host_sees(jumping) and not bool(jumping.any()):
                x.mask(remasked)
                return
            jumps = Jumps(jumping.double(), x.predict(level, scale).clean())
        else:
            remasked = torch.zeros_like(x.known)
            jumps = self.rate_jumps(x.predict(level, scale))
            jumping = (uniforms < jumps.probability) & ~x.known
        ids, log_probability = self.draw_targets(x, jumps, jumping, number)
        x.mask(remasked)
        x.write(jumping, ids, log_probability)

    def rate_jumps(self, prediction: Prediction) -> Jumps:
        """The forward and reverse jumps of a process that does more than mask."""
        x_t, process = prediction.x_t, prediction.denoiser.process
        score = scores_of_clean(prediction.clean(self.filtered if self.filters else None), prediction).exp()
        alpha = prediction.level.alpha
        both = reverse_rates(score, x_t, process, alpha) + process.rates_from(x_t, alpha)
        rates = both.scatter(-1, x_t[..., None], 0.0)
        return Jumps(-torch.expm1(-self.corrector_noise * rates.sum(dim=-1)), rates.log())

    def gibbs(self, x: NoisyTokens, level: NoiseLevel, number: int, scale: float) -> None:
        """Draw `corrector_tokens` tokens of each sequence again, given the others.

        Args:
            x: the tokens.
            level: their noise, which stays.
            number: names the random numbers.
            scale: guidance scale.
        """
        process, random = x.denoiser.process, x.random
        order = random.uniform(Purpose.ORDER, x.length, number).masked_fill(x.known, 2.0)
        chosen = random_subset(order, self.corrector_tokens) & ~x.known
        uniforms = random.uniform(Purpose.TOKEN, x.length, number)
        if x.absorbing:
            # The network must not see the tokens that are drawn again. Masks are left of 1 - alpha of them.
            x.mask(chosen)
            chosen = chosen & (random.uniform(Purpose.CONFIDENCE, x.length, number) < level.alpha)
            if host_sees(chosen) and not bool(chosen.any()):
                return
            clean = x.predict(finite_noise(level), scale).clean()
            x.write(chosen, *draw_where(chosen, self.choose, clean, uniforms))
        else:
            clean = x.predict(finite_noise(level), scale).clean(self.filtered if self.filters else None)
            marginal = process.marginal(clean.exp(), level.alpha).log()
            x.write(chosen, *draw_where(chosen, draw_jumps, marginal, uniforms))
