"""Losses of discrete diffusion: each costs a prediction in nats, and most bound -log p of the clean sequence.

- `MaskedCrossEntropy`: MDLM (Sahoo et al., 2024), MD4 (Shi et al., 2024), RADD (Ou et al., 2024).
- `ScoreEntropy`: SEDD's denoising score entropy (Lou et al., 2024).
- `ContinuousBound`: the bound in continuous time, T = infinity; UDLM (Schiff et al., 2024) and Duo for the uniform
  process, GIDD (von Rütte et al., 2025) for its own, tauLDR (Campbell et al., 2022) for every process. `GIDDLoss`
  (`gidd.py`) is GIDD's with its weights of training.
- `DiscreteTimeBound`: the bound of T steps, D3PM's L_vb (Austin et al., 2021).
- `HybridBound`: D3PM's training loss L_lambda, this bound with a cross-entropy added (GIDD's hybrid *noise* is another
  thing, see `ContinuousBound`).
- `VQDiffusionLoss` (`mask_and_replace.py`): VQ-Diffusion's, this bound with a weighted cross-entropy of its own.
- `DiscreteFlowMatching`: the loss of discrete flow matching (Gat et al., 2024; Shaul et al., 2024).

One training step draws the level of noise, then the noisy tokens x_t, and takes the loss of what the network makes of
them:

    level = loss.level(schedule, uniforms, length)
    states = loss.corrupt(process, tokens, level, uniforms_of_tokens)
    nats = loss(network(states), tokens, head=head, states=states, process=process, level=level)  # (B, N)

The closed forms that they share stand in `divergences.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.random import random_subset
from discrete_lit.diffusion.divergences import (
    LEAST_PROBABILITY,
    by_rows,
    gather,
    marginals,
    mixture_at_states,
    mixture_divergence,
)
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import Head, HeadKind
from discrete_lit.diffusion.processes import ForwardProcess, MixtureProcess, ends_in_masks, is_absorbing
from discrete_lit.diffusion.schedules import MaskSchedule

LossKind = Literal["bound", "not a bound"]

LastLaw = Literal["chain", "prediction"]
"""The law p(x_0 | x_t) of the step that goes back to the data, see `DiscreteTimeBound`."""


class DiffusionLoss(ABC):
    """Draws a level of noise and the noisy tokens, and costs a prediction of the clean ones in nats.

    Take the sum over a sequence and the mean over the level and the noise. Of a `"bound"` it is at least -log p of the
    clean sequence minus the prior term, `ForwardProcess.prior_divergence` at t = 1, which no training changes.

    A loss of one's own defines `heads`, `kind` and `integrand`.
    """

    heads: frozenset[HeadKind]
    """The kinds of head that the loss accepts."""
    kind: LossKind
    """Whether the loss is a bound if noise goes all the way; `label` looks at the schedule too."""
    known_tokens: bool = False
    """Whether tokens that noise left cost something too, where it only masks and they are known."""
    importance: nn.Module | None = None
    """The module that learns which levels cost most, kept with a generator's weights; None for most losses."""

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> NoiseLevel:
        """Draw the noise level of each sequence.

        Args:
            schedule: the schedule of training.
            uniforms: `(B, 1)` float64 in (0, 1), which decide the draw; here they are the times t.
            length: N.
        """
        return NoiseLevel.at(schedule, uniforms)

    def corrupt(self, process: ForwardProcess, tokens: Tensor, level: NoiseLevel, uniforms: Tensor) -> Tensor:
        """Draw x_t `(B, N)` given clean `tokens (B, N)`; `uniforms (B, N)`, float64 in (0, 1), decide the draw."""
        return process.corrupt(tokens, level.alpha, uniforms, level.noise)

    def __call__(
        self,
        logits: Tensor,
        tokens: Tensor,
        *,
        head: Head,
        states: Tensor,
        process: ForwardProcess,
        level: NoiseLevel,
    ) -> Tensor:
        """Return the cost of each token; the loss is the mean over the level of its sum over N.

        Args:
            logits: the network's output, `(B, N, K)`, or `(B, N, S)` of heads with an output for the mask; of any
                precision.
            tokens: x_0, `(B, N)` int64.
            head: the meaning of the logits.
            states: x_t, `(B, N)` int64.
            process: the noise that made the states.
            level: the level of the states, as `level` drew it.

        Returns:
            `(B, N)` nats in float64: next to clean data a rare state costs more than float32 can hold.

        Raises:
            ValueError: the loss is not for this head or process.
        """
        self.check(head, process)
        length = tokens.shape[1]
        if is_absorbing(process) and not self.known_tokens:
            # A token that the noise left is known, and costs nothing. How many there are the host must wait for: it
            # costs less than half the passes over wide logits would.
            positions = (states == process.mask_id).flatten().nonzero()[:, 0]
        else:
            positions = torch.arange(states.numel(), device=states.device)
        # A process without a closed form has a matrix for each level: tokens of one level stay together.
        together = 1 if isinstance(process, MixtureProcess) else length
        clean, noisy = (rearrange(ids.flatten()[positions], "(r n) -> r n", n=together) for ids in (tokens, states))
        levels = level.take(positions[::together] // length)

        def cost(rows: Tensor, chunk: slice) -> Tensor:
            part = slice(chunk.start // together, chunk.stop // together)
            rows, at = rearrange(rows, "(r n) k -> r n k", n=together), levels.take(part)
            prediction = head(rows, noisy[part], at)
            return self.integrand(prediction, clean[part], states=noisy[part], process=process, level=at).flatten()

        return by_rows(cost, rearrange(logits, "b n k -> (b n) k"), positions, together).view_as(tokens)

    @abstractmethod
    def integrand(
        self, prediction: Tensor, tokens: Tensor, *, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        """Return the formula of the loss: the cost of each token at its level, `(B, N)` float64.

        Args:
            prediction: the head's, log-probabilities `(B, N, K)` or log-scores `(B, N, S)`.
            tokens: x_0, `(B, N)`.
            states: x_t, `(B, N)`; where noise only masks, masks alone.
            process: the noise.
            level: `(B, 1)`.
        """

    def end_batch(self) -> None:  # noqa: B027
        """Learn what a training batch cost, where the loss draws its levels by that."""

    def check(self, head: Head, process: ForwardProcess) -> None:
        """Refuse a head or process that the loss is not for.

        Raises:
            ValueError: the loss cannot be used with them.
        """
        if head.kind not in self.heads:
            raise ValueError(
                f"{type(self).__name__} needs a head of kind {' or '.join(sorted(self.heads))}, "
                f"{type(head).__name__} is of kind {head.kind}"
            )
        head.check(process)

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        """Tell whether the loss bounds -log p with this process and schedule.

        A schedule whose m starts above 0 leaves out the cost of the last tokens. Where noise ends in masks, one whose m
        ends below 1 leaves out a prior term that is infinite.
        """
        first, last = schedule.ends()
        cut = first > 0 or (last < 1 and ends_in_masks(process))
        return "not a bound" if cut else self.kind


Variable = Literal["time", "mask_ratio", "mask_count"]


class MaskedCrossEntropy(DiffusionLoss):
    """The weighted cross-entropy of masked tokens, the bound of the absorbing process: MDLM, MD4, RADD.

    The mean may be taken over one of three variables, which give the same bound (RADD, theorem 3):

    - `"time"`: t uniform, weight m'(t) / m(t) (MDLM eq. 10, MD4 eq. 6; RADD's t-DCE);
    - `"mask_ratio"`: m itself uniform in (0, 1), weight 1 / m, whatever the schedule (RADD's lambda-DCE);
    - `"mask_count"`: k of N tokens masked, k uniform in 1 ... N, weight N / k (RADD's k-DCE).

    The last two go all the way to m = 1 and are bounds with every schedule. The schedule then only gives the time that
    a timed network is told for this m.

    Args:
        variable: the variable that the mean is over.

    Raises:
        ValueError: the variable is unknown.
    """

    heads = frozenset({"posterior", "leave_one_out"})
    kind = "bound"

    def __init__(self, variable: Variable = "time") -> None:
        if variable not in ("time", "mask_ratio", "mask_count"):
            raise ValueError(f"variable must be 'time', 'mask_ratio' or 'mask_count', got {variable!r}")
        self.variable = variable

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> NoiseLevel:
        if self.variable == "time":
            return super().level(schedule, uniforms, length)
        m = uniforms.double()
        if self.variable == "mask_count":
            m = ((m * length).floor() + 1).clamp(max=length) / length
        t = schedule.inverse(m.clamp(*schedule.ends()))
        # The slope of m in the variable m is 1.
        return NoiseLevel(t=t, alpha=1 - m, noise=m, rate=1 / (1 - m))

    def corrupt(self, process: ForwardProcess, tokens: Tensor, level: NoiseLevel, uniforms: Tensor) -> Tensor:
        if self.variable != "mask_count":
            return super().corrupt(process, tokens, level, uniforms)
        assert process.mask_id is not None
        masked = random_subset(uniforms, (level.noise * tokens.shape[1]).round())
        return tokens.masked_fill(masked, process.mask_id)

    def integrand(
        self, prediction: Tensor, tokens: Tensor, *, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        cost = F.nll_loss(rearrange(prediction, "b n k -> (b n) k"), tokens.flatten(), reduction="none")
        weight = level.mask_weight if self.variable == "time" else 1 / level.noise
        return weight * cost.view_as(tokens).double()

    def check(self, head: Head, process: ForwardProcess) -> None:
        super().check(head, process)
        if not is_absorbing(process):
            raise ValueError(
                f"MaskedCrossEntropy is for AbsorbingProcess, got {type(process).__name__}: use ContinuousBound"
            )

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        return super().label(process, schedule) if self.variable == "time" else self.kind


class ScoreEntropy(DiffusionLoss):
    """SEDD's denoising score entropy, `sigma' sum_{y != x} Q(y, x) [s_y - r_y log s_y + r_y (log r_y - 1)]`.

    r_y = q(y | x_0) / q(x | x_0) is the ratio of the clean sequence, s_y the predicted score (Lou, Meng & Ermon,
    "Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution", 2024, eq. 9, with the constant K(r)
    of eq. 5, so that it is 0 where s = r). Its minimiser is p_t(y) / p_t(x). Scores need not be those of a
    distribution: whatever they are, it bounds -log p of the chain with the rates that they give.
    """

    heads = frozenset({"score"})
    kind = "bound"

    def integrand(
        self, prediction: Tensor, tokens: Tensor, *, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        if isinstance(process, MixtureProcess):
            return level.rate * self._of_mixture(prediction, tokens, states, process, level)
        scores = prediction.double()
        ratios = process.ratios(tokens, states, level.alpha, level.noise)
        terms = scores.exp() - ratios * (scores + 1) + torch.xlogy(ratios, ratios)
        return level.rate * (process.rates_into(states) * terms).sum(dim=-1)

    def _of_mixture(
        self, scores: Tensor, tokens: Tensor, states: Tensor, process: MixtureProcess, level: NoiseLevel
    ) -> Tensor:
        """Return the sum in closed form, `pi_x / a_x sum_{y != x} [e_y - a_y log e_y + a_y (log a_y - 1)]`.

        Here a = q(. | x_0) and e_y = a_x s_y. All ids but x_0 have the same a_y, so that only a sum of scores and a sum
        of log-scores run over all K ids.
        """
        assert process.homogeneous, "scores are of homogeneous processes"
        prior, id_probability = process.prior_at(states), process.id_probability
        is_clean, is_mask = states == tokens, states == process.vocab_size
        at_state = level.noise * prior + torch.where(is_clean, level.alpha, 0.0)  # a_x
        of_clean = level.alpha + level.noise * id_probability  # a of x_0
        # Scores are of the size of 1 / (exp(sigma) - 1), so large near t = 0 that only their logarithms are used. e_y
        # is of the size of 1, unless the clean id is thought to be next to impossible: then float32 has no such number.
        scaled = scores + at_state.log()[..., None].to(scores.dtype)
        total = scaled.scatter(-1, states[..., None], -torch.inf).logsumexp(dim=-1).double().exp()
        log_at_state = at_state.log()

        def cost(weight: Tensor, log_score: Tensor, count: Tensor | int = 1) -> Tensor:
            """Return -a (log e - log a + 1) of `count` states with one a, whose log-scores sum to `log_score`."""
            return torch.xlogy(weight, weight) * count - weight * (log_score + count * (log_at_state + 1))

        at_clean = gather(scores, tokens).double()
        result = total + torch.where(is_clean, 0.0, cost(of_clean, at_clean))
        if process.masks:
            at_mask = scores[..., process.vocab_size].double()
            result = result + torch.where(is_mask, 0.0, cost(level.noise * process.mask_fraction, at_mask))
        if id_probability > 0:
            # The token's own log-score is 0, so of the sum over ids only that of x_0 has to be taken out.
            others = scores[..., : process.vocab_size].sum(dim=-1).double() - at_clean
            count = process.vocab_size - 1 - (~is_clean & ~is_mask).double()
            result = result + cost(level.noise * id_probability, others, count)
        return prior / at_state * result


class ContinuousBound(DiffusionLoss):
    """The bound in continuous time, `sigma' sum_y Q(y, x) [s^_y - s_y + s_y log(s_y / s^_y)]`: UDLM, Duo, GIDD, tauLDR.

    With a = q(. | x_0), and b its mean over the predicted leave-one-out posterior of x_0, the true and the predicted
    scores are s_y = a_y / a_x and s^_y = b_y / b_x (Campbell et al., 2022, proposition 2, for the reverse rates of the
    x_0-parameterization). For mixtures with prior pi it is

        sigma' pi_x / a_x [KL(a | b) + a_x / b_x - log(a_x / b_x) - 1],

    which is the loss of UDLM (Schiff et al., 2024, eq. 16) and Duo for the uniform process, of GIDD for its own, whose
    pi_x is that of the level (von Rütte et al., 2025, theorem 3.7), and `m' / m` times the cross-entropy of masked
    tokens for the absorbing one.

    Args:
        time_margin: times are drawn from [time_margin, 1 - time_margin], in [0, 1/2): at the ends of time weights can
            be infinite. With a margin the loss is no bound.

    Raises:
        ValueError: the margin is out of its range.
    """

    heads = frozenset({"leave_one_out"})
    kind: LossKind = "bound"

    def __init__(self, time_margin: float = 0.0) -> None:
        if not 0 <= time_margin < 0.5:
            raise ValueError(f"time_margin must lie in [0, 0.5), got {time_margin}")
        self.time_margin = time_margin

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> NoiseLevel:
        return super().level(schedule, self.time_margin + (1 - 2 * self.time_margin) * uniforms, length)

    def integrand(
        self, prediction: Tensor, tokens: Tensor, *, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        if isinstance(process, MixtureProcess):
            alpha, noise = level.alpha, level.noise
            _, log_ratio = mixture_at_states(
                prediction, tokens, states=states, process=process, alpha=alpha, noise=noise
            )
            divergence = mixture_divergence(prediction, tokens, process=process, alpha=alpha, noise=noise)
            weight = self.weight(tokens, states=states, process=process, level=level)
            return weight * (divergence + torch.expm1(log_ratio) - log_ratio)
        true, predicted = marginals(prediction, tokens, process=process, alpha=level.alpha, noise=level.noise)
        true = true / gather(true, states)[..., None]
        predicted = predicted / gather(predicted, states)[..., None]
        log_ratio = (predicted / true).log()
        gap = true * (torch.expm1(log_ratio) - log_ratio)
        return level.rate * (process.rates_into(states, level.alpha, level.noise) * gap).sum(dim=-1)

    def weight(self, tokens: Tensor, *, states: Tensor, process: MixtureProcess, level: NoiseLevel) -> Tensor:
        """Return the weight of each token of a mixture, `sigma' pi_x / a_x`, float64.

        Args:
            tokens: x_0, `(B, N)`.
            states: x_t, `(B, N)`.
            process: the noise.
            level: `(B, 1)`.
        """
        masses = process.noise_masses(level.alpha, level.noise)
        masses = masses[0].clamp(min=LEAST_PROBABILITY), masses[1]
        at_state = process.at(states, masses) + torch.where(states == tokens, level.alpha, 0.0)
        return level.rate * process.at(states, process.rate_masses(level.alpha, level.noise)) / at_state

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        return "not a bound" if self.time_margin > 0 else super().label(process, schedule)


@dataclass(frozen=True, kw_only=True)
class StepLevel(NoiseLevel):
    """The noise at both ends of a step from s to t; the fields of `NoiseLevel` are those of t, the noisy end."""

    alpha_before: Tensor
    """alpha_s, at the clean end."""
    noise_before: Tensor
    """1 - alpha_s."""


class DiscreteTimeBound(DiffusionLoss):
    """The bound of T steps, D3PM's L_vb: `T KL(q(x_s | x_t, x_0) || p(x_s | x_t))`, s = t - 1/T, t among 1/T, ..., 1.

    p(x_s | x_t) is that of the x_0-parameterization: proportional to q(x_t | x_s) times the mean of q(x_s | x_0) over
    the leave-one-out posterior (Austin et al., "D3PM", 2021, eq. 4). The first step, t = 1/T, goes back to the data
    whatever the schedule's m(0): it is the paper's reconstruction term. For masks the loss is
    `T (alpha_s - alpha_t) / (1 - alpha_t)` times the cross-entropy (MD4; Shi et al., 2024, eq. 4).

    Args:
        steps: T >= 1.
        to_data: the first step goes back to the data; otherwise to the schedule's m(0), and what is left to be guessed
            there is not counted: MD4's code adds a constant for it.
        last_law: p(x_0 | x_t) of the step that goes back to the data: that of eq. 4 (`"chain"`), or the head's
            prediction as it is (`"prediction"`), as in D3PM's code. Both give a bound, of different chains; samplers
            and likelihoods here are those of the first.

    Raises:
        ValueError: there is less than one step, or an unknown law.
    """

    heads = frozenset({"leave_one_out"})
    kind: LossKind = "bound"

    def __init__(self, steps: int, *, to_data: bool = True, last_law: LastLaw = "chain") -> None:
        if steps < 1:
            raise ValueError(f"steps of {type(self).__name__} must be at least 1, got {steps}")
        if last_law not in ("chain", "prediction"):
            raise ValueError(f"last_law of {type(self).__name__} must be 'chain' or 'prediction', got {last_law!r}")
        self.steps = steps
        self.to_data = to_data
        self.last_law: LastLaw = last_law

    def level(self, schedule: MaskSchedule, uniforms: Tensor, length: int) -> StepLevel:
        step = (uniforms.double() * self.steps).floor().clamp(max=self.steps - 1)
        end, start = NoiseLevel.at(schedule, (step + 1) / self.steps), step / self.steps
        alpha, noise = schedule.alpha(start), schedule.mask_probability(start)
        if self.to_data:
            alpha, noise = torch.where(step == 0, 1.0, alpha), torch.where(step == 0, 0.0, noise)
        return StepLevel(**vars(end), alpha_before=alpha, noise_before=noise)

    def integrand(
        self, prediction: Tensor, tokens: Tensor, *, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        return self.steps * self._cost(prediction, tokens, states, process, level)

    def _cost(
        self, prediction: Tensor, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        """Return what a step costs: its KL, or behind the last one -log of its law."""
        assert isinstance(level, StepLevel), "the level was drawn by this loss"
        divergence = self._divergence(prediction, tokens, states, process, level)
        if self.last_law == "chain":
            return divergence
        return torch.where(level.noise_before == 0, -gather(prediction, tokens).double(), divergence)

    def _divergence(
        self, prediction: Tensor, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        """Return the KL of one step: the mean of log(a_s / b_s) under q(x_s | x_t, x_0), less log(a_t / b_t) at x_t.

        a = q(. | x_0) is the marginal of the data, and b its mean over the predicted leave-one-out posterior.
        """
        assert isinstance(level, StepLevel), "the level was drawn by this loss"
        before, ratio = level.alpha_before, level.alpha / level.alpha_before
        if isinstance(process, MixtureProcess):
            noise_before = level.noise_before
            a_s, log_ratio_s = mixture_at_states(
                prediction, tokens, states=states, process=process, alpha=before, noise=noise_before
            )
            a_t, log_ratio_t = mixture_at_states(
                prediction, tokens, states=states, process=process, alpha=level.alpha, noise=level.noise
            )
            divergence = mixture_divergence(prediction, tokens, process=process, alpha=before, noise=noise_before)
            added = process.step_masses(before, level.alpha, noise_s=noise_before, noise_t=level.noise)
            jump = process.at(states, added)
            return (ratio * a_s * log_ratio_s + jump * divergence) / a_t - log_ratio_t
        true, predicted = marginals(prediction, tokens, process=process, alpha=before, noise=level.noise_before)
        step = process.step_likelihood(  # q(x_t | x_s)
            states, before, level.alpha, noise_s=level.noise_before, noise_t=level.noise
        )
        a_t, b_t = ((law * step).sum(dim=-1, keepdim=True) for law in (true, predicted))
        posterior = true * step / a_t  # q(x_s | x_t, x_0)
        return (posterior * (true.log() - predicted.log())).sum(dim=-1) - (a_t.log() - b_t.log())[..., 0]

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        first, last = schedule.ends()
        cut = (first > 0 and not self.to_data) or (last < 1 and ends_in_masks(process))
        # Where the prediction is the law, tokens that are known cost something at the last step.
        left_out = self.last_law == "prediction" and is_absorbing(process) and not self.known_tokens
        return "not a bound" if cut or left_out else self.kind


class HybridBound(DiscreteTimeBound):
    """D3PM's training loss L_lambda: the bound of T steps, with a part of the cross-entropy of x_0 given x_t added.

    (Austin et al., 2021, eq. 5.) The value is T (KL + lambda CE). The paper's lambda weighs the cross-entropy against
    the KL of one step, as its code does; here both are on the scale of the bound, the sum over T steps. It pulls the
    head from the leave-one-out posterior towards the posterior.

    Args:
        steps: T >= 1.
        cross_entropy_weight: lambda >= 0; the paper's is 0.001 for images, 0.01 for text8.
        known_tokens: where noise only masks, count the cross-entropy of tokens that it left too, as D3PM's code does:
            no sampler reads these predictions, but the network learns to copy.
        last_law: as for `DiscreteTimeBound`.

    Raises:
        ValueError: a setting is out of its range.
    """

    kind = "not a bound"

    def __init__(
        self,
        steps: int,
        cross_entropy_weight: float = 0.001,
        *,
        known_tokens: bool = False,
        last_law: LastLaw = "chain",
    ) -> None:
        super().__init__(steps, last_law=last_law)
        self.known_tokens = known_tokens
        if cross_entropy_weight < 0:
            raise ValueError(f"cross_entropy_weight must be >= 0, got {cross_entropy_weight}")
        self.cross_entropy_weight = cross_entropy_weight

    def integrand(
        self, prediction: Tensor, tokens: Tensor, *, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        divergence = self._cost(prediction, tokens, states, process, level)
        return self.steps * (divergence - self.cross_entropy_weight * gather(prediction, tokens).double())

    def label(self, process: ForwardProcess, schedule: MaskSchedule) -> LossKind:
        return self.kind


class DiscreteFlowMatching(DiffusionLoss):
    """The generalised KL of mixture paths: `m' / m [x_t != x_0](-log p(x_0)) + m' / m ([x_t = x_0] - p(x_t))`.

    p is the posterior. Tokens jump to y at the rate `m' / m p(y)` (Shaul et al., "Flow Matching with General Discrete
    Paths", 2024, eq. 36; Gat et al., "Discrete Flow Matching", 2024), and the loss bounds -log p of that chain. For
    masks the chain is the reverse of the noise; for other noise it is another chain with the same marginals.
    """

    heads = frozenset({"posterior"})
    kind = "bound"

    def integrand(
        self, prediction: Tensor, tokens: Tensor, *, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        is_mask = states == process.vocab_size
        at_clean = gather(prediction, tokens).double()
        at_state = gather(prediction, states.masked_fill(is_mask, 0)).double().exp()
        moved = -at_clean - torch.where(is_mask, 0.0, at_state)
        return level.mask_weight * torch.where(states == tokens, 1 - at_state, moved)

    def check(self, head: Head, process: ForwardProcess) -> None:
        super().check(head, process)
        if not isinstance(process, MixtureProcess) or not process.homogeneous:
            raise ValueError(
                "DiscreteFlowMatching is for paths that mix data with one distribution (AbsorbingProcess, "
                f"UniformProcess, HybridProcess), got {type(process).__name__}"
            )
