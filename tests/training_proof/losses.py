"""The authors' training losses of generators in closed form, given the logits; nothing of it comes from our own code.

Where the golden cases have logits and no loss, equal logits and an equal function of them are an equal loss. Each
function is in float64, with the published scale: a clip of the gradient's norm acts on that.

- LlamaGen, RAR, taming's GPT: the mean cross-entropy of all ids. VAR: the sum over an image's ids, each with the weight
  1 / N, and the mean over images.
- TiTok's generator (`MLMLoss` of 1d-tokenizer): cross-entropies with smoothed labels, by weights of 1 where ids are
  masked and 0.1 elsewhere, over the sum of the weights + 1e-8.
- MaskBit (`MLMLoss`, `sum_splits: False`): the mean over all groups of bits, masked or not, with smoothed labels.
- Halton-MaskGIT: the mean over all ids; its softmax has the mask's logit too, which is left out here.
- D3PM (`diffusion_categorical.py`): bits of a dimension of one step, KL(q(x_s | x_t, x_0) || p(x_s | x_t)) or, at the
  first step, the cross-entropy of x_0; the hybrid loss adds 0.001 times that at every step, of all dimensions. Left
  out are the 1e-6 inside its logarithms, and that its last beta of the cosine is 0.999, not 1.
"""

from collections.abc import Callable
from math import cos, log, pi

import torch
from torch import Tensor

SMOOTHING = 0.1


def cross_entropy(logits: Tensor, ids: Tensor, smoothing: float = 0.0) -> Tensor:
    """-sum_k y_k log p_k of labels y that give each id the share `smoothing / K`: `(B, N)`."""
    log_p = logits.double() - logits.double().exp().sum(dim=-1, keepdim=True).log()
    target = torch.nn.functional.one_hot(ids, logits.shape[-1]).double()
    target = (1 - smoothing) * target + smoothing / logits.shape[-1]
    return -(target * log_p).sum(dim=-1)


def mean_of_all(logits: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
    return cross_entropy(logits, ids).mean()


def mean_of_images(logits: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
    return (cross_entropy(logits, ids) / ids.shape[1]).sum(dim=1).mean()


def smoothed_mean_of_all(logits: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
    return cross_entropy(logits, ids, SMOOTHING).mean()


def masked_mean(logits: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
    weights = torch.where(masked, 1.0, 0.1).double()
    return (cross_entropy(logits, ids, SMOOTHING) * weights).sum() / (weights.sum() + 1e-8)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# By recipe: from logits `(B, N, K)`, ids and masks `(B, N)` to the loss.
LOSSES: dict[str, Loss] = {
    "generators/llamagen_b_imagenet256": mean_of_all,
    "generators/rar_b_imagenet256": mean_of_all,
    "generators/taming_gpt_imagenet256": mean_of_all,
    "generators/var_d16_imagenet256": mean_of_images,
    "generators/titok_l32_generator_imagenet256": masked_mean,
    "generators/maskbit_14bit_imagenet256": smoothed_mean_of_all,
    "generators/halton_b_imagenet256": mean_of_all,
}


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
