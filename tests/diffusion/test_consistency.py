"""ConsistencyLoss and ConsistencySampler on Gaussian data, where the consistency function is known."""

from itertools import pairwise
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from discrete_lit.diffusion.consistency import ConsistencyLoss, ode_step
from discrete_lit.diffusion.gaussian import (
    Estimate,
    GaussianDenoiser,
    LinearRatePath,
    RectifiedPath,
    ScheduledPath,
    TrigonometricPath,
)
from discrete_lit.diffusion.solvers import ConsistencySampler

MEAN, DEVIATION = 1.5, 0.4


def exact(x: Tensor, t: float) -> Tensor:
    """Lead x_t to the data on straight lines, for data N(MEAN, DEVIATION^2)."""
    spread = sqrt((1 - t) ** 2 * DEVIATION**2 + t**2)
    return MEAN + DEVIATION / spread * (x - (1 - t) * MEAN)


def gains(count: int, deviation: float = DEVIATION) -> list[float]:
    """List the slopes of f at the N + 1 times at which consistency training stands still.

    The best guess of f(x_s, s), which is linear, given x_t of the same noise: c_t = c_s Cov(x_s, x_t) / Var(x_t).
    """
    found = [1.0]
    for number in range(1, count + 1):
        t, s = number / count, (number - 1) / count
        covariance = (1 - s) * (1 - t) * deviation**2 + s * t
        found.append(found[-1] * covariance / ((1 - t) ** 2 * deviation**2 + t**2))
    return found


def teacher(x: Tensor, t: Tensor) -> Estimate:
    """Know the data and the noise in x_t as well as can be."""
    t = t[:, None]
    centred = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * DEVIATION**2 + t**2)
    return Estimate(data=MEAN + (1 - t) * DEVIATION**2 * centred, noise=t * centred)


def distilled_gains(count: int, solver: str, deviation: float = DEVIATION) -> list[float]:
    """List the slopes of f at the N + 1 times at which distillation stands still: products of a step's slopes.

    The ODE of x - (1 - t) MEAN is linear, x' = r(t) x with r half the slope of log Var x_t.
    """

    def rate(t: float) -> float:
        return (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)

    found = [1.0]
    for number in range(1, count + 1):
        t, h = number / count, 1 / count
        euler = 1 - h * rate(t)
        heun = 1 - h * (rate(t) + euler * rate(t - h)) / 2
        found.append(found[-1] * (euler if solver == "euler" or number == 1 else heun))
    return found


def loss(**settings: Any) -> ConsistencyLoss:
    denoiser = GaussianDenoiser(RectifiedPath(), prediction="velocity")
    return ConsistencyLoss(denoiser, **{"intervals": 8, "first_intervals": 1, "doubling_steps": 0, **settings})


@pytest.mark.parametrize("solver", [None, "euler", "heun"])
@pytest.mark.parametrize("moved", [0.0, 0.01])
def test_training_stands_still_at_the_best_linear_function(moved: float, solver: str | None) -> None:
    """Signs have the second moments of a normal law, which is all that a squared error looks at."""
    count = 8
    slopes = torch.tensor(gains(count) if solver is None else distilled_gains(count, solver), dtype=torch.float64)
    slopes[3] += moved
    slopes.requires_grad_()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        slope = slopes[(t * count).round().long()][:, None]
        f = MEAN + slope * (x - (1 - t[:, None]) * MEAN)
        return (x - f) / t[:, None].clamp(min=1e-9)

    signs = torch.cartesian_prod(*2 * [torch.tensor([-1.0, 1.0], dtype=torch.float64)])
    t = (torch.arange(1, count + 1, dtype=torch.float64) / count).repeat_interleave(4) - 0.3 / count
    data, noise = (column.repeat(count)[:, None] for column in (MEAN + DEVIATION * signs[:, 0], signs[:, 1]))
    # So wide a Huber distance is the squared error, over twice its width.
    chosen = loss(huber=1e4, solver=solver or "heun")
    terms = chosen(predict, data, noise, t=t, teacher=None if solver is None else teacher)
    assert terms.shape == (4 * count,)
    (terms.sum() * 1e4).backward()
    assert slopes.grad is not None
    still = slopes.grad.abs() < 1e-5
    assert bool(still[0]), "what f(x_s, s) is pulled to is held fixed"
    assert still[1:].tolist() == [moved == 0 or number not in (3, 4) for number in range(1, count + 1)]


def test_more_intervals_lead_to_the_consistency_function() -> None:
    """At t = 1 f has the slope of the ODE's, the deviation itself, with an error that halves with the interval."""
    errors = [abs(gains(count)[-1] - DEVIATION) for count in (64, 128, 256)]
    assert all(1.8 < coarse / fine < 2.2 for coarse, fine in pairwise(errors)), errors


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_distillation_has_the_order_of_its_solver(solver: str, order: int) -> None:
    """What is left at t = 1 halves with the interval for Euler, as without a teacher, and quarters for Heun."""
    errors = [abs(distilled_gains(count, solver)[-1] - DEVIATION) for count in (64, 128, 256)]
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert ratios == pytest.approx(2 * [2**order], rel=0.1), errors


@pytest.mark.parametrize("path", [RectifiedPath(), TrigonometricPath(), LinearRatePath()])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_a_step_follows_the_ode_of_a_gaussian(path: Any, solver: Any, order: int) -> None:
    """x_s has the place in its law that x_t has: (x_s - alpha_s MEAN) / sqrt(Var x_s) stays as it is."""

    def law(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        return alpha, sigma, alpha**2 * DEVIATION**2 + sigma**2

    def best(x: Tensor, t: Tensor) -> Estimate:
        alpha, sigma, variance = law(t)
        centred = (x - alpha * MEAN) / variance
        return Estimate(data=MEAN + alpha * DEVIATION**2 * centred, noise=sigma * centred)

    t, place = torch.tensor([0.3, 0.6, 0.95], dtype=torch.float64), torch.tensor([[1.0], [-2.0], [0.5]]).double()
    errors = []
    for h in (0.01, 0.005):
        alpha, _, variance = law(t)
        reached = ode_step(best, path, alpha * MEAN + variance.sqrt() * place, t, t - h, solver)
        alpha, _, variance = law(t - h)
        errors.append((reached - alpha * MEAN - variance.sqrt() * place).abs())
    # The error of one step is of one order more.
    torch.testing.assert_close(errors[0] / errors[1], torch.full_like(place, 2 ** (order + 1)), rtol=0.1, atol=0)
    end = ode_step(best, path, place, t, torch.zeros(3), solver)
    torch.testing.assert_close(end, best(place, t).data)


def test_the_distance_is_pseudo_huber_times_the_intervals() -> None:
    data, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0.3, 0.6, 1.0])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) * t[:, None].float()

    terms = loss(intervals=4, huber=0.1)(predict, data, noise, t=t)
    for row, later in enumerate((2, 3, 4)):
        ends = []
        for step in (later, later - 1):
            time = step / 4
            x = (1 - time) * data[row] + time * noise[row]
            ends.append(x - time * torch.sin(x) * time)
        distance = ((ends[0] - ends[1]).square().sum() + 0.04).sqrt() - 0.2
        torch.testing.assert_close(terms[row], (4 * distance).to(terms.dtype), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["v", "velocity"])
def test_the_distance_may_be_of_what_is_predicted(prediction: Any) -> None:
    """A network that is off by as much at every time costs as much at every time, where f is held at the truth."""
    denoiser = GaussianDenoiser(RectifiedPath(), prediction=prediction)
    data, noise = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    t = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    off = torch.zeros((), dtype=torch.float64)

    def predict(x: Tensor, time: Tensor) -> Tensor:
        """Say what leads to the data exactly, but for the student's time."""
        return denoiser.target(data, noise, time) + torch.where(time == t, off, 0.0)[:, None]

    for distance_of, slopes in (("data", (t / ((1 - t) ** 2 + t**2)) if prediction == "v" else t), ("prediction", 1)):
        chosen = ConsistencyLoss(
            denoiser, intervals=4, first_intervals=1, doubling_steps=0, huber=1e-9, distance_of=distance_of
        )
        off.fill_(0.5)
        terms = chosen(predict, data, noise, t=t)
        torch.testing.assert_close(
            terms, 4 * 0.5 * sqrt(6) * torch.ones(4, dtype=torch.float64) * slopes, rtol=1e-6, atol=1e-6
        )


def test_intervals_double_over_training() -> None:
    growing = loss(intervals=80, first_intervals=10, doubling_steps=400)
    assert [growing.intervals_at(step) for step in (0, 99, 100, 200, 300, 399, 400)] == [10, 10, 20, 40, 80, 80, 80]
    assert growing.intervals_at(None) == 80


@pytest.mark.parametrize("steps", [1, 3])
def test_the_sampler_jumps_exactly(steps: int) -> None:
    """Each jump leads to data of the true law: the noise that is added before it has its share in them."""
    start, *fresh = torch.randn(3, 500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    drawn = ConsistencySampler(steps)(
        lambda x, t: Estimate(data=exact(x, t), noise=x),
        start,
        path=RectifiedPath(),
        noise=lambda step: fresh[step],
    )
    normal = start
    for number in range(1, steps):
        s = 1 - number / steps
        normal = ((1 - s) * DEVIATION * normal + s * fresh[number - 1]) / sqrt((1 - s) ** 2 * DEVIATION**2 + s**2)
    torch.testing.assert_close(drawn, MEAN + DEVIATION * normal)


@pytest.mark.parametrize("path", [RectifiedPath(), TrigonometricPath(), LinearRatePath()])
def test_the_function_begins_with_the_data(path: Any) -> None:
    prediction: Any = "v" if isinstance(path, LinearRatePath) else "velocity"
    consistency = ConsistencyLoss(GaussianDenoiser(path, prediction=prediction))
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(consistency.function(lambda x, t: x + 7, x, torch.zeros(3)), x)


@pytest.mark.parametrize(("prediction", "left"), [("v", 0.0), ("velocity", 1.0)])
def test_one_jump_of_v_has_no_noise_that_the_network_did_not_make(prediction: Any, left: float) -> None:
    """At t = 1 the noise goes into f by the network alone, or has to be undone by it."""
    consistency = ConsistencyLoss(GaussianDenoiser(RectifiedPath(), prediction=prediction))
    x = torch.randn(3, 4, dtype=torch.float64)
    drawn = consistency.function(lambda x, t: torch.full_like(x, -0.5), x, torch.ones(3))
    torch.testing.assert_close(drawn, 0.5 + left * x)


@pytest.mark.parametrize(
    ("deviation", "count", "trained", "distilled"),
    [(0.02, 40, 0.58, 0.64), (0.02, 160, 0.88, 0.96), (0.2, 40, 0.94, 0.99), (0.2, 160, 0.98, 1.0)],
)
def test_few_intervals_shrink_what_varies_little(
    deviation: float, count: int, trained: float, distilled: float
) -> None:
    """The figures of the module's description."""
    assert gains(count, deviation)[-1] / deviation == pytest.approx(trained, abs=0.006)
    assert distilled_gains(count, "heun", deviation)[-1] / deviation == pytest.approx(distilled, abs=0.006)


def test_settings_that_make_no_consistency_function_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 <= first_intervals <= intervals must hold, got 10 and intervals=4"):
        loss(intervals=4, first_intervals=10)
    with pytest.raises(ValueError, match="huber above 0"):
        loss(first_intervals=1, huber=0.0)
    with pytest.raises(ValueError, match="distance_of must be 'data' or 'prediction', got 'noise'"):
        loss(distance_of="noise")
    with pytest.raises(ValueError, match="solver must be 'euler' or 'heun', got 'dpm'"):
        loss(solver="dpm")
    with pytest.raises(ValueError, match="needs a path in continuous time, this one has steps"):
        ConsistencyLoss(GaussianDenoiser(ScheduledPath(), prediction="v"))
    with pytest.raises(ValueError, match=r"a prediction of 'v' or 'velocity' without a variance.*got 'noise'"):
        ConsistencyLoss(GaussianDenoiser(RectifiedPath()))
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        ConsistencySampler(1, temperature=-1.0)
