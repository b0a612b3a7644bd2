"""KLVAE's bottleneck: its samples, its divergence, its gradients."""

import pytest
import torch
from scipy.stats import kstest
from torch.distributions import Normal, kl_divergence

from discrete_lit.core.random import CounterRandom
from discrete_lit.tokenizers.klvae import GaussianBottleneck


@pytest.mark.parametrize("grid", [(), (5,), (3, 4), (2, 3, 4)])
def test_any_grid(grid: tuple[int, ...]) -> None:
    bottleneck = GaussianBottleneck(3, 0.5)
    assert bottleneck.latent_dim == 6
    moments = torch.randn(2, *grid, 6) * 2
    latents, losses = bottleneck(moments)
    mean, logvar = moments[..., :3], moments[..., 3:]
    assert latents.shape == mean.shape and latents.dtype == torch.float32 and not torch.equal(latents, mean)
    nats = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(dim=1)
    torch.testing.assert_close(bottleneck.posterior(moments).kl(), nats)
    torch.testing.assert_close(losses, {"kl": 0.5 * nats.mean()})
    assert torch.equal(bottleneck.eval()(moments)[0], mean)


@pytest.mark.parametrize("keyed", [True, False])
def test_samples_have_their_law(keyed: bool) -> None:
    mean, logvar = torch.tensor([0.5, -2.0]), torch.tensor([1.0, -3.0])
    posterior = GaussianBottleneck(2, 0.0).posterior(torch.cat((mean, logvar)).expand(2000, 2, 4))
    sample = posterior.sample(CounterRandom(0, torch.arange(2000)) if keyed else None)
    whitened = (sample - mean) / (logvar / 2).exp()
    assert kstest(whitened.flatten().numpy(), "norm").pvalue > 1e-3
    assert torch.corrcoef(whitened.flatten(1).T).sub(torch.eye(4)).abs().max() < 0.1


def test_noise_belongs_to_the_sample() -> None:
    bottleneck, moments = GaussianBottleneck(2, 0.0), torch.randn(6, 3, 4)
    whole, _ = bottleneck(moments, CounterRandom(1, torch.arange(6)))
    part, _ = bottleneck(moments[4:], CounterRandom(1, torch.arange(4, 6)))
    assert torch.equal(whole[4:], part)
    other, _ = bottleneck(moments, CounterRandom(2, torch.arange(6)))
    assert not (whole == other).any()


def test_gradient_reaches_mean_and_variance() -> None:
    moments = torch.randn(2, 5, 4, requires_grad=True)
    posterior = GaussianBottleneck(2, 1.0).posterior(moments)
    sample = posterior.sample()
    (gradient,) = torch.autograd.grad(sample.sum(), moments)
    assert (gradient[..., :2] == 1).all()
    torch.testing.assert_close(gradient[..., 2:], 0.5 * (sample - posterior.mean).detach())


def test_variances_are_clamped() -> None:
    posterior = GaussianBottleneck(1, 1.0).posterior(torch.tensor([[0.0, -1e4], [0.0, 1e4]]))
    assert posterior.logvar.flatten().tolist() == [-30, 20]
    assert posterior.kl().isfinite().all() and posterior.sample().isfinite().all()


def test_autocast_keeps_float32() -> None:
    bottleneck, moments = GaussianBottleneck(2, 0.1), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        latents, losses = bottleneck(moments.bfloat16(), CounterRandom(0, torch.arange(3)))
    expected, plain = bottleneck(moments.bfloat16().float(), CounterRandom(0, torch.arange(3)))
    assert torch.equal(latents, expected) and torch.equal(losses["kl"], plain["kl"])


@pytest.mark.parametrize(("arguments", "message"), [((0, 1.0), "dim must be positive"), ((2, -1.0), "kl_weight must")])
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianBottleneck(*arguments)
