"""Forward processes q(x_t | x_0): how noise corrupts tokens, each independently of the others.

- `AbsorbingProcess`: masks; absorbing D3PM (Austin et al., 2021), SEDD absorb (Lou et al., 2024), MDLM, MD4.
- `UniformProcess`: uniform random ids; uniform D3PM, SEDD uniform, UDLM (Schiff et al., 2024), Duo.
- `HybridProcess`: masks and uniform ids mixed, in the same proportion at all times.
- `MixtureProcess`: the three in one formula, `q(x_t | x_0) = alpha x_0 + (1 - alpha) pi`.
- `GIDDProcess` (`gidd.py`): the same formula with a pi that moves from uniform ids to masks (von Rütte et al., 2025).
- `DiscretizedGaussianProcess`: neighbours in an order of the ids, such as grey levels; D3PM's discretized Gaussian.
- `DenseProcess`: any symmetric matrix of rates.
- `MaskAndReplaceProcess` (`mask_and_replace.py`): VQ-Diffusion's noise, whose masks stay masks.

Every process is a continuous-time Markov chain, which a schedule (`schedules.py`) speeds up or slows down: after a
total noise of sigma, a token follows that row of the kernel which its clean id selects. A level of noise is given as
`alpha = exp(-sigma)`, in (0, 1]. But for `GIDDProcess`, a chain has one rate matrix Q: its kernel is `exp(sigma Q)`,
and the noise between two times s < t is given by `alpha_t / alpha_s`. D3PM's products of step matrices are these
kernels; none is stored for each time and pair of ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import ceil, exp, lgamma, log, log2

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from discrete_lit.core.synchronisation import copying_tables, has_data, host_may_wait


class ForwardProcess(ABC):
    """The law q(x_t | x_0) of one token over S states: the K ids and, if the process masks, the mask id K.

    Distributions are probabilities over the last dimension. `alpha` broadcasts against the dimensions before it: `(B,
    1)` against `(B, N, K)`, for instance. Results have the precision of the distribution that is given, and float64
    where none is. Every method that takes `alpha` but `pull` also takes `noise`, 1 - alpha with all its digits, which
    `alpha` has lost next to clean data: below 1e-16 it tells no noise from none. It is computed where it is not given.

    Args:
        vocab_size: K, at least 2.
        masks: whether the mask id is a state.

    Raises:
        ValueError: the vocabulary has fewer than 2 ids.
    """

    needs_order: bool = False
    """Whether ids next to one another must mean similar things."""
    speed: float = 1.0
    """How often a unit of the total noise replaces a token, on average over the ids."""
    homogeneous: bool = True
    """Whether the rates are the same at every level: the noise between two levels is then that up to their ratio."""

    def __init__(self, vocab_size: int, masks: bool) -> None:
        if vocab_size < 2:
            raise ValueError(f"a process needs a vocabulary of at least 2 ids, got {vocab_size}")
        self.vocab_size = vocab_size
        self.masks = masks
        self.states = vocab_size + int(masks)

    @property
    def mask_id(self) -> int | None:
        """The id of the mask state, K; None if the process has none."""
        return self.vocab_size if self.masks else None

    @abstractmethod
    def prior(self) -> Tensor:
        """Return the stationary distribution pi, where all noise ends: `(S,)` float64."""

    @abstractmethod
    def draw_prior(self, uniforms: Tensor) -> Tensor:
        """Draw states from the stationary distribution, int64 in the shape of `uniforms` (float64 in (0, 1))."""

    @abstractmethod
    def corrupt(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t `(B, N)` given clean tokens.

        Args:
            tokens: x_0, `(B, N)` int64 in [0, K).
            alpha: `(B, 1)` float64.
            uniforms: `(B, N)` float64 in (0, 1), which decide the draw.
            noise: 1 - alpha.
        """

    @abstractmethod
    def replace(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t as `corrupt` does, but draw tokens anew where the uniform numbers are below `replaced`.

        However rarely that is, next to 0 float64 has the digits to tell all ids apart, which next to 1 it has not.
        """

    @abstractmethod
    def replaced(self, tokens: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the probability `(B, N)` that `replace` draws a token anew."""

    @abstractmethod
    def push(self, distribution: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """Add noise to `distribution (..., S)`: `distribution @ exp(sigma Q)`, `(..., S)`."""

    @abstractmethod
    def pull(self, values: Tensor, alpha: Tensor) -> Tensor:
        """Undo `push`: `values (..., S) @ exp(-sigma Q)`; it turns ratios at one level into those at an earlier one."""

    @abstractmethod
    def likelihood(self, states: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the probability `(..., S)` of reaching `states (...)` from each state, a column of `exp(sigma Q)`."""

    def step_likelihood(
        self,
        states: Tensor,
        alpha_s: Tensor,
        alpha_t: Tensor,
        *,
        noise_s: Tensor | None = None,
        noise_t: Tensor | None = None,
    ) -> Tensor:
        """Return the probability `(..., S)` that the noise from s to t > s takes each state to `states (...)`."""
        return self.likelihood(states, alpha_t / alpha_s)

    @abstractmethod
    def rates_into(self, states: Tensor, alpha: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Return the rate Q(y, x) of jumps from each state y into `states (...)` x, 0 for y = x: `(..., S)` float64.

        Only a process that is not `homogeneous` needs to be told the level.
        """

    @abstractmethod
    def rates_from(self, states: Tensor, alpha: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Return the rate Q(x, y) of jumps from `states (...)` x to each state y, 0 for y = x: `(..., S)` float64.

        Only a process that is not `homogeneous` needs to be told the level.
        """

    def widen(self, distribution: Tensor) -> Tensor:
        """Turn a distribution over the K ids into one over the S states, of which the mask has probability 0."""
        if not self.masks:
            return distribution
        return torch.cat((distribution, torch.zeros_like(distribution[..., :1])), dim=-1)

    def marginal(self, clean: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the law `(..., S)` of a noisy token whose clean id follows `clean (..., K)`."""
        return self.push(self.widen(clean), alpha, noise)

    def marginals(
        self, tokens: Tensor, clean: Tensor, alpha: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return two laws of a noisy token: given its clean id, `tokens (...)`, and if that follows `clean (..., K)`.

        Each is `(..., S)`, in the precision of `clean`.
        """
        given = torch.nn.functional.one_hot(tokens, self.vocab_size).to(clean.dtype)
        return self.marginal(given, alpha, noise), self.marginal(clean, alpha, noise)

    def ratios(self, tokens: Tensor, states: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return q(y | x_0) / q(x | x_0) for all states y, `(..., S)`, of clean `tokens (...)` at `states (...)` x."""
        clean = torch.nn.functional.one_hot(tokens, self.vocab_size).double()
        marginal = self.marginal(clean, alpha, noise)
        return marginal / marginal.gather(-1, states[..., None])

    def prior_divergence(self, tokens: Tensor, alpha: Tensor) -> Tensor:
        """Return KL(q(x_t | x_0) || pi) of `tokens (B, N)`, nats `(B, N)` float64: a bound's prior term."""
        marginal = self.marginal(torch.nn.functional.one_hot(tokens, self.vocab_size).double(), alpha)
        return (torch.xlogy(marginal, marginal) - torch.xlogy(marginal, self.prior().to(marginal))).sum(dim=-1)

    def matrix(self, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the kernel `exp(sigma Q)`, `(..., S, S)` float64; row x is the law of a token that started at x."""
        started = torch.eye(self.states, dtype=torch.float64, device=alpha.device)
        return self.push(started, alpha[..., None], None if noise is None else noise[..., None])


class MixtureProcess(ForwardProcess):
    """The process `q(x_t | x_0) = alpha x_0 + (1 - alpha) pi`: a token is kept, or replaced by a draw from pi.

    It is the chain of the rate matrix `Q = 1 pi^T - I` (Austin et al., "D3PM", 2021, appendix A.2). All formulas are
    written with the probabilities that noise gives each id and the mask, `noise_masses`, `step_masses` and
    `rate_masses`: a subclass whose pi changes with the level overrides these three and `mask_share`.

    Args:
        vocab_size: K.
        mask_fraction: probability of the mask in pi, in [0, 1]; the K ids have the rest in equal parts.

    Raises:
        ValueError: the fraction is out of [0, 1].
    """

    def __init__(self, vocab_size: int, mask_fraction: float) -> None:
        if not 0 <= mask_fraction <= 1:
            raise ValueError(f"mask_fraction must lie in [0, 1], got {mask_fraction}")
        super().__init__(vocab_size, masks=mask_fraction > 0)
        self.mask_fraction = mask_fraction
        self.id_probability = (1 - mask_fraction) / vocab_size

    def prior(self) -> Tensor:
        prior = torch.full((self.states,), self.id_probability, dtype=torch.float64)
        if self.masks:
            prior[-1] = self.mask_fraction
        return prior

    def prior_at(self, states: Tensor) -> Tensor:
        """Return the stationary pi at `states (...)`, float64."""
        ids = torch.full_like(states, self.id_probability, dtype=torch.float64)
        return ids.masked_fill(states == self.vocab_size, self.mask_fraction)

    # What noise alone puts on each id and on the mask; float64 in the shape of the levels.

    def mask_share(self, alpha: Tensor, noise: Tensor | None = None) -> Tensor | float:
        """Return the share of the mask in the noise up to a level, in [0, 1]."""
        return self.mask_fraction

    def noise_masses(self, alpha: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the probabilities, at a level, that noise has put a token on a given id, and on the mask."""
        noise = noise_of(alpha, noise)
        return noise * self.id_probability, noise * self.mask_fraction

    def step_masses(
        self, alpha_s: Tensor, alpha_t: Tensor, *, noise_s: Tensor | None = None, noise_t: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the probabilities that the noise from s to t > s puts a token on a given id, and on the mask."""
        added = (alpha_s - alpha_t if noise_s is None or noise_t is None else noise_t - noise_s) / alpha_s
        return added * self.id_probability, added * self.mask_fraction

    def rate_masses(self, alpha: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the rates, for a unit of noise at a level, at which tokens are put on a given id, and on the mask."""
        like = torch.ones_like(alpha, dtype=torch.float64)
        return like * self.id_probability, like * self.mask_fraction

    def at(self, states: Tensor, masses: tuple[Tensor, Tensor]) -> Tensor:
        """Return that of two masses, of an id and of the mask, which belongs to `states (...)`."""
        of_id, of_mask = masses
        return torch.where(states == self.vocab_size, of_mask, of_id)

    def over_states(self, masses: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the masses `(..., S)` of all states, of those of an id and of the mask `(...)`."""
        of_id, of_mask = (mass[..., None].to(dtype) for mass in masses)
        ids = of_id.expand(*of_id.shape[:-1], self.vocab_size)
        return torch.cat((ids, of_mask), dim=-1) if self.masks else ids

    def draw_prior(self, uniforms: Tensor) -> Tensor:
        return self._draw_noise(uniforms, self.mask_fraction)

    def _draw_noise(self, uniforms: Tensor, mask_share: Tensor | float) -> Tensor:
        """Draw the mask where a uniform number is below its share, and ids elsewhere."""
        ids = torch.full_like(uniforms, self.vocab_size, dtype=torch.int64)
        if isinstance(mask_share, float) and mask_share == 1:
            return ids
        rest = (uniforms - mask_share) / (1 - mask_share)
        drawn = (rest * self.vocab_size).nan_to_num(0.0).clamp(0, self.vocab_size - 1).long()
        return torch.where(uniforms < mask_share, ids, drawn)

    def corrupt(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.replace(tokens, alpha, 1 - uniforms, noise)

    def replace(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor, noise: Tensor | None = None) -> Tensor:
        share, noise = self.mask_share(alpha, noise), noise_of(alpha, noise)
        # Known to be below the noise, a uniform number is uniform in (0, noise): it decides the draw too.
        return torch.where(uniforms < noise, self._draw_noise(1 - (uniforms / noise).clamp(max=1), share), tokens)

    def replaced(self, tokens: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        return noise_of(alpha, noise).expand(tokens.shape)

    def push(self, distribution: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        # 1 - alpha is taken in float64: next to clean data float32 has no digit of it.
        kept = alpha[..., None].to(distribution.dtype)
        replaced = self.over_states(self.noise_masses(alpha, noise), distribution.dtype)
        return kept * distribution + replaced * distribution.sum(-1, keepdim=True)

    def pull(self, values: Tensor, alpha: Tensor) -> Tensor:
        # The kernel alpha I + 1 m^T, with a sum of 1 - alpha in m, has the inverse (I - 1 m^T) / alpha.
        inverse = (1 / alpha.double())[..., None].to(values.dtype)
        of_id, of_mask = self.noise_masses(alpha)
        removed = self.over_states((of_id / alpha.double(), of_mask / alpha.double()), values.dtype)
        return inverse * values - removed * values.sum(-1, keepdim=True)

    def likelihood(self, states: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        same = equals(states, self.states)
        return alpha.double()[..., None] * same + self.at(states, self.noise_masses(alpha, noise))[..., None]

    def rates_into(self, states: Tensor, alpha: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        others = ~equals(states, self.states)
        return self.at(states, self._rates(states, alpha, noise))[..., None] * others

    def rates_from(self, states: Tensor, alpha: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        others = ~equals(states, self.states)
        return self.over_states(self._rates(states, alpha, noise), torch.float64) * others

    def _rates(self, states: Tensor, alpha: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        if alpha is None:
            assert self.homogeneous, f"the rates of {type(self).__name__} change with the level"
            alpha = torch.ones((), dtype=torch.float64, device=states.device)
        return self.rate_masses(alpha, noise)

    def prior_divergence(self, tokens: Tensor, alpha: Tensor) -> Tensor:
        alpha = alpha.double()
        of_id, of_mask = self.noise_masses(alpha)
        costs = [(alpha + of_id, self.id_probability, 1), (of_id, self.id_probability, self.vocab_size - 1)]
        costs += [(of_mask, self.mask_fraction, 1)] if self.masks else []
        each = (count * _divergence(mass, prior) for mass, prior, count in costs)
        return sum(each, start=torch.zeros_like(alpha)).expand(tokens.shape)


def _divergence(mass: Tensor, prior: float) -> Tensor:
    """Return `mass log(mass / prior)`, infinite where the prior is 0 and the mass is not."""
    return torch.xlogy(mass, mass) - torch.xlogy(mass, torch.full_like(mass, prior))


class AbsorbingProcess(MixtureProcess):
    """The absorbing process of D3PM, SEDD, MDLM and MD4: a token becomes the mask and stays it.

    `q(x_t | x_0) = alpha x_0 + (1 - alpha) mask`.

    Args:
        vocab_size: K.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, mask_fraction=1.0)


class UniformProcess(MixtureProcess):
    """The uniform process of D3PM, SEDD, UDLM and Duo: a token becomes an id drawn uniformly, its own included.

    `q(x_t | x_0) = alpha x_0 + (1 - alpha) / K`.

    Args:
        vocab_size: K.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, mask_fraction=0.0)


class HybridProcess(MixtureProcess):
    """Mixed noise in one proportion: a token is masked, or becomes an id drawn uniformly.

    GIDD's own mixture, whose proportion changes in time, is `GIDDProcess`.

    Args:
        vocab_size: K.
        mask_fraction: probability of the mask in pi, in (0, 1); the K ids have the rest in equal parts.

    Raises:
        ValueError: the fraction leaves out one of the two.
    """

    def __init__(self, vocab_size: int, mask_fraction: float = 0.8) -> None:
        if not 0 < mask_fraction < 1:
            raise ValueError(
                f"mask_fraction must lie in (0, 1), got {mask_fraction}; 1 is AbsorbingProcess, 0 UniformProcess"
            )
        super().__init__(vocab_size, mask_fraction)


def equals(states: Tensor, count: int) -> Tensor:
    """Tell of each of `count` states whether it is the one at `states (...)`: `(..., count)` bool.

    `torch.nn.functional.one_hot` would first look for states out of range, for which the host waits, and fill int64.
    """
    return states[..., None] == torch.arange(count, device=states.device)


def noise_of(alpha: Tensor, noise: Tensor | None) -> Tensor:
    """Return 1 - alpha, float64: as it is given, or computed."""
    return 1 - alpha.double() if noise is None else noise.double()


def total_noise(alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return sigma = -log alpha, float64, with all the digits that `noise`, 1 - alpha, has where it is small."""
    alpha = alpha.double()
    return -alpha.log() if noise is None else torch.where(noise < 0.5, -torch.log1p(-noise.double()), -alpha.log())


def is_absorbing(process: ForwardProcess) -> bool:
    """Tell whether noise masks and does nothing else."""
    return isinstance(process, MixtureProcess) and process.homogeneous and process.mask_fraction == 1


def ends_in_masks(process: ForwardProcess) -> bool:
    """Tell whether noise ends in masks alone: no other state has a part in the prior."""
    return isinstance(process, MixtureProcess) and process.mask_fraction == 1


LARGEST_VOCABULARY = 1024
"""The most ids of a dense process, whose kernels have K x K entries."""


# More total noise than this leaves nothing of a token.
_ENDLESS = 1e6
# Kernels and laws are formed for at most so many entries at once: 32 MB of float64.
_ENTRIES_AT_ONCE = 2**22
# A dense process keeps powers of its matrix with at most so many entries, 256 MB of float64 at 1,024 ids.
_ENTRIES_OF_POWERS = 2**25
# Paths of more jumps than the powers have are left out where their probability is below this.
_LEAST_PATH = 1e-60
# The doublings of the noise that are counted where there is no data to tell: those of sigma = 1 or so.
_USUAL_SQUARINGS = 1


class DenseProcess(ForwardProcess):
    """The chain of a symmetric rate matrix Q.

    Kernels are `exp(sigma Q)` by uniformization (Jensen, 1953), a sum over the number n of jumps, `exp(-x) x^n / n!
    R^n` with `x = sigma q` and `R = I + Q / q`, q the highest rate of leaving a state: first for a small part of the
    noise, which is then doubled by squaring. No number is negative on the way, so that nothing cancels, and every
    probability has nearly all its digits, the smallest too. By eigenvectors, `U exp(sigma lambda) U^T`, those below
    1e-16 would be rounding; they serve `pull` alone, whose results have both signs.

    Args:
        rates: Q, `(K, K)`, symmetric, with rows that sum to 0 and no negative entry beside the diagonal; K <= 1,024.

    Raises:
        ValueError: the matrix is not one of rates, or has more than 1,024 rows.
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
        self.fastest = float(beside.sum(dim=1).max()) or 1.0
        """q, the highest rate of leaving a state; 1 if nothing ever moves."""
        self.speed = float(beside.sum(dim=1).mean()) or 1.0
        eigenvalues, self.eigenvectors = torch.linalg.eigh(rates)
        # The largest eigenvalue is 0. If rounding puts it above, endless noise makes its exponential infinite.
        self.eigenvalues = eigenvalues.clamp(max=0)
        self._copies: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def prior(self) -> Tensor:
        return torch.full((self.states,), 1 / self.states, dtype=torch.float64)

    def draw_prior(self, uniforms: Tensor) -> Tensor:
        return (uniforms * self.states).long().clamp(max=self.states - 1)

    def corrupt(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor, noise: Tensor | None = None) -> Tensor:
        def drawn(ids: Tensor, numbers: Tensor, rows: Tensor) -> Tensor:
            cumulative = rows.cumsum(dim=-1)
            below = cumulative <= numbers[..., None] * cumulative[..., -1:]
            return below.sum(dim=-1).clamp(max=self.states - 1)

        return self._draw(drawn, tokens, total_noise(alpha, noise), uniforms)

    def replace(self, tokens: Tensor, alpha: Tensor, uniforms: Tensor, noise: Tensor | None = None) -> Tensor:
        def drawn(ids: Tensor, numbers: Tensor, rows: Tensor) -> Tensor:
            leaving = rows.scatter(-1, ids[..., None], 0.0).cumsum(dim=-1)
            own = rows.gather(-1, ids[..., None])
            found = (leaving <= numbers[..., None] * (leaving[..., -1:] + own)).sum(dim=-1)
            return torch.where(found < self.states, found, ids)

        return self._draw(drawn, tokens, total_noise(alpha, noise), uniforms)

    def replaced(self, tokens: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        def left(ids: Tensor, kernels: Tensor) -> Tensor:
            own = torch.eye(self.states, dtype=torch.bool, device=ids.device)
            leaving = kernels.masked_fill(own, 0.0).sum(dim=-1) / kernels.sum(dim=-1)
            return leaving.expand(len(ids), -1).gather(1, ids[..., 0])

        return self._by_level(left, total_noise(alpha, noise), tokens[..., None])

    def push(self, distribution: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        def pushed(laws: Tensor, kernels: Tensor) -> Tensor:
            return laws.double() @ kernels

        return self._by_level(pushed, total_noise(alpha, noise), distribution).to(distribution.dtype)

    def pull(self, values: Tensor, alpha: Tensor) -> Tensor:
        _, roots, vectors, _ = self._on(values.device)
        sigma = alpha.double().log()
        scaled = (values.double() @ vectors) * torch.exp(sigma[..., None] * roots)
        return (scaled @ vectors.T).to(values.dtype)

    def likelihood(self, states: Tensor, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        return self._rows(states, total_noise(alpha, noise))

    def marginals(
        self, tokens: Tensor, clean: Tensor, alpha: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        def both(ids: Tensor, laws: Tensor, kernels: Tensor) -> Tensor:
            return torch.stack((_rows_of(kernels, ids[..., 0]), laws.double() @ kernels), dim=-2)

        found = self._by_level(both, total_noise(alpha, noise), tokens[..., None], clean)
        return found[..., 0, :].to(clean.dtype), found[..., 1, :].to(clean.dtype)

    def rates_into(self, states: Tensor, alpha: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        return self._on(states.device)[0][states]

    def rates_from(self, states: Tensor, alpha: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        # The rates are symmetric.
        return self.rates_into(states)

    def _draw(
        self, drawn: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: Tensor, sigma: Tensor, uniforms: Tensor
    ) -> Tensor:
        """Call `drawn(tokens, uniforms, rows of the kernel)` for some sequences at a time."""
        one, levels = sigma.numel() == 1, sigma.expand(len(tokens), 1)
        count = max(1, _ENTRIES_AT_ONCE // (tokens.shape[1] * self.states))  # sequences
        chunks = zip(*(values.split(count) for values in (tokens, uniforms, levels)), strict=True)
        return torch.cat(
            [drawn(ids, numbers, self._rows(ids, sigma if one else level)) for ids, numbers, level in chunks]
        )

    def _rows(self, states: Tensor, sigma: Tensor) -> Tensor:
        """Return the rows of the kernel, which are its columns too, since it is symmetric: `(..., K)`."""
        return self._by_level(lambda ids, kernels: _rows_of(kernels, ids[..., 0]), sigma, states[..., None])

    def _by_level(self, function: Callable[..., Tensor], sigma: Tensor, *values: Tensor) -> Tensor:
        """Call `function(*values (b, n, ...), kernels (b, K, K))` for some levels at a time.

        Args:
            function: returns `(b, n, ...)`; it may be given one kernel for all, `(1, K, K)`.
            sigma: broadcasts against the dimensions of the values but for their last.
            values: `(..., n, k)` of one shape before k.
        """
        shape = torch.broadcast_shapes(values[0].shape[:-1], sigma.shape)
        spread = sigma.ndim > 0 and sigma.shape[-1] != 1
        if spread or not shape:  # one level a place
            one_place = [value.unsqueeze(-2) for value in values]
            return self._by_level(function, sigma[..., None], *one_place).squeeze(len(shape))
        one, sigma = sigma.numel() == 1, sigma.expand(*shape[:-1], 1).reshape(-1)
        values = tuple(value.expand(*shape, -1).reshape(len(sigma), shape[-1], -1) for value in values)
        if one and len(sigma):  # as in a step of a sampler
            found = function(*values, self._kernels(sigma[:1]))
        elif len(sigma) > 1 and host_may_wait(sigma) and bool((sigma == sigma[0]).all()):
            found = function(*values, self._kernels(sigma[:1]))
        else:
            count = max(1, _ENTRIES_AT_ONCE // self.states**2)
            chunks = zip(sigma.split(count), *(value.split(count) for value in values), strict=True)
            found = torch.cat([function(*chunk, self._kernels(levels)) for levels, *chunk in chunks])
        return found.reshape(*shape, *found.shape[2:])

    def _kernels(self, sigma: Tensor) -> Tensor:
        """Return `exp(sigma Q)` of levels `(b,)`, `(b, K, K)` float64.

        The last are kept: a training step needs them twice, to draw the noise and to cost the prediction.
        """
        if not host_may_wait(sigma):
            return self._new_kernels(sigma)
        levels, kernels = self._last or (None, None)
        if levels is None or kernels is None or levels.device != sigma.device or not torch.equal(levels, sigma):
            with torch.inference_mode(False), torch.no_grad():
                kernels = self._new_kernels(sigma.clone())
                self._last = sigma.clone(), kernels
        return kernels

    def _new_kernels(self, sigma: Tensor) -> Tensor:
        powers = self._on(sigma.device)[3]
        count = len(powers) - 1
        numbers = torch.arange(count + 1, dtype=torch.float64, device=sigma.device)
        log_factorials = torch.lgamma(numbers + 1)
        # So little noise that more jumps than there are powers have a probability below `_LEAST_PATH`.
        most = min(1.0, exp((log(_LEAST_PATH) + lgamma(count + 1)) / count))
        jumps = sigma.double().clamp(max=_ENDLESS) * self.fastest
        squarings = torch.log2(jumps / most).ceil().clamp(min=0)
        order = squarings.argsort(descending=True)
        part = (jumps * torch.exp2(-squarings))[order, None]
        weights = torch.exp(torch.xlogy(numbers, part) - part - log_factorials)
        kernels = (weights @ powers.flatten(1)).unflatten(1, powers.shape[1:])
        if not host_may_wait(sigma):
            # As often as any level may need it.
            longest = ceil(log2(max(_ENDLESS * self.fastest / most, 1))) if has_data(sigma) else _USUAL_SQUARINGS
            for number in range(longest):
                kernels = torch.where((squarings[order] > number)[:, None, None], _doubled(kernels), kernels)
            return kernels[order.argsort()]
        # The levels with the most noise stand first, and are doubled the longest.
        for active in squarings.long().bincount().flip(0).cumsum(0).flip(0)[1:].tolist():
            kernels[:active] = _doubled(kernels[:active])
        return kernels[order.argsort()]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rates without diagonal, eigenvalues, eigenvectors and the powers of R on a device.

        They are copied there at the first use.
        """
        if device not in self._copies:
            # Validation may come first, and training cannot use tensors of inference mode.
            with torch.inference_mode(False), copying_tables():
                parts = self.rates - self.rates.diagonal().diag(), self.eigenvalues, self.eigenvectors
                rates, values, vectors = (part.to(device) for part in parts)
                copies = rates, values, vectors, self._powers(rates)
            if isinstance(rates, FakeTensor):
                return copies  # these have no data, as while FLOPs are counted: not to be kept
            self._copies[device] = copies
        return self._copies[device]

    @torch.no_grad()
    def _powers(self, rates: Tensor) -> Tensor:
        """Return R^0, R^1, ..., `(n, K, K)`, of rates without diagonal."""
        count = min(48, max(2, _ENTRIES_OF_POWERS // self.states**2))
        powers = rates.new_zeros(count + 1, self.states, self.states)
        if not has_data(rates):
            return powers
        step = rates / self.fastest
        step = step + (1 - step.sum(dim=1)).clamp(min=0).diag()
        powers[0].fill_diagonal_(1)
        for number in range(count):
            torch.matmul(powers[number], step, out=powers[number + 1])
        return powers


def _doubled(kernels: Tensor) -> Tensor:
    """Return kernels of twice the noise."""
    doubled = kernels @ kernels
    # Rows sum to 1: it keeps the rounding of one doubling out of the next.
    return doubled / doubled.sum(dim=-1, keepdim=True)


def _rows_of(kernels: Tensor, ids: Tensor) -> Tensor:
    """Return the rows `(b, n, K)` of kernels `(b, K, K)`, or of one `(1, K, K)`, at `ids (b, n)`."""
    if len(kernels) == 1:
        return kernels[0][ids]
    return kernels[torch.arange(len(kernels), device=ids.device)[:, None], ids]


class DiscretizedGaussianProcess(DenseProcess):
    """The discretized Gaussian of D3PM: a token jumps to ids near its own in their order, such as grey levels.

    Jumps come at rate 1 and follow the paper's matrix (Austin et al., 2021, eq. 8), which is off its diagonal
    `exp(-4 (i - j)^2 / ((K - 1)^2 beta)) / sum_n exp(-4 n^2 / ((K - 1)^2 beta))`, n from -(K - 1) to K - 1. The paper
    widens beta from step to step, and products of such matrices have no closed form. Here beta stays the same, and
    more noise means more jumps.

    Args:
        vocab_size: K, at most 1,024.
        beta: squared width of a jump, > 0, in units of half the range of the ids.

    Raises:
        ValueError: beta is not positive, or the vocabulary is too large.
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
    """Return one step of D3PM's discretized Gaussian, a doubly stochastic matrix `(K, K)`, float64."""
    ids = torch.arange(size, dtype=torch.float64)
    distances = torch.arange(-(size - 1), size, dtype=torch.float64)
    scale = -4 / ((size - 1) ** 2 * beta)
    matrix = torch.exp(scale * (ids[:, None] - ids) ** 2) / torch.exp(scale * distances**2).sum()
    matrix.fill_diagonal_(0)
    return matrix + (1 - matrix.sum(dim=1)).diag()
