"""Straight-through estimator, rotation trick, index backpropagation: values are the codes, gradients the formulas."""

import math

import pytest
import torch

from discrete_lit.tokenizers.quantizers.gradient_estimators import (
    rotation_trick,
    straight_through,
    through_probabilities,
)


def test_straight_through_is_the_identity_backwards() -> None:
    latents, codes = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    made = straight_through(latents, codes)
    assert torch.equal(made, codes)
    weights = torch.randn(5, 3)
    of_latents, of_codes = torch.autograd.grad((made * weights).sum(), (latents, codes), allow_unused=True)
    assert torch.equal(of_latents, weights) and of_codes is None


@pytest.mark.parametrize("dim", [2, 5])
def test_rotation_by_its_matrix(dim: int) -> None:
    """A rotation in the plane of latent and code that turns one into the direction of the other, then scales."""
    latents, codes = torch.randn(50, dim, requires_grad=True), torch.randn(50, dim)
    made = rotation_trick(latents, codes)
    assert torch.equal(made, codes)
    weights = torch.randn(50, dim)
    (gradient,) = torch.autograd.grad((made * weights).sum(), latents)
    for row in zip(latents.detach().double(), codes.double(), weights.double(), gradient, strict=True):
        latent, code, weight, found = row
        e, q = latent / latent.norm(), code / code.norm()
        # Rodrigues' formula in the plane of e and q, without a reflection.
        cosine = float(e @ q)
        across = (q - cosine * e) / (q - cosine * e).norm()
        sine = math.sqrt(1 - cosine**2)
        turn = (
            torch.eye(dim, dtype=torch.float64)
            + sine * (torch.outer(across, e) - torch.outer(e, across))
            + (cosine - 1) * (torch.outer(e, e) + torch.outer(across, across))
        )
        matrix = code.norm() / latent.norm() * turn
        torch.testing.assert_close(matrix @ latent, code, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.double(), matrix.T @ weight, rtol=1e-3, atol=1e-4)


def test_rotation_keeps_the_angle_between_gradient_and_vector() -> None:
    latents, codes = torch.randn(50, 4, requires_grad=True), torch.randn(50, 4)
    weights = torch.randn(50, 4)
    (gradient,) = torch.autograd.grad((rotation_trick(latents, codes) * weights).sum(), latents)
    angle = torch.cosine_similarity
    torch.testing.assert_close(angle(gradient, latents.detach()), angle(weights, codes), rtol=1e-3, atol=1e-4)


def test_rotation_without_a_direction_or_by_half_a_turn_is_finite() -> None:
    latents = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    codes = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    made = rotation_trick(latents, codes)
    (gradient,) = torch.autograd.grad(made.sum(), latents)
    assert torch.equal(made, codes)
    assert torch.equal(gradient[:2], torch.ones(2, 2)) and gradient.isfinite().all()


def test_through_probabilities_is_the_formula() -> None:
    """`(hard - sg(soft) + soft) @ codebook` and all its gradients."""
    logits, codebook = torch.randn(20, 6, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    hard = torch.nn.functional.one_hot(logits.argmax(dim=1), 6).float()
    weights = torch.randn(20, 3)
    soft = logits.softmax(dim=1)
    expected = (hard - soft.detach() + soft) @ codebook
    made = through_probabilities(codebook[logits.argmax(dim=1)], logits.softmax(dim=1), codebook)
    torch.testing.assert_close(made, expected)
    assert torch.equal(made, codebook[logits.argmax(dim=1)])
    for one, other in zip(
        torch.autograd.grad((made * weights).sum(), (logits, codebook)),
        torch.autograd.grad((expected * weights).sum(), (logits, codebook)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
