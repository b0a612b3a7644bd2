"""What the players lose, LeCam and R1, against their formulas."""

from math import exp, log

import pytest
import torch
from torch import nn

from discrete_lit.tokenizers.losses.adversarial import LeCam, discriminator_loss, generator_loss, gradient_penalty

REAL, FAKE = torch.tensor([[2.0, 0.5], [-1.0, 0.0]]), torch.tensor([[-2.0, 0.25], [0.5, -0.5]])


def mean(function, logits):
    values = logits.flatten().tolist()
    return sum(function(value) for value in values) / len(values)


def log_sigmoid(value):
    return -log(1 + exp(-value))


def test_discriminator():
    hinge = mean(lambda value: max(0, 1 - value), REAL) + mean(lambda value: max(0, 1 + value), FAKE)
    logistic = mean(lambda value: -log_sigmoid(value), REAL) + mean(lambda value: -log_sigmoid(-value), FAKE)
    for kind, expected in (("hinge", hinge), ("vanilla", logistic), ("non_saturating", logistic)):
        assert float(discriminator_loss(kind, REAL, FAKE)) == pytest.approx(expected / 2, rel=1e-6)


def test_generator():
    linear, logistic = -mean(float, FAKE), mean(lambda value: -log_sigmoid(value), FAKE)
    for kind, expected in (("hinge", linear), ("vanilla", linear), ("non_saturating", logistic)):
        assert float(generator_loss(kind, FAKE)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non_saturating"])
def test_the_players_pull_apart(kind):
    """The discriminator raises logits of reals and lowers those of fakes, the generator raises those of fakes."""
    real, fake = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    at_real, at_fake = torch.autograd.grad(discriminator_loss(kind, real, fake), (real, fake))
    (of_generator,) = torch.autograd.grad(generator_loss(kind, fake), fake)
    assert (at_real < 0).all() and (at_fake > 0).all() and (of_generator < 0).all()


def test_lecam():
    lecam = LeCam(decay=0.9)
    real_mean = fake_mean = 0.0
    for shift in (0.0, 1.0, -0.5):
        real, fake = REAL + shift, FAKE - shift
        penalty = lecam(real, fake)
        real_mean = 0.9 * real_mean + 0.1 * mean(float, real)
        fake_mean = 0.9 * fake_mean + 0.1 * mean(float, fake)
        expected = mean(lambda value, m=fake_mean: max(0, value - m) ** 2, real)
        expected += mean(lambda value, m=real_mean: max(0, m - value) ** 2, fake)
        assert float(penalty) == pytest.approx(expected, rel=1e-5)
    again = LeCam(decay=0.9)
    again.load_state_dict(lecam.state_dict())
    assert float(again.real_mean) == pytest.approx(real_mean) and float(again.fake_mean) == pytest.approx(fake_mean)


def test_gradient_penalty_of_a_quadratic():
    """D(x) = mean over two logits of a |x|^2 has the gradient 2 a x, and the penalty the gradient 8 a |x|^2 by a."""
    factor = nn.Parameter(torch.tensor(0.7))
    images = torch.randn(3, 2, 4, 4, requires_grad=True)
    logits = (factor * images.square().flatten(1).sum(dim=1))[:, None] * torch.tensor([0.5, 1.5])
    penalty = gradient_penalty(logits, images)
    square = images.detach().square().flatten(1).sum(dim=1).mean()
    torch.testing.assert_close(penalty.detach(), 4 * factor.detach() ** 2 * square)
    penalty.backward()
    torch.testing.assert_close(factor.grad, 8 * factor.detach() * square)
