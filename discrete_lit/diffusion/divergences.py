"""Divergences of noisy marginals, which the losses of diffusion share, and their evaluation a few rows at a time.

`mixture_divergence` and `mixture_at_states` are closed forms for processes of one formula, `marginals` serves the
others; `by_rows` keeps the memory of wide logits small.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.diffusion.processes import ForwardProcess, MixtureProcess, is_absorbing

# Closed forms that the bounds of a leave-one-out head share: the true noisy marginal a = q(. | x_0) against the
# predicted one b, its mean over the leave-one-out posterior p of x_0.


LEAST_PROBABILITY = 1e-100
"""Stands for a probability of 0, whose logarithm would be infinite: far below what counts, and float64 still has its
inverse squared, which gradients have."""
# From here on log(1 + exp(x)) equals x, in float64 too.
_LINEAR = 40


def mixture_divergence(
    leave_one_out: Tensor, tokens: Tensor, *, process: MixtureProcess, alpha: Tensor, noise: Tensor
) -> Tensor:
    """Return KL(a | b) of a mixture, float64, by one pass over the ids.

    Let c be the probability that noise alone gives each id. Then `b_y = c + alpha p_y`, the ids that are not x_0
    contribute `-c sum_y log(1 + alpha p_y / c)`, and the mask's term does not depend on p.

    Args:
        leave_one_out: log p, `(..., K)`.
        tokens: x_0, `(...)`.
        process: the noise.
        alpha: float64, broadcasts against the tokens.
        noise: 1 - alpha.
    """
    at_clean = gather(leave_one_out, tokens).double()
    if is_absorbing(process):
        return -alpha * at_clean
    floor = _floor(process, alpha, noise)
    offset = alpha.log() - floor.log()
    risen = F.softplus(leave_one_out + offset[..., None].to(leave_one_out.dtype), threshold=_LINEAR)
    at_clean_risen = F.softplus(at_clean + offset, threshold=_LINEAR)
    of_clean = alpha + floor
    others = risen.sum(dim=-1).double() - at_clean_risen
    return of_clean * (of_clean.log() - floor.log() - at_clean_risen) - floor * others


def mixture_at_states(
    leave_one_out: Tensor, tokens: Tensor, *, states: Tensor, process: MixtureProcess, alpha: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a and log(a / b) of a mixture at `states (...)`, float64; the arguments are `mixture_divergence`'s."""
    is_clean, is_mask = states == tokens, states == process.vocab_size
    if is_absorbing(process):
        at_clean = gather(leave_one_out, tokens).double()
        return torch.where(is_clean, alpha, noise), torch.where(is_clean, -at_clean, 0.0)
    floor = _floor(process, alpha, noise)
    of_state = torch.where(is_clean, alpha + floor, floor)
    at_state = gather(leave_one_out, states.masked_fill(is_mask, 0)).double()
    log_predicted = floor.log() + F.softplus(at_state + alpha.log() - floor.log(), threshold=_LINEAR)
    # The mask's probability does not depend on p.
    log_ratio = torch.where(is_mask, 0.0, of_state.log() - log_predicted)
    return torch.where(is_mask, process.noise_masses(alpha, noise)[1], of_state), log_ratio


def _floor(process: MixtureProcess, alpha: Tensor, noise: Tensor) -> Tensor:
    """Return c, the probability that noise alone gives each id."""
    return process.noise_masses(alpha, noise)[0].clamp(min=LEAST_PROBABILITY)


def marginals(
    leave_one_out: Tensor, tokens: Tensor, *, process: ForwardProcess, alpha: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a and b over all states, `(..., S)` float64, for processes without a closed form."""
    true, predicted = process.marginals(tokens, leave_one_out.double().exp(), alpha, noise)
    return true.clamp(min=LEAST_PROBABILITY), predicted.clamp(min=LEAST_PROBABILITY)


def gather(values: Tensor, ids: Tensor) -> Tensor:
    """Return `values (..., S)` at `ids (...)`."""
    return values.gather(-1, ids[..., None])[..., 0]


# The evaluation of a loss on wide logits, a few rows at a time.


# The logits' entries in one chunk, 4 MB of float32; chunks are larger where there would be more than `_MOST_PARTS`, for
# which a GPU would wait for the host. The tensors made of a chunk on the way are a few times as large.
_ENTRIES_AT_ONCE = 2**20
_MOST_PARTS = 16


def by_rows(
    function: Callable[[Tensor, slice], Tensor], logits: Tensor, positions: Tensor, together: int = 1
) -> Tensor:
    """Apply `function` to some rows of the logits, in chunks; the other rows get 0.

    The gradient of each chunk is computed together with its value. So of all that the function makes of the logits,
    only their gradient is kept for the backward pass. Other tensors that the function reads get no gradient.

    Args:
        function: takes rows `(r, S)` of the logits and their slice of `positions`, and returns `(r,)`.
        logits: `(R, S)`.
        positions: `(n,)` int64, the rows to work on, without repetition.
        together: a divisor of n; each chunk has a multiple of so many rows.

    Returns:
        `(R,)` float64.
    """
    return _ByRows.apply(logits, positions, function, together)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, positions: Tensor, function: Callable[[Tensor, slice], Tensor], together: int
    ) -> Tensor:
        count = len(positions)
        size = max(_ENTRIES_AT_ONCE // logits.shape[1], -(-count // _MOST_PARTS))
        size = max(1, size // together) * together
        everywhere, wanted = count == len(logits), ctx.needs_input_grad[0]
        values = logits.new_zeros(len(logits), dtype=torch.float64)
        # Rows that do not count have the gradient 0.
        gradient = (torch.empty_like if everywhere else torch.zeros_like)(logits) if wanted else None
        for start in range(0, count, size):
            chunk = slice(start, min(start + size, count))
            here = positions[chunk]
            rows = logits[chunk].detach() if everywhere else logits[here]
            if gradient is None:
                values[here] = function(rows, chunk).double()
                continue
            with torch.enable_grad():
                value = function(rows.requires_grad_(), chunk)
                gradient[here] = torch.autograd.grad(value.sum(), rows)[0]
            values[here] = value.detach().double()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None
