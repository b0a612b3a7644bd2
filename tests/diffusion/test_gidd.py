"""GIDD's noise against the paper's formulas and its own rates; its bound against the exact likelihood; its weights."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.enumerated_steps import OncePerState, context_of, draw_numbers, enumerated_law
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers
from helpers.exact_oracle import ExactBackbone, noisy_law, reference_law
from torch import Tensor

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import (
    AbsorbingProcess,
    GIDDLoss,
    GIDDProcess,
    GIDDSchedule,
    HybridProcess,
    LeaveOneOutHead,
    LinearSchedule,
    NoiseLevel,
    UniformProcess,
)
from discrete_lit.diffusion.likelihood import likelihood_bound
from discrete_lit.diffusion.losses import ContinuousBound, DiffusionLoss, DiscreteTimeBound
from discrete_lit.diffusion.processes import ends_in_masks, is_absorbing
from discrete_lit.diffusion.reverse import jumps_from_clean, without_rare
from discrete_lit.samplers import AncestralSampler, EulerSampler, PredictorCorrectorSampler, TauLeapingSampler
from discrete_lit.samplers.diffusion import NoisyTokens

SIZE, UNIFORM = 4, 0.3
NO_WEIGHTING: Any = "none"
PROCESS, SCHEDULE = GIDDProcess(SIZE, UNIFORM), GIDDSchedule(UNIFORM)
TIMES = torch.tensor([1e-6, 0.02, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64)


def paper(t: float, uniform: float = UNIFORM, size: int = SIZE) -> tuple[float, Tensor]:
    """alpha_t, and beta_t pi_t of all states."""
    c = 2 * uniform / (1 - uniform) * (t * (1 - t)) ** 0.5
    masses = torch.tensor([c / size] * size + [t], dtype=torch.float64)
    return (1 - t) / (1 + c), masses / (1 + c)


def step_of_paper(s: float, t: float) -> Tensor:
    """`(S, S)`: q(x_t | x_s), of alpha_t / alpha_s and what is left of beta_t pi_t."""
    (alpha_s, before), (alpha_t, after) = paper(s), paper(t)
    ratio = alpha_t / alpha_s
    return ratio * torch.eye(SIZE + 1, dtype=torch.float64) + (after - ratio * before)


@pytest.mark.parametrize("uniform", [0.3, 0.9, 2.1e-9])
def test_marginals_are_those_of_the_paper(uniform: float) -> None:
    process, schedule = GIDDProcess(SIZE, uniform), GIDDSchedule(uniform)
    level = NoiseLevel.at(schedule, TIMES[:, None])
    for row, t in enumerate(TIMES.tolist()):
        alpha, masses = paper(t, uniform)
        assert float(level.alpha[row]) == pytest.approx(alpha, rel=1e-12)
        kernel = process.matrix(level.alpha[row, 0], level.noise[row, 0])
        expected = alpha * torch.eye(SIZE + 1, dtype=torch.float64) + masses
        torch.testing.assert_close(kernel, expected, rtol=1e-9, atol=1e-15)
        assert float(process.paper_time(level.alpha[row], level.noise[row])) == pytest.approx(t, rel=1e-9)
    # Uniform ids have p_u at t = 1/2, and the mask the rest of what is not clean.
    half = NoiseLevel.at(schedule, torch.full((1, 1), 0.5))
    of_id, of_mask = process.noise_masses(half.alpha, half.noise)
    assert float(SIZE * of_id) == pytest.approx(uniform) and float(of_mask) == pytest.approx((1 - uniform) / 2)


def test_marginals_are_products_of_the_matrices_of_steps() -> None:
    """And of the exponentials of short steps along the rates, which change with the level."""
    grid = torch.linspace(0, 0.95, 60, dtype=torch.float64)
    product, last = torch.eye(SIZE + 1, dtype=torch.float64), float(grid[-1])
    for s, t in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        product = product @ step_of_paper(s, t)
    end = NoiseLevel.at(SCHEDULE, torch.tensor(last, dtype=torch.float64))
    torch.testing.assert_close(product, PROCESS.matrix(end.alpha, end.noise), rtol=0, atol=1e-12)

    def along_rates(steps: int) -> Tensor:
        # Of equal steps in x = sqrt(t / (1 - t)), at whose middle the rates are taken.
        first, width = 0.2, (float(PROCESS.root(end.alpha)) - 0.2) / steps
        edges = first + width * torch.arange(steps + 1, dtype=torch.float64)
        scale = PROCESS.uniform_scale
        sigma = torch.log1p(edges**2 + scale * edges)
        moved = PROCESS.matrix(torch.exp(-sigma[0]))
        for number, noise in enumerate(sigma.diff()):
            middle = first + width * (number + 0.5)
            alpha = torch.tensor(1 / (1 + middle**2 + scale * middle), dtype=torch.float64)
            rates = PROCESS.rates_from(torch.arange(SIZE + 1), alpha.expand(SIZE + 1))
            torch.testing.assert_close(PROCESS.rates_into(torch.arange(SIZE + 1), alpha.expand(SIZE + 1)), rates.T)
            moved = moved @ torch.linalg.matrix_exp(noise * (rates - rates.sum(dim=1).diag()))
        return moved

    # Exact, since between two values of x the masks are to the uniform ids as the middle says.
    torch.testing.assert_close(along_rates(8), product, rtol=0, atol=1e-12)


def test_posterior_by_bayes_for_every_pair_and_two_levels() -> None:
    clean = torch.eye(SIZE, dtype=torch.float64).log()[:, None].expand(-1, SIZE + 1, -1)
    states = torch.arange(SIZE + 1).expand(SIZE, -1)
    for s, t in ((0.0, 0.5), (0.125, 0.25), (0.25, 0.875), (0.5, 1.0)):
        alpha, masses = paper(s)
        before = alpha * torch.eye(SIZE + 1, dtype=torch.float64)[:SIZE] + masses
        joint = (before[:, :, None] * step_of_paper(s, t)).transpose(1, 2)  # (x_0, x_t, x_s)
        reached = joint.sum(dim=-1, keepdim=True)
        level_s, level_t = (NoiseLevel.at(SCHEDULE, torch.full((SIZE, 1), time).double()) for time in (s, t))
        found = jumps_from_clean(clean, states, PROCESS, level_s.alpha, level_t.alpha).distribution(states, SIZE + 1)
        possible = (reached > 0).expand_as(joint)
        torch.testing.assert_close(found[possible], (joint / reached)[possible], rtol=0, atol=1e-12)


def test_what_it_is_and_where_it_ends() -> None:
    assert not is_absorbing(PROCESS) and ends_in_masks(PROCESS) and ends_in_masks(AbsorbingProcess(4))
    assert not ends_in_masks(UniformProcess(4)) and not ends_in_masks(HybridProcess(4))
    tokens, ends = torch.arange(SIZE)[:, None], torch.tensor([[0.0]], dtype=torch.float64)
    assert torch.equal(PROCESS.prior_divergence(tokens, ends), torch.zeros(SIZE, 1).double())
    assert bool((PROCESS.prior_divergence(tokens, ends + 1e-9) == torch.inf).all())
    assert torch.equal(PROCESS.matrix(ends[0, 0]), PROCESS.prior().expand(SIZE + 1, -1))
    assert torch.equal(PROCESS.matrix(1 - ends[0, 0]), torch.eye(SIZE + 1, dtype=torch.float64))
    law = torch.rand(7, 2, SIZE + 1, dtype=torch.float64)
    alpha = torch.full((7, 1), 0.3, dtype=torch.float64)
    torch.testing.assert_close(PROCESS.pull(PROCESS.push(law, alpha), alpha), law)
    for loss, kind in (
        (ContinuousBound(), "bound"),
        (ContinuousBound(1e-4), "not a bound"),
        (GIDDLoss(), "not a bound"),
    ):
        assert loss.label(PROCESS, SCHEDULE) == kind
    with pytest.raises(AssertionError, match="the rates of GIDDProcess change with the level"):
        PROCESS.rates_into(tokens)


def test_draws_have_the_law_of_the_kernel() -> None:
    count, level = 40_000, NoiseLevel.at(SCHEDULE, torch.full((SIZE, 1), 0.4))
    uniforms = CounterRandom(3, torch.arange(SIZE)).uniform(Purpose.MASK_ORDER, count)
    states = PROCESS.corrupt(torch.arange(SIZE)[:, None].expand(-1, count), level.alpha, uniforms, level.noise)
    kernel = PROCESS.matrix(level.alpha[0, 0])
    for token in range(SIZE):
        assert chi_square_p_value(states[token], kernel[token]) > 1e-4
    assert bool((PROCESS.draw_prior(uniforms) == SIZE).all())
    # However little noise there is, every id is drawn.
    noise = torch.full((1, 1), 1e-20, dtype=torch.float64)
    places = (torch.arange(1000, dtype=torch.float64)[None] + 0.5) / 1000
    drawn = PROCESS.replace(torch.zeros(1, 1000, dtype=torch.int64), 1 - noise, places * noise, noise)
    assert torch.bincount(drawn[0], minlength=SIZE + 1).tolist() == pytest.approx([250] * SIZE + [0], abs=1)


# The bound, on sequences of two tokens: every noisy sequence is enumerated, the noise is integrated by quadrature.

CLEAN, NOISY = all_sequences(SIZE, 2), all_sequences(SIZE + 1, 2)
LAW = reference_law().reshape(16, 4).sum(dim=1)


class Tilted(ExactBackbone):
    """Predictions with a wrong temperature."""

    def logits_at(self, tokens: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
        return 0.5 * super().logits_at(tokens, labels, alpha)


def mean_costs(loss: DiffusionLoss, backbone: ExactBackbone, level: NoiseLevel) -> Tensor:
    """`(L, 16)`: the cost of every clean sequence at levels `(L, 1)`, averaged over all that noise makes of it."""
    levels, count = len(level.t), len(NOISY)
    kernel = backbone.process.push(torch.eye(SIZE + 1).double().expand(levels, -1, -1), level.alpha, level.noise)
    chances = kernel[:, CLEAN[:, 0]][:, :, NOISY[:, 0]] * kernel[:, CLEAN[:, 1]][:, :, NOISY[:, 1]]  # (L, 16, 25)
    labels = torch.zeros(levels * count, dtype=torch.int64)
    logits = backbone.logits_at(NOISY.repeat(levels, 1), labels, level.alpha.repeat_interleave(count, dim=0))
    logits = logits.reshape(levels, 1, count, 2, -1).expand(-1, 16, -1, -1, -1).flatten(0, 2)
    values = loss(
        logits,
        CLEAN[None, :, None].expand(levels, -1, count, -1).reshape(-1, 2),
        head=backbone.head,
        states=NOISY.repeat(levels * 16, 1),
        process=backbone.process,
        level=level.take(torch.arange(levels).repeat_interleave(16 * count)),
    )
    # What has no chance at the end of time, where all are masks, has no cost either.
    return torch.where(chances > 0, values.sum(dim=1).view_as(chances) * chances, 0.0).sum(dim=2)


def integrated(backbone: ExactBackbone) -> Tensor:
    """`(16,)`: the bound, integrated over x = (u / (1 - u))^2."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(120))
    u = ((nodes + 1) / 2)[:, None]
    x, slope = (u / (1 - u)) ** 2, 2 * u / (1 - u) ** 3
    odds = x**2 + PROCESS.uniform_scale * x
    alpha, noise = 1 / (1 + odds), odds / (1 + odds)
    rate = (2 * x + PROCESS.uniform_scale) * alpha * slope  # d sigma / d u
    level = NoiseLevel(t=PROCESS.paper_time(alpha, noise), alpha=alpha, noise=noise, rate=rate)
    return (weights[:, None] / 2 * mean_costs(ContinuousBound(), backbone, level)).sum(dim=0)


def test_the_bound_of_an_exact_model_is_the_likelihood() -> None:
    exact = integrated(ExactBackbone(PROCESS, LeaveOneOutHead(), LAW.expand(2, -1), length=2))
    torch.testing.assert_close(exact, -LAW.log(), rtol=0, atol=1e-5)
    tilted = integrated(Tilted(PROCESS, LeaveOneOutHead(), LAW.expand(2, -1), length=2))
    assert float((LAW * (tilted - exact)).sum()) > 0.005


def test_the_bound_of_steps_is_above_and_falls() -> None:
    backbone = ExactBackbone(PROCESS, LeaveOneOutHead(), LAW.expand(2, -1), length=2)
    entropy, gaps = float(-(LAW * LAW.log()).sum()), []
    for steps in (4, 8, 16):
        loss = DiscreteTimeBound(steps)
        level = loss.level(SCHEDULE, (torch.arange(steps)[:, None] + 0.5) / steps, 2)
        gaps.append(float((LAW * mean_costs(loss, backbone, level).mean(dim=0)).sum()) - entropy)
    assert gaps[0] > gaps[1] > gaps[2] > 0 and gaps[2] < 0.03


@torch.no_grad()
def test_the_estimate_of_the_likelihood() -> None:
    """Whatever the schedule, since the process is a function of alpha."""
    backbone = ExactBackbone(PROCESS, LeaveOneOutHead())
    tokens, labels = all_sequences(4, 3).repeat(40, 1), torch.zeros(64 * 40, dtype=torch.int64)
    random = CounterRandom(0, torch.arange(len(tokens)))

    def network(states: Tensor, level: NoiseLevel) -> Tensor:
        return backbone.logits_at(states, labels, level.alpha)

    for schedule in (SCHEDULE, LinearSchedule()):
        nats, error = likelihood_bound(network, backbone.denoiser(schedule), tokens, random, 12)
        gap = (nats - reference_law().log().repeat(40)).mean()
        assert abs(float(gap)) < 4 * float(error.square().sum().sqrt()) / len(tokens)


# Sampling.


def test_the_ancestral_law_approaches_the_model() -> None:
    backbone, law = OncePerState(PROCESS, LeaveOneOutHead()), reference_law()
    gaps = []
    for steps in (1, 4, 16):
        drawn = enumerated_law(AncestralSampler(steps=steps), backbone, SCHEDULE)
        gaps.append(float((law * (law / drawn).log()).sum()))
    assert gaps[0] == pytest.approx(0.1211186343, abs=1e-6)  # one step draws all tokens apart
    assert gaps[0] > 2 * gaps[1] and gaps[1] > 2 * gaps[2] > 0


@pytest.mark.parametrize("sampler", [AncestralSampler(steps=3), EulerSampler(steps=4), TauLeapingSampler(steps=4)])
def test_draws_follow_the_enumerated_law(sampler: Any) -> None:
    backbone = OncePerState(PROCESS, LeaveOneOutHead())
    numbers = draw_numbers(sampler, backbone, SCHEDULE, 50_000)
    assert chi_square_p_value(numbers, enumerated_law(sampler, backbone, SCHEDULE)) > 1e-4


@pytest.mark.parametrize("process", [PROCESS, AbsorbingProcess(SIZE)])
def test_a_step_without_rare_states_takes_the_most_probable(process: Any) -> None:
    backbone = OncePerState(process, LeaveOneOutHead(), timed=process is PROCESS)
    numbers = draw_numbers(AncestralSampler(steps=1, min_p=0.9), backbone, LinearSchedule(), 100)
    marginals = [reference_law().reshape(4, 4, 4).sum(dim=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    first, second, third = (int(marginal.argmax()) for marginal in marginals)
    assert numbers.unique().tolist() == [16 * first + 4 * second + third]


def test_correctors_leave_the_noisy_law_alone() -> None:
    """One token drawn again given the others, and forward and reverse jumps for the time of a little noise."""
    backbone, rows = OncePerState(PROCESS, LeaveOneOutHead()), 20_000
    context = context_of(backbone, rows, SCHEDULE)
    assert context.denoiser is not None
    level = NoiseLevel.at(SCHEDULE, torch.tensor([[0.5]]))
    law = noisy_law(reference_law(), PROCESS, float(level.alpha))
    places = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    start = all_sequences(SIZE + 1, 3)[torch.searchsorted(law.cumsum(dim=0), places).clamp(max=124)]
    for corrector in ("gibbs", "forward_backward"):
        sampler = PredictorCorrectorSampler(corrector, corrector_noise=0.05, steps=4)
        x = NoisyTokens(context, context.denoiser, level=level, steps=4)
        x.tokens = start
        for number in range(4):
            getattr(sampler, corrector)(x, level, number, 1.0)
        assert int((x.tokens != start).sum()) > rows / 20
        assert chi_square_p_value(sequence_numbers(x.tokens, SIZE + 1), law) > 1e-4


def test_rare_states_are_left_out_of_a_step() -> None:
    """Staying too; and the most probable state is kept however improbable."""
    backbone = OncePerState(PROCESS, LeaveOneOutHead())
    states = all_sequences(SIZE + 1, 3)
    level = NoiseLevel.at(SCHEDULE, torch.tensor([[0.6]]))
    clean = backbone.logits_at(states, torch.zeros(125, dtype=torch.int64), level.alpha.expand(125, 1))
    jumps = jumps_from_clean(clean, states, PROCESS, SCHEDULE.alpha(torch.tensor([[0.3]])), level.alpha)
    law = jumps.distribution(states, SIZE + 1)
    for least in (0.05, 0.9):
        kept = law * ((law >= least) | (law == law.amax(dim=-1, keepdim=True)))
        found = without_rare(jumps, states, PROCESS, least).distribution(states, SIZE + 1)
        torch.testing.assert_close(found, kept / kept.sum(dim=-1, keepdim=True))


# Weights.


def test_weights_of_training() -> None:
    level = NoiseLevel.at(SCHEDULE, torch.tensor([[0.25], [0.9]]))
    tokens, states = torch.tensor([[0, 0, 0]] * 2), torch.tensor([[0, 1, SIZE]] * 2)
    dynamic = GIDDLoss().weight(tokens, states=states, process=PROCESS, level=level)
    of_clean = PROCESS.uniform_scale / 5 * torch.exp(torch.sigmoid(-level.t[:, 0]) / 2)
    torch.testing.assert_close(dynamic[:, 0], of_clean)
    assert dynamic[:, 1:].tolist() == [[1, 2], [1, 2]]
    bound = ContinuousBound().weight(tokens, states=states, process=PROCESS, level=level)
    clipped = GIDDLoss("clip", 0.5, highest=3.0).weight(tokens, states=states, process=PROCESS, level=level)
    assert float(bound.min()) < 0.5 and float(bound.max()) > 3 and torch.equal(clipped, bound.clamp(0.5, 3))
    # The paper's, w = (pi_t' - alpha' / alpha pi_t) / q: 1 / (t (1 - t)) at masks.
    torch.testing.assert_close(bound[:, 2:], 1 / (level.t * (1 - level.t)))
    times = GIDDLoss(time_margin=0.1).level(SCHEDULE, torch.tensor([[0.0], [0.5], [1.0]]), 3).t
    assert times[:, 0].tolist() == pytest.approx([0.1, 0.5, 0.9])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GIDDProcess(4, 0.0), r"uniform_fraction must lie in \(0, 1\), got 0.0; 0 is AbsorbingProcess"),
        (
            lambda: GIDDLoss(NO_WEIGHTING),
            "weighting must be 'dynamic' or 'clip', got 'none'; without, use ContinuousBound",
        ),
        (lambda: GIDDLoss(lowest=2.0), "0 <= lowest < highest must hold, got 2.0 and 2.0"),
        (lambda: GIDDLoss(time_margin=0.5), r"time_margin must lie in \[0, 0.5\), got 0.5"),
        (
            lambda: GIDDLoss().check(LeaveOneOutHead(), HybridProcess(4)),
            "GIDDLoss with weighting='dynamic' is for GIDDProcess, got HybridProcess",
        ),
    ],
)
def test_what_is_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
