"""Forward processes q(x_t | x_0): how noise corrupts tokens, each independently of the others.

- `AbsorbingProcess`: masks; absorbing D3PM (Austin et al., 2021), SEDD absorb (Lou et al., 2024), MDLM, MD4.
- `UniformProcess`: uniform random ids; uniform D3PM, SEDD uniform, UDLM (Schiff et al., 2024), Duo.
- `HybridProcess`: masks and uniform ids mixed, in the same proportion at all times.
- `MixtureProcess`: the three in one formula, `q(x_t | x_0) = alpha x_0 + (1 - alpha) pi`.
- `GIDDProcess` (`gidd.py`): the same formula with a pi that moves from uniform ids to masks (von Rütte et al., 2025).
- `DiscretizedGaussianProcess` (`dense_processes.py`): neighbours in an order of the ids, such as grey levels; D3PM's
  discretized Gaussian. `DenseProcess`, there too: any symmetric matrix of rates.
- `MaskAndReplaceProcess` (`mask_and_replace.py`): VQ-Diffusion's noise, whose masks stay masks.

Every process is a continuous-time Markov chain, which a schedule (`schedules.py`) speeds up or slows down: after a
total noise of sigma, a token follows that row of the kernel which its clean id selects. A level of noise is given as
`alpha = exp(-sigma)`, in (0, 1]. But for `GIDDProcess`, a chain has one rate matrix Q: its kernel is `exp(sigma Q)`,
and the noise between two times s < t is given by `alpha_t / alpha_s`. D3PM's products of step matrices are these
kernels; none is stored for each time and pair of ids.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


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
