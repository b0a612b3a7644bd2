"""Forward processes against the exponential of their rate matrix, and what is drawn from them."""

from collections.abc import Callable

import pytest
import torch
from helpers.exact_laws import chi_square_p_value
from torch import Tensor

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import (
    AbsorbingProcess,
    DenseProcess,
    DiscretizedGaussianProcess,
    ForwardProcess,
    HybridProcess,
    MixtureProcess,
    UniformProcess,
)
from discrete_lit.diffusion import dense_processes as dense_module
from discrete_lit.diffusion.dense_processes import gaussian_transition

SIZE = 4


def band() -> DenseProcess:
    """Jumps to the neighbours alone, around a circle."""
    ones = torch.ones(SIZE, dtype=torch.float64)
    ring = torch.roll(ones.diag(), 1, dims=1) + torch.roll(ones.diag(), -1, dims=1)
    return DenseProcess(ring - 2 * ones.diag())


PROCESSES: dict[str, Callable[[], ForwardProcess]] = {
    "absorbing": lambda: AbsorbingProcess(SIZE),
    "uniform": lambda: UniformProcess(SIZE),
    "hybrid": lambda: HybridProcess(SIZE, 0.6),
    "gaussian": lambda: DiscretizedGaussianProcess(SIZE, 0.5),
    "band": band,
}
each_process = pytest.mark.parametrize("name", PROCESSES)


def rate_matrix(name: str) -> Tensor:
    """Q as the papers define it."""
    states = SIZE + (name in ("absorbing", "hybrid"))
    if name == "gaussian":
        return gaussian_transition(SIZE, 0.5) - torch.eye(SIZE, dtype=torch.float64)
    if name == "band":
        return band().rates
    prior = torch.full((states,), {"uniform": 0.25, "hybrid": 0.1}.get(name, 0.0), dtype=torch.float64)
    if states > SIZE:
        prior[-1] = {"absorbing": 1.0, "hybrid": 0.6}[name]
    return prior.expand(states, -1) - torch.eye(states, dtype=torch.float64)


def alpha(sigma: float) -> Tensor:
    return torch.exp(torch.tensor(-sigma, dtype=torch.float64))


@each_process
@pytest.mark.parametrize("sigma", [1e-6, 0.3, 2.0, 9.0])
def test_kernels_are_the_exponential_of_the_rates(name: str, sigma: float) -> None:
    process, rates = PROCESSES[name](), rate_matrix(name)
    kernel = torch.linalg.matrix_exp(sigma * rates)
    close = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(process.matrix(alpha(sigma)), kernel, **close)
    torch.testing.assert_close(kernel.sum(dim=1), torch.ones_like(kernel[0]), **close)
    states = torch.arange(process.states)
    torch.testing.assert_close(process.likelihood(states, alpha(sigma)), kernel.T, **close)
    torch.testing.assert_close(process.rates_into(states), (rates - rates.diagonal().diag()).T, **close)
    law = torch.rand(7, 2, process.states, dtype=torch.float64)
    torch.testing.assert_close(process.push(law, alpha(sigma).expand(7, 1)), law @ kernel, **close)
    clean = torch.rand(7, 2, SIZE, dtype=torch.float64)
    torch.testing.assert_close(process.marginal(clean, alpha(sigma).expand(7, 1)), clean @ kernel[:SIZE], **close)
    if sigma < 3:
        torch.testing.assert_close(process.pull(law @ kernel, alpha(sigma).expand(7, 1)), law, rtol=0, atol=1e-11)


@each_process
def test_noise_adds_up_and_ends_in_the_prior(name: str) -> None:
    process = PROCESSES[name]()
    one, two = process.matrix(alpha(0.4)), process.matrix(alpha(1.1))
    torch.testing.assert_close(one @ two, process.matrix(alpha(1.5)), rtol=0, atol=1e-13)
    torch.testing.assert_close(process.matrix(alpha(0.0)), torch.eye(process.states, dtype=torch.float64))
    end = process.prior().expand(process.states, -1)
    torch.testing.assert_close(process.matrix(alpha(600.0)), end, rtol=0, atol=1e-12)


@each_process
def test_divergence_from_the_prior(name: str) -> None:
    process, tokens = PROCESSES[name](), torch.arange(SIZE)[:, None]
    for sigma in (0.2, 1.0, 5.0):
        kernel, prior = process.matrix(alpha(sigma))[:SIZE], process.prior()
        expected = (torch.xlogy(kernel, kernel) - torch.xlogy(kernel, prior)).sum(dim=1)
        found = process.prior_divergence(tokens, alpha(sigma).expand(SIZE, 1))[:, 0]
        if name == "absorbing":
            assert (found == torch.inf).all()
        else:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if isinstance(process, MixtureProcess):
        assert torch.equal(process.prior_divergence(tokens, torch.zeros(SIZE, 1)), torch.zeros(SIZE, 1).double())


@each_process
def test_posterior_by_bayes_for_every_pair_and_two_levels(name: str) -> None:
    """q(x_s | x_t, x_0) from push and likelihood, against the joint law of the three."""
    process, rates = PROCESSES[name](), rate_matrix(name)
    for s, t in ((0.0, 0.5), (0.2, 0.9), (1.0, 4.0)):
        before, step = torch.linalg.matrix_exp(s * rates)[:SIZE], torch.linalg.matrix_exp((t - s) * rates)
        joint = before[:, :, None] * step  # (x_0, x_s, x_t)
        states = torch.arange(process.states)
        clean = torch.eye(SIZE, dtype=torch.float64)[:, None].expand(-1, process.states, -1)
        marginal = process.marginal(clean, alpha(s).expand(SIZE, 1))  # (x_0, x_t, x_s)
        found = marginal * process.likelihood(states, alpha(t - s))
        torch.testing.assert_close(found, joint.transpose(1, 2), rtol=0, atol=1e-13)
        reached = process.marginal(torch.eye(SIZE, dtype=torch.float64), alpha(t).expand(SIZE))
        torch.testing.assert_close(found.sum(dim=-1), reached, rtol=0, atol=1e-12)


@each_process
def test_draws_have_the_law_of_the_kernel(name: str) -> None:
    process, count = PROCESSES[name](), 40_000
    tokens = torch.arange(SIZE)[:, None].expand(-1, count)
    uniforms = CounterRandom(3, torch.arange(SIZE)).uniform(Purpose.MASK_ORDER, count)
    levels = alpha(0.7).expand(SIZE, 1)
    states = process.corrupt(tokens, levels, uniforms)
    kernel = process.matrix(alpha(0.7))
    for token in range(SIZE):
        law = kernel[token] * (kernel[token] > 1e-15)
        assert chi_square_p_value(states[token], law / law.sum()) > 1e-4
    drawn = process.draw_prior(uniforms).flatten()
    if name == "absorbing":
        assert (drawn == SIZE).all()
    else:
        assert chi_square_p_value(drawn, process.prior()) > 1e-4
    assert torch.equal(process.corrupt(tokens, torch.ones(SIZE, 1).double(), uniforms), tokens)


def test_draws_of_dense_kernels_do_not_depend_on_how_many_are_formed_at_once(monkeypatch) -> None:
    process, tokens = DiscretizedGaussianProcess(9, 0.5), torch.randint(9, (5, 7))
    levels, uniforms = torch.rand(5, 1, dtype=torch.float64), torch.rand(5, 7, dtype=torch.float64)
    expected = process.corrupt(tokens, levels, uniforms)
    monkeypatch.setattr(dense_module, "_ENTRIES_AT_ONCE", 130)
    assert torch.equal(process.corrupt(tokens, levels, uniforms), expected)


def test_dense_kernels_are_copied_to_a_device_once() -> None:
    process, meta = DiscretizedGaussianProcess(9, 0.5), torch.device("meta")
    law = torch.ones(2, 9, device=meta)
    with torch.inference_mode():
        process.push(law, torch.ones(2, device=meta))
        process.rates_into(torch.zeros(3, dtype=torch.int64))
    copies = process._on(meta)
    assert not any(part.is_inference() for part in (*copies, *process._on(torch.device("cpu"))))
    process.pull(law, torch.ones(2, device=meta))
    process.rates_into(torch.zeros(3, dtype=torch.int64, device=meta))
    assert process._on(meta) is copies and process._on(torch.device("cpu"))[2].device.type == "cpu"
    assert process.matrix(torch.tensor(0.5).double()).isfinite().all()


def test_rare_states_keep_their_probability() -> None:
    """1e6 ids: the share of draws above the last of them is that of the kernel, not that of 2^-24 steps."""
    process = UniformProcess(1_000_000)
    uniforms = 1 - (torch.arange(1, 2001, dtype=torch.float64)[None] - 0.5) * 1e-9
    states = process.corrupt(torch.zeros(1, 2000, dtype=torch.int64), torch.full((1, 1), 0.5).double(), uniforms)
    # Each id has 5e-7 of the mass: the last 2e-6 of the uniforms are the last four ids.
    assert torch.bincount(states[0] - 999_996).tolist() == [500, 500, 500, 500]


@pytest.mark.parametrize("noise", [1e-11, 1e-15, 1e-30])
def test_every_id_is_drawn_however_little_noise_there_is(noise: float) -> None:
    """The place of a uniform number below the noise says which: next to 0 all its digits count."""
    levels = torch.full((1, 1), noise, dtype=torch.float64)
    places = (torch.arange(100_000, dtype=torch.float64)[None] + 0.5) / 100_000
    tokens = torch.full((1, 100_000), 3)
    for process in (UniformProcess(50_000), HybridProcess(50_000, 0.5)):
        states = process.replace(tokens, 1 - levels, places * levels, levels)
        assert len(states.unique()) == process.states
        assert torch.equal(process.replace(tokens, 1 - levels, (1 + places) * levels, levels), tokens)
    process = DiscretizedGaussianProcess(40, 0.5)
    chances = process.replaced(tokens[:, :1], 1 - levels, levels)
    states = process.replace(tokens[:, :20_000], 1 - levels, places[:, ::5] * chances, levels)
    assert set(states[0].tolist()) == set(range(40)) - {3}


def test_float32_marginals_next_to_clean_data() -> None:
    """1 - alpha keeps its digits: noise of 1e-9 puts 1e-9 / K on every other id."""
    process, nearly = UniformProcess(4), torch.tensor([[1 - 1e-9]], dtype=torch.float64)
    marginal = process.marginal(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), nearly)
    assert marginal.dtype == torch.float32
    assert marginal[0, 0, 1:].tolist() == pytest.approx([2.5e-10] * 3, rel=1e-6)
    scores = torch.tensor([[[1.0, 2.5e-10, 2.5e-10, 2.5e-10]]])
    assert process.pull(scores, nearly)[0, 0].tolist() == pytest.approx([1, 0, 0, 0], abs=1e-15)


def test_reference_values() -> None:
    matrix = gaussian_transition(4, 0.5)
    assert matrix[0].tolist() == pytest.approx([0.7659536969, 0.2186736670, 0.0151942011, 0.0001784351], abs=5e-11)
    for sums in (matrix.sum(dim=0), matrix.sum(dim=1)):
        torch.testing.assert_close(sums, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-15)
    token = torch.tensor([[1]])
    masked = AbsorbingProcess(4).ratios(token, torch.tensor([[4]]), alpha(0.5).expand(1, 1))
    assert masked[0, 0].tolist() == pytest.approx([0, 1.5414940825, 0, 0, 1], abs=5e-11)
    same = UniformProcess(4).ratios(token, token, alpha(0.5).expand(1, 1))
    assert same[0, 0].tolist() == pytest.approx([0.1395483259, 1, 0.1395483259, 0.1395483259], abs=5e-11)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UniformProcess(1), "a process needs a vocabulary of at least 2 ids, got 1"),
        (lambda: MixtureProcess(4, 1.5), r"mask_fraction must lie in \[0, 1\], got 1.5"),
        (lambda: HybridProcess(4, 1.0), r"mask_fraction must lie in \(0, 1\), got 1.0; 1 is AbsorbingProcess"),
        (lambda: DiscretizedGaussianProcess(4, 0.0), "beta must be > 0, got 0.0"),
        (lambda: DiscretizedGaussianProcess(1025), r"DiscretizedGaussianProcess is for at most 1024 ids .* got 1025"),
        (lambda: DenseProcess(torch.zeros(1025, 1025)), "for at most 1024 ids, got 1025: use AbsorbingProcess or Unif"),
        (lambda: DenseProcess(torch.tensor([[-1.0, 1.0], [2.0, -2.0]])), "rates must be a symmetric matrix"),
        (
            lambda: DenseProcess(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])),
            "without negative entries beside the diagonal",
        ),
        (lambda: DenseProcess(torch.tensor([[-1.0, 0.5], [0.5, -1.0]])), "the rows of rates must sum to 0"),
    ],
)
def test_processes_that_are_none(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
