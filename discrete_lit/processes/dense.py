"""Processes with any symmetric rate matrix over an ordered vocabulary, as D3PM's discretised Gaussian."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from discrete_lit.processes.forward import ForwardProcess

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


class GaussianProcess(DenseProcess):
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
                f"GaussianProcess is for at most {LARGEST_VOCABULARY} ids in an order that means something (grey "
                f"levels), got {vocab_size}"
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
