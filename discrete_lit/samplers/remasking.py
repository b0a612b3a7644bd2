"""Sampling that masks again what it drew: ReMDM (Wang et al., "Remasking Discrete Diffusion Models with Inference-Time
Scaling", 2025).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.diffusion import MaskSchedule
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.samplers.diffusion import AncestralSampler, Interval, Trajectory

RemaskingStrategy = Literal["cap", "rescale", "conf", "loop"]


class RemaskingSampler(AncestralSampler):
    """Each step masks a revealed token again with probability sigma, and reveals masked ones the more for it.

    A masked token is revealed with probability `(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)`, so that at
    every level as many are masked as without (eq. 6). With sigma_max = min(1, (1 - alpha_s) / alpha_t):

    - `cap`: sigma = min(eta, sigma_max);
    - `rescale`: sigma = eta sigma_max;
    - `conf`: eta sigma_max, shared out among the revealed tokens of a sequence by the softmax of minus the probability
      that each was drawn with; the masked ones are revealed as without (as in the released code);
    - `loop`: three phases in turn: none is masked again until the share alpha is revealed, then `cap` at this level,
      where nothing else happens, then the rest without.

    Known tokens are never masked.

    Args:
        strategy: one of the four.
        eta: in [0, 1]; 0 is `AncestralSampler`.
        loop: `[first, end]` in [0, 1], the shares of the steps between which a loop stays at its level.
        loop_alpha: share of tokens that are revealed there, in (0, 1).
        settings: of `DiffusionSampler` and `Sampler`.

    Raises:
        ValueError: a setting out of its range; a loop with a grid; in use, a generator whose noise does more than mask.
    """

    def __init__(
        self,
        strategy: RemaskingStrategy = "cap",
        eta: float = 0.02,
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

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        if not is_absorbing(denoiser.process):
            raise ValueError(
                "RemaskingSampler masks tokens again, the process must be absorbing: "
                f"{type(denoiser.process).__name__} is not"
            )

    def times(self, schedule: MaskSchedule) -> Tensor:
        times = super().times(schedule)
        if self.strategy != "loop":
            return times
        done, (first, end) = 1 - times, self.loop
        held = schedule.inverse(times.new_tensor(1 - self.loop_alpha))
        start = 1 - (1 - held) * (done / max(first, 1e-12)).clamp(max=1)
        rest = held * (1 - (done - end).clamp(min=0) / max(1 - end, 1e-12)).clamp(min=0)
        times = torch.where(done < end, start, rest)
        times[0], times[-1] = 0, 1
        return times

    def remasking(self, interval: Interval) -> Tensor:
        """sigma, `(B, 1)` float64; of `conf` what is shared out."""
        before, after = interval.before.alpha, interval.after.alpha
        most = ((1 - after) / before).clamp(max=1)
        if self.strategy == "loop" and not torch.equal(before, after):
            return torch.zeros_like(most)
        return most.clamp(max=self.eta) if self.strategy in ("cap", "loop") else self.eta * most

    def reveal(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last or self.strategy == "conf":
            return super().reveal(interval, weight)
        before, after = interval.before.alpha, interval.after.alpha
        return ((after - (1 - self.remasking(interval)) * before) / (1 - before) * weight).clamp(max=1)

    def forget(self, trajectory: Trajectory, interval: Interval, coins: Tensor) -> Tensor:
        revealed = ~trajectory.masked & ~trajectory.fixed
        sigma = self.remasking(interval)
        if self.strategy == "conf":
            doubt = (-trajectory.log_probability.exp()).masked_fill(~revealed, -torch.inf)
            sigma = sigma * doubt.softmax(dim=1).nan_to_num(0.0)
        return revealed & (coins < sigma)
