"""How far a predicted noisy marginal is from the true one: what every bound of a cavity head is made of."""

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.processes.forward import ForwardProcess
from discrete_lit.processes.losses.diffusion_loss import gather
from discrete_lit.processes.mixture import MixtureProcess

# In place of a probability of 0, whose logarithm would be none: far below what float64 adds up.
_TINY = 1e-30
# From here on log(1 + exp(x)) is x, in float64 too.
_LINEAR = 40
# What the eigenvectors of a dense chain cannot tell from 0.
_DENSE_ROUNDING = 1e-18


def marginals(cavity: Tensor, tokens: Tensor, process: ForwardProcess, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """a = q(. | x_0) and b, its mean over the cavity, `(..., S)` float64, for processes without a closed form."""
    clean = F.one_hot(tokens, process.vocab_size).double()
    true, predicted = (process.marginal(of, alpha).clamp(min=_DENSE_ROUNDING) for of in (clean, cavity.double().exp()))
    return true, predicted


def mixture_divergence(cavity: Tensor, tokens: Tensor, process: MixtureProcess, alpha: Tensor, noise: Tensor) -> Tensor:
    """KL(a | b) with a = q(. | x_0) and b its mean over the cavity, in float64; one pass over the ids.

    With c what noise alone gives each id, `b_y = c + alpha p_y`: those that are not x_0 share
    `-c sum_y log(1 + alpha p_y / c)`, and the mask's part does not depend on p.

    Args:
        cavity: `(..., K)` log-probabilities.
        tokens: x_0 `(...)`.
        process: the noise.
        alpha: broadcasts against the tokens, float64.
        noise: 1 - alpha.
    """
    at_clean = gather(cavity, tokens).double()
    if process.id_share == 0:
        return -alpha * at_clean
    floor = _floor(process, noise)
    offset = alpha.log() - floor.log()
    risen = F.softplus(cavity + offset[..., None].to(cavity.dtype), threshold=_LINEAR)
    at_clean_risen = F.softplus(at_clean + offset, threshold=_LINEAR)
    of_clean = alpha + floor
    others = risen.sum(dim=-1).double() - at_clean_risen
    return of_clean * (of_clean.log() - floor.log() - at_clean_risen) - floor * others


def mixture_at_states(
    cavity: Tensor, tokens: Tensor, states: Tensor, process: MixtureProcess, alpha: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """a and log(a / b) at `states (...)`, float64; the rest as for `mixture_divergence`."""
    is_clean, is_mask = states == tokens, states == process.vocab_size
    if process.id_share == 0:
        at_clean = gather(cavity, tokens).double()
        return torch.where(is_clean, alpha, noise), torch.where(is_clean, -at_clean, 0.0)
    floor = _floor(process, noise)
    of_state = torch.where(is_clean, alpha + floor, floor)
    at_state = gather(cavity, states.masked_fill(is_mask, 0)).double()
    log_predicted = floor.log() + F.softplus(at_state + alpha.log() - floor.log(), threshold=_LINEAR)
    # The mask's share does not depend on p.
    log_ratio = torch.where(is_mask, 0.0, of_state.log() - log_predicted)
    return torch.where(is_mask, noise * process.mask_share, of_state), log_ratio


def _floor(process: MixtureProcess, noise: Tensor) -> Tensor:
    return (noise * process.id_share).clamp(min=_TINY)
