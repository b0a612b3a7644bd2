"""What the players lose, the adaptive weight, LeCam and R1, against their formulas."""

from math import exp, log

import pytest
import torch
from torch import nn

from discrete_lit.tokenizers.losses import adversarial
from discrete_lit.tokenizers.losses.adversarial import (
    AdaptiveWeight,
    LeCam,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)

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
    of_means = mean(lambda value: -log_sigmoid(value), FAKE.mean(dim=1))  # a row is an image
    assert of_means != pytest.approx(logistic, rel=1e-2)
    expected = {"hinge": linear, "vanilla": linear, "non_saturating": logistic, "non_saturating_mean": of_means}
    for kind, value in expected.items():
        assert float(generator_loss(kind, FAKE)) == pytest.approx(value, rel=1e-6)


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


def test_lecam_on_means():
    """TiTok's: of the two mean logits, with running means as they were before the batch."""
    lecam = LeCam(decay=0.9, on="means")
    real_mean = fake_mean = 0.0
    for shift in (0.0, 1.0, -0.5):
        real, fake = (REAL + shift).requires_grad_(), (FAKE - shift).requires_grad_()
        penalty = lecam(real, fake)
        mean_of_real, mean_of_fake = mean(float, real), mean(float, fake)
        above, below = max(0, mean_of_real - fake_mean), max(0, real_mean - mean_of_fake)
        assert float(penalty.detach()) == pytest.approx(above**2 + below**2, rel=1e-5, abs=1e-9)
        found = torch.autograd.grad(penalty, (real, fake))
        torch.testing.assert_close(found[0], torch.full((2, 2), 2 * above / 4))
        torch.testing.assert_close(found[1], torch.full((2, 2), -2 * below / 4))
        real_mean = 0.9 * real_mean + 0.1 * mean_of_real
        fake_mean = 0.9 * fake_mean + 0.1 * mean_of_fake
    assert float(lecam.real_mean) == pytest.approx(real_mean) and float(lecam.fake_mean) == pytest.approx(fake_mean)


def of_last_layer(**settings):
    """The adaptive weight of two losses of a linear decoder, and the two losses' gradients at its weight."""
    torch.manual_seed(0)
    last, hidden, images = nn.Conv2d(4, 3, 1), torch.randn(2, 4, 6, 5), torch.randn(2, 3, 6, 5)
    outputs = last(hidden)
    reconstruction, generator = (outputs - images).abs().mean(), -(outputs * images).sin().mean()
    at_outputs, at_weight = (
        [torch.autograd.grad(loss, wanted, retain_graph=True)[0] for loss in (reconstruction, generator)]
        for wanted in (outputs, last.weight)
    )
    found = AdaptiveWeight(**settings)(
        outputs, last.weight, reconstruction_gradient=at_outputs[0], generator_gradient=at_outputs[1]
    )
    return float(found), *(float(gradient.norm()) for gradient in at_weight)


def test_adaptive_weight():
    found, reconstruction, generator = of_last_layer()
    assert found == pytest.approx(reconstruction / (generator + 1e-4), rel=1e-5)
    found, *_ = of_last_layer(delta=0.5)
    assert found == pytest.approx(reconstruction / (generator + 0.5), rel=1e-5)
    assert of_last_layer(largest=found / 2)[0] == pytest.approx(found / 2)
    assert of_last_layer(least=1e3)[0] == pytest.approx(1e3)


@pytest.mark.parametrize("largest", [1e4, 3.0])
def test_the_adaptive_weight_of_sums_is_that_of_ldm(largest):
    """LDM's loss is the sum over an image's pixels; ours is that divided by their number, weights included."""
    found, reconstruction, generator = of_last_layer(reduction="sum", largest=largest)
    pixels = 3 * 6 * 5
    of_ldm = min(reconstruction * pixels / (generator + 1e-4), largest)
    assert found * pixels == pytest.approx(of_ldm, rel=1e-5) and (of_ldm == 3.0) == (largest == 3.0)


def test_a_rank_weighs_its_own_batch_where_it_shall(monkeypatch):
    expected = of_last_layer()[0]
    monkeypatch.setattr(
        adversarial, "all_reduce_sum", lambda value: value * torch.tensor([3.0, 1.0]).view(2, 1, 1, 1, 1)
    )
    assert of_last_layer(across_ranks=False)[0] == pytest.approx(expected)
    assert of_last_layer()[0] == pytest.approx(3 * expected, rel=1e-5)


def test_wrong_settings():
    with pytest.raises(ValueError, match="0 <= least < largest and delta >= 0, got least=2, largest=1"):
        AdaptiveWeight(least=2, largest=1)
    with pytest.raises(ValueError, match="must be 'mean' or 'sum', got 'max'"):
        AdaptiveWeight(reduction="max")
    with pytest.raises(ValueError, match="lecam_on must be 'logits' or 'means', got 'images'"):
        LeCam(0.9, on="images")


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
