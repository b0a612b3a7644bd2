"""The gradients that code vectors hand to the latents they replace; their values are the codes, to the bit."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this length a direction means nothing.
_SHORTEST = 1e-6


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """`codes` `(..., D)` whose gradient is the latents' own (Bengio et al., 2013)."""
    return codes.detach() + (latents - latents.detach())


def rotation_trick(latents: Tensor, codes: Tensor) -> Tensor:
    """`codes` `(..., D)` as a rotation and scaling of the latents, which are constant in the backward pass.

    Fifty et al., "Restructuring Vector Quantization with the Rotation Trick", 2024, section 4: with e the latent, q its
    code, ê and q̂ their directions and r = (ê + q̂) / |ê + q̂|, the code is `sg[(|q| / |e|) R] e` with the rotation
    R = I - 2 r rᵀ + 2 q̂ êᵀ. Angles between gradient and code become angles between gradient and latent. Latents or
    codes without a direction (shorter than 1e-6) take the straight-through gradient.
    """
    with torch.no_grad():
        length, target = latents.norm(dim=-1, keepdim=True), codes.norm(dim=-1, keepdim=True)
        turned = (length > _SHORTEST) & (target > _SHORTEST)
        source, goal = latents / length.clamp_min(_SHORTEST), codes / target.clamp_min(_SHORTEST)
        middle = F.normalize(source + goal, dim=-1)
        scale = target / length.clamp_min(_SHORTEST)
    along_middle = (latents * middle).sum(dim=-1, keepdim=True)
    along_source = (latents * source).sum(dim=-1, keepdim=True)
    rotated = scale * (latents - 2 * along_middle * middle + 2 * along_source * goal)
    moved = torch.where(turned, rotated, latents)
    return codes.detach() + (moved - moved.detach())


GRADIENTS = {"straight_through": straight_through, "rotation": rotation_trick}


def through_probabilities(codes: Tensor, probabilities: Tensor, codebook: Tensor) -> Tensor:
    """`codes` that hand their gradient to the probabilities of all codes as well, as if they were their mean.

    The straight-through estimator on the choice itself, `(hard - sg(soft) + soft) @ codebook`, without the product:
    its value is `hard @ codebook`, and the gradient of the probabilities is `gradient @ codebook^T`.

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
