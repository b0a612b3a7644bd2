"""The schedulers of diffusers, which draw what our solvers draw from the same network and the same noise."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from discrete_lit.diffusion.gaussian import Estimate, GaussianDenoiser, RectifiedPath, ScheduledPath
from discrete_lit.diffusion.solvers import DDIM, DDPM, Euler

pytestmark = pytest.mark.parity

START = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def others_warnings() -> Iterator[None]:
    """Deprecations inside the other package are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def network(x: Tensor, time: float, *, outputs: int = 1) -> Tensor:
    """Any smooth function of the state and the time."""
    made = torch.cos(2 * x + time / 100) + 0.3 * x.roll(1, dims=1)
    return torch.cat([made, torch.sin(3 * x)], dim=1)[:, : outputs * x.shape[1]]


def ours(denoiser: GaussianDenoiser, time: Callable[[float], float]) -> Callable[[Tensor, float], Estimate]:
    def denoise(x: Tensor, t: float) -> Estimate:
        return denoiser(network(x, time(t), outputs=2 if denoiser.learned_variance else 1), x, t)

    return denoise


def theirs(scheduler: Any, *, outputs: int = 1, **settings: Any) -> Tensor:
    x = START
    for time in scheduler.timesteps:
        x = scheduler.step(network(x, float(time), outputs=outputs), time, x, **settings).prev_sample
    return x


@pytest.mark.parametrize(("prediction", "other"), [("noise", "epsilon"), ("data", "sample"), ("v", "v_prediction")])
def test_ddim(prediction: Any, other: str) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=other,
    )
    scheduler.set_timesteps(10)
    denoiser = GaussianDenoiser(ScheduledPath("scaled_linear"), prediction=prediction)
    solver = DDIM(10, spacing="strided", offset=1, last="first_step")
    drawn = solver(ours(denoiser, lambda t: round(1000 * t) - 1), START, path=denoiser.path)
    torch.testing.assert_close(drawn, theirs(scheduler), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variance", "other"), [("smallest", "fixed_small"), ("largest", "fixed_large"), ("learned", "learned_range")]
)
def test_ddpm(variance: Any, other: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(20, beta_start=0.005, beta_end=0.4, clip_sample=False, variance_type=other)
    scheduler.set_timesteps(20)
    learned = variance == "learned"
    path = ScheduledPath("linear", steps=20, start=1e-4, end=0.008)  # of 1,000 steps
    denoiser = GaussianDenoiser(path, learned_variance=learned)
    generator = torch.Generator().manual_seed(1)
    drawn = DDPM(20, variance=variance)(
        ours(denoiser, lambda t: round(20 * t) - 1),
        START,
        path=path,
        noise=lambda step: torch.randn(START.shape, generator=generator, dtype=START.dtype),
    )
    expected = theirs(scheduler, outputs=2 if learned else 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - step / 10 for step in range(10)])
    denoiser = GaussianDenoiser(RectifiedPath(), prediction="velocity")
    drawn = Euler(10, shift=shift)(ours(denoiser, lambda t: 1000 * t), START, path=denoiser.path)
    torch.testing.assert_close(drawn, theirs(scheduler).double(), rtol=1e-4, atol=1e-4)
