"""One reverse step: the law of x_s given x_t, each token for itself, from the noise at alpha_t to less, at alpha_s.

- Posterior step, of a leave-one-out posterior c (D3PM, MDLM, UDLM): `jumps_from_clean`. It is Bayes' rule averaged over
  the clean id, `p(x_s = y | x_t = x) ~ q_s(y) q(x_t = x | x_s = y)` with `q_s = sum over x_0 of c(x_0) q(x_s | x_0)`
  (Austin et al., D3PM, 2021, eq. 4; Schiff et al., UDLM, 2024).
- Tweedie step, of a score (SEDD's analytic sampler; Lou et al., 2024, eq. 19): `analytic_weights`, and for the last
  step `denoise_weights`.
- Euler step, of a score (SEDD; section 4.2): `euler_weights`, along the rates of the reverse chain, `reverse_rates`,
  which also serve tau-leaping (Campbell et al., 2022).

A step is given as `Jumps`: the probability of leaving the state, and the law of where to. Samplers draw the two apart,
so that rare jumps and rare ids both keep their probability.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from discrete_lit.diffusion.processes import ForwardProcess, MixtureProcess, equals, is_absorbing


@dataclass(frozen=True)
class Jumps:
    """The law of one step of a batch, whose tokens jump independently of one another."""

    probability: Tensor
    """`(B, N)` float64: the probability of leaving the state."""
    targets: Tensor
    """Unnormalised log-probabilities of the next state: `(B, N, S)` with -inf at the state itself, or `(B, N, K)` where
    only masked tokens leave."""

    def distribution(self, states: Tensor, size: int) -> Tensor:
        """Return the law of the next state, `(B, N, size)` float64, of tokens at `states (B, N)`."""
        where_to = self.targets.double().softmax(dim=-1).nan_to_num(0.0)
        law = where_to.new_zeros((*states.shape, size))
        law[..., : where_to.shape[-1]] = self.probability[..., None] * where_to
        return law.scatter_add(-1, states[..., None], (1 - self.probability)[..., None])

    def most_probable(self, states: Tensor) -> Tensor:
        """Return the most probable next state `(B, N)` of tokens at `states (B, N)`."""
        best = self.targets.argmax(dim=-1)
        of_best = self.targets.log_softmax(dim=-1).gather(-1, best[..., None])[..., 0].exp()
        return torch.where(self.probability * of_best > 1 - self.probability, best, states)

    def log_probability(self, targets: Tensor) -> Tensor:
        """Return the log-probability `(B, N)`, float64, that a token which leaves goes to its target.

        Args:
            targets: `(B, N)` int64; nan is returned for those that `self.targets` does not list, such as the mask.
        """
        known = targets < self.targets.shape[-1]
        log_probability = self.targets.log_softmax(dim=-1).gather(-1, torch.where(known, targets, 0)[..., None])[..., 0]
        return log_probability.double().masked_fill(~known, torch.nan)


# The posterior step, from a distribution over clean ids.


def jumps_from_clean(clean: Tensor, states: Tensor, process: ForwardProcess, alpha_s: Tensor, alpha_t: Tensor) -> Jumps:
    """Return the exact step given the leave-one-out posterior of each token.

    Args:
        clean: its log-probabilities `(B, N, K)`.
        states: x_t, `(B, N)` int64.
        process: the noise.
        alpha_s: alpha at the step's end, `(B, 1)` float64, > 0.
        alpha_t: alpha at its start, below alpha_s.
    """
    if is_absorbing(process):
        masked = states == process.mask_id
        return Jumps(torch.where(masked, unmask_probability(alpha_s, alpha_t), 0.0), clean)
    ratio = alpha_t / alpha_s
    marginal = process.marginal(clean.exp(), alpha_s)  # q_s, (B, N, S)
    if not isinstance(process, MixtureProcess):
        return jumps_from_weights(marginal * process.step_likelihood(states, alpha_s, alpha_t), states)
    # From every other state, noise reaches x with the same probability: q_s alone decides where to.
    own = marginal.gather(-1, states[..., None])[..., 0].double()
    elsewhere = marginal.scatter(-1, states[..., None], 0.0)
    reached = process.at(states, process.step_masses(alpha_s, alpha_t))
    leave, stay = reached * elsewhere.sum(dim=-1, dtype=torch.float64), (ratio + reached) * own
    return Jumps(_leaving_probability(leave, stay), elsewhere.log())


def unmask_probability(alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
    """Return the probability `(m_t - m_s) / m_t` that an absorbing process's masked token is unmasked from t to s."""
    return (alpha_s - alpha_t) / (1 - alpha_t)


# The Tweedie and the Euler step, from scores. They give weights of the next state, which `jumps_from_weights` takes.


def analytic_weights(score: Tensor, states: Tensor, process: ForwardProcess, ratio: Tensor) -> Tensor:
    """Return the weights of SEDD's Tweedie step (eq. 19): the scores at the earlier level, times the kernel from there.

    The scores at the earlier level, SEDD's "staggered score", are `process.pull(score, ratio)`; the kernel's column is
    `process.likelihood(states, ratio)`.

    Args:
        score: `(B, N, S)`, p_t(y) / p_t(x), 1 at the state itself.
        states: x, `(B, N)` int64.
        process: the noise.
        ratio: `(B, 1)` float64, alpha_t / alpha_s = exp(-the noise between the two).

    Returns:
        `(B, N, S)`; they sum to 1, but are negative in places if no distribution has such scores.
    """
    return process.pull(score, ratio) * process.likelihood(states, ratio)


def denoise_weights(score: Tensor, states: Tensor, process: ForwardProcess, alpha: Tensor) -> Tensor:
    """Return `analytic_weights` of the K ids `(B, N, K)` for a step that removes all noise, SEDD's last one.

    All of a token's can be negative if no distribution has such scores and masks are not the only noise.
    """
    return analytic_weights(score, states, process, alpha)[..., : process.vocab_size]


def euler_weights(
    score: Tensor, states: Tensor, process: ForwardProcess, noise: Tensor, *, alpha: Tensor | None = None
) -> Tensor:
    """Return the weights `(B, N, S)` of an Euler step: stay, plus `reverse_rates` times the noise of the step.

    The weight of staying is negative where the step is too long.

    Args:
        score: `(B, N, S)`, p_t(y) / p_t(x).
        states: x, `(B, N)` int64.
        process: the noise.
        noise: `(B, 1)` float64, dt sigma'(t).
        alpha: `(B, 1)` float64, the level, where rates change with it.
    """
    return equals(states, process.states) + noise[..., None] * reverse_rates(score, states, process, alpha)


def reverse_rates(score: Tensor, states: Tensor, process: ForwardProcess, alpha: Tensor | None = None) -> Tensor:
    """Return the rate Q(y, x) s_y of each jump back from x to y, for a unit of noise, `(B, N, S)` (SEDD, eq. 3).

    The entry of x itself is minus their sum. The level alpha, `(B, 1)`, is needed where rates change with it.
    """
    rates = process.rates_into(states, alpha) * score
    return rates.scatter(-1, states[..., None], -rates.sum(dim=-1, keepdim=True))


def jumps_from_weights(weights: Tensor, states: Tensor) -> Jumps:
    """Return the step whose next state has the probabilities `weights (B, N, S)`, once negative ones are set to 0.

    They need not be normalised. Euler's weights can be negative.
    """
    weights = weights.double().clamp(min=0)
    own = weights.gather(-1, states[..., None])[..., 0]
    elsewhere = weights.scatter(-1, states[..., None], 0.0)
    return Jumps(_leaving_probability(elsewhere.sum(dim=-1), own), elsewhere.log())


def without_rare(jumps: Jumps, states: Tensor, process: ForwardProcess, least: float) -> Jumps:
    """Return a step without the next states of a probability below `least`, staying included (GIDD's `min_p`).

    The most probable one is kept in any case.

    Args:
        jumps: the step.
        states: x_t, `(B, N)`.
        process: the noise.
        least: in [0, 1).
    """
    law = jumps.distribution(states, process.states)
    kept = law.masked_fill((law < least) & (law < law.amax(dim=-1, keepdim=True)), 0.0)
    own = kept.gather(-1, states[..., None])[..., 0]
    elsewhere = kept.scatter(-1, states[..., None], 0.0)[..., : jumps.targets.shape[-1]]
    return Jumps(_leaving_probability(elsewhere.sum(dim=-1), own), elsewhere.log())


def _leaving_probability(leave: Tensor, stay: Tensor) -> Tensor:
    return torch.where(leave > 0, leave / (leave + stay), 0.0)
