"""D3PM's training loss in closed form, given the logits; nothing of it comes from our own code.

Its scale is the published one, on which a clip of the gradient's norm acts (`diffusion_categorical.py`): bits of a
dimension of one step, KL(q(x_s | x_t, x_0) || p(x_s | x_t)) or, at the first step, the cross-entropy of x_0. The hybrid
loss adds 0.001 times that at every step, of all dimensions. Left out are the 1e-6 inside its logarithms, and that its
last beta of the cosine is 0.999, not 1.
"""

from collections.abc import Callable
from math import cos, log, pi

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Give -log p of each id, `(B, N)`."""
    log_p = logits.double() - logits.double().exp().sum(dim=-1, keepdim=True).log()
    return -log_p.gather(-1, ids[..., None])[..., 0]


def absorbing_kernels(states: int, steps: int) -> Tensor:
    """Make q(x_t | x_s) `(T, S, S)`, from row to column: beta is 1 / T, 1 / (T - 1), ..., 1; the last is a mask."""
    betas = 1 / torch.arange(steps, 0, -1, dtype=torch.float64)
    to_mask = torch.zeros(states, states, dtype=torch.float64)
    to_mask[:, -1] = 1
    stay = torch.eye(states, dtype=torch.float64)
    return (1 - betas)[:, None, None] * stay + betas[:, None, None] * to_mask


def uniform_kernels(states: int, steps: int) -> Tensor:
    """Make those to any state, with beta by the quotients of cos((t / T + 0.008) / 1.008 pi / 2)."""
    alphas = torch.tensor([cos((t / steps + 0.008) / 1.008 * pi / 2) for t in range(steps + 1)], dtype=torch.float64)
    betas = (1 - alphas[1:] / alphas[:-1])[:, None, None]
    return (1 - betas) * torch.eye(states, dtype=torch.float64) + betas / states


def d3pm(
    logits: Tensor, ids: Tensor, noisy: Tensor, *, kernels: Tensor, step: int, cross_entropy_weight: float
) -> Tensor:
    """Compute the loss of a batch at one step, in bits of a dimension.

    Args:
        logits: of x_0, `(B, N, K)`.
        ids: x_0 `(B, N)` in [0, K).
        noisy: x_t `(B, N)` in [0, S).
        kernels: `(T, S, S)`.
        step: in [0, T), from `step` states to `step + 1`.
        cross_entropy_weight: of the hybrid loss; 0 for the bound alone.
    """
    nats = cross_entropy(logits, ids)
    kl = nats
    if step > 0:
        states, predicted = kernels.shape[-1], logits.double().softmax(dim=-1)
        before = torch.linalg.multi_dot([*kernels[:step], torch.eye(states, dtype=torch.float64)])  # q(x_s | x_0)
        arrives = kernels[step].T[noisy]  # q(x_t | x_s), by x_s
        true = arrives * before[ids]
        model = arrives * (predicted @ before[: logits.shape[-1]])
        true, model = (law / law.sum(dim=-1, keepdim=True) for law in (true, model))
        kl = torch.where(true > 0, true * (true.clamp(min=1e-300).log() - model.clamp(min=1e-300).log()), 0.0).sum(-1)
    return (kl + cross_entropy_weight * nats).mean() / log(2)


# By recipe: the kernels of its steps, the weight of the cross-entropy, and whether the last state is a mask.
D3PM: dict[str, tuple[Callable[[int, int], Tensor], float, bool]] = {
    "generators/d3pm_absorbing": (absorbing_kernels, 0.001, True),
    "generators/d3pm_uniform": (uniform_kernels, 0.0, False),
}
