"""One step back in time of a noisy sequence, each token for itself: from the noise at alpha_t to less, at alpha_s.

With the cavity c the step is Bayes' rule, averaged over the clean id:
`p(x_s = y | x_t = x) ~ q_s(y) q(x_t = x | x_s = y)` with `q_s = sum over x_0 of c(x_0) q(. | x_0)` (Austin et al.,
D3PM, 2021, eq. 4; Schiff et al., UDLM, 2024). Scores give it from ratios of p_t (Lou et al., SEDD, 2024, section 4.2).
A step is given as the probability of leaving the state, and where to: the two are drawn apart, so that rare jumps and
rare ids both keep their probability.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from discrete_lit.diffusion.processes import ForwardProcess, MixtureProcess, is_absorbing


@dataclass(frozen=True)
class Jumps:
    """Independent jumps of the tokens of a batch."""

    probability: Tensor
    """`(B, N)` float64: of leaving the state."""
    targets: Tensor
    """Unnormalised log-probabilities of where to, `(B, N, S)` with -inf at the state itself; `(B, N, K)` where only
    masked tokens leave."""

    def distribution(self, states: Tensor, size: int) -> Tensor:
        """The law of the next state `(B, N, size)` float64; `states (B, N)` are left."""
        where_to = self.targets.double().softmax(dim=-1).nan_to_num(0.0)
        law = where_to.new_zeros((*states.shape, size))
        law[..., : where_to.shape[-1]] = self.probability[..., None] * where_to
        return law.scatter_add(-1, states[..., None], (1 - self.probability)[..., None])

    def most_probable(self, states: Tensor) -> Tensor:
        """The most probable next state `(B, N)`."""
        best = self.targets.argmax(dim=-1)
        share = self.targets.log_softmax(dim=-1).gather(-1, best[..., None])[..., 0].exp()
        return torch.where(self.probability * share > 1 - self.probability, best, states)

    def log_probability(self, targets: Tensor) -> Tensor:
        """`(B, N)`, that of each of `targets (B, N)` where its token leaves its state; nan where it cannot be meant."""
        known = targets < self.targets.shape[-1]
        log_share = self.targets.log_softmax(dim=-1).gather(-1, torch.where(known, targets, 0)[..., None])[..., 0]
        return log_share.double().masked_fill(~known, torch.nan)


def unmask_probability(alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
    """Of a masked token of an absorbing process between two levels: `(m_t - m_s) / m_t`."""
    return (alpha_s - alpha_t) / (1 - alpha_t)


def jumps_from_clean(clean: Tensor, states: Tensor, process: ForwardProcess, alpha_s: Tensor, alpha_t: Tensor) -> Jumps:
    """The exact step given each token's cavity.

    Args:
        clean: `(B, N, K)` log-probabilities.
        states: x_t `(B, N)`.
        process: the noise.
        alpha_s: `(B, 1)` float64 of the step's end, above 0.
        alpha_t: of its start, below alpha_s.
    """
    if is_absorbing(process):
        masked = states == process.mask_id
        return Jumps(torch.where(masked, unmask_probability(alpha_s, alpha_t), 0.0), clean)
    ratio = alpha_t / alpha_s
    marginal = process.marginal(clean.exp(), alpha_s)  # (B, N, S)
    if not isinstance(process, MixtureProcess):
        return jumps_from_weights(marginal * process.likelihood(states, ratio), states)
    # Whatever state was left, noise reaches x with the same probability: where to is decided by the marginal alone.
    own = marginal.gather(-1, states[..., None])[..., 0].double()
    elsewhere = marginal.scatter(-1, states[..., None], 0.0)
    reached = (alpha_s - alpha_t) / alpha_s * process.prior_at(states)
    leave, stay = reached * elsewhere.sum(dim=-1, dtype=torch.float64), (ratio + reached) * own
    return Jumps(_share(leave, stay), elsewhere.log())


def jumps_from_weights(weights: Tensor, states: Tensor) -> Jumps:
    """Of unnormalised probabilities `(B, N, S)` of the next state; what is negative, as Euler's can be, counts as 0."""
    weights = weights.double().clamp(min=0)
    own = weights.gather(-1, states[..., None])[..., 0]
    elsewhere = weights.scatter(-1, states[..., None], 0.0)
    return Jumps(_share(elsewhere.sum(dim=-1), own), elsewhere.log())


def analytic_weights(score: Tensor, states: Tensor, process: ForwardProcess, ratio: Tensor) -> Tensor:
    """SEDD's Tweedie step (eq. 19): the scores at the earlier level, times the kernel from there.

    The staggered score is `process.pull(score, ratio)`, the kernel's column `process.likelihood(states, ratio)`.

    Args:
        score: `(B, N, S)`, p_t(y) / p_t(x), 1 at the state itself.
        states: x `(B, N)`.
        process: the noise.
        ratio: `(B, 1)` float64, alpha_t / alpha_s = exp(-the noise between).

    Returns:
        `(B, N, S)`, which sum to 1 but may be negative where no law has such scores.
    """
    return process.pull(score, ratio) * process.likelihood(states, ratio)


def denoise_weights(score: Tensor, states: Tensor, process: ForwardProcess, alpha: Tensor) -> Tensor:
    """`analytic_weights` of the step that takes away all noise, of the K ids: SEDD's last one; `(B, N, K)`.

    They may all be negative where no law has such scores and masks are not the only noise.
    """
    return analytic_weights(score, states, process, alpha)[..., : process.vocab_size]


def reverse_rates(score: Tensor, states: Tensor, process: ForwardProcess) -> Tensor:
    """`(B, N, S)`: the rate Q(y, x) s_y of each jump back from x to y for a unit of noise (Lou et al., eq. 3).

    At x itself stands minus their sum.
    """
    rates = process.rates_into(states) * score
    return rates.scatter(-1, states[..., None], -rates.sum(dim=-1, keepdim=True))


def euler_weights(score: Tensor, states: Tensor, process: ForwardProcess, noise: Tensor) -> Tensor:
    """`(B, N, S)`: stay, but for `reverse_rates` times the `noise (B, 1)` of the step, dt d sigma / dt.

    The weight of staying is negative where the step is too long.
    """
    stay = torch.nn.functional.one_hot(states, process.states)
    return stay + noise[..., None] * reverse_rates(score, states, process)


def _share(leave: Tensor, stay: Tensor) -> Tensor:
    return torch.where(leave > 0, leave / (leave + stay), 0.0)
