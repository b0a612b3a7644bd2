"""EnCodec's losses: the balancer's shares, and gradients against autograd's of the losses written out."""

import pytest
import torch
from helpers.sounds import waveforms
from torch.nn import functional as F

from discrete_lit.tokenizers.losses import (
    AudioObjective,
    GradientBalancer,
    MultiScaleSTFTDiscriminator,
    SpectrogramAdversarialLoss,
)

WINDOWS = (32, 64)


def test_the_balancer_gives_each_loss_its_share() -> None:
    """Eq. 4 on constant gradients: shares of the weights, whatever the sizes, also from the first step on."""
    balancer = GradientBalancer(0.9, norm=2.0)
    balancer.expect(["a", "b", "c"])
    directions = torch.eye(3)[:, None].repeat(1, 4, 1)[..., None]  # of each loss, (B, 3, 1)
    gradients = {name: scale * each for name, scale, each in zip("abc", (1e-3, 5.0, 1e4), directions, strict=True)}
    weights = {"a": 1.0, "b": 3.0, "c": 4.0}
    for _ in range(3):
        balanced = balancer(gradients, weights)
        assert torch.allclose(balanced[:, :, 0], 2.0 * torch.tensor([1.0, 3.0, 4.0]) / 8, rtol=1e-5)
    before = balancer.norm_a.clone()
    balancer.eval()
    balancer({"a": gradients["b"]}, weights)
    assert balancer.norm_a == before  # only training moves the running means


def test_a_loss_that_grows_is_not_followed_at_once() -> None:
    balancer = GradientBalancer(0.9)
    balancer.expect(["a"])
    gradient = torch.ones(2, 1, 4)
    balancer({"a": gradient}, {"a": 1.0})
    # The corrected mean of 1 and 10: (0.09 * 1 + 0.1 * 10) / 0.19 of the first norm.
    grown = balancer({"a": 10 * gradient}, {"a": 1.0})
    assert grown.norm(dim=(1, 2))[0] == pytest.approx(10 / ((0.09 + 1.0) / 0.19), rel=1e-5)


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"norm": 0.0}])
def test_balancers_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a gradient balancer needs"):
        GradientBalancer(**settings)


@pytest.fixture
def adversarial() -> SpectrogramAdversarialLoss:
    torch.manual_seed(0)
    return SpectrogramAdversarialLoss(MultiScaleSTFTDiscriminator(filters=4, windows=WINDOWS), 3.0, feature_weight=2.0)


def test_gradients_are_those_of_the_losses_written_out(adversarial: SpectrogramAdversarialLoss) -> None:
    """One backward pass gives both players what two passes with detached inputs would."""
    objective = AudioObjective(8000, windows=WINDOWS, adversarial_loss=adversarial)
    clips, outputs = waveforms(2, 1, 256), waveforms(2, 1, 256, seed=1).requires_grad_()
    found = objective(outputs, clips, step=0)
    found.loss.backward()
    made = outputs.grad.clone()
    of_discriminator = [parameter.grad.clone() for parameter in adversarial.parameters_to_train()]

    networks = adversarial.discriminator
    fake, real = networks.scales(outputs), networks.scales(clips)
    generator = sum(F.relu(1 - logits).mean() for logits, _ in fake) / 2
    pairs = [
        (a, b.detach())
        for (_, ours), (_, theirs) in zip(fake, real, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    features = sum((a - b).abs().mean() / b.abs().mean() for a, b in pairs) / len(pairs)
    waveform, spectral = F.l1_loss(outputs, clips), objective.spectral(outputs, clips).mean()
    total = 0.1 * waveform + 2.0 * spectral + 3.0 * generator + 2.0 * features
    (expected,) = torch.autograd.grad(total, outputs)
    assert torch.allclose(made, expected, atol=1e-6)
    cut = networks.scales(outputs.detach())
    loss = sum(
        F.relu(1 - a).mean() + F.relu(1 + b).mean() for (a, _), (b, _) in zip(networks.scales(clips), cut, strict=True)
    )
    for own, other in zip(
        of_discriminator, torch.autograd.grad(loss / 2, adversarial.parameters_to_train()), strict=True
    ):
        assert torch.allclose(own, other, atol=1e-6)
    assert found.terms["generator"] == pytest.approx(3 * float(generator.detach()), rel=1e-5)
    assert found.terms["features"] == pytest.approx(2 * float(features.detach()), rel=1e-5)


def test_the_balanced_gradient_has_the_norm_that_is_asked_for(adversarial: SpectrogramAdversarialLoss) -> None:
    objective = AudioObjective(8000, windows=WINDOWS, adversarial_loss=adversarial, balancer=GradientBalancer())
    outputs = waveforms(1, 1, 256, seed=1).requires_grad_()
    objective(outputs, waveforms(1, 1, 256), step=0).loss.backward()
    # Four parts with shares that add up to 1: the sum is at most 1 long.
    assert 0.2 < float(outputs.grad.norm()) <= 1.0
    plain = objective(outputs, waveforms(1, 1, 256))
    assert set(plain.terms) == {"waveform", "spectral"}


def test_the_autoencoder_trains_alone_before_the_start(adversarial: SpectrogramAdversarialLoss) -> None:
    adversarial.start_step = 5
    objective = AudioObjective(8000, windows=WINDOWS, adversarial_loss=adversarial)
    found = objective(waveforms(1, 1, 256, seed=1).requires_grad_(), waveforms(1, 1, 256), step=4)
    assert set(found.terms) == {"waveform", "spectral"}
    found.loss.backward()
    assert all(not parameter.grad.any() for parameter in adversarial.parameters_to_train())


def test_clips_shorter_than_the_discriminators_window(adversarial: SpectrogramAdversarialLoss) -> None:
    with pytest.raises(ValueError, match="clips of at least 64 samples, its longest window, got 40"):
        adversarial.discriminator(waveforms(1, 1, 40))
