"""What a loss of discrete diffusion is.

A function of each row of wide logits, a few rows at a time.

How far a predicted noisy marginal is from the true one: what every bound of a cavity head is made of.

Cross-entropy of masked tokens (Sahoo et al., "MDLM", 2024; Shi et al., "MD4", 2024; Ou et al., "RADD", 2024).

Denoising score entropy (Lou, Meng & Ermon, "Discrete Diffusion Modeling by Estimating the Ratios of the Data
Distribution", 2024).

The bound in continuous time, for every process.

The bound of a chain of T steps, and D3PM's training loss.

Discrete flow matching's loss (Gat et al., 2024; Shaul et al., "Flow Matching with General Discrete Paths", 2024).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.random import random_subset
from discrete_lit.diffusion.parameterization import Head, HeadKind
from discrete_lit.diffusion.processes import ForwardProcess, MixtureProcess, is_absorbing
from discrete_lit.diffusion.schedules import MaskSchedule, NoiseLevel

LossKind = Literal["bound", "not a bound"]


class DiffusionLoss(ABC):
    """Draws a level of noise and the noisy tokens, and says what their prediction costs in nats.

    Summed over a sequence and averaged over the level and the noise, a `"bound"` is at least -log p of the clean
    sequence less the prior's term, `ForwardProcess.prior_divergence` at t = 1, which nothing learned changes.
    """

    heads: frozenset[HeadKind]
    """The kinds of head that it can take."""
    kind: LossKind
    """Whether it is a bound where noise goes all the way; `label` also looks at the schedule."""

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> NoiseLevel:
        """The level of each sequence.

        Args:
            schedule: of training.
            uniforms: `(B, 1)` float64 in (0, 1).
            length: N.
        """
        return NoiseLevel.at(schedule, uniforms)

    def corrupt(self, process: ForwardProcess, tokens: Tensor, level: NoiseLevel, uniforms: Tensor) -> Tensor:
        """x_t `(B, N)` of clean `tokens (B, N)`; `uniforms (B, N)` float64 in (0, 1) decide it."""
        return process.corrupt(tokens, level.alpha, uniforms)

    def check(self, head: Head, process: ForwardProcess) -> None:
        """Whether it can be used with them.

        Raises:
            ValueError: it cannot.
        """
        if head.kind not in self.heads:
            raise ValueError(
                f"{type(self).__name__} needs a head of kind {' or '.join(sorted(self.heads))}, "
                f"{type(head).__name__} is of kind {head.kind}"
            )
        if head.kind == "score" and head.mask_output != process.masks:
            raise ValueError(
                f"scores are of all states: mask_output of {type(head).__name__} must be {process.masks} for "
                f"{type(process).__name__}, got {head.mask_output}"
            )

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        """Whether it bounds -log p with this schedule.

        A schedule whose m starts above 0 leaves out what the last tokens cost; where noise only masks, one that ends
        below 1 leaves out a prior's term that is infinite.
        """
        first, last = schedule.ends()
        cut = first > 0 or (last < 1 and is_absorbing(process))
        return "not a bound" if cut else self.kind

    def __call__(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        """The integrand at the level.

        Args:
            logits: `(B, N, K)`, or `(B, N, S)` of heads with the mask's output, float32 or float64.
            head: what the logits mean.
            tokens: clean, `(B, N)` int64.
            states: x_t, `(B, N)` int64.
            process: that made the states.
            level: of the states, as `level` drew it.

        Returns:
            `(B, N)` nats of the logits' precision, whose mean over the level of the sum over N is the loss.

        Raises:
            ValueError: a head or process that this loss is not for.
        """
        self.check(head, process)
        length = tokens.shape[1]
        # Where noise only masks, a token that it left is known.
        counted = states == process.mask_id if is_absorbing(process) else torch.ones_like(states, dtype=torch.bool)
        places = counted.flatten().nonzero()[:, 0]
        clean, noisy = tokens.flatten()[places, None], states.flatten()[places, None]
        levels = level.take(places // length)

        def of_rows(rows: Tensor, part: slice) -> Tensor:
            arguments = clean[part], noisy[part], process, levels.take(part)
            return self.integrand(rows[:, None], head, *arguments)[:, 0]

        return by_rows(of_rows, logits.flatten(0, 1), places).view_as(tokens)

    @abstractmethod
    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        """As `__call__`, of all tokens it is given, in float64."""


def gather(values: Tensor, ids: Tensor) -> Tensor:
    """`values (..., S)` at `ids (...)`."""
    return values.gather(-1, ids[..., None])[..., 0]


# Entries of the logits that are worked on at once, 4 MB of float32, or more where that would be more parts than this: a
# GPU waits for the host otherwise. What is made of them on the way is a few times as large.
_ENTRIES_AT_ONCE = 2**20


_MOST_PARTS = 16


def by_rows(function: Callable[[Tensor, slice], Tensor], logits: Tensor, places: Tensor) -> Tensor:
    """`function` of some rows, 0 for the others.

    Its gradient is worked out beside its value, so that of all that the function makes of the logits nothing is kept
    but their gradient. What else the function reads gets none.

    Args:
        function: of rows `(r, S)` of the logits and where they stand in `places`; gives `(r,)`.
        logits: `(R, S)`.
        places: `(n,)` int64, rows of the logits without repetition.

    Returns:
        `(R,)`.
    """
    return _ByRows.apply(logits, places, function)  # pyright: ignore[reportReturnType]


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        count = len(places)
        size = max(1, _ENTRIES_AT_ONCE // logits.shape[1], -(-count // _MOST_PARTS))
        everywhere, wanted = count == len(logits), ctx.needs_input_grad[0]
        values = logits.new_zeros(len(logits))
        # Rows that do not count have no gradient.
        gradient = (torch.empty_like if everywhere else torch.zeros_like)(logits) if wanted else None
        for start in range(0, count, size):
            standing = slice(start, min(start + size, count))
            part = places[standing]
            rows = logits[standing].detach() if everywhere else logits[part]
            if gradient is None:
                values[part] = function(rows, standing).to(values.dtype)
                continue
            with torch.enable_grad():
                value = function(rows.requires_grad_(), standing)
                gradient[part] = torch.autograd.grad(value.sum(), rows)[0]
            values[part] = value.detach().to(values.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None], None, None


# In place of a probability of 0, whose logarithm would be none: far below what float64 adds up.
_TINY = 1e-30


# From here on log(1 + exp(x)) is x, in float64 too.
_LINEAR = 40


# What the eigenvectors of a dense chain cannot tell from 0.
_DENSE_ROUNDING = 1e-18


def marginals(cavity: Tensor, tokens: Tensor, process: ForwardProcess, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """a = q(. | x_0) and b, its mean over the cavity, `(..., S)` float64, for processes without a closed form."""
    clean = F.one_hot(tokens, process.vocab_size).double()
    true, predicted = (process.marginal(of, alpha).clamp(min=_DENSE_ROUNDING) for of in (clean, cavity.double().exp()))
    return true, predicted


def mixture_divergence(cavity: Tensor, tokens: Tensor, process: MixtureProcess, alpha: Tensor, noise: Tensor) -> Tensor:
    """KL(a | b) with a = q(. | x_0) and b its mean over the cavity, in float64; one pass over the ids.

    With c what noise alone gives each id, `b_y = c + alpha p_y`: those that are not x_0 share
    `-c sum_y log(1 + alpha p_y / c)`, and the mask's part does not depend on p.

    Args:
        cavity: `(..., K)` log-probabilities.
        tokens: x_0 `(...)`.
        process: the noise.
        alpha: broadcasts against the tokens, float64.
        noise: 1 - alpha.
    """
    at_clean = gather(cavity, tokens).double()
    if process.id_share == 0:
        return -alpha * at_clean
    floor = _floor(process, noise)
    offset = alpha.log() - floor.log()
    risen = F.softplus(cavity + offset[..., None].to(cavity.dtype), threshold=_LINEAR)
    at_clean_risen = F.softplus(at_clean + offset, threshold=_LINEAR)
    of_clean = alpha + floor
    others = risen.sum(dim=-1).double() - at_clean_risen
    return of_clean * (of_clean.log() - floor.log() - at_clean_risen) - floor * others


def mixture_at_states(
    cavity: Tensor, tokens: Tensor, states: Tensor, process: MixtureProcess, alpha: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """a and log(a / b) at `states (...)`, float64; the rest as for `mixture_divergence`."""
    is_clean, is_mask = states == tokens, states == process.vocab_size
    if process.id_share == 0:
        at_clean = gather(cavity, tokens).double()
        return torch.where(is_clean, alpha, noise), torch.where(is_clean, -at_clean, 0.0)
    floor = _floor(process, noise)
    of_state = torch.where(is_clean, alpha + floor, floor)
    at_state = gather(cavity, states.masked_fill(is_mask, 0)).double()
    log_predicted = floor.log() + F.softplus(at_state + alpha.log() - floor.log(), threshold=_LINEAR)
    # The mask's share does not depend on p.
    log_ratio = torch.where(is_mask, 0.0, of_state.log() - log_predicted)
    return torch.where(is_mask, noise * process.mask_fraction, of_state), log_ratio


def _floor(process: MixtureProcess, noise: Tensor) -> Tensor:
    return (noise * process.id_share).clamp(min=_TINY)


Variable = Literal["time", "mask_ratio", "mask_count"]


class MaskedCrossEntropy(DiffusionLoss):
    """-log p of the masked tokens, weighted so that its mean is the bound of the absorbing process.

    The mean is over one of three variables, which give the same bound (RADD, theorem 3):

    - `"time"`: t uniform, weight m'(t) / m(t) (t-DCE; MDLM eq. 10, MD4 eq. 6);
    - `"mask_ratio"`: m itself uniform in (0, 1), weight 1 / m, whatever the schedule (lambda-DCE);
    - `"mask_count"`: k of N tokens masked, k uniform in 1 ... N, weight N / k (k-DCE).

    The last two go all the way to m = 1, so they are bounds with every schedule, which only tells a timed network the
    time at which m is so large.

    Args:
        variable: what the mean is over.

    Raises:
        ValueError: an unknown variable.
    """

    heads = frozenset({"posterior", "cavity"})
    kind = "bound"

    def __init__(self, variable: Variable = "time") -> None:
        if variable not in ("time", "mask_ratio", "mask_count"):
            raise ValueError(f"variable must be 'time', 'mask_ratio' or 'mask_count', got {variable!r}")
        self.variable = variable

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> NoiseLevel:
        if self.variable == "time":
            return super().level(schedule, uniforms, length)
        share = uniforms.double()
        if self.variable == "mask_count":
            share = ((share * length).floor() + 1).clamp(max=length) / length
        t = schedule.inverse(share.clamp(*schedule.ends()))
        # The slope of m against itself is 1.
        return NoiseLevel(t, 1 - share, share, 1 / (1 - share))

    def corrupt(self, process: ForwardProcess, tokens: Tensor, level: NoiseLevel, uniforms: Tensor) -> Tensor:
        if self.variable != "mask_count":
            return super().corrupt(process, tokens, level, uniforms)
        assert process.mask_id is not None
        masked = random_subset(uniforms, (level.noise * tokens.shape[1]).round())
        return tokens.masked_fill(masked, process.mask_id)

    def check(self, head: Head, process: ForwardProcess) -> None:
        super().check(head, process)
        if not is_absorbing(process):
            raise ValueError(
                f"MaskedCrossEntropy is for AbsorbingProcess, got {type(process).__name__}: use ContinuousBound"
            )

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        return super().label(process, schedule) if self.variable == "time" else self.kind

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        log_probabilities = head(logits, states, level)
        cost = F.nll_loss(log_probabilities.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        weight = level.mask_weight if self.variable == "time" else 1 / level.noise
        return weight * cost.double()


class ScoreEntropy(DiffusionLoss):
    """`sigma' sum_{y != x} Q(y, x) [s_y - r_y log s_y + r_y (log r_y - 1)]` with `r_y = q(y | x_0) / q(x | x_0)`.

    (Eq. 9 with the constant K(r) of eq. 5, so that it is 0 where s = r; its minimiser is p_t(y) / p_t(x).) Scores need
    not be those of a law: whatever they are, it bounds -log p of the chain with the rates that they give.
    """

    heads = frozenset({"score"})
    kind = "bound"

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        scores = head(logits, states, level)
        if isinstance(process, MixtureProcess):
            return level.rate * self._of_mixture(scores, tokens, states, process, level)
        scores = scores.double()
        ratios = process.ratios(tokens, states, level.alpha).clamp(min=0)
        terms = scores.exp() - ratios * (scores + 1) + torch.xlogy(ratios, ratios)
        return level.rate * (process.rates_into(states) * terms).sum(dim=-1)

    def _of_mixture(
        self, scores: Tensor, tokens: Tensor, states: Tensor, process: MixtureProcess, level: NoiseLevel
    ) -> Tensor:
        """`pi_x / a_x sum_{y != x} [e_y - a_y log e_y + a_y (log a_y - 1)]` with a = q(. | x_0) and e_y = a_x s_y.

        But for x_0 the ids have one a_y, so a sum of scores and one of their logarithms are all that is as wide as K.
        """
        prior, share = process.prior_at(states), process.id_share
        is_clean, is_mask = states == tokens, states == process.vocab_size
        at_state = level.noise * prior + torch.where(is_clean, level.alpha, 0.0)  # a_x
        of_clean = level.alpha + level.noise * share  # a of x_0
        # Less than the log-odds, scores are of the size of 1: exp(sigma) - 1 never leaves the logarithm.
        scaled = scores + at_state.log()[..., None].to(scores.dtype)
        total = scaled.scatter(-1, states[..., None], -torch.inf).exp().sum(dim=-1).double()
        log_at_state = at_state.log()

        def cost(weight: Tensor, log_score: Tensor, count: Tensor | int = 1) -> Tensor:
            """-a (log e - log a + 1) of `count` states with one a, whose log-scores sum to `log_score`."""
            return torch.xlogy(weight, weight) * count - weight * (log_score + count * (log_at_state + 1))

        at_clean = gather(scores, tokens).double()
        result = total + torch.where(is_clean, 0.0, cost(of_clean, at_clean))
        if process.masks:
            at_mask = scores[..., process.vocab_size].double()
            result = result + torch.where(is_mask, 0.0, cost(level.noise * process.mask_fraction, at_mask))
        if share > 0:
            # Its own score is 0, so of the ids only x_0's has to be taken out.
            others = scores[..., : process.vocab_size].sum(dim=-1).double() - at_clean
            count = process.vocab_size - 1 - (~is_clean & ~is_mask).double()
            result = result + cost(level.noise * share, others, count)
        return prior / at_state * result


class ContinuousBound(DiffusionLoss):
    """`sigma' sum_y Q(y, x) [s^_y - s_y + s_y log(s_y / s^_y)]`, scores made of the cavity.

    With a = q(. | x_0) and b its mean over the cavity, s_y = a_y / a_x and s^_y = b_y / b_x (Campbell et al., 2022,
    proposition 2, for the reverse rates of the x_0-parametrisation). For mixtures with prior pi it is
    `sigma' pi_x / a_x [KL(a | b) + a_x / b_x - log(a_x / b_x) - 1]`: UDLM's (Schiff et al., 2024, eq. 16) and Duo's for
    the uniform process, GIDD's for a mix (von Rütte et al., 2025, theorem 3.7), `m' / m` times the cross-entropy of
    masked tokens for masks.
    """

    heads = frozenset({"cavity"})
    kind = "bound"

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        cavity = head(logits, states, level)
        if isinstance(process, MixtureProcess):
            at_state, log_ratio = mixture_at_states(cavity, tokens, states, process, level.alpha, level.noise)
            divergence = mixture_divergence(cavity, tokens, process, level.alpha, level.noise)
            weight = level.rate * process.prior_at(states) / at_state
            return weight * (divergence + torch.expm1(log_ratio) - log_ratio)
        true, predicted = marginals(cavity, tokens, process, level.alpha)
        true = true / gather(true, states)[..., None]
        predicted = predicted / gather(predicted, states)[..., None]
        gap = predicted - true + true * (true.log() - predicted.log())
        return level.rate * (process.rates_into(states) * gap).sum(dim=-1)


@dataclass(frozen=True)
class StepLevel(NoiseLevel):
    """The level at the noisy end of a step."""

    alpha_before: Tensor
    """alpha_s at its clean end."""
    noise_before: Tensor
    """1 - alpha_s."""


class DiscreteTimeBound(DiffusionLoss):
    """`T KL(q(x_s | x_t, x_0) | p(x_s | x_t))` for s = t - 1/T and t uniform in 1/T, ..., 1.

    p(x_s | x_t) is the x_0-parametrisation, proportional to q(x_t | x_s) times the mean of q(x_s | x_0) over the cavity
    (Austin et al., "D3PM", 2021, eq. 4). The step from 1/T goes to the data, whatever the schedule's m(0): it is the
    paper's reconstruction term. For masks it is MD4's `T (alpha_s - alpha_t) / (1 - alpha_t)` cross-entropy (Shi et
    al., 2024, eq. 4).

    Args:
        steps: T >= 1.

    Raises:
        ValueError: fewer than one step.
    """

    heads = frozenset({"cavity"})
    kind: LossKind = "bound"

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"steps of {type(self).__name__} must be at least 1, got {steps}")
        self.steps = steps

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> StepLevel:
        step = (uniforms.double() * self.steps).floor().clamp(max=self.steps - 1)
        end, start = NoiseLevel.at(schedule, (step + 1) / self.steps), step / self.steps
        alpha = torch.where(step == 0, 1.0, schedule.alpha(start))
        noise = torch.where(step == 0, 0.0, schedule.mask_probability(start))
        return StepLevel(end.t, end.alpha, end.noise, end.rate, alpha, noise)

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        return "not a bound" if is_absorbing(process) and schedule.ends()[1] < 1 else self.kind

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        return self.steps * self._divergence(head(logits, states, level), tokens, states, process, level)

    def _divergence(
        self, cavity: Tensor, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        """With marginals a of the data and b of the cavity: the mean of log(a_s / b_s) under q(x_s | x_t, x_0), less
        log(a_t / b_t) of x_t."""
        assert isinstance(level, StepLevel), "a level of this loss"
        before, ratio = level.alpha_before, level.alpha / level.alpha_before
        if isinstance(process, MixtureProcess):
            a_before, log_before = mixture_at_states(cavity, tokens, states, process, before, level.noise_before)
            a_state, log_ratio = mixture_at_states(cavity, tokens, states, process, level.alpha, level.noise)
            divergence = mixture_divergence(cavity, tokens, process, before, level.noise_before)
            jump = (level.noise - level.noise_before) / before * process.prior_at(states)
            return (ratio * a_before * log_before + jump * divergence) / a_state - log_ratio
        true, predicted = marginals(cavity, tokens, process, before)
        weights = true * process.likelihood(states, ratio)
        posterior = weights / weights.sum(dim=-1, keepdim=True)
        a_state, b_state = (gather(process.push(of, ratio), states) for of in (true, predicted))
        return (posterior * (true.log() - predicted.log())).sum(dim=-1) - (a_state / b_state).log()


class HybridBound(DiscreteTimeBound):
    """D3PM's training loss: the bound, and a share of the cross-entropy of x_0 given x_t (Austin et al., 2021, eq. 5).

    The value is T (KL + lambda CE): the paper's lambda weighs the cross-entropy against one step's KL, as their code
    does, and both stand here on the scale of the bound, the sum of T steps. The cross-entropy is of all tokens (of the
    masked ones where noise only masks); it pulls the head from the cavity towards the posterior.

    Args:
        steps: T >= 1.
        cross_entropy_weight: lambda >= 0; the paper's 0.001 of images, 0.01 of text8.

    Raises:
        ValueError: a setting out of its range.
    """

    kind = "not a bound"

    def __init__(self, steps: int, cross_entropy_weight: float = 0.001) -> None:
        super().__init__(steps)
        if cross_entropy_weight < 0:
            raise ValueError(f"cross_entropy_weight must be >= 0, got {cross_entropy_weight}")
        self.cross_entropy_weight = cross_entropy_weight

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        return self.kind

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        cavity = head(logits, states, level)
        divergence = self._divergence(cavity, tokens, states, process, level)
        return self.steps * (divergence - self.cross_entropy_weight * gather(cavity, tokens).double())


class DiscreteFlowMatching(DiffusionLoss):
    """The generalised KL of mixture paths: `m' / m [x_t != x_0](-log p(x_0)) + m' / m ([x_t = x_0] - p(x_t))`.

    p is the posterior, with which tokens jump at rate `m' / m p(y)` (Shaul et al., eq. 36): it bounds -log p of that
    chain, which for masks is the reverse of the noise, and else another chain with the same marginals.
    """

    heads = frozenset({"posterior"})
    kind = "bound"

    def check(self, head: Head, process: ForwardProcess) -> None:
        super().check(head, process)
        if not isinstance(process, MixtureProcess):
            raise ValueError(
                "DiscreteFlowMatching is for paths that mix data with one distribution (AbsorbingProcess, "
                f"UniformProcess, HybridProcess), got {type(process).__name__}"
            )

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        posterior = head(logits, states, level)
        is_mask = states == process.vocab_size
        at_clean = gather(posterior, tokens).double()
        at_state = gather(posterior, states.masked_fill(is_mask, 0)).double().exp()
        moved = -at_clean - torch.where(is_mask, 0.0, at_state)
        return level.mask_weight * torch.where(states == tokens, 1 - at_state, moved)
