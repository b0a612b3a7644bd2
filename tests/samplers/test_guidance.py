"""Classifier-free guidance on log-probabilities, and its schedules."""

from math import cos, pi

import pytest
import torch

from discrete_lit.samplers.guidance import guide, scale_at


def test_known_values() -> None:
    """p_c^2 / p_u normalised, for s = 2 (w = 1)."""
    conditional = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()
    unconditional = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    expected = torch.tensor([0.8698224852, 0.0236686391, 0.0355029586, 0.0710059172])
    torch.testing.assert_close(guide(conditional, unconditional, 2.0).softmax(dim=-1), expected)
    normaliser = guide(conditional, unconditional, 2.0).exp().sum()
    assert float(normaliser) == pytest.approx(1.4083333333, rel=1e-6)


def test_one_is_the_conditional_and_zero_the_unconditional() -> None:
    conditional, unconditional = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional.log_softmax(dim=-1))
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional.log_softmax(dim=-1))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_formula_on_log_probabilities_not_on_logits(scale: float) -> None:
    conditional, unconditional = torch.randn(3, 5), torch.randn(3, 5)
    p, q = conditional.double().softmax(dim=-1), unconditional.double().softmax(dim=-1)
    torch.testing.assert_close(
        guide(conditional, unconditional, scale).double(), q.log() + scale * (p / q).log(), rtol=1e-5, atol=1e-5
    )
    shifted = guide(conditional + 7, unconditional - 3, scale)  # logits are known up to a constant
    torch.testing.assert_close(shifted, guide(conditional, unconditional, scale), rtol=1e-5, atol=1e-5)


def test_schedules() -> None:
    for progress in (0.0, 0.2, 0.5, 0.99):
        assert scale_at("constant", 3.0, progress) == 3.0
        assert scale_at("linear", 3.0, progress) == pytest.approx(1 + 2 * progress)
        assert scale_at("cosine", 3.0, progress) == pytest.approx(1 + 2 * (1 - cos(pi * progress)) / 2)
    for schedule in ("linear", "cosine"):
        assert scale_at(schedule, 3.0, 0.0) == 1.0
        assert scale_at(schedule, 1.0, 0.7) == 1.0
