"""ReMDM: sampling that masks again what it drew (Wang et al., "Remasking Discrete Diffusion Models with Inference-Time
Scaling", 2025), with the two correctors that its authors compare it with.
"""

from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from discrete_lit.core.synchronisation import on_device
from discrete_lit.diffusion import MaskSchedule
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.diffusion.reverse import Jumps
from discrete_lit.samplers.categorical import within_nucleus
from discrete_lit.samplers.diffusion import DiffusionSampler, Interval, NoisyTokens
from discrete_lit.samplers.diffusion_guidance import Prediction

RemaskingStrategy = Literal["cap", "rescale", "conf", "loop", "forward_backward", "flow_matching"]

_Number = TypeVar("_Number", float, Tensor)
# The eta of each strategy where none is given; the two correctors have none.
_ETA = {"cap": 0.02, "rescale": 0.02, "conf": 1.0, "loop": 0.02}
# Two fractions of the steps that are nearer than this are one.
_SAME = 1e-9


class RemaskingSampler(DiffusionSampler):
    """Sample by ReMDM: each step masks an unmasked token again with probability sigma, and unmasks the more for it.

    A masked token is unmasked with probability `(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)`, so that at every
    level as many are masked as without remasking (eq. 6). With sigma_max = min(1, (1 - alpha_s) / alpha_t):

    - `cap`: sigma = min(eta, sigma_max);
    - `rescale`: sigma = eta sigma_max;
    - `conf`: eta sigma_max, divided among the unmasked tokens of a sequence by the softmax of minus the probability
      that each was drawn with; masked tokens are unmasked as without, so that more are masked than at the level (both
      as in the released code, where eta is 1);
    - `loop`: three phases in turn: no remasking until the fraction alpha is unmasked, then `cap` at this level, where
      nothing else happens, then the rest without. A step is of the phase that it begins in, with all of its length;
    - `forward_backward`: sigma = (alpha_s - alpha_t) / alpha_t, a step forward after each step back (Campbell et al.,
      2022). Where it exceeds sigma_max, near the end, more tokens are masked than at the level;
    - `flow_matching`: the corrector of discrete flow matching (Gat et al., 2024, appendix D), with a = 1 + 10 (m (1 -
      m))^(1/4) at the mask probability m: masked tokens are unmasked a times as often as without, unmasked ones masked
      again with probability (a - 1) (alpha_s / alpha_t - 1), in steps that are so short that both stay below 1.

    MDLM, the sixth in the comparison of the paper, is `AncestralSampler`. The loop over the steps is
    `DiffusionSampler.draw`. Known tokens are never masked.

    Args:
        strategy: one of the six.
        eta: in [0, 1]; 0 is `AncestralSampler`. By default 1 for `conf`, else 0.02; the two correctors have none.
        loop: `[first, end]` in [0, 1], the fractions of the steps between which a loop stays at its level: 1 - t_on and
            1 - t_off in the terms of the released code.
        loop_alpha: fraction of tokens that are unmasked there, in (0, 1).
        nucleus: p in (0, 1], the mass of the ids that are drawn from. As in the released code, the id that crosses p
            is left out, which `top_p` keeps, and `conf` judges an id by its share of what is kept.
        settings: of `DiffusionSampler` and `Sampler`. With `flow_matching` a step is at most 1 / T long, and there are
            more than T steps.

    Raises:
        ValueError: a setting out of its range; a grid where the strategy has its own; a nucleus beside `top_p`; in use,
            a generator whose noise does more than mask.
    """

    def __init__(
        self,
        strategy: RemaskingStrategy = "cap",
        eta: float | None = None,
        *,
        loop: tuple[float, float] = (0.45, 0.95),
        loop_alpha: float = 0.9,
        nucleus: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if strategy not in get_args(RemaskingStrategy):
            *others, last = map(repr, get_args(RemaskingStrategy))
            raise ValueError(f"strategy must be {', '.join(others)} or {last}, got {strategy!r}")
        if eta is not None and strategy not in _ETA:
            raise ValueError(f"strategy={strategy!r} has no eta, got {eta}: leave it out")
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        if not 0 <= loop[0] < loop[1] <= 1:
            raise ValueError(f"loop must be [first, end] with 0 <= first < end <= 1, got {list(loop)}")
        if not 0 < loop_alpha < 1:
            raise ValueError(f"loop_alpha must lie in (0, 1), got {loop_alpha}")
        if strategy in ("loop", "flow_matching") and self.grid is not None:
            raise ValueError(f"strategy={strategy!r} makes its own grid: leave grid out")
        if not 0 < nucleus <= 1:
            raise ValueError(f"nucleus must lie in (0, 1], got {nucleus}")
        if nucleus < 1 and self.top_p not in (None, 1.0):
            raise ValueError(f"nucleus={nucleus} and top_p={self.top_p} are two rules for one thing: give one of them")
        self.strategy: RemaskingStrategy = strategy
        self.eta = _ETA.get(strategy, 1.0) if eta is None else eta
        self.loop = loop
        self.loop_alpha = loop_alpha
        self.nucleus = nucleus

    # What a step masks and unmasks.

    def sigma(self, interval: Interval) -> Tensor:
        """The remasking probability sigma, `(1, 1)` float64; for `conf` the total to be divided."""
        alpha_s, alpha_t = interval.alpha_s, interval.alpha_t
        if interval.last:
            return torch.zeros_like(alpha_t)
        growth = alpha_s / alpha_t - 1
        if self.strategy == "forward_backward":
            return growth.clamp(max=1)
        if self.strategy == "flow_matching":
            # At the start there is nothing to mask.
            return torch.where(alpha_t > 0, (corrector_speed(1 - alpha_t) - 1) * growth, 0.0).clamp(0, 1)
        largest = ((1 - alpha_s) / alpha_t).clamp(max=1)
        if self.strategy == "loop":
            return torch.where(alpha_t == alpha_s, largest.clamp(max=self.eta), 0.0)
        return largest.clamp(max=self.eta) if self.strategy == "cap" else self.eta * largest

    def remask_probability(self, x: NoisyTokens, interval: Interval) -> Tensor:
        """The probability `(B, N)` float64 that each token is masked again; 0 for masked and known ones."""
        unmasked = ~x.masked & ~x.known
        sigma = self.sigma(interval)
        if self.strategy == "conf":
            doubt = (-x.log_probability.exp()).masked_fill(~unmasked, -torch.inf)
            sigma = sigma * doubt.softmax(dim=1).nan_to_num(0.0)
        return torch.where(unmasked, sigma, 0.0)

    def unmask_probability(self, interval: Interval, weight: Tensor) -> Tensor:
        if interval.last or self.strategy == "conf":
            return super().unmask_probability(interval, weight)
        alpha_s, alpha_t = interval.alpha_s, interval.alpha_t
        if self.strategy == "flow_matching":
            unmasked = corrector_speed(1 - alpha_t) * (alpha_s - alpha_t)
        else:
            unmasked = alpha_s - (1 - self.sigma(interval)) * alpha_t
        return (unmasked / (1 - alpha_t) * weight).clamp(max=1)

    def jumps(self, prediction: Prediction, interval: Interval) -> Jumps:
        jumps = super().jumps(prediction, interval)
        return jumps if self.nucleus == 1 else Jumps(jumps.probability, within_nucleus(jumps.targets, self.nucleus))

    # The time grid.

    def times(self, schedule: MaskSchedule, device: torch.device | None = None) -> Tensor:
        if self.strategy == "loop":
            fractions = self.fractions(device)
            times = self._looped(schedule, fractions, fractions)
        elif self.strategy == "flow_matching":
            mask_probabilities = on_device(_short_steps, self.steps, device=device or torch.device("cpu"))
            first, last = schedule.mask_probability(torch.linspace(0, 1, 2, dtype=torch.float64, device=device))
            times = schedule.inverse(mask_probabilities.clamp(first, last))
        else:
            return super().times(schedule, device)
        times[:1].zero_()
        times[-1:].fill_(1)
        return times

    def levels(self, schedule: MaskSchedule, times: Tensor) -> tuple[NoiseLevel, NoiseLevel]:
        starts, ends = super().levels(schedule, times)
        if self.strategy != "loop":
            return starts, ends
        fractions = self.fractions(times.device).flip(0)[:, None, None]
        return starts, NoiseLevel.at(schedule, self._looped(schedule, fractions[1:], fractions[:-1]))

    def _looped(self, schedule: MaskSchedule, fractions: Tensor, begun: Tensor) -> Tensor:
        """Give the times that the loop has reached where the fraction t of all steps is left.

        Args:
            schedule: of training.
            fractions: t, of any shape.
            begun: of the same shape; the phase is that of a step which begins there.
        """
        # Down to the time at which the fraction loop_alpha is unmasked, along it, and down to 0.
        (first, end), done, begun = self.loop, 1 - fractions, 1 - begun
        held = schedule.inverse(fractions.new_full((), 1 - self.loop_alpha))
        before = 1 - (1 - held) * done / max(first, _SAME)
        after = held * (1 - done) / max(1 - end, _SAME)
        times = torch.where(begun < first - _SAME, before, held)
        return torch.where(begun >= end - _SAME, after, times).clamp(0, 1)

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        if not is_absorbing(denoiser.process):
            raise ValueError(
                "RemaskingSampler masks tokens again, the process must be absorbing: "
                f"{type(denoiser.process).__name__} is not"
            )


def corrector_speed(mask_probability: _Number) -> _Number:
    """Return how much faster the flow-matching corrector unmasks, a = 1 + 10 (m (1 - m))^(1/4) (Gat et al., 2024)."""
    speed: Any = 1 + 10 * (mask_probability * (1 - mask_probability)) ** 0.25
    return speed


def _short_steps(steps: int) -> Tensor:
    """Give the mask probabilities of the flow-matching corrector from 0 to 1, float64.

    From m a step goes to `m - min(1 / T, 1 / (a / m + (a - 1) / (1 - m)))`, with which no probability exceeds 1, the
    first to `1 - 1 / T`; the last one goes from 1 / T or less to 0.
    """
    found = [1.0, 1 - 1 / steps] if steps > 1 else [1.0]
    while (m := found[-1]) > 1 / steps:
        speed = corrector_speed(m)
        found.append(m - min(1 / steps, 1 / (speed / m + (speed - 1) / (1 - m))))
    return torch.tensor([0.0, *found[::-1]], dtype=torch.float64)
