"""Forward processes: how the tokens of an image are corrupted, each independently of the others.

Every process here is a continuous-time Markov chain with one rate matrix Q, sped up or slowed down by a schedule: after
a total noise of sigma a token follows the row of `exp(sigma Q)` that its clean id selects. A level of noise is given as
`alpha = exp(-sigma)`, in (0, 1], and what lies between two levels s < t by `alpha_t / alpha_s`. Nothing with one entry
for each time and pair of ids is ever formed.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ForwardProcess(ABC):
    """q(x_t | x_0) of one token, its S states being the K ids, and where there is one the mask id K.

    Distributions are probabilities over the last dimension; `alpha` broadcasts against what stands before it, for
    instance `(B, 1)` against `(B, N, K)`. Results have the distributions' precision, float64 where only `alpha` tells.

    Args:
        vocab_size: K.
        masks: whether the mask id is a state.
    """

    needs_order: bool = False
    """Whether ids that are near one another must mean similar things."""

    def __init__(self, vocab_size: int, masks: bool) -> None:
        if vocab_size < 2:
            raise ValueError(f"a process needs a vocabulary of at least 2 ids, got {vocab_size}")
        self.vocab_size = vocab_size
        self.masks = masks
        self.states = vocab_size + int(masks)

    @property
    def mask_id(self) -> int | None:
        """The id of the mask state, K; None for a process without."""
        return self.vocab_size if self.masks else None

    @abstractmethod
    def prior(self) -> Tensor:
        """`(S,)` float64, the stationary distribution, which all noise leads to."""

    @abstractmethod
    def push(self, distribution: Tensor, alpha: Tensor) -> Tensor:
        """`distribution (..., S)` after more noise: `distribution @ exp(sigma Q)`, `(..., S)`."""

    @abstractmethod
    def likelihood(self, states: Tensor, alpha: Tensor) -> Tensor:
        """`(..., S)`: the probability of reaching `states (...)` from each state: a column of `exp(sigma Q)`."""

    @abstractmethod
    def pull(self, values: Tensor, alpha: Tensor) -> Tensor:
        """`values (..., S) @ exp(-sigma Q)`: `push` undone, for ratios at one level to become those at an earlier."""

    @abstractmethod
    def rates_into(self, states: Tensor) -> Tensor:
        """`(..., S)` float64: the rate Q(y, x) of jumping from each state y into `states` x; 0 for y = x."""

    @abstractmethod
    def rates_from(self, states: Tensor) -> Tensor:
        """`(..., S)` float64: the rate Q(x, y) of jumping from `states` x to each state y; 0 for y = x."""

    @abstractmethod
    def corrupt(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor) -> Tensor:
        """Draw `x_t (B, N)` given clean `tokens (B, N)`.

        Args:
            tokens: int64 ids.
            alpha: `(B, 1)` float64.
            uniforms: `(B, N)` float64 in (0, 1), one for each token.
        """

    @abstractmethod
    def draw_prior(self, uniforms: Tensor) -> Tensor:
        """Independent states of the stationary distribution, int64 of the shape of `uniforms` (float64 in (0, 1))."""

    def widen(self, distribution: Tensor) -> Tensor:
        """A distribution over the K ids as one over the states: nothing is clean and masked."""
        if not self.masks:
            return distribution
        return torch.cat((distribution, torch.zeros_like(distribution[..., :1])), dim=-1)

    def marginal(self, clean: Tensor, alpha: Tensor) -> Tensor:
        """q_t of tokens whose clean id follows `clean (..., K)`: `(..., S)`."""
        return self.push(self.widen(clean), alpha)

    def ratios(self, tokens: Tensor, states: Tensor, alpha: Tensor) -> Tensor:
        """q_t(y | x_0) / q_t(x | x_0) for all y, `(..., S)`, of clean `tokens (...)` at `states (...)` x."""
        clean = torch.nn.functional.one_hot(tokens, self.vocab_size).double()
        marginal = self.marginal(clean, alpha)
        return marginal / marginal.gather(-1, states[..., None])

    def prior_divergence(self, tokens: Tensor, alpha: Tensor) -> Tensor:
        """KL(q_t(. | x_0) | prior), nats of each of `tokens (B, N)`, float64: what a bound pays where noise stops."""
        marginal = self.marginal(torch.nn.functional.one_hot(tokens, self.vocab_size).double(), alpha)
        return (torch.xlogy(marginal, marginal) - torch.xlogy(marginal, self.prior().to(marginal))).sum(dim=-1)

    def matrix(self, alpha: Tensor) -> Tensor:
        """The kernel `exp(sigma Q)`, `(..., S, S)` float64; a row for each state that noise is added to."""
        return self.push(torch.eye(self.states, dtype=torch.float64, device=alpha.device), alpha[..., None])
