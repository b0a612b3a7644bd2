"""Solvers: the exact law on Gaussian data, orders of convergence, a mixture, and the grids of published code."""

import os
from collections.abc import Callable
from math import cos, exp
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kstest, norm
from torch import Tensor

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import (
    Denoise,
    Estimate,
    GaussianPath,
    LinearRatePath,
    RectifiedPath,
    ScheduledPath,
    SteppedPath,
    TrigonometricPath,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
)
from discrete_lit.diffusion.solvers import (
    DDIM,
    DDPM,
    Euler,
    EulerMaruyama,
    Heun,
    HeunMaruyama,
    Solver,
    Step,
    even_steps,
)

MEAN, DEVIATION = 0.4, 0.6
PATHS: dict[str, GaussianPath] = {
    "rectified": RectifiedPath(),
    "trigonometric": TrigonometricPath(),
    "linear rate": LinearRatePath(),
    "steps": SteppedPath(cosine_betas(1024)),
}


def best(path: GaussianPath) -> Denoise:
    """What the best network says where the data are N(MEAN, DEVIATION^2)."""

    def denoise(x_t: Tensor, t: float) -> Estimate:
        alpha, sigma = path.number(path.alpha, t), path.number(path.sigma, t)
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        data = MEAN + gain * (x_t - alpha * MEAN)
        noise = sigma / (alpha**2 * DEVIATION**2 + sigma**2) * (x_t - alpha * MEAN)
        return Estimate(data=data, noise=noise)

    return denoise


def law(solver: Solver, path: GaussianPath) -> tuple[float, float]:
    """Mean and deviation of what a solver draws from standard normal noise, exactly.

    With the best network of Gaussian data all is linear in the start and in each fresh noise. So there is one row for
    each of these, with a 1 there and 0 elsewhere, and one of zeros, which is the mean.
    """
    steps = solver.steps
    start = torch.zeros(steps + 2, 1, dtype=torch.float64)
    start[1] = 1

    def noise(step: int) -> Tensor:
        fresh = torch.zeros(steps + 2, 1, dtype=torch.float64)
        fresh[2 + step] = 1
        return fresh

    drawn = solver(best(path), start, path=path, noise=noise)[:, 0]
    return drawn[0].item(), (drawn[1:] - drawn[0]).norm().item()


def deterministic_end(path: GaussianPath) -> tuple[float, float]:
    """Where the exact flow leads the mean and a deviation of standard normal noise at t = 1."""
    alpha, sigma = path.number(path.alpha, 1.0), path.number(path.sigma, 1.0)
    scale = DEVIATION / (alpha**2 * DEVIATION**2 + sigma**2) ** 0.5
    return MEAN - scale * alpha * MEAN, scale


@pytest.mark.parametrize(
    ("solver", "order"),
    [(Euler, 1), (Heun, 2), (DDIM, 1)],
    ids=["Euler", "Heun", "DDIM"],
)
@pytest.mark.parametrize("name", ["rectified", "trigonometric"])
def test_solvers_of_the_flow_reach_its_end_with_their_order(name: str, solver: type[Solver], order: int) -> None:
    path = PATHS[name]
    mean, scale = deterministic_end(path)

    def miss(steps: int) -> float:
        found = law(solver(steps), path)
        return abs(found[0] - mean) + abs(found[1] - scale)

    # In the limit of small steps, the error falls by 2^order where they are halved.
    ratios = [miss(steps) / miss(2 * steps) for steps in (64, 128)]
    assert all(2**order * 0.9 < ratio < 2**order * 1.1 for ratio in ratios), ratios


STOCHASTIC: dict[str, Callable[[int], Solver]] = {
    "DDPM": lambda steps: DDPM(steps, variance="smallest"),
    "DDPM, largest": lambda steps: DDPM(steps, variance="largest"),
    "DDIM, eta 1": lambda steps: DDIM(steps, eta=1.0),
    "DDIM, eta 0.5": lambda steps: DDIM(steps, eta=0.5),
    "Euler-Maruyama": lambda steps: EulerMaruyama(steps, last_step=1 / steps),
    "Euler-Maruyama, strong": lambda steps: EulerMaruyama(steps, last_step=1 / steps, strength=3.0),
}


@pytest.mark.parametrize("solver", STOCHASTIC)
@pytest.mark.parametrize("name", PATHS)
def test_stochastic_solvers_reach_the_law_of_the_data(name: str, solver: str) -> None:
    if name in ("steps", "linear rate") and solver.startswith("Euler"):
        return  # the first has no slopes, the second an infinite one at t = 0
    path = PATHS[name]

    def miss(steps: int) -> float:
        mean, deviation = law(STOCHASTIC[solver](steps), path)
        return abs(mean - MEAN) + abs(deviation - DEVIATION)

    few, many = miss(128), miss(512)
    assert many < 0.02, many
    assert many < few / 2, (few, many)


@pytest.mark.parametrize("name", ["rectified", "trigonometric"])
def test_noise_before_heuns_two_passes_errs_less_than_before_one(name: str) -> None:
    def miss(kind: type[EulerMaruyama], steps: int) -> float:
        mean, deviation = law(kind(steps, last_step=1 / steps), PATHS[name])
        return abs(mean - MEAN) + abs(deviation - DEVIATION)

    # On Gaussian data it falls faster than by the first order, which is Euler's.
    assert 1.8 < miss(EulerMaruyama, 64) / miss(EulerMaruyama, 128) < 2.2
    assert miss(HeunMaruyama, 16) / miss(HeunMaruyama, 32) > 3.5
    assert miss(HeunMaruyama, 256) < miss(EulerMaruyama, 256) / 5


def test_ddim_on_straight_lines_is_euler_and_with_eta_1_it_is_ddpm() -> None:
    path, start = RectifiedPath(), torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        DDIM(7)(best(path), start, path=path), Euler(7)(best(path), start, path=path), rtol=1e-12, atol=1e-12
    )
    noises = torch.randn(9, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for path in PATHS.values():
        ours = DDIM(9, eta=1.0)(best(path), start, path=path, noise=noises.__getitem__)
        theirs = DDPM(9, variance="smallest")(best(path), start, path=path, noise=noises.__getitem__)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_temperature_and_shift() -> None:
    path = RectifiedPath()
    cold = law(DDPM(200, variance="smallest", temperature=0.5), path)
    assert cold[1] < 0.8 * DEVIATION
    times = Euler(4, shift=3.0).times(path)
    assert times == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert Euler(2, start=0.5).times(path) == [0.5, 0.25, 0]


MIXTURE = ((0.3, -1.0, 0.2), (0.7, 0.8, 0.3))  # weight, mean and deviation of each part


def best_of_mixture(path: GaussianPath) -> Denoise:
    def denoise(x_t: Tensor, t: float) -> Estimate:
        alpha, sigma = path.number(path.alpha, t), path.number(path.sigma, t)
        weights, means = [], []
        for weight, mean, deviation in MIXTURE:
            variance = alpha**2 * deviation**2 + sigma**2
            centred = x_t - alpha * mean
            weights.append(weight / variance**0.5 * torch.exp(-(centred**2) / (2 * variance)))
            means.append(mean + alpha * deviation**2 / variance * centred)
        total = torch.stack(weights).sum(dim=0)
        data = (torch.stack(weights) * torch.stack(means)).sum(dim=0) / total
        return Estimate(data=data, noise=(x_t - alpha * data) / sigma)

    return denoise


@pytest.mark.parametrize(
    "solver",
    [
        DDPM(400, variance="smallest"),
        DDIM(400),
        DDIM(400, eta=1.0),
        Heun(100, euler_last=True),
        Euler(400),
        EulerMaruyama(400, last_step=0.005),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_a_mixture_is_drawn_by_its_law(solver: Solver) -> None:
    path, count = TrigonometricPath(), 4000
    random = CounterRandom(5, torch.arange(count))
    drawn = solver(
        best_of_mixture(path),
        random.normal(Purpose.LATENT_NOISE, 1),
        path=path,
        noise=lambda step: random.normal(Purpose.LATENT_NOISE, 1, step + 1),
    )

    def distribution(x: np.ndarray) -> np.ndarray:
        return np.sum([weight * norm.cdf(x, mean, deviation) for weight, mean, deviation in MIXTURE], axis=0)

    assert kstest(drawn[:, 0].numpy(), distribution).pvalue > 0.01


def test_grids_of_published_code() -> None:
    assert even_steps(1000, 1) == [0]
    assert even_steps(1000, 1000) == list(range(1000))
    assert even_steps(1000, 4) == [0, 333, 666, 999]
    path = SteppedPath(scaled_linear_betas())
    ldm = DDIM(10, eta=1.0, spacing="strided", offset=1, last="first_step")
    assert [round(1000 * t) - 1 for t in ldm.times(path)] == [*range(901, 0, -100), 0]
    assert DDIM(10, spacing="strided").times(path)[-1] == 0
    if folder := os.environ.get("DISCRETE_LIT_GOLDEN"):
        dit = load_file(Path(folder) / "dit" / "a.safetensors")
        assert even_steps(1000, 50) == dit["out.use_timesteps_50"].tolist()
        stored = load_file(Path(folder) / "ldm" / "a.safetensors")
        squared = torch.tensor([path.number(path.alpha, t) ** 2 for t in ldm.times(path)]).flip(0)
        torch.testing.assert_close(squared[1:], stored["out.ddim_alphas"].float())
        torch.testing.assert_close(squared[:-1], stored["out.ddim_alphas_prev"].float())


def test_one_step_of_dit_and_of_ldm_from_their_networks_outputs() -> None:
    folder = os.environ.get("DISCRETE_LIT_GOLDEN")
    if not folder:
        pytest.skip("DISCRETE_LIT_GOLDEN names no folder of golden files")
    stored = load_file(Path(folder) / "ldm" / "a.safetensors")
    path, solver = SteppedPath(scaled_linear_betas()), DDIM(10, eta=1.0, spacing="strided", offset=1, last="first_step")
    times = solver.times(path)[::-1]
    index = int(stored["in.index"])

    def known(x_t: Tensor, t: float) -> Estimate:
        data = stored["out.ddim_step_x0"]
        noise = (x_t - path.number(path.alpha, t) * data) / path.number(path.sigma, t)
        return Estimate(data=data, noise=noise)

    step = Step(t=times[index + 1], s=times[index], path=path, denoise=known, noise=lambda: stored["in.noise"])
    torch.testing.assert_close(solver.step(stored["in.x"], step), stored["out.ddim_step_eta1"], rtol=1e-4, atol=1e-4)


def test_wrong_settings_are_refused() -> None:
    path = SteppedPath(linear_betas(100))
    start = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="steps=200 exceeds the 100 steps"):
        DDPM(200)(best(path), start, path=path)
    with pytest.raises(ValueError, match="give noise"):
        DDPM(10, variance="smallest")(best(path), start, path=path)
    with pytest.raises(ValueError, match="variance='learned'"):
        DDPM(10)(best(path), start, path=path, noise=lambda _: start)
    with pytest.raises(ValueError, match="in continuous time"):
        EulerMaruyama(10)(best(path), start, path=path)
    with pytest.raises(ValueError, match="not of steps"):
        DDIM(10, shift=3.0)(best(path), start, path=path)
    with pytest.raises(ValueError, match="takes step 100 of 100"):
        DDIM(100, spacing="strided", offset=1)(best(path), start, path=path)
    for wrong in (
        lambda: Euler(0),
        lambda: Euler(4, shift=0.0),
        lambda: Euler(4, start=1.5),
        lambda: DDIM(4, eta=2.0),
        lambda: DDPM(4, temperature=-1.0),
        lambda: EulerMaruyama(1),
        lambda: EulerMaruyama(4, last_step=1.0),
    ):
        with pytest.raises(ValueError, match="must"):
            wrong()


def test_shapes_of_images_and_precision_are_kept() -> None:
    path = TrigonometricPath()
    start = torch.full((2, 3, 4, 4), cos(1.0))
    for solver in (DDPM(3, variance="smallest"), DDIM(3), Euler(3), Heun(3, euler_last=True), EulerMaruyama(3)):
        drawn = solver(best(path), start, path=path, noise=lambda _: start * exp(-1))
        assert drawn.shape == start.shape
        assert drawn.dtype == torch.float32
        assert bool(drawn.isfinite().all())


def test_what_depends_on_the_path_alone_is_computed_once() -> None:
    made: list[int] = []

    class Counted(DDPM):
        def times(self, path: GaussianPath) -> list[float]:
            made.append(self.steps)
            return super().times(path)

    solver, path = Counted(4, variance="smallest"), ScheduledPath("cosine", steps=10)

    def draw(solver: Solver, path: GaussianPath) -> None:
        start = torch.zeros(2, 3, dtype=torch.float64)
        solver(lambda x, t: Estimate(data=x, noise=x), start, path=path, noise=lambda step: torch.zeros_like(start))

    draw(solver, path)
    draw(solver, path)
    assert made == [4]
    draw(solver, ScheduledPath("cosine", steps=12))
    draw(solver.with_steps(3), path)
    assert made == [4, 4, 3] and solver.steps == 4
    solver.offset = 1  # a setting that was changed is not forgotten
    draw(solver, path)
    assert made == [4, 4, 3, 4]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        solver.with_steps(0)
    with pytest.raises(ValueError, match="steps must be at least 2, the last among them, got 1"):
        EulerMaruyama(3).with_steps(1)
