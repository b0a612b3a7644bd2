"""Losses against the exact law, where a bound with true conditionals costs -log p; their gradients and memory.

Every mean over time, noise and clean sequences is worked out in full: noisy sequences are enumerated, time is
integrated by quadrature. So the values are exact to rounding, and what is wrong in the tenth digit fails.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product

import mpmath
import numpy as np
import pytest
import torch
from helpers.exact_laws import all_sequences
from helpers.exact_oracle import ENTROPY, ExactBackbone, noisy_law, reference_law
from torch import Tensor

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import (
    AbsorbingProcess,
    ArccosSchedule,
    CosineSchedule,
    CosineSquaredSchedule,
    D3PMCosineSchedule,
    DenseProcess,
    DiscretizedGaussianProcess,
    ForwardProcess,
    GeometricSchedule,
    Head,
    HybridProcess,
    LeaveOneOutHead,
    LinearSchedule,
    LogLinearSchedule,
    LogSinSchedule,
    MaskSchedule,
    MDLMCosineSchedule,
    NoiseLevel,
    PosteriorHead,
    ScoreHead,
    SquareSchedule,
    TruncatedSchedule,
    UniformProcess,
    divergences,
)
from discrete_lit.diffusion.losses import (
    ContinuousBound,
    DiffusionLoss,
    DiscreteFlowMatching,
    DiscreteTimeBound,
    HybridBound,
    MaskedCrossEntropy,
    ScoreEntropy,
)

WHOLE: dict[str, MaskSchedule] = {
    "linear": LinearSchedule(),
    "cosine": CosineSchedule(),
    "arccos": ArccosSchedule(),
    "square": SquareSchedule(),
    "log-sin": LogSinSchedule(0.0),
    "cosine squared": CosineSquaredSchedule(0.0),
    "MDLM cosine": MDLMCosineSchedule(0.0),
    "D3PM cosine": D3PMCosineSchedule(),
}
CUT: dict[str, MaskSchedule] = {
    "log-linear": LogLinearSchedule(),
    "log-sin": LogSinSchedule(),
    "geometric": GeometricSchedule(),
    "cosine squared": CosineSquaredSchedule(),
    "MDLM cosine": MDLMCosineSchedule(),
    "truncated": TruncatedSchedule(LinearSchedule(), lowest=1e-3, highest=0.999),
}
PROCESSES: dict[str, Callable[[], ForwardProcess]] = {
    "absorbing": lambda: AbsorbingProcess(4),
    "uniform": lambda: UniformProcess(4),
    "hybrid": lambda: HybridProcess(4, 0.6),
    "gaussian": lambda: DiscretizedGaussianProcess(4, 0.5),
}
# Losses in continuous time with the heads that each is trained with.
ABSORBING_LOSSES: dict[str, tuple[DiffusionLoss, Callable[[], Head]]] = {
    "score entropy": (ScoreEntropy(), lambda: ScoreHead(scale_by_noise=False)),
    "scaled score entropy": (ScoreEntropy(), lambda: ScoreHead(scale_by_noise=True)),
    "cross-entropy of the leave-one-out posterior": (MaskedCrossEntropy(), LeaveOneOutHead),
    "cross-entropy of the posterior": (MaskedCrossEntropy(), PosteriorHead),
    "continuous bound": (ContinuousBound(), LeaveOneOutHead),
    "flow matching": (DiscreteFlowMatching(), PosteriorHead),
}
CLEAN = all_sequences(4, 3)


def surprise() -> Tensor:
    """-log p of the 64 sequences."""
    return -reference_law().log()


def costs(loss: DiffusionLoss, backbone: ExactBackbone, level: NoiseLevel) -> Tensor:
    """`(L, 64)`: the loss of every clean sequence at `level (L, 1)`, averaged over all that noise makes of it."""
    process, levels = backbone.process, len(level.t)
    noisy = all_sequences(process.states, 3)
    kernel = process.matrix(level.alpha[:, 0])[:, :4]  # (L, K, S)
    chances = torch.stack([kernel[:, CLEAN[:, n]][:, :, noisy[:, n]] for n in range(3)]).prod(dim=0)  # (L, 64, S^3)
    states = noisy.repeat(levels, 1)
    labels = torch.zeros(len(states), dtype=torch.int64)
    logits = backbone.logits_at(states, labels, level.alpha.repeat_interleave(len(noisy), dim=0))
    logits = logits.reshape(levels, 1, len(noisy), 3, -1).expand(-1, 64, -1, -1, -1).flatten(0, 2)
    rows = torch.arange(levels).repeat_interleave(64 * len(noisy))
    tokens = CLEAN[None, :, None].expand(levels, -1, len(noisy), -1).reshape(-1, 3)
    states = noisy.expand(levels, 64, -1, -1).reshape(-1, 3)
    possible = chances.flatten() > 0
    values = torch.zeros(len(rows), dtype=torch.float64)
    values[possible] = loss(
        logits[possible].nan_to_num(neginf=-1e4),
        tokens[possible],
        head=backbone.head,
        states=states[possible],
        process=process,
        level=level.take(rows[possible]),
    ).sum(dim=1)
    return (values.view_as(chances) * chances).sum(dim=2)


def over_masks(loss: DiffusionLoss, backbone: ExactBackbone, schedule: MaskSchedule, low: float, high: float) -> Tensor:
    """`(64,)`: the integral over the times at which m is between `low` and `high`; polynomials in m are exact."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(8))
    m = (low + (high - low) * (nodes + 1) / 2)[:, None]
    t = schedule.inverse(m)
    level = NoiseLevel.at(schedule, t)
    per_mask = costs(loss, backbone, level) / schedule.derivative(t)
    return (weights[:, None] * per_mask).sum(dim=0) * (high - low) / 2


def over_noise(loss: DiffusionLoss, backbone: ExactBackbone, schedule: MaskSchedule, sigma: float) -> Tensor:
    """`(64,)`: the integral over the times at which the total noise is below `sigma`."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(48))
    fraction = (nodes + 1) / 2
    # The fifth power smooths the logarithms that the integrand has at 0.
    noise = (sigma * fraction**5)[:, None]
    measure = weights / 2 * sigma * 5 * fraction**4
    level = NoiseLevel.at(schedule, schedule.inverse(-torch.expm1(-noise)))
    exact = replace(level, alpha=torch.exp(-noise), noise=-torch.expm1(-noise))
    return (measure[:, None] * costs(loss, backbone, exact) / exact.rate).sum(dim=0)


def prior_gap(process: ForwardProcess, sigma: float) -> Tensor:
    """`(64,)`: the sum of q(x_T | x_0) log(p_T / pi): how far the bound is from -log p where noise stops at sigma."""
    alpha = float(np.exp(-sigma))
    noisy = all_sequences(process.states, 3)
    kernel = process.matrix(torch.tensor(alpha, dtype=torch.float64))[:4]
    chances = torch.stack([kernel[CLEAN[:, n]][:, noisy[:, n]] for n in range(3)]).prod(dim=0)
    ratio = noisy_law(reference_law(), process, alpha).log() - process.prior()[noisy].log().sum(dim=1)
    return chances @ ratio


def prior_term(process: ForwardProcess, sigma: float) -> Tensor:
    return process.prior_divergence(CLEAN, torch.full((64, 1), float(np.exp(-sigma)), dtype=torch.float64)).sum(dim=1)


@pytest.mark.parametrize("schedule", WHOLE)
@pytest.mark.parametrize("name", ABSORBING_LOSSES)
def test_absorbing_bounds_are_exact_sequence_by_sequence(name: str, schedule: str) -> None:
    loss, head = ABSORBING_LOSSES[name]
    backbone = ExactBackbone(AbsorbingProcess(4), head())
    found = over_masks(loss, backbone, WHOLE[schedule], 0.0, 1.0)
    torch.testing.assert_close(found, surprise(), rtol=0, atol=1e-10)
    assert loss.label(backbone.process, WHOLE[schedule]) == "bound"


@pytest.mark.parametrize("schedule", CUT)
@pytest.mark.parametrize("name", ABSORBING_LOSSES)
def test_what_a_cut_schedule_leaves_out_is_what_the_bound_lacks(name: str, schedule: str) -> None:
    loss, head = ABSORBING_LOSSES[name]
    backbone = ExactBackbone(AbsorbingProcess(4), head())
    low, high = CUT[schedule].ends()
    found = over_masks(loss, backbone, CUT[schedule], low, high)
    ends = [over_masks(loss, backbone, LinearSchedule(), *part) for part in ((0.0, low), (high, 1.0))]
    torch.testing.assert_close(found + sum(ends), surprise(), rtol=0, atol=1e-10)
    assert float(reference_law() @ (surprise() - found)) > 1e-9
    assert loss.label(backbone.process, CUT[schedule]) == "not a bound"
    if schedule == "truncated":
        assert float(reference_law() @ found) == pytest.approx(4.0194288292, abs=5e-11)


@pytest.mark.parametrize("head", [LeaveOneOutHead(), PosteriorHead()], ids=["leave-one-out", "posterior"])
@pytest.mark.parametrize("variable", ["mask_ratio", "mask_count"])
def test_means_over_masks_are_bounds_with_every_schedule(variable, head: Head) -> None:
    backbone = ExactBackbone(AbsorbingProcess(4), head)
    for schedule in (LogLinearSchedule(0.1), TruncatedSchedule(CosineSchedule(), lowest=0.2, highest=0.9)):
        loss = MaskedCrossEntropy(variable)
        assert loss.label(backbone.process, schedule) == "bound"
        if variable == "mask_ratio":
            nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(8))
            level = loss.level(schedule, ((nodes + 1) / 2)[:, None], 3)
            found = (weights[:, None] / 2 * costs(loss, backbone, level)).sum(dim=0)
        else:
            found = torch.zeros(64, dtype=torch.float64)
            masks = torch.tensor(list(product((False, True), repeat=3)))
            for uniform, k in ((1e-9, 1), (0.4, 2), (0.99, 3)):
                level = loss.level(schedule, torch.full((64, 1), uniform, dtype=torch.float64), 3)
                assert level.noise.unique().tolist() == pytest.approx([k / 3])
                chosen = masks[masks.sum(dim=1) == k]
                for mask in chosen:
                    states = CLEAN.masked_fill(mask, 4)
                    logits = backbone.logits_at(states, torch.zeros(64, dtype=torch.int64), level.alpha)
                    arguments = {"head": head, "states": states, "process": backbone.process, "level": level}
                    cost = loss(logits, CLEAN, **arguments).sum(dim=1)
                    found += cost / len(chosen) / 3
        torch.testing.assert_close(found, surprise(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (LinearSchedule(), 1, 4.1485289543),
        (LinearSchedule(), 2, 4.0971634295),
        (LinearSchedule(), 4, 4.0645853229),
        (LinearSchedule(), 8, 4.0465724335),
        (LogSinSchedule(0.0), 2, 4.1154407927),
        (LogSinSchedule(0.0), 4, 4.0768480490),
    ],
)
def test_finite_steps_of_masks(schedule: MaskSchedule, steps: int, expected: float) -> None:
    loss, backbone = DiscreteTimeBound(steps), ExactBackbone(AbsorbingProcess(4), LeaveOneOutHead())
    found = costs(loss, backbone, each_step(loss, schedule)).mean(dim=0)
    assert float(reference_law() @ found) == pytest.approx(expected, abs=6e-11)
    assert loss.label(backbone.process, schedule) == "bound"
    assert loss.label(backbone.process, LogLinearSchedule()) == "not a bound"


def each_step(loss: DiscreteTimeBound, schedule: MaskSchedule) -> NoiseLevel:
    middles = (torch.arange(loss.steps, dtype=torch.float64)[:, None] + 0.5) / loss.steps
    return loss.level(schedule, middles, 3)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("process", ["uniform", "hybrid", "gaussian"])
def test_finite_steps_by_the_divergence_of_enumerated_chains(process: str, steps: int) -> None:
    """sum of T KL = the KL between the joint laws of noising and of denoising, step by step from the kernels."""
    noise = PROCESSES[process]()
    schedule, loss = LogLinearSchedule(0.2), DiscreteTimeBound(steps)
    backbone = ExactBackbone(noise, LeaveOneOutHead())
    found = costs(loss, backbone, each_step(loss, schedule)).mean(dim=0)
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alphas = schedule.alpha(times)
    noisy = all_sequences(noise.states, 3)
    expected = torch.zeros(64, dtype=torch.float64)
    for s, t in pairwise(alphas):
        before, step, after = (noise.matrix(level) for level in (s, t / s, t))
        leave_one_out = backbone.logits_at(
            noisy, torch.zeros(len(noisy), dtype=torch.int64), t.expand(len(noisy), 1)
        ).exp()
        for n in range(3):
            column = step[:, noisy[:, n]].T  # (S^3, S): q(x_t | x_s)
            model = (leave_one_out[:, n] @ before[:4]) * column
            model = model / model.sum(dim=1, keepdim=True)
            true = before[CLEAN[:, n]][:, None] * column  # (64, S^3, S)
            true = true / true.sum(dim=2, keepdim=True)
            divergence = torch.xlogy(true, true / model.clamp(min=1e-300)).sum(dim=2)
            chance = torch.stack([after[CLEAN[:, i]][:, noisy[:, i]] for i in range(3)]).prod(dim=0)
            expected += (chance * divergence.nan_to_num(0.0)).sum(dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", [LogLinearSchedule(1e-4), GeometricSchedule(1e-6, 8.0)], ids=["line", "geometric"])
@pytest.mark.parametrize(
    ("process", "kind"), [(p, k) for p in ("uniform", "hybrid", "gaussian") for k in ("leave_one_out", "score")]
)
def test_bounds_with_their_prior_term_sequence_by_sequence(process: str, kind: str, schedule: MaskSchedule) -> None:
    noise = PROCESSES[process]()
    head = LeaveOneOutHead() if kind == "leave_one_out" else ScoreHead(scale_by_noise=False, mask_output=noise.masks)
    loss = ContinuousBound() if kind == "leave_one_out" else ScoreEntropy()
    sigma = 1.5
    found = over_noise(loss, ExactBackbone(noise, head), schedule, sigma) + prior_term(noise, sigma)
    torch.testing.assert_close(found, surprise() + prior_gap(noise, sigma), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("sigma", "expected", "term"), [(1.0, 4.0298716076, 0.5209465034), (3.0, 4.0274368217, 0.0108139115)]
)
def test_uniform_reference_values(sigma: float, expected: float, term: float) -> None:
    process = UniformProcess(4)
    prior = prior_term(process, sigma)
    assert float(reference_law() @ prior) == pytest.approx(term, abs=6e-11)
    found = (
        over_noise(ContinuousBound(), ExactBackbone(process, LeaveOneOutHead()), LogLinearSchedule(1e-4), sigma) + prior
    )
    assert float(reference_law() @ found) == pytest.approx(expected, abs=6e-11)
    assert float(reference_law() @ found) > ENTROPY


def test_a_posterior_in_the_place_of_a_leave_one_out_posterior_costs_far_more() -> None:
    """What the networks of papers disagree about: 5.98 nats instead of 4.03."""
    process, sigma = UniformProcess(4), 6.0
    honest = ExactBackbone(process, LeaveOneOutHead())

    class Posterior(ExactBackbone):
        def logits_at(self, tokens: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
            other = ExactBackbone(process, PosteriorHead())
            return other.logits_at(tokens, labels, alpha)

    schedule = LogLinearSchedule(1e-4)
    right, wrong = (
        float(reference_law() @ (over_noise(ContinuousBound(), network, schedule, sigma) + prior_term(process, sigma)))
        for network in (honest, Posterior(process, LeaveOneOutHead()))
    )
    assert right == pytest.approx(ENTROPY, abs=1e-4)
    assert wrong == pytest.approx(5.98, abs=5e-3)


@pytest.mark.parametrize("process", ["uniform", "hybrid"])
def test_flow_matching_bounds_from_above(process: str) -> None:
    """Of another chain with the same marginals: at least -log p, and not equal to it."""
    noise, sigma = PROCESSES[process](), 2.0
    loss, backbone = DiscreteFlowMatching(), ExactBackbone(noise, PosteriorHead())
    gap = over_noise(loss, backbone, LogLinearSchedule(1e-4), sigma) + prior_term(noise, sigma)
    gap = reference_law() @ (gap - surprise() - prior_gap(noise, sigma))
    assert 1e-3 < float(gap) < 1


def test_hybrid_adds_its_part_of_cross_entropy_on_the_scale_of_the_bound() -> None:
    process, schedule = UniformProcess(4), LogLinearSchedule(0.2)
    backbone = ExactBackbone(process, LeaveOneOutHead())
    plain, hybrid = DiscreteTimeBound(5), HybridBound(5, 0.01)
    level = each_step(plain, schedule)
    difference = costs(hybrid, backbone, level) - costs(plain, backbone, level)
    noisy = all_sequences(4, 3)
    for row in range(5):
        leave_one_out = backbone.logits_at(noisy, torch.zeros(64, dtype=torch.int64), level.alpha[row].expand(64, 1))
        kernel = process.matrix(level.alpha[row, 0])
        chances = torch.stack([kernel[CLEAN[:, n]][:, noisy[:, n]] for n in range(3)]).prod(dim=0)
        entropy = -sum(leave_one_out[:, n][:, CLEAN[:, n]].T for n in range(3))
        torch.testing.assert_close(difference[row], 5 * 0.01 * (chances * entropy).sum(dim=1), rtol=1e-9, atol=1e-12)
    assert hybrid.label(process, schedule) == "not a bound" and plain.label(process, schedule) == "bound"


def test_normalised_scores_cost_their_cross_entropy() -> None:
    process, states = AbsorbingProcess(7), torch.full((6, 3), 7)
    tokens = torch.randint(7, (6, 3))
    log_p = torch.randn(6, 3, 7, dtype=torch.float64).log_softmax(dim=-1)
    level = NoiseLevel.at(LogSinSchedule(), torch.rand(6, 1, dtype=torch.float64))
    scores = torch.cat((log_p + level.odds.log()[..., None], torch.zeros(6, 3, 1)), dim=-1)
    given = {"states": states, "process": process, "level": level}
    found = ScoreEntropy()(scores, tokens, head=ScoreHead(scale_by_noise=False), **given)
    expected = MaskedCrossEntropy()(log_p, tokens, head=LeaveOneOutHead(), **given)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_expected_score_entropy_is_least_at_the_true_ratios(process: str) -> None:
    """Its gradient in every log-score of every noisy sequence vanishes there, and is s - r of one clean sequence."""
    noise = PROCESSES[process]()
    head = ScoreHead(scale_by_noise=False, mask_output=noise.masks)
    backbone, alpha = ExactBackbone(noise, head), torch.tensor([[0.6]], dtype=torch.float64)
    noisy = all_sequences(noise.states, 3)
    level = NoiseLevel(t=alpha, alpha=alpha, noise=1 - alpha, rate=torch.ones_like(alpha)).take(
        torch.zeros(64 * len(noisy), dtype=torch.int64)
    )
    kernel = noise.matrix(alpha[0, 0])
    chances = torch.stack([kernel[CLEAN[:, n]][:, noisy[:, n]] for n in range(3)]).prod(dim=0)
    weights = (reference_law()[:, None] * chances).flatten()
    scores = backbone.logits_at(noisy, torch.zeros(len(noisy), dtype=torch.int64), alpha.expand(len(noisy), 1))
    scores = scores.clone().requires_grad_()
    tokens, states = CLEAN.repeat_interleave(len(noisy), dim=0), noisy.repeat(64, 1)
    possible = weights > 0
    values = ScoreEntropy()(
        scores.repeat(64, 1, 1)[possible],
        tokens[possible],
        head=head,
        states=states[possible],
        process=noise,
        level=level.take(possible),
    )
    (gradient,) = torch.autograd.grad((values.sum(dim=1) * weights[possible]).sum(), scores, retain_graph=True)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    (single,) = torch.autograd.grad(values[0].sum(), scores)
    ratios = noise.ratios(tokens[possible][:1], states[possible][:1], alpha)
    rates = noise.rates_into(states[possible][:1])
    row = int((noisy == states[possible][0]).all(dim=1).nonzero())
    # Where noise only masks nothing jumps into an id.
    torch.testing.assert_close(single[row], (rates * (scores.detach()[row].exp() - ratios))[0], rtol=1e-9, atol=1e-12)
    at_ratios = ratios.log().clamp(min=-700)
    first = {"head": head, "states": states[possible][:1], "process": noise, "level": level.take(slice(1))}
    nothing = ScoreEntropy()(at_ratios, tokens[possible][:1], **first)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-12)


def test_heads_and_processes_that_do_not_fit() -> None:
    logits, tokens = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64)
    level = NoiseLevel.at(LinearSchedule(), torch.tensor([[0.5]]))
    for loss, head, process, message in [
        (
            ContinuousBound(),
            PosteriorHead(),
            UniformProcess(4),
            "ContinuousBound needs a head of kind leave_one_out, Posterior",
        ),
        (
            ScoreEntropy(),
            LeaveOneOutHead(),
            UniformProcess(4),
            "ScoreEntropy needs a head of kind score, LeaveOneOutHead is of ki",
        ),
        (
            MaskedCrossEntropy(),
            ScoreHead(),
            AbsorbingProcess(4),
            "head of kind leave_one_out or posterior, ScoreHead is of ki",
        ),
        (
            DiscreteTimeBound(4),
            PosteriorHead(),
            UniformProcess(4),
            "DiscreteTimeBound needs a head of kind leave_one_out",
        ),
        (
            DiscreteFlowMatching(),
            LeaveOneOutHead(),
            UniformProcess(4),
            "DiscreteFlowMatching needs a head of kind posterior",
        ),
        (
            MaskedCrossEntropy(),
            LeaveOneOutHead(),
            UniformProcess(4),
            "is for AbsorbingProcess, got UniformProcess: use Cont",
        ),
        (
            DiscreteFlowMatching(),
            PosteriorHead(),
            DiscretizedGaussianProcess(4),
            "DiscreteFlowMatching is for paths .* got DiscretizedGaussianProcess",
        ),
        (ScoreEntropy(), ScoreHead(), UniformProcess(4), "mask_output of ScoreHead must be False for UniformProcess"),
        (
            ScoreEntropy(),
            ScoreHead(mask_output=False),
            UniformProcess(4),
            "scale_by_noise of ScoreHead must be False for UniformProcess, got True",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(logits, tokens, head=head, states=tokens, process=process, level=level)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiscreteTimeBound(0), "steps of DiscreteTimeBound must be at least 1, got 0"),
        (lambda: HybridBound(0), "steps of HybridBound must be at least 1, got 0"),
        (lambda: HybridBound(3, -0.1), "cross_entropy_weight must be >= 0, got -0.1"),
        (lambda: MaskedCrossEntropy("tokens"), "variable must be 'time', 'mask_ratio' or 'mask_count', got 'tokens'"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_counts_of_masks_are_exact_and_every_subset_equally_likely() -> None:
    loss, indices = MaskedCrossEntropy("mask_count"), torch.arange(6000)
    uniforms = CounterRandom(0, indices).uniform(Purpose.MASK_ORDER, 4)
    level = loss.level(LinearSchedule(), (indices[:, None].double() + 0.5) / 6000, 4)
    states = loss.corrupt(AbsorbingProcess(9), torch.zeros(6000, 4, dtype=torch.int64), level, uniforms)
    counts = (states == 9).sum(dim=1)
    assert torch.equal(counts.double(), (level.noise[:, 0] * 4).round())
    assert torch.bincount(counts).tolist() == [0, 1500, 1500, 1500, 1500]
    subsets = ((states == 9) * 2 ** torch.arange(4)).sum(dim=1)[counts == 2]
    assert torch.bincount(subsets).nonzero().flatten().tolist() == [3, 5, 6, 9, 10, 12]
    assert (torch.bincount(subsets)[[3, 5, 6, 9, 10, 12]] - 250).abs().max() < 5 * 250**0.5


# Values, gradients and memory on wide logits, a few rows at a time.

CASES = {
    "score entropy, masks": (ScoreEntropy(), ScoreHead(), AbsorbingProcess(6)),
    "score entropy, uniform": (ScoreEntropy(), ScoreHead(scale_by_noise=False, mask_output=False), UniformProcess(6)),
    "score entropy, hybrid": (ScoreEntropy(), ScoreHead(scale_by_noise=False), HybridProcess(6)),
    "score entropy, gaussian": (
        ScoreEntropy(),
        ScoreHead(scale_by_noise=False, mask_output=False),
        DiscretizedGaussianProcess(6, 0.5),
    ),
    "cross-entropy": (MaskedCrossEntropy(), LeaveOneOutHead(), AbsorbingProcess(6)),
    "continuous, uniform": (ContinuousBound(), LeaveOneOutHead(), UniformProcess(6)),
    "continuous, hybrid": (ContinuousBound(), LeaveOneOutHead(), HybridProcess(6)),
    "continuous, gaussian": (ContinuousBound(), LeaveOneOutHead(), DiscretizedGaussianProcess(6, 0.5)),
    "steps, masks": (DiscreteTimeBound(4), LeaveOneOutHead(), AbsorbingProcess(6)),
    "steps, hybrid": (DiscreteTimeBound(4), LeaveOneOutHead(), HybridProcess(6)),
    "steps and cross-entropy": (HybridBound(4, 0.1), LeaveOneOutHead(), UniformProcess(6)),
    "flow matching": (DiscreteFlowMatching(), PosteriorHead(), HybridProcess(6)),
}


def batch_of(loss: DiffusionLoss, head: Head, process):
    outputs = 6 + int(head.mask_output)
    logits = torch.randn(3, 5, outputs, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(6, (3, 5))
    level = loss.level(LogLinearSchedule(), torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64), 5)
    states = loss.corrupt(process, tokens, level, torch.rand(3, 5, dtype=torch.float64))
    return logits, tokens, states, level


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_differences_and_by_autograd_whatever_the_chunks(name: str, monkeypatch) -> None:
    loss, head, process = CASES[name]
    logits, tokens, states, level = batch_of(loss, head, process)
    arguments = {"head": head, "states": states, "process": process, "level": level}
    assert torch.autograd.gradcheck(lambda given: loss(given, tokens, **arguments), logits, rtol=1e-5)
    whole = loss(logits, tokens, **arguments)
    assert (whole > -1e-9).all()
    weights = torch.rand_like(whole)
    (gradient,) = torch.autograd.grad((whole * weights).sum(), logits)
    monkeypatch.setattr(divergences, "_ENTRIES_AT_ONCE", 12)
    monkeypatch.setattr(divergences, "_MOST_PARTS", 100)
    parts = loss(logits, tokens, **arguments)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)
    (in_parts,) = torch.autograd.grad((parts * weights).sum(), logits)
    torch.testing.assert_close(in_parts, gradient, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(loss(logits, tokens, **arguments), whole.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_good_as_its_digits(name: str) -> None:
    loss, head, process = CASES[name]
    logits, tokens, states, level = batch_of(loss, head, process)
    logits = logits.detach().float()
    found = loss(logits, tokens, head=head, states=states, process=process, level=level)
    expected = loss(logits.double(), tokens, head=head, states=states, process=process, level=level)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("process", [UniformProcess(4), HybridProcess(4, 0.5)])
def test_scores_of_which_float32_has_no_exponential(process) -> None:
    tokens = states = torch.zeros(1, 1, dtype=torch.int64)
    level = level_of_noise(torch.tensor([[1e-10]], dtype=torch.float64))
    scores = torch.tensor([0.0, 100.0, 90.0, 50.0, 110.0])[: process.states].expand(1, 1, -1)
    head = ScoreHead(scale_by_noise=False, mask_output=process.masks)
    given = {"head": head, "states": states, "process": process, "level": level}
    found, expected = (ScoreEntropy()(values, tokens, **given) for values in (scores, scores.double()))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("process", [UniformProcess(4), DiscretizedGaussianProcess(4, 0.3)])
def test_costs_of_rare_states_are_beyond_the_precision_of_the_logits(process, precision: torch.dtype) -> None:
    tokens, states = torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None]
    level = level_of_noise(torch.tensor([[1e-44]], dtype=torch.float64))
    logits = torch.tensor([-92.0, 0.0, 0.5, -1.0], dtype=precision, requires_grad=True)
    given = {"head": LeaveOneOutHead(), "states": states, "process": process, "level": level}
    found = ContinuousBound()(logits.expand(1, 4, 4), tokens, **given)
    expected = ContinuousBound()(logits.detach().double().expand(1, 4, 4), tokens, **given)
    assert expected.max() > torch.finfo(torch.float32).max
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name in CASES if "steps" not in name])
@pytest.mark.parametrize("t", [1e-7, 1 - 1e-7])
def test_finite_at_both_ends_of_time(name: str, t: float) -> None:
    """No 0 log 0 and no infinite odds reach a value or a gradient in float32, however wrong the network."""
    loss, head, process = CASES[name]
    outputs = 6 + int(head.mask_output)
    logits = (torch.randn(2, 5, outputs) * 30).requires_grad_()
    tokens = torch.randint(6, (2, 5))
    level = NoiseLevel.at(LogLinearSchedule(1e-5), torch.full((2, 1), t, dtype=torch.float64))
    for states in (tokens, process.corrupt(tokens, level.alpha * 0, torch.rand(2, 5, dtype=torch.float64))):
        if name == "score entropy, gaussian" and t < 0.5 and not torch.equal(states, tokens):
            continue  # a jump across the range at no noise has odds of 1e30 against it
        scaled = logits if head.kind != "score" else logits / 30
        value = loss(scaled, tokens, head=head, states=states, process=process, level=level)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all() and gradient.isfinite().all()


def test_of_the_logits_only_their_gradient_is_kept() -> None:
    """What lives from the forward to the backward pass is one tensor of their size, for the widest of the losses."""
    loss, head, process = CASES["continuous, uniform"]
    logits, tokens, states, level = batch_of(loss, head, process)
    step = loss(logits, tokens, head=head, states=states, process=process, level=level).grad_fn
    kept = []
    while step is not None:
        kept += [tensor.numel() for tensor in getattr(step, "saved_tensors", ())]
        step = step.next_functions[0][0] if step.next_functions else None
    assert kept == [logits.numel()]


def test_tokens_that_are_not_masked_cost_nothing_and_teach_nothing() -> None:
    loss, head, process = CASES["cross-entropy"]
    logits, tokens, _, level = batch_of(loss, head, process)
    value = loss(logits, tokens, head=head, states=tokens, process=process, level=level)
    assert torch.equal(value, torch.zeros_like(value))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


# Digits at small probabilities, against 130 digits of mpmath.


def line(size: int, rate: float = 1.0) -> DenseProcess:
    """Jumps to the neighbours alone, along a line."""
    jumps = torch.full((size - 1,), rate, dtype=torch.float64)
    rates = jumps.diag(1) + jumps.diag(-1)
    return DenseProcess(rates - rates.sum(dim=1).diag())


DENSE: dict[str, Callable[[], DenseProcess]] = {
    "wide jumps": lambda: DiscretizedGaussianProcess(8, 0.3),
    "short jumps": lambda: DiscretizedGaussianProcess(8, 0.02),
    "many ids": lambda: DiscretizedGaussianProcess(11, 0.1),
    "line": lambda: line(6),
    "fast line": lambda: line(9, rate=7.0),
}
LEAST = [1e-1, 1e-6, 1e-16, 1e-20, 1e-30, 1e-40]


def with_least(size: int, least: float, several: bool) -> Tensor:
    """`(K,)` probabilities of which the first, or every second, is `least`."""
    law = torch.linspace(1, 2, size, dtype=torch.float64)
    law[:: 2 if several else size] = 0
    law = law / law.sum()
    return torch.where(law == 0, least, law * (1 - least * (law == 0).sum()))


def bound_by_mpmath(law: Tensor, kernel: mpmath.matrix, rates: mpmath.matrix) -> Tensor:
    """`(K, K)`, the integrand of `ContinuousBound` at rate 1 for every clean id and state."""
    size = len(law)
    found = torch.zeros(size, size, dtype=torch.float64)
    predicted = mpmath.matrix([law.tolist()]) * kernel
    for clean, x in product(range(size), repeat=2):
        total = mpmath.mpf(0)
        for y in set(range(size)) - {x}:
            true, wrong = kernel[clean, y] / kernel[clean, x], predicted[y] / predicted[x]
            total += rates[y, x] * (wrong - true + true * mpmath.log(true / wrong))
        found[clean, x] = float(total)
    return found


def level_of_noise(sigma: Tensor) -> NoiseLevel:
    """The level of total noise `sigma (L, 1)`, at rate 1."""
    noise = -torch.expm1(-sigma)
    return NoiseLevel(t=noise, alpha=torch.exp(-sigma), noise=noise, rate=torch.ones_like(sigma))


@pytest.mark.parametrize("name", DENSE)
def test_bounds_of_dense_processes_keep_their_digits(name: str) -> None:
    process = DENSE[name]()
    size = process.states
    tokens, states = torch.cartesian_prod(torch.arange(size), torch.arange(size)).T[:, None]
    for least, sigma in zip(LEAST, (3.0, 0.7, 1e-3, 1e-9, 1e-20, 1e-41), strict=True):
        level = level_of_noise(torch.tensor([[sigma]], dtype=torch.float64))
        given = {"head": LeaveOneOutHead(), "states": states, "process": process, "level": level}
        with mpmath.workdps(130):
            rates = mpmath.matrix(process.rates.tolist())
            for x in range(size):
                rates[x, x] = -sum(rates[x, y] for y in range(size) if y != x)
            kernel = mpmath.expm(rates * mpmath.mpf(sigma), method="taylor")
            chances = torch.tensor(kernel.tolist(), dtype=torch.float64)
            torch.testing.assert_close(
                process.matrix(level.alpha[0, 0], level.noise[0, 0]), chances, rtol=1e-11, atol=1e-110
            )
            for several in (False, True):
                law = with_least(size, least, several)
                found = ContinuousBound()(law.log().expand(1, size**2, -1), tokens, **given).view(size, size)
                expected = bound_by_mpmath(law, kernel, rates)
                means = (chances * found).sum(dim=1), (chances * expected).sum(dim=1)
                torch.testing.assert_close(*means, rtol=1e-6, atol=1e-15)
                # A state that is hardly ever reached, where the two laws are nearly the same, has a digit less.
                reached = chances > 1e-50
                torch.testing.assert_close(found[reached], expected[reached], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_integrated_bounds_of_dense_processes_are_minus_log_p(name: str, several: bool) -> None:
    """One token has no others to leave out: its law is the exact prediction at every level of noise."""
    process = DENSE[name]()
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(6))
    edges = torch.linspace(-110, np.log(600), 234, dtype=torch.float64)  # of log sigma
    middles, half = (edges[1:] + edges[:-1]) / 2, (edges[1] - edges[0]) / 2
    sigma = (middles[:, None] + half * nodes).flatten()[:, None].exp()
    measure = (half * weights).expand(len(middles), -1).reshape(-1, 1) * sigma
    states = torch.arange(process.states).expand(len(sigma), -1)
    level = level_of_noise(sigma)
    chances = process.likelihood(torch.zeros(len(sigma), dtype=torch.int64), level.alpha[:, 0], level.noise[:, 0])
    for least in LEAST:
        law = with_least(process.states, least, several)
        prediction = law.log().expand(*states.shape, -1)
        given = {"head": LeaveOneOutHead(), "states": states, "process": process, "level": level}
        costs = ContinuousBound()(prediction, torch.zeros_like(states), **given)
        end = torch.tensor(600.0).double().neg().exp()
        true, predicted = process.marginals(torch.tensor(0), law, end)
        left = torch.xlogy(true, true / predicted).sum()
        assert float((costs * chances * measure).sum() + left) == pytest.approx(-np.log(least), rel=1e-6)
