"""GIDD: noise that is uniform ids at first and masks at last (von Rütte et al., "Generalized Interpolating Discrete
Diffusion", 2025), in one place: its process, its schedule, and the weights that it trains with.

The paper writes, in its time t and with `c = B sqrt(t (1 - t))` (its gamma is 1),

    q(x_t | x_0) = ((1 - t) x_0 + t mask + c uniform) / (1 + c),  B = 2 p_u / (1 - p_u),

so that at t = 1/2 uniform ids have the probability p_u. `GIDDSchedule` is `alpha = (1 - t) / (1 + c)`, and
`GIDDProcess` the rest as a function of alpha: so bounds, likelihoods and samplers take it as any other noise.
"""

from typing import Literal

import torch
from torch import Tensor

from discrete_lit.diffusion.losses import ContinuousBound, LossKind
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import Head
from discrete_lit.diffusion.processes import ForwardProcess, MixtureProcess, noise_of
from discrete_lit.diffusion.schedules import MaskSchedule


def uniform_scale(uniform_fraction: float) -> float:
    """Return GIDD's B = 2 p_u / (1 - p_u).

    Raises:
        ValueError: the fraction is out of (0, 1).
    """
    if not 0 < uniform_fraction < 1:
        raise ValueError(f"uniform_fraction must lie in (0, 1), got {uniform_fraction}; 0 is AbsorbingProcess")
    return 2 * uniform_fraction / (1 - uniform_fraction)


class GIDDProcess(MixtureProcess):
    """The noise of GIDD: little noise draws ids uniformly, much noise masks (section 3.3 of the paper).

    With the odds of noise `o = (1 - alpha) / alpha` and the root x >= 0 of `x^2 + B x = o`, which is `sqrt(t / (1 -
    t))` in the paper's time, masks have the probability `alpha x^2` and uniform ids `alpha B x`. The chain ends in
    masks alone, and its rates change on the way.

    Args:
        vocab_size: K.
        uniform_fraction: p_u, in (0, 1).

    Raises:
        ValueError: the fraction is out of (0, 1).
    """

    homogeneous = False

    def __init__(self, vocab_size: int, uniform_fraction: float = 0.1) -> None:
        super().__init__(vocab_size, mask_fraction=1.0)
        self.uniform_fraction = uniform_fraction
        self.uniform_scale = uniform_scale(uniform_fraction)
        """B."""

    def root(self, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x = sqrt(t / (1 - t)), float64, from 0 where nothing is noise to infinity where all is."""
        alpha, noise, half = alpha.double(), noise_of(alpha, noise), self.uniform_scale / 2
        return noise / (alpha * half + torch.sqrt((alpha * half) ** 2 + alpha * noise))

    def paper_time(self, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the paper's time t of a level, whatever the schedule, float64 in [0, 1]."""
        return 1 / (1 + self.root(alpha, noise) ** -2)

    def mask_share(self, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        return 1 / (1 + self.uniform_scale / self.root(alpha, noise))  # x / (x + B)

    def noise_masses(self, alpha: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        noise, x = noise_of(alpha, noise), self.root(alpha, noise)
        uniform = noise / (1 + x / self.uniform_scale)
        return uniform / self.vocab_size, noise / (1 + self.uniform_scale / x)

    def step_masses(
        self, alpha_s: Tensor, alpha_t: Tensor, *, noise_s: Tensor | None = None, noise_t: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # What there is at t, without what is left of s.
        ratio = alpha_t.double() / alpha_s.double()
        pairs = zip(self.noise_masses(alpha_s, noise_s), self.noise_masses(alpha_t, noise_t), strict=True)
        of_id, of_mask = ((at_t - ratio * at_s).clamp(min=0) for at_s, at_t in pairs)
        return of_id, of_mask

    def rate_masses(self, alpha: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # As d(B x) to d(x^2); the two add up to 1.
        x = self.root(alpha, noise)
        return 1 / (1 + 2 * x / self.uniform_scale) / self.vocab_size, 1 / (1 + self.uniform_scale / (2 * x))


class GIDDSchedule(MaskSchedule):
    """The schedule of GIDD: alpha = (1 - t) / (1 + c), c = B sqrt(t (1 - t)).

    Args:
        uniform_fraction: p_u, in (0, 1), as of the process.

    Raises:
        ValueError: the fraction is out of (0, 1).
    """

    def __init__(self, uniform_fraction: float = 0.1) -> None:
        self.uniform_fraction = uniform_fraction
        self.uniform_scale = uniform_scale(uniform_fraction)

    def mask_probability(self, t: Tensor) -> Tensor:
        t, c = t.double(), self._uniform(t)
        return (t + c) / (1 + c)

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t.double()) / (1 + self._uniform(t))

    def derivative(self, t: Tensor) -> Tensor:
        # alpha (1 / (1 - t) + c' / (1 + c)), with (1 - t) c' without a division by 0 at t = 1.
        t, c = t.double(), self._uniform(t)
        slope = self.uniform_scale * (1 - 2 * t) / 2 * torch.sqrt((1 - t) / t)
        return (1 + slope / (1 + c)) / (1 + c)

    def inverse(self, m: Tensor) -> Tensor:
        return GIDDProcess(2, self.uniform_fraction).paper_time(1 - m.double(), m)

    def _uniform(self, t: Tensor) -> Tensor:
        """Return c."""
        return self.uniform_scale * torch.sqrt(t.double() * (1 - t.double()))


GIDDWeighting = Literal["dynamic", "clip"]


class GIDDLoss(ContinuousBound):
    """The training loss of GIDD: `ContinuousBound` with weights that do not grow without limit.

    In the place of the bound's weight, `sigma' q(x) / a_x` in the terms of `ContinuousBound`, stands

    - `"dynamic"`, which GIDD's published models were trained with: 2 at masks, 1 at other noise, and `B / (K + 1)
      exp(sigmoid(-t) / 2)` at tokens that are clean, t being the paper's time (as in its code; where that has the
      sigmoid, the paper has the log-SNR);
    - `"clip"`: the bound's own weight;

    either then clipped to [lowest, highest]. Without any of it, the loss is `ContinuousBound`.

    Args:
        weighting: one of the two.
        lowest: least weight, >= 0.
        highest: largest weight, > lowest.
        time_margin: as of `ContinuousBound`; the paper's 1e-4 by default.

    Raises:
        ValueError: a setting out of its range; in use, dynamic weights with another process than GIDD's.
    """

    kind: LossKind = "not a bound"

    def __init__(
        self,
        weighting: GIDDWeighting = "dynamic",
        lowest: float = 0.0,
        *,
        highest: float = 2.0,
        time_margin: float = 1e-4,
    ) -> None:
        super().__init__(time_margin=time_margin)
        if weighting not in ("dynamic", "clip"):
            raise ValueError(f"weighting must be 'dynamic' or 'clip', got {weighting!r}; without, use ContinuousBound")
        if not 0 <= lowest < highest:
            raise ValueError(f"0 <= lowest < highest must hold, got {lowest} and {highest}")
        self.weighting: GIDDWeighting = weighting
        self.lowest = lowest
        self.highest = highest

    def weight(self, tokens: Tensor, *, states: Tensor, process: MixtureProcess, level: NoiseLevel) -> Tensor:
        if self.weighting == "clip":
            weight = super().weight(tokens, states=states, process=process, level=level)
        else:
            assert isinstance(process, GIDDProcess)
            time = process.paper_time(level.alpha, level.noise)
            of_clean = process.uniform_scale / process.states * torch.exp(torch.sigmoid(-time) / 2)
            of_noise = torch.where(states == process.vocab_size, 2.0, 1.0).double()
            weight = torch.where(states == tokens, of_clean, of_noise)
        return weight.clamp(self.lowest, self.highest)

    def check(self, head: Head, process: ForwardProcess) -> None:
        super().check(head, process)
        needed = GIDDProcess if self.weighting == "dynamic" else MixtureProcess
        if not isinstance(process, needed):
            raise ValueError(
                f"GIDDLoss with weighting={self.weighting!r} is for {needed.__name__}, got {type(process).__name__}"
            )
