"""Forward processes of a dense matrix of rates, for ids in an order that means something, such as grey levels.

- `DenseProcess`: any symmetric matrix of rates.
- `DiscretizedGaussianProcess`: neighbours in an order of the ids; D3PM's discretized Gaussian (Austin et al., 2021).

What a process is, and how noise is counted, stands in `processes.py`.
"""

from collections.abc import Callable
from math import ceil, exp, lgamma, log, log2

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from discrete_lit.core.synchronisation import copying_tables, has_data, host_may_wait
from discrete_lit.diffusion.processes import ForwardProcess, total_noise

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
