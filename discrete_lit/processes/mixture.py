"""Processes that replace a token by a draw of one fixed distribution: absorbing, uniform, and a mix of the two."""

import torch
from torch import Tensor

from discrete_lit.processes.forward import ForwardProcess


class MixtureProcess(ForwardProcess):
    """q_t(. | x_0) = alpha x_0 + (1 - alpha) pi (Austin et al., "D3PM", 2021, appendix A.2; von Rütte et al., "GIDD",
    2025, with a pi that does not change), the chain of the rate matrix `Q = 1 pi^T - I`.

    Args:
        vocab_size: K.
        mask_share: of the mask in pi; the ids share the rest equally.

    Raises:
        ValueError: a share out of [0, 1].
    """

    def __init__(self, vocab_size: int, mask_share: float) -> None:
        if not 0 <= mask_share <= 1:
            raise ValueError(f"mask_share must lie in [0, 1], got {mask_share}")
        super().__init__(vocab_size, masks=mask_share > 0)
        self.mask_share = mask_share
        self.id_share = (1 - mask_share) / vocab_size

    def prior(self) -> Tensor:
        prior = torch.full((self.states,), self.id_share, dtype=torch.float64)
        if self.masks:
            prior[-1] = self.mask_share
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
        return ids.masked_fill(states == self.vocab_size, self.mask_share)

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
        if self.mask_share == 1:
            return ids
        rest = (uniforms - self.mask_share) / (1 - self.mask_share)
        drawn = (rest * self.vocab_size).long().clamp(0, self.vocab_size - 1)
        return torch.where(uniforms < self.mask_share, ids, drawn)

    def _prior_like(self, distribution: Tensor) -> Tensor:
        prior = distribution.new_full((self.states,), self.id_share)
        if self.masks:
            prior[-1] = self.mask_share
        return prior


class AbsorbingProcess(MixtureProcess):
    """A token becomes the mask and stays it: q_t = alpha x_0 + (1 - alpha) mask.

    Args:
        vocab_size: K.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, mask_share=1.0)


class UniformProcess(MixtureProcess):
    """A token jumps to an id drawn uniformly, its own included: q_t = alpha x_0 + (1 - alpha) / K.

    Args:
        vocab_size: K.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, mask_share=0.0)


class HybridProcess(MixtureProcess):
    """A token is masked or jumps to an id drawn uniformly.

    Args:
        vocab_size: K.
        mask_share: of the mask, in (0, 1).

    Raises:
        ValueError: a share that leaves one of the two out.
    """

    def __init__(self, vocab_size: int, mask_share: float = 0.8) -> None:
        if not 0 < mask_share < 1:
            raise ValueError(
                f"mask_share must lie in (0, 1), got {mask_share}; 1 is AbsorbingProcess, 0 UniformProcess"
            )
        super().__init__(vocab_size, mask_share)
