"""VQ-Diffusion's noise and loss: tokens are masked, or replaced by others, in T steps (Gu et al., "Vector Quantized
Diffusion Model for Text-to-Image Synthesis", CVPR 2022).

- `MaskAndReplaceSchedule`: alpha(t), the probability that noise has left a token alone.
- `MaskAndReplaceProcess`: the noise (section 4.1). A token stays with the probability alpha, is masked with gamma, and
  becomes each of the K ids with beta, its own included; a mask stays one.
- `VQDiffusionLoss`: the bound of T steps with an auxiliary cross-entropy, and steps that are drawn the more often the
  more they cost (`StepImportance`).

The network predicts the clean ids given all noisy ones (`PosteriorHead`), and `p(x_s | x_t)` is the mean of
`q(x_s | x_t, x_0)` over that (eq. 11).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.distributed import all_gather_rows
from discrete_lit.core.modules import RunningStatistics
from discrete_lit.diffusion.divergences import gather
from discrete_lit.diffusion.losses import (
    DiscreteTimeBound,
    LossKind,
    StepLevel,
)
from discrete_lit.diffusion.parameterization import leave_one_out_from_posterior
from discrete_lit.diffusion.processes import ForwardProcess, equals, noise_of
from discrete_lit.diffusion.schedules import MaskSchedule

# Of the published code: alpha and gamma after the first step, and after the last one.
_FIRST, _LAST = (0.99999, 0.000009), (0.000009, 0.99999)


class MaskAndReplaceSchedule(MaskSchedule):
    """The linear schedule of VQ-Diffusion's code, whose T steps end at the times 1/T, 2/T, ..., 1.

    alpha is 0.99999 after the first step, 0.000009 after the last, and linear between them.

    Args:
        steps: T, at least 2.
        first: alpha(1/T), in (0, 1).
        last: alpha(1), in (0, `first`).

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, steps: int = 100, *, first: float = _FIRST[0], last: float = _LAST[0]) -> None:
        if steps < 2:
            raise ValueError(f"steps of {type(self).__name__} must be at least 2, got {steps}")
        if not 0 < last < first < 1:
            raise ValueError(f"0 < last < first < 1 must hold, got last={last} and first={first}")
        self.steps, self.first, self.last = steps, first, last
        self._slope = (first - last) * steps / (steps - 1)

    def mask_probability(self, t: Tensor) -> Tensor:
        t = t.double()
        early = (1 - self.first) * self.steps * t
        return torch.where(t * self.steps < 1, early, 1 - self._late_alpha(t))

    def alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        early = 1 - (1 - self.first) * self.steps * t
        return torch.where(t * self.steps < 1, early, self._late_alpha(t))

    def derivative(self, t: Tensor) -> Tensor:
        early = torch.full_like(t, (1 - self.first) * self.steps, dtype=torch.float64)
        return early.masked_fill(t * self.steps >= 1, self._slope)

    def inverse(self, m: Tensor) -> Tensor:
        m = m.double()
        late = 1 - (1 - self.last - m) / self._slope
        return torch.where(m < 1 - self.first, m / ((1 - self.first) * self.steps), late).clamp(0, 1)

    def _late_alpha(self, t: Tensor) -> Tensor:
        return self.last + self._slope * (1 - t)


class MaskAndReplaceProcess(ForwardProcess):
    """The mask-and-replace noise: `q(x_t | x_0) = alpha x_0 + beta 1 + gamma mask`, alpha + K beta + gamma = 1.

    (Gu et al., 2022, eq. 7 and 8.) gamma is a function of alpha, through the two points that are given and the clean
    data, linear between them. The code's points are the defaults, for which K beta is 0.000001 at all steps: less than
    the 0.1 of the paper.

    A token that noise has masked stays masked; so the noise from s to t > s depends on both levels, and has

        alpha_t / alpha_s to stay,   1 - (1 - gamma_t) / (1 - gamma_s) to be masked,   the rest in K equal parts.

    Args:
        vocab_size: K.
        first: alpha and gamma at the end of the first step.
        last: alpha and gamma at the end of the last one.

    Raises:
        ValueError: probabilities out of their range, or a beta that is negative somewhere.
    """

    homogeneous = False

    def __init__(
        self, vocab_size: int, *, first: tuple[float, float] = _FIRST, last: tuple[float, float] = _LAST
    ) -> None:
        super().__init__(vocab_size, masks=True)
        (alpha_1, gamma_1), (alpha_T, gamma_T) = first, last
        if not (0 < alpha_T < alpha_1 < 1 and 0 <= gamma_1 < gamma_T < 1):
            raise ValueError(
                f"alpha must fall and gamma rise from first to last, between 0 and 1, got first={first} and last={last}"
            )
        if alpha_1 + gamma_1 > 1 or alpha_T + gamma_T > 1 or (1 - gamma_T) / (1 - gamma_1) < alpha_T / alpha_1:
            raise ValueError(
                f"the probability of another id, 1 - alpha - gamma, must not be negative in any step, got "
                f"first={first} and last={last}"
            )
        self.first, self.last = (alpha_1, gamma_1), (alpha_T, gamma_T)

    def gamma(self, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the probability that noise has masked a token, float64."""
        (alpha_1, gamma_1), (alpha_T, gamma_T) = self.first, self.last
        noise = noise_of(alpha, noise)
        early = noise * (gamma_1 / (1 - alpha_1))
        share = (noise - (1 - alpha_1)) / (alpha_1 - alpha_T)
        return torch.where(noise < 1 - alpha_1, early, gamma_1 + share * (gamma_T - gamma_1)).clamp(max=gamma_T)

    def kernel(
        self, alpha_s: Tensor, alpha_t: Tensor, *, noise_s: Tensor | None = None, noise_t: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha, beta and gamma of the noise from s to t > s, float64 in the shape of the levels."""
        alpha_s, alpha_t = alpha_s.double(), alpha_t.double()
        # The ids, together: 1 - gamma.
        ids_s, ids_t = 1 - self.gamma(alpha_s, noise_s), 1 - self.gamma(alpha_t, noise_t)
        kept = alpha_t / alpha_s
        return kept, ((ids_t / ids_s - kept) / self.vocab_size).clamp(min=0), (ids_s - ids_t) / ids_s

    def prior(self) -> Tensor:
        """Return the law that noise ends in: nearly the mask alone, the ids in equal parts."""
        prior = torch.full((self.states,), (1 - self.last[1]) / self.vocab_size, dtype=torch.float64)
        prior[-1] = self.last[1]
        return prior

    def draw_prior(self, uniforms: Tensor) -> Tensor:
        ids = ((uniforms - self.last[1]) / (1 - self.last[1]) * self.vocab_size).long()
        return torch.where(uniforms < self.last[1], self.vocab_size, ids.clamp(0, self.vocab_size - 1))

    def corrupt(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.replace(tokens, alpha, 1 - uniforms, noise)

    def replace(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor, noise: Tensor | None = None) -> Tensor:
        _, beta, gamma = self._up_to(alpha, noise)
        # Below gamma it is masked; what a uniform number is above gamma, below all noise, says which id.
        ids = ((uniforms - gamma) / beta).nan_to_num(0.0).clamp(0, self.vocab_size - 1).long()
        moved = torch.where(uniforms < gamma, self.vocab_size, ids)
        return torch.where(uniforms < gamma + self.vocab_size * beta, moved, tokens)

    def replaced(self, tokens: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        return noise_of(alpha, noise).expand(tokens.shape)

    def push(self, distribution: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        ids, mask = distribution.split((self.vocab_size, 1), dim=-1)
        together = ids.sum(dim=-1, keepdim=True)
        kept, beta, gamma = (part[..., None].to(distribution.dtype) for part in self._up_to(alpha, noise))
        return torch.cat((kept * ids + beta * together, mask + gamma * together), dim=-1)

    def pull(self, values: Tensor, alpha: Tensor) -> Tensor:
        ids, mask = values.split((self.vocab_size, 1), dim=-1)
        kept, beta, gamma = (part[..., None] for part in self._up_to(alpha))
        together = ids.sum(dim=-1, keepdim=True) / (1 - gamma)
        return torch.cat(((ids - beta * together) / kept, mask - gamma * together), dim=-1).to(values.dtype)

    def likelihood(self, states: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        return self._columns(states, *self._up_to(alpha, noise))

    def step_likelihood(
        self,
        states: Tensor,
        alpha_s: Tensor,
        alpha_t: Tensor,
        *,
        noise_s: Tensor | None = None,
        noise_t: Tensor | None = None,
    ) -> Tensor:
        return self._columns(states, *self.kernel(alpha_s, alpha_t, noise_s=noise_s, noise_t=noise_t))

    def rates_into(self, states: Tensor, alpha: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        return self._no_rates()

    def rates_from(self, states: Tensor, alpha: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        return self._no_rates()

    def _no_rates(self) -> Tensor:
        raise ValueError(
            "MaskAndReplaceProcess is noise of steps, without rates: use VQDiffusionLoss or DiscreteTimeBound, and "
            "AncestralSampler"
        )

    def _up_to(self, alpha: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha, beta and gamma of the noise from clean data to a level, float64."""
        alpha, gamma = alpha.double(), self.gamma(alpha, noise)
        return alpha, ((noise_of(alpha, noise) - gamma) / self.vocab_size).clamp(min=0), gamma

    def _columns(self, states: Tensor, kept: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
        """Return the probability `(..., S)` that such a kernel takes each state to `states (...)`."""
        is_mask = (states == self.vocab_size)[..., None]
        same = equals(states, self.states)
        from_ids = torch.where(is_mask, gamma[..., None], kept[..., None] * same + beta[..., None])
        from_mask = is_mask.to(from_ids.dtype)
        return torch.cat((from_ids[..., : self.vocab_size], from_mask), dim=-1)


@dataclass(frozen=True, kw_only=True)
class DrawnStep(StepLevel):
    """A step that was drawn: `(B, 1)` each."""

    step: Tensor
    """Its number from 0, the one that goes back to the data; int64."""
    weight: Tensor
    """The weight of its cost, float64: 1 / (T p), p the probability that it was drawn with."""


class StepImportance(RunningStatistics):
    """Draws steps by the root of their mean squared cost (Nichol & Dhariwal, "Improved DDPM", 2021, section 3.3).

    Until each step was seen more than 10 times, all are drawn alike; and always in eval mode. The cost of the step that
    goes back to the data counts as that of the next one. Ranks share what they have seen.

    Args:
        steps: T.
    """

    squares: Tensor
    counts: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.register_buffer("squares", torch.zeros(steps))
        self.register_buffer("counts", torch.zeros(steps))
        self._seen: list[Tensor] = []

    def probabilities(self) -> Tensor:
        """Return the probability of each step, `(T,)` float64."""
        roots = (self.squares.double() + 1e-10).sqrt() + 1e-4
        roots = torch.cat((roots[1:2], roots[1:]))
        known = (self.counts > 10).all() & torch.tensor(self.training, device=roots.device)
        return torch.where(known, roots / roots.sum(), 1 / len(roots))

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draw steps by uniform numbers in (0, 1): their numbers from 0, int64, and the weights of their costs."""
        probabilities = self.probabilities()
        cumulative = probabilities.cumsum(dim=0)
        step = torch.searchsorted(cumulative, uniforms.double() * cumulative[-1], right=True)
        step = step.clamp(max=len(probabilities) - 1)
        return step, 1 / (len(probabilities) * probabilities[step])

    @torch.no_grad()
    def observe(self, steps: Tensor, costs: Tensor) -> None:
        """Learn what steps cost: a running mean of squares, of which what is new is a tenth.

        While `accumulating`, `end_step` learns it.

        Args:
            steps: `(B,)` int64.
            costs: `(B,)` nats of a sequence.
        """
        self._seen.append(torch.stack((steps.double(), costs.double()), dim=-1))
        if not self.accumulating:
            self.end_step()

    def forget_step(self) -> None:
        self._seen = []

    @torch.no_grad()
    def end_step(self) -> None:
        seen, self._seen = self._seen, []
        if not seen:
            return
        rows = all_gather_rows(torch.cat(seen))
        steps, squares = rows[:, 0].long(), rows[:, 1] ** 2
        counts = torch.zeros(len(self.counts), dtype=torch.float64, device=rows.device)
        sums, counts = counts.index_add(0, steps, squares), counts.index_add(0, steps, torch.ones_like(squares))
        moved = 0.9 * self.squares + 0.1 * sums / counts.clamp(min=1)
        self.squares.copy_(torch.where(counts > 0, moved, self.squares.double()))
        self.counts.add_(counts)


class VQDiffusionLoss(DiscreteTimeBound):
    """VQ-Diffusion's loss: `KL(q(x_s | x_t, x_0) || p(x_s | x_t)) + lambda (2 - i / T) CE(x_0)`, times T, step i of T.

    (Gu et al., 2022, section 4.2; the factor of lambda is the code's.) At the step that goes back to the data, i = 0,
    the cross-entropy of x_0 is that of the bound, `-log p(x_0 | x_1)`.

    Args:
        steps: T, at least 2; those of the `MaskAndReplaceSchedule`.
        auxiliary_weight: lambda >= 0, 0.001 of the ImageNet model; 0 leaves the bound, by which it is trained alone.
        adaptive: the factor 2 - i / T of lambda; otherwise 1.
        mask_weights: of both terms at masked tokens, and at others; not at the step that goes back to the data.
        importance: draw steps in training by `StepImportance`.

    Raises:
        ValueError: a setting out of its range.
    """

    heads = frozenset({"posterior"})

    def __init__(
        self,
        steps: int = 100,
        *,
        auxiliary_weight: float = 1e-3,
        adaptive: bool = True,
        mask_weights: Sequence[float] = (1.0, 1.0),
        importance: bool = True,
    ) -> None:
        super().__init__(steps)
        if steps < 2:
            raise ValueError(f"steps of VQDiffusionLoss must be at least 2, got {steps}")
        if auxiliary_weight < 0 or len(mask_weights) != 2 or min(mask_weights) < 0:
            raise ValueError(
                "auxiliary_weight must be >= 0, and mask_weights two numbers >= 0, got "
                f"{auxiliary_weight} and {list(mask_weights)}"
            )
        self.auxiliary_weight = auxiliary_weight
        self.adaptive = adaptive
        self.mask_weights = tuple(mask_weights)
        # A generator takes it for a part of its own, which is saved with it and told of training.
        self.importance = self._drawing = StepImportance(steps) if importance else None
        self._seen: list[tuple[Tensor, Tensor]] = []

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> DrawnStep:
        if self._drawing is not None:
            step, weight = self._drawing.draw(uniforms)
        else:
            step = (uniforms.double() * self.steps).long().clamp(max=self.steps - 1)
            weight = torch.ones_like(uniforms, dtype=torch.float64)
        # In the middle of the step, so that rounding leaves it the same.
        level = super().level(schedule, (step + 0.5) / self.steps, length)
        return DrawnStep(**vars(level), step=step, weight=weight)

    def integrand(
        self, prediction: Tensor, tokens: Tensor, *, states: Tensor, process: ForwardProcess, level: Any
    ) -> Tensor:
        assert isinstance(level, DrawnStep), "the level was drawn by this loss"
        leave_one_out = leave_one_out_from_posterior(prediction, states, process, level)
        cost = self._divergence(leave_one_out, tokens, states, process, level)
        to_data = level.step == 0
        weights = torch.where(states == process.mask_id, *self.mask_weights).double()
        weights = torch.where(to_data, 1.0, weights)
        cost = cost * weights
        if self._drawing is not None and self._drawing.training:
            self._seen.append((level.step[:, 0], cost.detach().sum(dim=1)))
        if self.auxiliary_weight:
            auxiliary = torch.where(to_data, cost, -gather(prediction, tokens).double() * weights)
            factor = 2 - level.step / self.steps if self.adaptive else torch.ones_like(level.weight)
            cost = cost + self.auxiliary_weight * factor * auxiliary
        return self.steps * level.weight * cost

    def end_batch(self) -> None:
        seen, self._seen = self._seen, []
        if self._drawing is not None and seen:
            self._drawing.observe(*(torch.cat(parts) for parts in zip(*seen, strict=True)))

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        plain = not self.auxiliary_weight and self.mask_weights == (1.0, 1.0)
        return super().label(process, schedule) if plain else "not a bound"
