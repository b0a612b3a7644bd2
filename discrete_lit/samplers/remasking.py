"""ReMDM: sampling that masks again what it drew (Wang et al., "Remasking Discrete Diffusion Models with Inference-Time
Scaling", 2025).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.diffusion import MaskSchedule
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.samplers.diffusion import DiffusionSampler, Interval, NoisyTokens

RemaskingStrategy = Literal["cap", "rescale", "conf", "loop"]


class RemaskingSampler(DiffusionSampler):
    """Sample by ReMDM: each step masks an unmasked token again with probability sigma, and unmasks the more for it.

    A masked token is unmasked with probability `(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)`, so that at every
    level as many are masked as without remasking (eq. 6). With sigma_max = min(1, (1 - alpha_s) / alpha_t):

    - `cap`: sigma = min(eta, sigma_max);
    - `rescale`: sigma = eta sigma_max;
    - `conf`: eta sigma_max, divided among the unmasked tokens of a sequence by the softmax of minus the probability
      that each was drawn with; masked tokens are unmasked as without (as in the released code);
    - `loop`: three phases in turn: no remasking until the fraction alpha is unmasked, then `cap` at this level, where
      nothing else happens, then the rest without.

    The loop over the steps is `DiffusionSampler.draw`. Known tokens are never masked.

    Args:
        strategy: one of the four.
        eta: in [0, 1]; 0 is `AncestralSampler`.
        loop: `[first, end]` in [0, 1], the fractions of the steps between which a loop stays at its level.
        loop_alpha: fraction of tokens that are unmasked there, in (0, 1).
        settings: of `DiffusionSampler` and `Sampler`.

    Raises:
        ValueError: a setting out of its range; a loop with a grid; in use, a generator whose noise does more than mask.
    """

    def __init__(
        self,
        strategy: RemaskingStrategy = "cap",
        eta: float = 0.02,
        *,
        loop: tuple[float, float] = (0.45, 0.95),
        loop_alpha: float = 0.9,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if strategy not in ("cap", "rescale", "conf", "loop"):
            raise ValueError(f"strategy must be 'cap', 'rescale', 'conf' or 'loop', got {strategy!r}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        if not 0 <= loop[0] < loop[1] <= 1:
            raise ValueError(f"loop must be [first, end] with 0 <= first < end <= 1, got {list(loop)}")
        if not 0 < loop_alpha < 1:
            raise ValueError(f"loop_alpha must lie in (0, 1), got {loop_alpha}")
        if strategy == "loop" and self.grid is not None:
            raise ValueError("strategy='loop' makes its own grid: leave grid out")
        self.strategy = strategy
        self.eta = eta
        self.loop = loop
        self.loop_alpha = loop_alpha

    def sigma(self, interval: Interval) -> Tensor:
        """The remasking probability sigma, `(1, 1)` float64; for `conf` the total to be divided."""
        largest = ((1 - interval.alpha_s) / interval.alpha_t).clamp(max=1)
        if self.strategy == "loop":
            return torch.where(interval.alpha_t == interval.alpha_s, largest.clamp(max=self.eta), 0.0)
        return largest.clamp(max=self.eta) if self.strategy == "cap" else self.eta * largest

    def remask(self, x: NoisyTokens, interval: Interval, uniforms: Tensor) -> Tensor:
        unmasked = ~x.masked & ~x.known
        sigma = self.sigma(interval)
        if self.strategy == "conf":
            doubt = (-x.log_probability.exp()).masked_fill(~unmasked, -torch.inf)
            sigma = sigma * doubt.softmax(dim=1).nan_to_num(0.0)
        return unmasked & (uniforms < sigma)

    def unmask_probability(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last or self.strategy == "conf":
            return super().unmask_probability(interval, weight)
        alpha_s, alpha_t, sigma = interval.alpha_s, interval.alpha_t, self.sigma(interval)
        return ((alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t) * weight).clamp(max=1)

    def times(self, schedule: MaskSchedule, device: torch.device | None = None) -> Tensor:
        times = super().times(schedule, device)
        if self.strategy != "loop":
            return times
        # Down to the time at which the fraction loop_alpha is unmasked, along it, and down to 0.
        done, (first, end) = 1 - times, self.loop
        held = schedule.inverse(times.new_full((), 1 - self.loop_alpha))
        before = 1 - (1 - held) * (done / max(first, 1e-12)).clamp(max=1)
        after = held * (1 - (done - end).clamp(min=0) / max(1 - end, 1e-12)).clamp(min=0)
        times = torch.where(done < end, before, after)
        times[:1].zero_()
        times[-1:].fill_(1)
        return times

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        if not is_absorbing(denoiser.process):
            raise ValueError(
                "RemaskingSampler masks tokens again, the process must be absorbing: "
                f"{type(denoiser.process).__name__} is not"
            )
