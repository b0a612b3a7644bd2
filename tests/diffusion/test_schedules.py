"""Mask schedules: endpoints, derivatives, inverses, precision."""

from math import acos, pi, sin

import pytest
import torch
from scipy.stats import truncnorm

from discrete_lit.diffusion import (
    ArccosSchedule,
    CosineSchedule,
    LinearSchedule,
    MaskSchedule,
    SquareSchedule,
    TruncatedNormalSchedule,
)

SCHEDULES = [ArccosSchedule(), CosineSchedule(), LinearSchedule(), SquareSchedule()]
IDS = [type(schedule).__name__ for schedule in SCHEDULES]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)


def inner_times() -> torch.Tensor:
    return torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@each_schedule
def test_endpoints(schedule: MaskSchedule) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.equal(schedule.mask_probability(ends), ends)
    torch.testing.assert_close(schedule.inverse(ends), ends, rtol=0, atol=1e-15)


@each_schedule
def test_rises(schedule: MaskSchedule) -> None:
    assert (schedule.mask_probability(inner_times()).diff() > 0).all()


@each_schedule
def test_derivative_by_autograd_and_by_differences(schedule: MaskSchedule) -> None:
    t = inner_times().requires_grad_()
    (gradient,) = torch.autograd.grad(schedule.mask_probability(t).sum(), t)
    derivative = schedule.derivative(t.detach())
    torch.testing.assert_close(derivative, gradient, rtol=1e-9, atol=0)
    step = 1e-6
    with torch.no_grad():
        difference = (schedule.mask_probability(t + step) - schedule.mask_probability(t - step)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-5, atol=0)


@each_schedule
def test_inverse(schedule: MaskSchedule) -> None:
    t = inner_times()
    torch.testing.assert_close(schedule.inverse(schedule.mask_probability(t)), t, rtol=0, atol=1e-12)


@each_schedule
def test_precise_next_to_clean_data(schedule: MaskSchedule) -> None:
    t = torch.tensor([1e-14, 1e-9], dtype=torch.float64)
    torch.testing.assert_close(schedule.inverse(schedule.mask_probability(t)), t, rtol=1e-12, atol=0)
    slope = schedule.derivative(t) * t / schedule.mask_probability(t)  # the exponent of the leading power of t
    expected = 0.5 if isinstance(schedule, ArccosSchedule) else 1.0
    torch.testing.assert_close(slope, torch.full_like(slope, expected), rtol=1e-6, atol=0)


@each_schedule
def test_float32_times_are_computed_in_float64(schedule: MaskSchedule) -> None:
    t = torch.tensor([0.3, 0.7])
    for function in (schedule.mask_probability, schedule.derivative, schedule.inverse):
        assert function(t).dtype == torch.float64
        assert torch.equal(function(t), function(t.double()))


def test_values() -> None:
    t = torch.tensor(0.3)
    time = float(t)  # 0.3 as float32 has it
    assert float(CosineSchedule().mask_probability(t)) == pytest.approx(sin(pi * time / 2), rel=1e-14)
    assert float(ArccosSchedule().mask_probability(t)) == pytest.approx(acos(1 - time) * 2 / pi, rel=1e-14)
    assert float(LinearSchedule().mask_probability(t)) == time
    assert float(SquareSchedule().mask_probability(t)) == pytest.approx(1 - (1 - time) ** 2, rel=1e-14)


@pytest.mark.parametrize(("mean", "deviation", "lowest"), [(1.0, 0.25, 0.7), (0.55, 0.25, 0.0), (0.3, 2.0, 0.5)])
def test_truncated_normal_by_scipy(mean: float, deviation: float, lowest: float) -> None:
    schedule = TruncatedNormalSchedule(mean, deviation, lowest)
    law = truncnorm((lowest - mean) / deviation, (1 - mean) / deviation, mean, deviation)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    ratios = schedule.mask_probability(t)
    torch.testing.assert_close(ratios, torch.tensor(law.ppf(t.numpy())), rtol=0, atol=1e-9)
    assert (ratios[0], ratios[-1]) == (pytest.approx(lowest), pytest.approx(1))
    torch.testing.assert_close(schedule.inverse(ratios), t, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.derivative(t), torch.tensor(1 / law.pdf(ratios.numpy())), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deviation": 0.0}, "deviation must be > 0, got 0.0"),
        ({"lowest": 1.0}, r"lowest must lie in \[0, 1\), got 1.0"),
        ({"mean": 50.0}, "mean=50.0 lies too many deviations of 0.25 from"),
    ],
)
def test_truncated_normal_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TruncatedNormalSchedule(**arguments)
