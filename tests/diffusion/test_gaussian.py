"""Gaussian paths, predictions, posteriors, losses and bounds against closed forms and published values."""

import os
from dataclasses import replace
from math import erf, log, pi
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from discrete_lit.diffusion import gaussian
from discrete_lit.diffusion.gaussian import (
    Denoise,
    Estimate,
    GaussianDenoiser,
    GaussianPath,
    LinearRatePath,
    Posterior,
    PredictionKind,
    RectifiedPath,
    ScheduledPath,
    SteppedPath,
    TrigonometricPath,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    shifted,
)
from discrete_lit.diffusion.gaussian_losses import (
    DenoisingLoss,
    LogitNormalTimes,
    discretized_log_likelihood,
    step_bound,
    variational_bound,
)

CONTINUOUS: dict[str, GaussianPath] = {
    "rectified": RectifiedPath(),
    "trigonometric": TrigonometricPath(),
    "linear rate": LinearRatePath(),
}
STEPPED: dict[str, SteppedPath] = {
    "linear": SteppedPath(linear_betas()),
    "scaled linear": SteppedPath(scaled_linear_betas()),
    "cosine": SteppedPath(cosine_betas()),
}
PATHS = CONTINUOUS | STEPPED
KINDS: tuple[PredictionKind, ...] = ("noise", "data", "v", "velocity")


def noise_like(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def golden(family: str) -> dict[str, Tensor]:
    folder = os.environ.get("DISCRETE_LIT_GOLDEN")
    if not folder:
        pytest.skip("DISCRETE_LIT_GOLDEN names no folder of golden files")
    return load_file(Path(folder) / family / "a.safetensors")


@pytest.mark.parametrize("name", CONTINUOUS)
def test_slopes_are_derivatives_and_the_ends_are_clean_and_noise(name: str) -> None:
    path = CONTINUOUS[name]
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64).requires_grad_()
    for value, slope in ((path.alpha, path.alpha_slope), (path.sigma, path.sigma_slope)):
        (expected,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope(t.detach()), expected, rtol=1e-10, atol=1e-12)
    assert path.number(path.alpha, 0.0) == 1
    assert path.number(path.sigma, 0.0) == 0
    assert path.number(path.alpha, 1.0) < 7e-3
    assert abs(path.number(path.sigma, 1.0) - 1) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATHS)
def test_what_a_perfect_network_says_is_read_back(name: str, kind: PredictionKind) -> None:
    path = PATHS[name]
    if kind == "velocity" and isinstance(path, SteppedPath):
        with pytest.raises(ValueError, match="no velocity"):
            GaussianDenoiser(path, prediction=kind)
        return
    data, noise = noise_like((7, 3), 0), noise_like((7, 3), 1)
    t = torch.tensor([0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.998], dtype=torch.float64)
    denoiser = GaussianDenoiser(path, prediction=kind)
    x_t = path.add_noise(data, noise, t)
    estimate = denoiser(denoiser.target(data, noise, t), x_t, t)
    torch.testing.assert_close(estimate.data, data, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(estimate.noise, noise, rtol=1e-8, atol=1e-8)
    one = denoiser(denoiser.target(data, noise, t)[3:4], x_t[3:4], 0.5)
    torch.testing.assert_close(one.data, data[3:4], rtol=1e-8, atol=1e-8)


def test_a_learned_variance_is_the_second_half_of_the_channels() -> None:
    denoiser = GaussianDenoiser(STEPPED["linear"], learned_variance=True)
    t = torch.tensor([0.5], dtype=torch.float64)
    images, vectors = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3)
    of_images = denoiser(torch.cat((images, images + 1), dim=1), images, t)
    of_vectors = denoiser(torch.cat((vectors, vectors + 1), dim=1), vectors, t)
    for estimate, x in ((of_images, images), (of_vectors, vectors)):
        assert estimate.variance is not None
        assert estimate.data.shape == estimate.variance.shape == x.shape
        assert bool((estimate.variance == 1).all() and (estimate.noise == 0).all())


def test_clipped_data_come_with_the_noise_that_fits_them() -> None:
    path = RectifiedPath()
    estimate = GaussianDenoiser(path, prediction="data", clip=1.0)(torch.tensor([[3.0]]), torch.tensor([[2.0]]), 0.5)
    assert estimate.data.item() == 1
    assert (0.5 * estimate.data + 0.5 * estimate.noise).item() == 2


@pytest.mark.parametrize("name", PATHS)
def test_the_posterior_is_bayes_rule(name: str) -> None:
    path, t, s = PATHS[name], 0.6, 0.25
    # x_t = ratio x_s + added noise; of the joint law of (x_s, x_t) given x, condition on x_t.
    alpha_t, alpha_s = path.number(path.alpha, t), path.number(path.alpha, s)
    sigma_t, sigma_s = path.number(path.sigma, t), path.number(path.sigma, s)
    covariance = alpha_t / alpha_s * sigma_s**2
    gain = covariance / sigma_t**2
    x, x_t = 1.7, -0.4
    posterior = Posterior.between(path, t, s, like=torch.zeros((), dtype=torch.float64))
    mean = posterior.mean(torch.tensor(x, dtype=torch.float64), torch.tensor(x_t, dtype=torch.float64))
    assert mean.item() == pytest.approx(alpha_s * x + gain * (x_t - alpha_t * x), rel=1e-9)
    assert posterior.variance.item() == pytest.approx(sigma_s**2 - gain * covariance, rel=1e-9)
    assert posterior.largest_variance.item() == pytest.approx(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2, rel=1e-9)


def test_betas_are_the_published_tables() -> None:
    assert linear_betas()[0] == 1e-4
    assert linear_betas()[-1] == 0.02
    assert linear_betas(500)[-1] == pytest.approx(0.04)
    assert scaled_linear_betas()[0] == pytest.approx(0.0015)
    assert max(cosine_betas()) == 0.999
    torch.testing.assert_close(
        STEPPED["linear"].squared_alphas[1:].float(), golden("dit")["out.alphas_cumprod"].float(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        STEPPED["cosine"].squared_alphas[1:].float(),
        golden("mar")["out.alphas_cumprod_train"].float(),
        rtol=1e-6,
        atol=0,
    )


def test_times_between_steps_and_wrong_betas_are_refused() -> None:
    path = STEPPED["linear"]
    with pytest.raises(ValueError, match="1000 steps"):
        path.alpha(torch.tensor(0.12345, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"betas must be numbers in \(0, 1\), .*, got 1 of 2 outside, such as 1"):
        SteppedPath([0.1, 1.0])
    with pytest.raises(ValueError, match=r"a linear schedule of steps=10, .* got 5 of 10 outside, such as 1\.116"):
        ScheduledPath("linear", steps=10)
    times = path.training_times(torch.tensor([1e-9, 0.4999, 1 - 1e-12], dtype=torch.float64))
    assert path.network_time(times).round().tolist() == [0, 499, 999]


def test_times_with_a_normal_logit_have_their_quantiles_and_shift() -> None:
    u = torch.tensor([0.1, 0.5, 0.975], dtype=torch.float64)
    plain = LogitNormalTimes(0.8, 0.8)(u)
    expected = [0.8 - 0.8 * 1.2815515655446004, 0.8, 0.8 + 0.8 * 1.959963984540054]
    torch.testing.assert_close(torch.logit(plain), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    # Shifting multiplies the odds.
    torch.testing.assert_close(torch.logit(LogitNormalTimes(0.8, 0.8, shift=3.0)(u)), torch.logit(plain) + log(3))
    assert shifted(torch.tensor([0.0, 1.0]), 5.0).tolist() == [0, 1]


@pytest.mark.parametrize("error_of", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_another_quantity_is_its_squared_difference(kind: PredictionKind, error_of: PredictionKind) -> None:
    path = TrigonometricPath()
    denoiser = GaussianDenoiser(path, prediction=kind)
    loss = DenoisingLoss(denoiser, error_of=error_of)
    data, noise = noise_like((4, 5), 0), noise_like((4, 5), 1)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    x_t = path.add_noise(data, noise, t)
    output = denoiser.target(data, noise, t) + 0.1 * noise_like((4, 5), 2)
    estimate = denoiser(output, x_t, t)
    other = GaussianDenoiser(path, prediction=error_of)
    difference = other.target(estimate.data, estimate.noise, t) - other.target(data, noise, t)
    terms = loss(output, data, noise, x_t=x_t, t=t)
    torch.testing.assert_close(terms["error"], (difference**2).mean(dim=1), rtol=1e-7, atol=1e-12)
    assert set(terms) == {"error"}


def test_a_bounded_sigma_bounds_the_velocity_of_a_prediction_of_the_data() -> None:
    path = RectifiedPath()
    loss = DenoisingLoss(GaussianDenoiser(path, prediction="data", smallest_sigma=0.05), error_of="velocity")
    data, noise, wrong = noise_like((2, 6), 0), noise_like((2, 6), 1), noise_like((2, 6), 2)
    t = torch.tensor([0.01, 0.5], dtype=torch.float64)
    x_t = path.add_noise(data, noise, t)
    bounded = t.clamp(min=0.05)[:, None]
    expected = (((x_t - data) / bounded - (x_t - wrong) / bounded) ** 2).mean(dim=1)
    torch.testing.assert_close(loss(wrong, data, noise, x_t=x_t, t=t)["error"], expected)


def test_a_step_backwards_is_that_of_dit() -> None:
    stored = golden("dit")
    path = STEPPED["linear"]
    x_t, t = stored["in.x"], (stored["in.t"].double() + 1) / 1000
    estimate = GaussianDenoiser(path, learned_variance=True)(stored["out.out"], x_t, t)
    posterior = Posterior.between(path, t, t - 1 / 1000, like=x_t)
    torch.testing.assert_close(estimate.data, stored["out.p_pred_xstart"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.mean(estimate.data, x_t), stored["out.p_mean"], rtol=1e-5, atol=1e-6)
    log_variance = posterior.log_variance(estimate, smallest=posterior.variance)
    torch.testing.assert_close(log_variance, stored["out.p_log_variance"])
    torch.testing.assert_close(path.add_noise(x_t, stored["in.noise"], t), stored["out.x_t"])


def test_the_velocity_of_straight_lines_is_read_as_sit_does() -> None:
    stored = golden("sit")
    t = 1 - stored["in.t"].double()  # its time runs from noise to data
    path = RectifiedPath()
    estimate = GaussianDenoiser(path, prediction="velocity")(-stored["out.velocity"], stored["in.x"], t)
    torch.testing.assert_close(estimate.noise, stored["out.eps"])
    torch.testing.assert_close(estimate.score(path, t), stored["out.score"])
    loss = DenoisingLoss(GaussianDenoiser(path, prediction="velocity"))
    x_t = path.add_noise(stored["in.x"], stored["in.noise"], t)
    terms = loss(-stored["out.loss_pred"], stored["in.x"], stored["in.noise"], x_t=x_t, t=t)
    torch.testing.assert_close(terms["error"], stored["out.loss"])
    torch.testing.assert_close(
        TrigonometricPath().add_noise(stored["in.x"], stored["in.noise"], t), stored["out.gvp_xt"], rtol=1e-5, atol=1e-6
    )
    velocity = -TrigonometricPath().velocity(stored["in.x"], stored["in.noise"], t)
    torch.testing.assert_close(velocity, stored["out.gvp_ut"], rtol=1e-5, atol=1e-5)


def test_the_levels_of_a_discretized_law_sum_to_one() -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, deviation in ((0.1, 0.02), (0.9, 0.3), (-1.5, 1.0)):
        log_p = discretized_log_likelihood(levels, torch.tensor(mean), torch.tensor(log(deviation)).double())
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    middle = discretized_log_likelihood(levels[127:128], levels[127:128], torch.tensor(log(0.01)).double())
    assert middle.exp().item() == pytest.approx(erf(1 / 255 / 0.01 / 2**0.5), abs=3e-4)


# --- Bounds ---


def gaussian_estimate(path: GaussianPath, mean: float, deviation: float, x_t: Tensor, t: float) -> Estimate:
    """What the best network says where the data are N(mean, deviation^2)."""
    alpha, sigma = path.number(path.alpha, t), path.number(path.sigma, t)
    gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
    data = mean + gain * (x_t - alpha * mean)
    return Estimate(data=data, noise=(x_t - alpha * data) / sigma)


@pytest.mark.parametrize("name", PATHS)
def test_the_bound_of_the_exact_reverse_is_the_entropy_and_what_its_ends_miss(name: str) -> None:
    path, mean, deviation = PATHS[name], 0.3, 0.8
    times = [1.0, 0.8, 0.5, 0.2, 0.01]
    # The bound is quadratic in the data and in each noise: two points each give its mean exactly.
    data = torch.tensor([mean - deviation, mean + deviation] * 2, dtype=torch.float64)[:, None]
    noise = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)[:, None]

    def exact(x_t: Tensor, t: float) -> Estimate:
        estimate = gaussian_estimate(path, mean, deviation, x_t, t)
        if t == times[-1]:
            return estimate
        posterior = Posterior.between(path, t, times[times.index(t) + 1], like=x_t)
        variance = posterior.variance + posterior.data_weight**2 * unsure(path, deviation, t)
        low, high = posterior.variance.log(), posterior.largest_variance.log()
        place = 2 * (variance.log() - low) / (high - low) - 1
        return Estimate(data=estimate.data, noise=estimate.noise, variance=place.expand_as(x_t))

    def bound(estimate: Denoise, variance: Literal["smallest", "largest", "learned"]) -> float:
        return (
            variational_bound(estimate, data, path=path, times=times, noise=lambda _: noise, variance=variance)
            .mean()
            .item()
        )

    def divergence(mean: float, variance: float, other: float) -> float:
        """Of N(mean, variance) from N(0, other)."""
        return (mean**2 + variance) / other / 2 - 0.5 + log(other / variance) / 2

    entropy = log(deviation * (2 * pi * torch.e) ** 0.5)
    alpha, sigma = path.number(path.alpha, 1.0), path.number(path.sigma, 1.0)
    prior = divergence(alpha * mean, (alpha * deviation) ** 2 + sigma**2, 1.0)
    spread = path.number(path.sigma, 0.01) / path.number(path.alpha, 0.01)
    decoder = divergence(0.0, unsure(path, deviation, 0.01), spread**2)
    assert bound(exact, "learned") == pytest.approx(entropy + prior + decoder, abs=1e-9)
    best = bound(exact, "learned")
    assert bound(exact, "smallest") > best + 1e-3
    assert bound(exact, "largest") > best + 1e-3
    wrong = bound(lambda x, t: replace(exact(x, t), data=exact(x, t).data + 0.1), "learned")
    assert wrong > best + 1e-3


def unsure(path: GaussianPath, deviation: float, t: float) -> float:
    """The variance of the data given x_t."""
    alpha, sigma = path.number(path.alpha, t), path.number(path.sigma, t)
    return (deviation * sigma) ** 2 / ((alpha * deviation) ** 2 + sigma**2)


def test_the_first_and_later_terms_of_a_step_bound() -> None:
    path = SteppedPath(linear_betas(100)[:10])
    data = torch.tensor([[0.2], [0.2], [0.2]], dtype=torch.float64)
    noise = torch.tensor([[0.5], [0.5], [0.5]], dtype=torch.float64)
    t = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    x_t = path.add_noise(data, noise, t)
    perfect = Estimate(data=data, noise=noise, variance=-torch.ones_like(data))
    terms = step_bound(perfect, data, x_t=x_t, t=t, path=path)
    # The posterior itself costs nothing, but at the first step, where the data are told from their neighbours.
    torch.testing.assert_close(terms[1:], torch.zeros(2, 1, dtype=torch.float64), rtol=0, atol=1e-12)
    second = Posterior.between(path, 0.2, 0.1, like=data).variance
    assert terms[0].item() == pytest.approx(
        -discretized_log_likelihood(data[:1], data[:1], second.log() / 2).item(), rel=1e-6
    )
    wider = Estimate(data=data, noise=noise, variance=torch.ones_like(data))
    posterior = Posterior.between(path, 0.7, 0.6, like=data)
    ratio = (posterior.variance / posterior.largest_variance).item()
    assert step_bound(wider, data, x_t=x_t, t=t, path=path)[2].item() == pytest.approx((ratio - 1 - log(ratio)) / 2)


def test_the_learned_variance_is_trained_and_the_mean_is_not_by_the_bound() -> None:
    path = STEPPED["cosine"]
    loss = DenoisingLoss(GaussianDenoiser(path, learned_variance=True))
    data, noise = noise_like((3, 4), 0), noise_like((3, 4), 1)
    t = loss.times(torch.tensor([0.1, 0.5, 0.9]))
    x_t = path.add_noise(data, noise, t)
    output = torch.cat((noise + 0.1, torch.zeros_like(noise)), dim=1).requires_grad_()
    terms = loss(output, data, noise, x_t=x_t, t=t)
    (gradient,) = torch.autograd.grad(terms["bound"].sum(), output)
    assert bool((gradient[:, :4] == 0).all() and (gradient[:, 4:] != 0).all())
    torch.testing.assert_close(terms["error"], torch.full((3,), 0.01, dtype=torch.float64))
    with pytest.raises(ValueError, match="learned variance"):
        DenoisingLoss(GaussianDenoiser(RectifiedPath(), learned_variance=True))


def test_times_of_a_bound_must_fall_and_stay_above_zero() -> None:
    for times in ([0.5, 0.0], [0.5, 0.5], []):
        with pytest.raises(ValueError, match="times must fall"):
            variational_bound(
                lambda x, t: gaussian_estimate(RectifiedPath(), 0.0, 1.0, x, t),
                torch.zeros(1, 1),
                path=RectifiedPath(),
                times=times,
                noise=lambda _: torch.zeros(1, 1),
            )


def test_the_numbers_of_a_time_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver asks for those of its times in every draw; a training that takes floats must not fill the memory."""
    path, asked = RectifiedPath(), []

    def alpha(t: torch.Tensor) -> torch.Tensor:
        asked.append(t.tolist())
        return 1 - t

    monkeypatch.setattr(path, "alpha", alpha)
    like = torch.zeros(2, 3)
    for _ in range(3):
        assert path.at(path.alpha, 0.25, like) == 0.75 and path.at(path.alpha, 0.5, like) == 0.5
        posterior = Posterior.between(path, 0.5, 0.25, like=like)
    assert asked == [0.25, 0.5, 0.5, 0.25]
    times = torch.tensor([0.5, 0.5], dtype=torch.float64)
    of_each = Posterior.between(path, times, times / 2, like=like)
    for name in ("data_weight", "state_weight", "variance", "largest_variance"):
        torch.testing.assert_close(getattr(posterior, name).expand(2, 1), getattr(of_each, name))
    monkeypatch.setattr(gaussian, "_MOST_KEPT", 5)
    for number in range(20):
        path.number(path.sigma, number / 20)
    assert len(vars(path)["_kept"]) <= 5
