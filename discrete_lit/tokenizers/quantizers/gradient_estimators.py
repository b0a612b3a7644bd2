"""Gradient estimators: the straight-through estimator, the rotation trick, index backpropagation.

The choice of a code has no gradient, so one is put in its place: each function gives back the codes, to the bit, and
says what the vectors that they replace receive in the backward pass.

    straight_through        the gradient itself                                 Bengio et al., 2013; VQ-VAE, eq. 2
    rotation_trick          the gradient, turned and scaled as the latent was   Fifty et al., 2024, section 4
    through_probabilities   the gradient of a softmax over all codes            IBQ; taming's hard Gumbel-softmax
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this length a vector has no direction to speak of.
_SHORTEST = 1e-6


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """Give back the codes `(..., D)`, whose gradient passes to the latents `(..., D)` unchanged.

    Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation", 2013.
    The codes receive none.
    """
    return codes.detach() + (latents - latents.detach())


def rotation_trick(latents: Tensor, codes: Tensor) -> Tensor:
    """Give back the codes `(..., D)` as the latents `(..., D)`, rotated and scaled by constants.

    Fifty et al., "Restructuring Vector Quantization with the Rotation Trick", 2024, section 4: with e the latent, q its
    code, ê and q̂ their directions and r = (ê + q̂) / |ê + q̂|, the code is `sg[(|q| / |e|) R] e` with the rotation
    R = I - 2 r rᵀ + 2 q̂ êᵀ. The angle between gradient and code becomes the angle between gradient and latent. Latents
    and codes without a direction (shorter than 1e-6) take the straight-through gradient. The codes receive none.
    """
    with torch.no_grad():
        e_length, q_length = latents.norm(dim=-1, keepdim=True), codes.norm(dim=-1, keepdim=True)
        has_direction = (e_length > _SHORTEST) & (q_length > _SHORTEST)
        e_hat, q_hat = latents / e_length.clamp_min(_SHORTEST), codes / q_length.clamp_min(_SHORTEST)
        r = F.normalize(e_hat + q_hat, dim=-1)
        scale = q_length / e_length.clamp_min(_SHORTEST)
    r_e = (latents * r).sum(dim=-1, keepdim=True)
    e_hat_e = (latents * e_hat).sum(dim=-1, keepdim=True)
    rotated = scale * (latents - 2 * r_e * r + 2 * e_hat_e * q_hat)  # (|q| / |e|) R e
    moved = torch.where(has_direction, rotated, latents)
    return codes.detach() + (moved - moved.detach())


GRADIENTS = {"straight_through": straight_through, "rotation": rotation_trick}
"""The estimators by the names of the setting `gradient`: each takes latents and codes."""


def through_probabilities(codes: Tensor, probabilities: Tensor, codebook: Tensor) -> Tensor:
    """Give back the chosen codes, whose gradient passes to the probabilities of all codes too, as if of their mean.

    The straight-through estimator on the choice itself (Shi et al., "Scalable Image Tokenization with Index
    Backpropagation Quantization", 2025), `(hard - sg(soft) + soft) @ codebook`, without the product: its value is
    `hard @ codebook`, and the gradient of the probabilities is `gradient @ codebook^T`.

    Args:
        codes: `(n, D)`, the chosen rows of the codebook, which keep their own gradient.
        probabilities: `(n, K)`, the softmax that the choice stands for.
        codebook: `(K, D)`; it receives its gradient through `codes` alone.
    """
    return _ThroughProbabilities.apply(codes, probabilities, codebook.detach())


class _ThroughProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, probabilities: Tensor, codebook: Tensor) -> Tensor:
        ctx.save_for_backward(codebook)
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (codebook,) = ctx.saved_tensors
        return gradients[0], gradients[0] @ codebook.T, None
