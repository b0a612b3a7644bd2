"""Single steps of the diffusion samplers: hitting times, tails, remasking, jumps that add up."""

from math import comb

import pytest
import torch
from helpers.enumerated_steps import PROCESSES, FiniteNoise, OncePerState, context_of, draw_numbers
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers
from helpers.exact_oracle import LENGTH, reference_law
from scipy.stats import binom, kstest, poisson

from discrete_lit.backbones import SequenceLayout
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import LinearSchedule, SquareSchedule
from discrete_lit.diffusion.dense_processes import DiscretizedGaussianProcess
from discrete_lit.diffusion.parameterization import Denoiser, LeaveOneOutHead
from discrete_lit.diffusion.processes import (
    AbsorbingProcess,
    UniformProcess,
)
from discrete_lit.diffusion.reverse import jumps_from_clean
from discrete_lit.samplers import (
    AncestralSampler,
    FirstHittingSampler,
    RemaskingSampler,
    SamplingContext,
    TauLeapingSampler,
)
from discrete_lit.samplers.diffusion import NoisyTokens
from discrete_lit.samplers.reverse_rates import poisson as draw_poisson


class LevelSeen(OncePerState):
    """Notes the levels that it is asked at."""

    def logits_at(self, tokens, labels, alpha):
        self.seen.append(1 - alpha[:, 0])
        return super().logits_at(tokens, labels, alpha)


def test_hitting_times() -> None:
    """With n masked at m the next hit is at `m U^(1 / n)`: mean n / (n + 1) and distribution function m^n of m."""
    backbone = LevelSeen(PROCESSES["absorbing"], LeaveOneOutHead())
    backbone.seen = []
    labels = torch.zeros(20_000, dtype=torch.int64)
    random = CounterRandom(1, torch.arange(20_000))
    output = FirstHittingSampler()(backbone, labels, random, denoiser=backbone.denoiser(SquareSchedule()))
    assert output.network_calls == LENGTH == len(backbone.seen)
    before = torch.ones(20_000, dtype=torch.float64)
    for n, m in zip((3, 2, 1), backbone.seen, strict=True):
        share = m / before
        assert float(share.mean()) == pytest.approx(n / (n + 1), abs=0.01)
        assert kstest(share.numpy(), lambda value, n=n: value**n).pvalue > 1e-4
        before = m


class FlatBackbone(torch.nn.Module):
    """Equal logits for every id; a stand-in that costs nothing at a large vocabulary."""

    def __init__(self, process, length: int) -> None:
        super().__init__()
        self.layout = SequenceLayout(
            process.vocab_size, (length,), num_classes=1, attention="bidirectional", mask_token=process.masks
        )

    def forward(self, tokens, labels, cache=None, order=None, time=None):
        return torch.zeros(1).expand(*tokens.shape, self.layout.outputs)

    def new_cache(self, labels):
        return None

    def flops(self, *arguments):
        return 0

    cache_flops = flops


def test_half_of_the_tokens_are_revealed_at_half_time() -> None:
    """Binomial(n, 0.5), at K T = 8,192 x 2,048, where races of float32 noise miss a third of the reveals."""
    process, steps, length = AbsorbingProcess(8192), 2048, 256
    denoiser = Denoiser(process=process, schedule=LinearSchedule(), head=LeaveOneOutHead(), time_input="none")
    labels, sampler = torch.zeros(1, dtype=torch.int64), AncestralSampler(steps=steps)
    context = SamplingContext(FlatBackbone(process, length), labels, random=CounterRandom(0, labels), denoiser=denoiser)
    intervals = sampler.intervals(denoiser.schedule, context)
    x = NoisyTokens(context, denoiser, level=intervals[0].t)
    for interval in intervals[: steps // 2]:
        sampler.step(x, interval, 1.0)
    low, high = binom.ppf([1e-4, 1 - 1e-4], length, 0.5)
    assert low <= int((~x.masked).sum()) <= high
    ids = x.tokens[~x.masked].double() / 8192
    assert kstest(ids.numpy(), "uniform").pvalue > 1e-4


def test_rare_jumps_of_uniform_noise() -> None:
    """One of a thousand steps at K = 16,384: a token that is right leaves with probability 6e-8 or so, not with 0."""
    process = UniformProcess(16_384)
    states = torch.zeros(1, 1, dtype=torch.int64)
    clean = torch.full((1, 1, 16_384), -25.0)
    clean[..., 0] = 0.0
    clean = clean.log_softmax(dim=-1)
    alpha = torch.tensor([[0.5]], dtype=torch.float64)
    jumps = jumps_from_clean(clean, states, process, alpha, alpha - 0.001)
    marginal = process.marginal(clean.double().exp(), alpha)
    kernel = process.likelihood(states, (alpha - 0.001) / alpha)
    law = marginal * kernel / (marginal * kernel).sum()
    assert float(jumps.probability) == pytest.approx(1 - float(law[0, 0, 0]), rel=1e-5) and 0 < float(jumps.probability)
    torch.testing.assert_close(jumps.distribution(states, 16_384), law, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("strategy", "eta"), [("cap", 0.1), ("cap", 1.0), ("rescale", 0.3), ("rescale", 1.0)])
def test_remasking_keeps_the_marginals(strategy: str, eta: float) -> None:
    """`(1 - alpha_t) u + alpha_t (1 - sigma) = alpha_s`, with sigma up to its most."""
    sampler = RemaskingSampler(strategy=strategy, eta=eta, steps=20)
    backbone = OncePerState(PROCESSES["absorbing"], LeaveOneOutHead())
    for interval in sampler.intervals(SquareSchedule(), context_of(backbone, 1, SquareSchedule()))[1:-1]:
        alpha_t, alpha_s = interval.alpha_t, interval.alpha_s
        sigma = sampler.sigma(interval)
        unmask = sampler.unmask_probability(interval, torch.ones(1, 1, dtype=torch.float64))
        assert 0 < float(sigma) <= min(1, float((1 - alpha_s) / alpha_t)) and 0 <= float(unmask) <= 1
        assert float((1 - alpha_t) * unmask + alpha_t * (1 - sigma)) == pytest.approx(float(alpha_s), abs=1e-12)


def test_remasked_counts_are_binomial() -> None:
    """The draws too: at every level as many tokens are masked as its mask probability says."""
    backbone = OncePerState(PROCESSES["absorbing"], LeaveOneOutHead(), timed=False)
    sampler, schedule, rows = RemaskingSampler(strategy="rescale", eta=0.5, steps=5), LinearSchedule(), 20_000
    context = context_of(backbone, rows, schedule)
    intervals = sampler.intervals(schedule, context)
    x = NoisyTokens(context, context.denoiser, level=intervals[0].t)
    for interval in intervals[:-1]:
        sampler.step(x, interval, 1.0)
        m = 1 - float(interval.alpha_s[0, 0])
        law = torch.tensor([comb(LENGTH, k) * m**k * (1 - m) ** (LENGTH - k) for k in range(LENGTH + 1)])
        assert chi_square_p_value(x.masked.sum(dim=1), law) > 1e-4


@pytest.mark.parametrize("strategy", ["cap", "rescale", "conf"])
def test_without_remasking_it_is_the_ancestral_sampler(strategy: str) -> None:
    backbone = OncePerState(PROCESSES["absorbing"], LeaveOneOutHead(), timed=False)
    plain = draw_numbers(AncestralSampler(steps=6), backbone, LinearSchedule(), 500)
    other = draw_numbers(RemaskingSampler(strategy=strategy, eta=0.0, steps=6), backbone, LinearSchedule(), 500)
    assert torch.equal(plain, other)


def test_a_loop_has_times_of_its_own() -> None:
    times = RemaskingSampler(strategy="loop", eta=0.0, steps=6, loop=(0.5, 1.0)).times(LinearSchedule())
    torch.testing.assert_close(times, torch.tensor([0, 0.1, 0.1, 0.1, 0.4, 0.7, 1.0], dtype=torch.float64))


def test_a_loop_masks_at_its_level_alone() -> None:
    """Half of what is revealed is masked again: as much as can be at a level of 2 / 3."""
    backbone = OncePerState(PROCESSES["absorbing"], LeaveOneOutHead(), timed=False)
    sampler = RemaskingSampler(strategy="loop", eta=1.0, steps=8, loop=(0.25, 0.75), loop_alpha=2 / 3)
    intervals = sampler.intervals(LinearSchedule(), context_of(backbone, 1, LinearSchedule()))
    assert [round(float(sampler.sigma(interval)), 6) for interval in intervals] == [0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0]


def test_doubtful_tokens_are_masked_first() -> None:
    """Three tokens drawn with probabilities 0.9, 0.5 and 0.1: sigma is shared by the softmax of minus these."""
    backbone = OncePerState(PROCESSES["absorbing"], LeaveOneOutHead(), timed=False)
    sampler = RemaskingSampler(strategy="conf", eta=1.0, steps=10)
    context = context_of(backbone, 20_000, LinearSchedule())
    interval = sampler.intervals(LinearSchedule(), context)[5]  # alpha from 0.5 to 0.6: sigma_max is 0.8
    x = NoisyTokens(context, context.denoiser, level=interval.t)
    x.tokens = torch.zeros_like(x.tokens)
    x.log_probability = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).log().expand(20_000, -1)
    uniforms = context.random.uniform(Purpose.CONFIDENCE, LENGTH)
    assert sampler.step(x, interval, 1.0) is None and x.masked.any()
    assert context.output(x.tokens).network_calls == 0  # nothing was masked that it could reveal
    share = 0.8 * torch.tensor([-0.9, -0.5, -0.1], dtype=torch.float64).softmax(dim=0)
    x.tokens = torch.zeros_like(x.tokens)
    torch.testing.assert_close(sampler.remask(x, interval, uniforms).double().mean(dim=0), share, atol=0.015, rtol=0)


def test_known_tokens_condition_first_hitting_exactly() -> None:
    backbone = OncePerState(PROCESSES["absorbing"], LeaveOneOutHead(), timed=False)
    rows, known = 40_000, torch.tensor([-1, 2, -1])
    labels = torch.zeros(rows, dtype=torch.int64)
    tokens = FirstHittingSampler()(
        backbone,
        labels,
        CounterRandom(0, torch.arange(rows)),
        known=known.expand(rows, -1),
        denoiser=backbone.denoiser(LinearSchedule()),
    ).tokens
    law = reference_law() * (all_sequences(4, 3)[:, 1] == 2)
    assert chi_square_p_value(sequence_numbers(tokens, 4), law / law.sum()) > 1e-4


def test_poisson_counts() -> None:
    uniforms = CounterRandom(0, torch.arange(1)).uniform(Purpose.TOKEN, 40_000)
    for mean in (0.0, 1e-9, 0.3, 4.0, 40.0):
        counts = draw_poisson(torch.full_like(uniforms, mean), uniforms)[0]
        assert ((counts > 0) == (uniforms[0] < -torch.expm1(torch.tensor(-mean, dtype=torch.float64)))).all()
        if mean < 1e-6:
            assert not counts.any()
        else:
            law = torch.tensor(poisson.pmf(range(200), mean))
            assert chi_square_p_value(counts, law / law.sum()) > 1e-4


def test_jumps_of_an_order_add_up() -> None:
    """One token: the sum of independent Poisson numbers of jumps to each id, cut to the range of ids."""
    process, size = DiscretizedGaussianProcess(4, 0.5), 4
    law = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    backbone = OncePerState(process, LeaveOneOutHead(), law.expand(2, -1), length=1)
    sampler, schedule, rows = TauLeapingSampler(steps=3), FiniteNoise(), 40_000
    context = context_of(backbone, rows, schedule)
    interval = sampler.intervals(schedule, context)[1]
    x = NoisyTokens(context, context.denoiser, level=interval.t)
    x.tokens = torch.ones_like(x.tokens)
    sampler.step(x, interval, 1.0)
    state = torch.tensor([[1]])
    alpha_t, slope = interval.alpha_t[:1], interval.slope[:1]
    marginal = process.marginal(law.expand(1, 1, 4), alpha_t)[0, 0]
    rates = process.rates_into(state)[0, 0] * marginal / marginal[1] * float(slope / alpha_t / 3)
    expected = torch.zeros(size, dtype=torch.float64)
    for down in range(12):
        for up in range(12):
            for double in range(12):
                chance = 1.0
                for count, rate in ((down, rates[0]), (up, rates[2]), (double, rates[3])):
                    chance *= float(poisson.pmf(count, float(rate)))
                expected[min(max(1 - down + up + 2 * double, 0), size - 1)] += chance
    assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
    assert chi_square_p_value(x.tokens[:, 0], expected / expected.sum()) > 1e-4
