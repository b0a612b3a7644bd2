"""Forward processes: how the tokens of an image are corrupted, each independently of the others.

Every process here is a continuous-time Markov chain with one rate matrix Q, sped up or slowed down by a schedule: after
a total noise of sigma a token follows the row of `exp(sigma Q)` that its clean id selects. A level of noise is given as
`alpha = exp(-sigma)`, in (0, 1], and what lies between two levels s < t by `alpha_t / alpha_s`. Nothing with one entry
for each time and pair of ids is ever formed.

Processes that replace a token by a draw of one fixed distribution: absorbing, uniform, and a mix of the two.

Processes with any symmetric rate matrix over an ordered vocabulary, as D3PM's discretised Gaussian.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


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


class MixtureProcess(ForwardProcess):
    """q_t(. | x_0) = alpha x_0 + (1 - alpha) pi (Austin et al., "D3PM", 2021, appendix A.2; von Rütte et al., "GIDD",
    2025, with a pi that does not change), the chain of the rate matrix `Q = 1 pi^T - I`.

    Args:
        vocab_size: K.
        mask_fraction: of the mask in pi; the ids share the rest equally.

    Raises:
        ValueError: a share out of [0, 1].
    """

    def __init__(self, vocab_size: int, mask_fraction: float) -> None:
        if not 0 <= mask_fraction <= 1:
            raise ValueError(f"mask_fraction must lie in [0, 1], got {mask_fraction}")
        super().__init__(vocab_size, masks=mask_fraction > 0)
        self.mask_fraction = mask_fraction
        self.id_share = (1 - mask_fraction) / vocab_size

    def prior(self) -> Tensor:
        prior = torch.full((self.states,), self.id_share, dtype=torch.float64)
        if self.masks:
            prior[-1] = self.mask_fraction
        return prior

    def push(self, distribution: Tensor, alpha: Tensor) -> Tensor:
        # The difference is taken in float64: next to clean data float32 has no digit of it.
        kept, replaced = (part[..., None].to(distribution.dtype) for part in (alpha, 1 - alpha.double()))
        return kept * distribution + replaced * self._prior_like(distribution) * distribution.sum(-1, keepdim=True)

    def pull(self, values: Tensor, alpha: Tensor) -> Tensor:
        # exp(-sigma Q) = I / alpha + (1 - 1 / alpha) 1 pi^T, since Q^2 = -Q.
        inverse = 1 / alpha.double()[..., None]
        kept, removed = inverse.to(values.dtype), (1 - inverse).to(values.dtype)
        return kept * values + removed * self._prior_like(values) * values.sum(-1, keepdim=True)

    def likelihood(self, states: Tensor, alpha: Tensor) -> Tensor:
        alpha = alpha.double()[..., None]
        same = torch.nn.functional.one_hot(states, self.states)
        return alpha * same + (1 - alpha) * self.prior_at(states)[..., None]

    def prior_at(self, states: Tensor) -> Tensor:
        """pi of each of `states (...)`, float64."""
        ids = torch.full_like(states, self.id_share, dtype=torch.float64)
        return ids.masked_fill(states == self.vocab_size, self.mask_fraction)

    def rates_into(self, states: Tensor) -> Tensor:
        others = 1 - torch.nn.functional.one_hot(states, self.states)
        return self.prior_at(states)[..., None] * others

    def prior_divergence(self, tokens: Tensor, alpha: Tensor) -> Tensor:
        # Every state but x_0 has the prior times 1 - alpha.
        prior, noise = self.prior_at(tokens), 1 - alpha.double()
        of_clean = alpha + noise * prior
        return torch.xlogy(of_clean, of_clean) - torch.xlogy(of_clean, prior) + torch.xlogy(noise, noise) * (1 - prior)

    def rates_from(self, states: Tensor) -> Tensor:
        others = 1 - torch.nn.functional.one_hot(states, self.states)
        return self.prior().to(states.device) * others

    def corrupt(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor) -> Tensor:
        replaced = uniforms >= alpha
        # Given that it is at least alpha, what a uniform number exceeds it by is uniform again.
        share = ((uniforms - alpha) / (1 - alpha)).clamp(0, 1)
        return torch.where(replaced, self.draw_prior(share), tokens)

    def draw_prior(self, uniforms: Tensor) -> Tensor:
        ids = torch.full_like(uniforms, self.vocab_size, dtype=torch.int64)
        if self.mask_fraction == 1:
            return ids
        rest = (uniforms - self.mask_fraction) / (1 - self.mask_fraction)
        drawn = (rest * self.vocab_size).long().clamp(0, self.vocab_size - 1)
        return torch.where(uniforms < self.mask_fraction, ids, drawn)

    def _prior_like(self, distribution: Tensor) -> Tensor:
        prior = distribution.new_full((self.states,), self.id_share)
        if self.masks:
            prior[-1] = self.mask_fraction
        return prior


class AbsorbingProcess(MixtureProcess):
    """A token becomes the mask and stays it: q_t = alpha x_0 + (1 - alpha) mask.

    Args:
        vocab_size: K.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, mask_fraction=1.0)


class UniformProcess(MixtureProcess):
    """A token jumps to an id drawn uniformly, its own included: q_t = alpha x_0 + (1 - alpha) / K.

    Args:
        vocab_size: K.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, mask_fraction=0.0)


class HybridProcess(MixtureProcess):
    """A token is masked or jumps to an id drawn uniformly.

    Args:
        vocab_size: K.
        mask_fraction: of the mask, in (0, 1).

    Raises:
        ValueError: a share that leaves one of the two out.
    """

    def __init__(self, vocab_size: int, mask_fraction: float = 0.8) -> None:
        if not 0 < mask_fraction < 1:
            raise ValueError(
                f"mask_fraction must lie in (0, 1), got {mask_fraction}; 1 is AbsorbingProcess, 0 UniformProcess"
            )
        super().__init__(vocab_size, mask_fraction)


LARGEST_VOCABULARY = 1024


# Total noise after which nothing is left of a token.
_ENDLESS = 1e6


# Kernels of so many entries are formed at once: 32 MB of float64.
_ENTRIES_AT_ONCE = 2**22


class DenseProcess(ForwardProcess):
    """The chain of a symmetric rate matrix, by its eigenvectors: `exp(sigma Q) = U exp(sigma lambda) U^T`.

    Args:
        rates: `(K, K)`, symmetric with rows that sum to 0 and nothing negative beside the diagonal; K at most 1,024.

    Raises:
        ValueError: a matrix that is none of rates, or a vocabulary above the limit.
    """

    def __init__(self, rates: Tensor) -> None:
        rates = rates.double()
        size = len(rates)
        if size > LARGEST_VOCABULARY:
            raise ValueError(
                f"a dense process has kernels of K x K entries, for at most {LARGEST_VOCABULARY} ids, got {size}: use "
                "AbsorbingProcess or UniformProcess"
            )
        beside = rates - rates.diagonal().diag()
        if rates.shape != (size, size) or not torch.allclose(rates, rates.T) or bool((beside < 0).any()):
            raise ValueError("rates must be a symmetric matrix without negative entries beside the diagonal")
        if not torch.allclose(rates.sum(dim=1), torch.zeros(size, dtype=torch.float64), atol=1e-9):
            raise ValueError("the rows of rates must sum to 0")
        super().__init__(size, masks=False)
        self.rates = rates
        eigenvalues, self.eigenvectors = torch.linalg.eigh(rates)
        # The largest is 0 but for rounding, which endless noise would make infinite.
        self.eigenvalues = eigenvalues.clamp(max=0)
        self._copies: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def prior(self) -> Tensor:
        return torch.full((self.states,), 1 / self.states, dtype=torch.float64)

    def push(self, distribution: Tensor, alpha: Tensor) -> Tensor:
        return self._apply(distribution, -alpha.double().log()).clamp(min=0)

    def pull(self, values: Tensor, alpha: Tensor) -> Tensor:
        return self._apply(values, alpha.double().log())

    def likelihood(self, states: Tensor, alpha: Tensor) -> Tensor:
        # The kernel is symmetric: its column is its row.
        return self.push(torch.nn.functional.one_hot(states, self.states).double(), alpha)

    def rates_into(self, states: Tensor) -> Tensor:
        return self._on(states.device)[0][states]

    def rates_from(self, states: Tensor) -> Tensor:
        # Rates are symmetric.
        return self.rates_into(states)

    def corrupt(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor) -> Tensor:
        count = max(1, _ENTRIES_AT_ONCE // (tokens.shape[1] * self.states))  # sequences
        parts = (part.split(count) for part in (tokens, alpha, uniforms))
        return torch.cat([self._draw(*part) for part in zip(*parts, strict=True)])

    def draw_prior(self, uniforms: Tensor) -> Tensor:
        return (uniforms * self.states).long().clamp(max=self.states - 1)

    def _draw(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor) -> Tensor:
        cumulative = self.likelihood(tokens, alpha).cumsum(dim=-1)
        below = cumulative <= uniforms[..., None] * cumulative[..., -1:]
        return below.sum(dim=-1).clamp(max=self.states - 1)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rates without their diagonal, eigenvalues and eigenvectors on a device; they are copied there once."""
        if device not in self._copies:
            with torch.inference_mode(False):  # validation may come before training
                parts = self.rates - self.rates.diagonal().diag(), self.eigenvalues, self.eigenvectors
                copies = parts[0].to(device), parts[1].to(device), parts[2].to(device)
            if isinstance(copies[0], FakeTensor):
                return copies  # without data, while operations are counted: not to be kept
            self._copies[device] = copies
        return self._copies[device]

    def _apply(self, values: Tensor, sigma: Tensor) -> Tensor:
        """`values (..., K) @ exp(sigma Q)`."""
        _, roots, vectors = self._on(values.device)
        scaled = (values.double() @ vectors) * torch.exp(sigma.clamp(max=_ENDLESS)[..., None] * roots)
        return (scaled @ vectors.T).to(values.dtype)


class DiscretizedGaussianProcess(DenseProcess):
    """D3PM's discretised Gaussian over ids in their order, grey levels for instance (Austin et al., 2021, eq. 8).

    Jumps come at rate 1 and follow the paper's matrix, off its diagonal
    `exp(-4 (i - j)^2 / ((K - 1)^2 beta)) / sum_n exp(-4 n^2 / ((K - 1)^2 beta))`, n from -(K - 1) to K - 1. The paper
    widens beta from step to step, whose products have no closed form; here beta stays, and the jumps add up.

    Args:
        vocab_size: K, at most 1,024.
        beta: squared width of a jump, > 0, in units of half the range of the ids.

    Raises:
        ValueError: a beta that is not positive, or a vocabulary above the limit.
    """

    needs_order = True

    def __init__(self, vocab_size: int, beta: float = 0.02) -> None:
        if beta <= 0:
            raise ValueError(f"beta must be > 0, got {beta}")
        if vocab_size > LARGEST_VOCABULARY:
            raise ValueError(
                f"DiscretizedGaussianProcess is for at most {LARGEST_VOCABULARY} ids in an order that means something "
                f"(grey levels), got {vocab_size}"
            )
        self.transition = gaussian_transition(vocab_size, beta)
        super().__init__(self.transition - torch.eye(vocab_size, dtype=torch.float64))


def gaussian_transition(size: int, beta: float) -> Tensor:
    """`(K, K)` float64, one step of D3PM's discretised Gaussian: doubly stochastic."""
    ids = torch.arange(size, dtype=torch.float64)
    distances = torch.arange(-(size - 1), size, dtype=torch.float64)
    scale = -4 / ((size - 1) ** 2 * beta)
    matrix = torch.exp(scale * (ids[:, None] - ids) ** 2) / torch.exp(scale * distances**2).sum()
    matrix.fill_diagonal_(0)
    return matrix + (1 - matrix.sum(dim=1)).diag()


def is_absorbing(process: ForwardProcess) -> bool:
    """Whether noise only masks."""
    return isinstance(process, MixtureProcess) and process.mask_fraction == 1
