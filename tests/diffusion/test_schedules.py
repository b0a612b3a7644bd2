"""Schedules: reference values, derivatives, inverses, precision at both ends; times spread over a batch."""

from math import acos, pi, sin

import mpmath
import pytest
import torch
from scipy.stats import kstest, truncnorm

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import (
    ArccosSchedule,
    CosineSchedule,
    CosineSquaredSchedule,
    D3PMCosineSchedule,
    GeometricSchedule,
    GIDDSchedule,
    LinearSchedule,
    LogLinearSchedule,
    LogSinSchedule,
    MaskSchedule,
    MDLMCosineSchedule,
    NoiseLevel,
    PowerSchedule,
    SquareSchedule,
    TruncatedNormalSchedule,
    TruncatedSchedule,
    WarpedSchedule,
)
from discrete_lit.diffusion.noise_level import (
    spread_times,
    stratified_times,
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
    "truncated": TruncatedSchedule(CosineSchedule(), lowest=1e-3, highest=0.999),
    "cubic": PowerSchedule(3.0),
    "GIDD": GIDDSchedule(0.2),
    "GIDD with next to no uniform ids": GIDDSchedule(2.1e-9),
    "warped": WarpedSchedule(LinearSchedule(), CosineSchedule()),
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
    "name", [name for name in SCHEDULES if not name.endswith(("truncated", "geometric", "next to no uniform ids"))]
)
def test_nothing_cancels_next_to_clean_data(name: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.tensor([[1e-12], [1e-9]], dtype=torch.float64)
    torch.testing.assert_close(schedule.inverse(schedule.mask_probability(t)), t, rtol=1e-11, atol=0)
    level = NoiseLevel.at(schedule, t)
    torch.testing.assert_close(level.sigma, level.noise, rtol=1e-4, atol=0)
    torch.testing.assert_close(level.odds * level.sigma, torch.ones_like(t), rtol=1e-4, atol=0)
    powers = {"arccos": 0.5, "cosine squared": 2.0, "MDLM cosine": 2.0, "cubic": 3.0, "GIDD": 0.5}
    torch.testing.assert_close(level.mask_weight * t, torch.full_like(t, powers.get(name, 1.0)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["arccos", "cosine", "linear", "square", "log-sin to the end", "D3PM cosine", "cubic"])
def test_nothing_cancels_next_to_noise(name: str) -> None:
    """alpha falls as a power of 1 - t down to where 1 - m has no digit left."""
    schedule = SCHEDULES[name]
    left = torch.tensor([2.0**-40, 2.0**-41], dtype=torch.float64)  # 1 - t is exact
    alpha = schedule.alpha(1 - left)
    power = 2.0 if name in ("cosine", "square", "log-sin to the end") else 1.0
    assert float(alpha[0] / alpha[1]) == pytest.approx(2**power, rel=1e-9)
    torch.testing.assert_close(schedule.derivative(1 - left) * left, power * alpha, rtol=1e-9, atol=0)
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
        (lambda: PowerSchedule(0.0), "exponent of PowerSchedule must be > 0, got 0.0"),
        (lambda: GIDDSchedule(0.0), r"uniform_fraction must lie in \(0, 1\), got 0.0; 0 is AbsorbingProcess"),
        (
            lambda: TruncatedSchedule(LinearSchedule(), lowest=0.5, highest=0.5),
            "0 <= lowest < highest <= 1 must hold, got 0.5 and 0.5",
        ),
    ],
)
def test_settings_out_of_range(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


MASKGIT = [ArccosSchedule(), CosineSchedule(), LinearSchedule(), SquareSchedule()]
IDS = [type(schedule).__name__ for schedule in MASKGIT]
each_of_maskgit = pytest.mark.parametrize("schedule", MASKGIT, ids=IDS)


def inner_times() -> torch.Tensor:
    return torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@each_schedule
def test_the_ends_are_exact(name: str) -> None:
    """By definition, whatever a processor makes of sin(pi / 2)."""
    schedule, ends = SCHEDULES[name], torch.tensor([0.0, 1.0], dtype=torch.float64)
    first, last = schedule.ends()
    m, alpha = schedule.mask_probability(ends), schedule.alpha(ends)
    assert float(m[0]) == first and float(alpha[0]) == 1 - first and float(m[1]) == last
    if name in ("arccos", "cosine", "linear", "square", "log-sin to the end", "D3PM cosine"):
        assert m.tolist() == [0, 1] and alpha.tolist() == [1, 0] and schedule.inverse(m).tolist() == [0, 1]
    torch.testing.assert_close(schedule.inverse(m), ends, rtol=0, atol=1e-15)


@each_of_maskgit
def test_rises(schedule: MaskSchedule) -> None:
    assert (schedule.mask_probability(inner_times()).diff() > 0).all()


@each_of_maskgit
def test_derivative_by_autograd_and_by_differences(schedule: MaskSchedule) -> None:
    t = inner_times().requires_grad_()
    (gradient,) = torch.autograd.grad(schedule.mask_probability(t).sum(), t)
    derivative = schedule.derivative(t.detach())
    torch.testing.assert_close(derivative, gradient, rtol=1e-9, atol=0)
    step = 1e-6
    with torch.no_grad():
        difference = (schedule.mask_probability(t + step) - schedule.mask_probability(t - step)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-5, atol=0)


@each_of_maskgit
def test_inverse_of_maskgit(schedule: MaskSchedule) -> None:
    t = inner_times()
    torch.testing.assert_close(schedule.inverse(schedule.mask_probability(t)), t, rtol=0, atol=1e-12)


@each_of_maskgit
def test_precise_next_to_clean_data(schedule: MaskSchedule) -> None:
    t = torch.tensor([1e-14, 1e-9], dtype=torch.float64)
    torch.testing.assert_close(schedule.inverse(schedule.mask_probability(t)), t, rtol=1e-12, atol=0)
    slope = schedule.derivative(t) * t / schedule.mask_probability(t)  # the exponent of the leading power of t
    expected = 0.5 if isinstance(schedule, ArccosSchedule) else 1.0
    torch.testing.assert_close(slope, torch.full_like(slope, expected), rtol=1e-6, atol=0)


def test_values_of_maskgit() -> None:
    t = torch.tensor(0.3)
    time = float(t)  # 0.3 as float32 has it
    assert float(CosineSchedule().mask_probability(t)) == pytest.approx(sin(pi * time / 2), rel=1e-14)
    assert float(ArccosSchedule().mask_probability(t)) == pytest.approx(acos(1 - time) * 2 / pi, rel=1e-14)
    assert float(LinearSchedule().mask_probability(t)) == time
    assert float(SquareSchedule().mask_probability(t)) == pytest.approx(1 - (1 - time) ** 2, rel=1e-14)


@pytest.mark.parametrize(("mean", "deviation", "lowest"), [(1.0, 0.25, 0.7), (0.55, 0.25, 0.0), (0.3, 2.0, 0.5)])
def test_truncated_normal_by_scipy(mean: float, deviation: float, lowest: float) -> None:
    schedule = TruncatedNormalSchedule(mean=mean, deviation=deviation, lowest=lowest)
    law = truncnorm((lowest - mean) / deviation, (1 - mean) / deviation, mean, deviation)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    ratios = schedule.mask_probability(t)
    torch.testing.assert_close(ratios, torch.tensor(law.ppf(t.numpy())), rtol=0, atol=1e-9)
    assert (ratios[0], ratios[-1]) == (pytest.approx(lowest), pytest.approx(1))
    torch.testing.assert_close(schedule.inverse(ratios), t, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.derivative(t), torch.tensor(1 / law.pdf(ratios.numpy())), rtol=1e-7, atol=0)


@pytest.mark.slow_but(3)
@pytest.mark.parametrize(
    ("mean", "deviation", "lowest"),
    [
        (1.0, 0.25, 0.7),
        (0.55, 0.25, 0.0),
        (0.5, 0.05, 0.0),
        (-1.0, 0.25, 0.0),
        (3.0, 0.25, 0.0),
        (0.3, 50.0, 0.0),
        (0.0, 0.1, 0.95),
        (-0.5, 0.05, 0.0),
        (1.3, 0.01, 0.0),
    ],
)
def test_truncated_normal_has_all_digits_at_both_ends(mean: float, deviation: float, lowest: float) -> None:
    schedule = TruncatedNormalSchedule(mean=mean, deviation=deviation, lowest=lowest)
    t = torch.tensor([1e-15, 1e-9, 1e-3, 0.4, 0.5, 0.6, 0.999, 1 - 2.0**-30, 1 - 2.0**-52], dtype=torch.float64)
    m = lowest + (1 - lowest) * torch.cat((t[:4], t[5:]))
    with mpmath.workdps(90):
        first, last = (mpmath.mpf(lowest) - mean) / deviation, (1 - mpmath.mpf(mean)) / deviation

        def share(score: mpmath.mpf) -> mpmath.mpf:
            return (mpmath.ncdf(score) - mpmath.ncdf(first)) / (mpmath.ncdf(last) - mpmath.ncdf(first))

        expected = [float(share((mpmath.mpf(ratio) - mean) / deviation)) for ratio in m.tolist()]
        assert schedule.inverse(m).tolist() == pytest.approx(expected, rel=1e-9, abs=0)
        for moment in t:
            low, high = first, last
            for _ in range(100):
                middle = (low + high) / 2
                low, high = (middle, high) if share(middle) < mpmath.mpf(float(moment)) else (low, middle)
            found = schedule.mask_probability(moment), schedule.alpha(moment), schedule.derivative(moment)
            slope = deviation * (mpmath.ncdf(last) - mpmath.ncdf(first)) / mpmath.npdf(low)
            right = lowest + (low - first) * deviation, (last - low) * deviation, slope
            for value, wanted in zip(found, right, strict=True):
                assert float(value) == pytest.approx(float(wanted), rel=1e-9)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert schedule.mask_probability(ends).tolist() == [lowest, 1] and schedule.alpha(ends).tolist() == [1 - lowest, 0]
    assert schedule.inverse(schedule.mask_probability(ends)).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deviation": 0.0}, "deviation must be > 0, got 0.0"),
        ({"lowest": 1.0}, r"lowest must lie in \[0, 1\), got 1.0"),
        ({"mean": 50.0}, "mean=50.0 lies too many deviations of 0.25 from"),
        ({"mean": -50.0}, "mean=-50.0 lies too many deviations of 0.25 from"),
    ],
)
def test_truncated_normal_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TruncatedNormalSchedule(**arguments)


def times(indices: torch.Tensor, strata: int, seed: int = 0) -> torch.Tensor:
    return stratified_times(CounterRandom(seed, indices), strata)


@pytest.mark.parametrize("first", [0, 5, 12345, 2**40 + 3])
def test_one_time_in_each_part_of_a_batch_that_starts_anywhere(first: int) -> None:
    found = times(torch.arange(first, first + 32), 32)
    assert found.shape == (32, 1) and found.dtype == torch.float64
    assert sorted((found[:, 0] * 32).long().tolist()) == list(range(32))


def test_the_same_times_whatever_the_ranks_and_after_a_resume() -> None:
    indices = torch.arange(70, 70 + 24)
    whole = times(indices, 24)
    for ranks in (2, 3, 8):
        parts = [times(part, 24) for part in indices.chunk(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(times(indices[5:6], 24), whole[5:6])
    assert not torch.equal(times(indices + 24, 24), whole) and not torch.equal(times(indices, 24, seed=1), whole)


def test_unbiased_and_of_less_variance_than_independent_times() -> None:
    """The mean of t^2 over batches of 16, whose independent variance is 4 / 45 / 16."""
    indices = torch.arange(16 * 4000)
    stratified = times(indices, 16)[:, 0]
    independent = CounterRandom(0, indices).uniform(Purpose.MASK_RATIO, 1)[:, 0]
    assert kstest(stratified.numpy(), "uniform").pvalue > 1e-4
    means = {name: (t**2).view(4000, 16).mean(dim=1) for name, t in (("both", stratified), ("one", independent))}
    assert means["one"].var() == pytest.approx(4 / 45 / 16, rel=0.1)
    assert means["both"].var() < 0.02 * means["one"].var()
    assert float(means["both"].mean()) == pytest.approx(1 / 3, abs=4 * float(means["both"].std()) / 4000**0.5)


def test_the_last_part_stays_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CounterRandom, "uniform", lambda self, *_: torch.full((1, 1), 1 - 2.0**-53).double())
    last = times(torch.tensor([2**20 - 1]), 2**20)
    assert 0.999 < float(last) < 1


@pytest.mark.parametrize("count", [4, 37, 500])
def test_times_of_validation_are_spread_over_every_run_of_samples(count: int) -> None:
    """Discrepancy below 2 log(n) / n wherever the run begins, and uniform over seeds."""
    for first in (0, 17, 2**33):
        found = spread_times(CounterRandom(0, torch.arange(first, first + count)))[:, 0].sort().values
        grid = torch.arange(count) / count
        assert (found - grid).abs().max() < 2 * torch.log(torch.tensor(2.0 * count)) / count
    one = torch.tensor([11])
    over_seeds = torch.cat([spread_times(CounterRandom(seed, one)) for seed in range(400)])[:, 0]
    assert kstest(over_seeds.numpy(), "uniform").pvalue > 1e-4
    whole = spread_times(CounterRandom(3, torch.arange(50)))
    assert torch.equal(spread_times(CounterRandom(3, torch.arange(20, 30))), whole[20:30])
