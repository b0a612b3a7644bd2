"""Schedules of diffusion: reference values, rates by autograd, inverses, precision at both ends."""

from math import pi

import pytest
import torch

from discrete_lit.diffusion import (
    ArccosSchedule,
    CosineSchedule,
    CosineSquaredSchedule,
    D3PMCosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    LogLinearSchedule,
    LogSinSchedule,
    MaskSchedule,
    MDLMCosineSchedule,
    NoiseLevel,
    SquareSchedule,
    TruncatedSchedule,
)

SCHEDULES: dict[str, MaskSchedule] = {
    "arccos": ArccosSchedule(),
    "cosine": CosineSchedule(),
    "linear": LinearSchedule(),
    "square": SquareSchedule(),
    "log-linear": LogLinearSchedule(),
    "log-sin": LogSinSchedule(),
    "log-sin to the end": LogSinSchedule(0.0),
    "cosine squared": CosineSquaredSchedule(),
    "MDLM cosine": MDLMCosineSchedule(),
    "geometric": GeometricSchedule(),
    "long geometric": GeometricSchedule(1e-4, 600.0),
    "D3PM cosine": D3PMCosineSchedule(),
    "truncated": TruncatedSchedule(CosineSchedule(), 1e-3, 0.999),
}
each_schedule = pytest.mark.parametrize("name", SCHEDULES)


@each_schedule
def test_rate_is_the_slope_of_the_total_noise(name: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(-schedule.alpha(t).log().sum(), t)
    torch.testing.assert_close(schedule.rate(t.detach()), slope, rtol=1e-9, atol=0)
    (rise,) = torch.autograd.grad(schedule.mask_probability(t).sum(), t)
    torch.testing.assert_close(schedule.derivative(t.detach()), rise, rtol=1e-9, atol=1e-12)
    level = NoiseLevel.at(schedule, t.detach())
    torch.testing.assert_close(level.mask_weight, rise / schedule.mask_probability(t.detach()), rtol=1e-9, atol=1e-12)


@each_schedule
def test_inverse_and_ends(name: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    m = schedule.mask_probability(t)
    torch.testing.assert_close(schedule.alpha(t), 1 - m, rtol=0, atol=1e-15)
    # Where m is next to 1 its own rounding moves t: only there the tolerance is theirs.
    tolerance = 1e-12 + 2**-51 / schedule.derivative(t).clamp(min=2**-50)
    assert ((schedule.inverse(m) - t).abs() <= tolerance)[m < 1 - 2**-50].all()
    assert (schedule.inverse(m) <= 1).all()
    short = {
        "log-linear": (0, 0.999),
        "log-sin": (0, 0.999),
        "cosine squared": (0, 0.999),
        "MDLM cosine": (0, 0.999),
        "geometric": (1e-5, 1 - 2.061e-9),
        "long geometric": (1e-4, 1),
        "truncated": (1e-3, 0.999),
    }
    first, last = short.get(name, (0, 1))
    assert schedule.ends() == (pytest.approx(first, rel=1e-4), pytest.approx(last, abs=1e-12))
    assert (schedule.ends()[0] == 0) == (first == 0)


@each_schedule
def test_float32_times_are_computed_in_float64(name: str) -> None:
    schedule, t = SCHEDULES[name], torch.tensor([0.3, 0.7])
    for function in (schedule.mask_probability, schedule.alpha, schedule.derivative, schedule.rate, schedule.inverse):
        assert function(t).dtype == torch.float64
        assert torch.equal(function(t), function(t.double()))


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULES if name not in ("truncated", "geometric", "long geometric")]
)
def test_nothing_cancels_next_to_clean_data(name: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.tensor([[1e-12], [1e-9]], dtype=torch.float64)
    torch.testing.assert_close(schedule.inverse(schedule.mask_probability(t)), t, rtol=1e-11, atol=0)
    level = NoiseLevel.at(schedule, t)
    torch.testing.assert_close(level.sigma, level.noise, rtol=1e-4, atol=0)
    torch.testing.assert_close(level.odds * level.sigma, torch.ones_like(t), rtol=1e-4, atol=0)
    powers = {"arccos": 0.5, "cosine squared": 2.0, "MDLM cosine": 2.0}
    torch.testing.assert_close(level.mask_weight * t, torch.full_like(t, powers.get(name, 1.0)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["arccos", "cosine", "linear", "square", "log-sin to the end", "D3PM cosine"])
def test_nothing_cancels_next_to_noise(name: str) -> None:
    """alpha falls as a power of 1 - t down to where 1 - m has no digit left."""
    schedule = SCHEDULES[name]
    left = torch.tensor([2.0**-40, 2.0**-41], dtype=torch.float64)  # 1 - t is exact
    alpha = schedule.alpha(1 - left)
    power = 2.0 if name in ("cosine", "square", "log-sin to the end") else 1.0
    assert float(alpha[0] / alpha[1]) == pytest.approx(2**power, rel=1e-9)
    assert float(NoiseLevel.at(schedule, 1 - left).sigma.diff()) == pytest.approx(power * 0.6931471805599453, rel=1e-9)


def test_geometric_noise_beyond_what_float64_tells_from_one() -> None:
    schedule = GeometricSchedule(1e-4, 600.0)
    level = NoiseLevel.at(schedule, torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64))
    assert level.sigma[:, 0].tolist() == pytest.approx([1e-4, (1e-4 * 600) ** 0.5, 600])
    assert level.rate[:, 0].tolist() == pytest.approx([sigma * 15.607270 for sigma in (1e-4, 0.06**0.5, 600)])


def test_reference_values() -> None:
    half, quarter = torch.tensor([[0.5]]), torch.tensor([[0.25]])
    level = NoiseLevel.at(LogSinSchedule(1e-3), half)
    assert float(level.noise) == pytest.approx(0.7063996744, abs=5e-11)
    assert float(level.sigma) == pytest.approx(1.2255358733, abs=5e-11)
    assert float(level.rate) == pytest.approx(3.7793214689, abs=5e-11)
    assert float(level.mask_weight) == pytest.approx(pi / 2, abs=1e-12)
    assert float(LogSinSchedule(1e-3).mask_probability(quarter)) == pytest.approx(0.3823007489, abs=5e-11)
    assert float(MDLMCosineSchedule(1e-3).mask_probability(quarter)) == pytest.approx(0.0760443470, abs=5e-11)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(LogSinSchedule(0.0).mask_probability(t), CosineSchedule().mask_probability(t))
    betas = 1 - torch.cos((t[1:] + 0.008) / 1.008 * pi / 2) / torch.cos((t[:-1] + 0.008) / 1.008 * pi / 2)
    torch.testing.assert_close(D3PMCosineSchedule().alpha(t[1:]), (1 - betas).cumprod(dim=0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogLinearSchedule(1.0), r"epsilon of LogLinearSchedule must lie in \[0, 1\), got 1.0"),
        (lambda: GeometricSchedule(0.0), "0 < sigma_min < sigma_max <= 700 must hold, got 0.0 and 20.0"),
        (lambda: GeometricSchedule(sigma_max=800.0), "got 1e-05 and 800.0"),
        (lambda: D3PMCosineSchedule(0.0), "offset of D3PMCosineSchedule must be > 0, got 0.0"),
        (
            lambda: TruncatedSchedule(LinearSchedule(), 0.5, 0.5),
            "0 <= lowest < highest <= 1 must hold, got 0.5 and 0.5",
        ),
    ],
)
def test_settings_out_of_range(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
