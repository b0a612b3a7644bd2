"""MaskGIT: its counts, its law and its cost; TiTok's draws and their order; what sets MaskBit's sampler apart."""

from itertools import pairwise

import pytest
import torch
from helpers.exact_laws import chi_square_p_value, order_log_laws, sequence_numbers
from torch import Tensor

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import ArccosSchedule, CosineSchedule, LinearSchedule, MaskSchedule, SquareSchedule
from discrete_lit.samplers import MaskBitSampler, MaskGITSampler, TiTokSampler
from discrete_lit.samplers.maskgit import draw_at


class Steep(MaskSchedule):
    """m = t^4: nearly everything is unmasked in the first step."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return t.double() ** 4

    def derivative(self, t: Tensor) -> Tensor:
        return 4 * t.double() ** 3

    def inverse(self, m: Tensor) -> Tensor:
        return m.double() ** 0.25


def unmasked_in_each_step(sampler: MaskGITSampler, length: int) -> list[int]:
    return [before - after for before, after in pairwise([length, *sampler.masked_counts(length)])]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (CosineSchedule(), [5, 15, 24, 31, 39, 45, 48, 49]),
        (ArccosSchedule(), [21, 21, 21, 23, 25, 28, 35, 82]),
    ],
)
def test_published_counts_of_256_tokens_in_8_steps(schedule: MaskSchedule, expected: list[int]) -> None:
    assert unmasked_in_each_step(MaskGITSampler(steps=8, mask_schedule=schedule), 256) == expected


def test_rounding_does_not_decide_a_count() -> None:
    assert unmasked_in_each_step(MaskGITSampler(steps=10, mask_schedule=LinearSchedule()), 100) == [10] * 10
    assert MaskGITSampler(steps=3).masked_counts(256)[1] == 128  # m(1/3) = sin(pi / 6) = 1/2


@pytest.mark.parametrize(
    "schedule", [CosineSchedule(), ArccosSchedule(), LinearSchedule(), SquareSchedule(), Steep()], ids=type
)
def test_every_step_unmasks_something(schedule: MaskSchedule) -> None:
    for length in (1, 2, 7, 64):
        for steps in range(1, length + 1):
            counts = unmasked_in_each_step(MaskGITSampler(steps=steps, mask_schedule=schedule), length)
            assert len(counts) == steps and sum(counts) == length and min(counts) >= 1


def test_more_steps_than_tokens_are_refused(make_backbone) -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="steps=7 exceeds the 6 tokens"):
        MaskGITSampler(steps=7)(make_backbone("bidirectional"), labels, CounterRandom(0, labels))


def test_one_token_a_step_in_random_order_has_the_order_averaged_law(make_backbone) -> None:
    backbone = make_backbone("bidirectional", vocab_size=3, grid=(3,), spread=0.5)
    sampler = MaskGITSampler(steps=3, choice_temperature=1e9)
    random = CounterRandom(5, torch.arange(30_000))
    with torch.no_grad():
        output = sampler(backbone, torch.ones(30_000, dtype=torch.int64), random)
    numbers = sequence_numbers(output.tokens, 3)
    laws = order_log_laws(backbone, label=1).exp()
    assert chi_square_p_value(numbers, laws.mean(dim=0)) > 1e-3
    # The orders differ enough that the test would see the wrong mixture, or the wrong class.
    assert chi_square_p_value(numbers, laws[0]) < 1e-6
    assert chi_square_p_value(numbers, order_log_laws(backbone, label=0).exp().mean(dim=0)) < 1e-6


def test_one_step_draws_every_token_alone(make_backbone) -> None:
    backbone = make_backbone("bidirectional", vocab_size=3, grid=(2,), spread=0.5)
    labels = torch.zeros(20_000, dtype=torch.int64)
    with torch.no_grad():
        tokens = MaskGITSampler(steps=1)(backbone, labels, CounterRandom(5, torch.arange(20_000))).tokens
        marginals = backbone(torch.full((1, 2), 3), labels[:1])[0].double().softmax(dim=-1)
    law = (marginals[0][:, None] * marginals[1]).flatten()
    assert chi_square_p_value(sequence_numbers(tokens, 3), law) > 1e-3


def test_without_noise_the_most_confident_tokens_stay(make_backbone) -> None:
    """The first of two steps keeps what its own draw was surest of, and never touches it again."""
    backbone = make_backbone("bidirectional", vocab_size=5, grid=(6,), spread=0.5)
    seen: list[Tensor] = []
    backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    labels = torch.zeros(50, dtype=torch.int64)
    random = CounterRandom(5, torch.arange(50))
    sampler = MaskGITSampler(steps=2, choice_temperature=0, mask_schedule=LinearSchedule())
    with torch.no_grad():
        tokens = sampler(backbone, labels, random).tokens
        first, second = seen
        assert (first == 5).all()
        log_probabilities = backbone(first, labels).log_softmax(dim=-1)
        single = MaskGITSampler(steps=1)(backbone, labels, random).tokens
    kept = second != 5
    assert (kept.sum(dim=1) == 3).all()
    assert torch.equal(second[kept], single[kept]) and torch.equal(tokens[kept], single[kept])
    confidence = log_probabilities.gather(-1, single[..., None])[..., 0]
    assert (confidence.masked_fill(~kept, 9).amin(dim=1) >= confidence.masked_fill(kept, -99).amax(dim=1)).all()


@pytest.mark.parametrize(
    ("schedule", "scale", "calls", "rows"),
    [
        ("constant", 1.0, 4, [3, 3, 3, 3]),
        ("constant", 2.0, 8, [6, 6, 6, 6]),
        ("linear", 2.0, 7, [3, 6, 6, 6]),  # the first step has s = 1 and skips the null pass
        ("cosine", 2.0, 7, [3, 6, 6, 6]),
    ],
)
def test_what_it_reports_is_what_it_ran(make_backbone, schedule, scale: float, calls: int, rows: list[int]) -> None:
    backbone = make_backbone("bidirectional")
    seen: list[int] = []
    backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    sampler = MaskGITSampler(steps=4, guidance_scale=scale, guidance_schedule=schedule)
    with torch.no_grad():
        output = sampler(backbone, torch.zeros(3, dtype=torch.int64), CounterRandom(0, torch.arange(3)))
    assert seen == rows
    assert (output.network_calls, output.sequential_passes) == (calls, 4) == (sum(seen) / 3, len(seen))


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"choice_temperature": -0.1}])
def test_settings_out_of_range(arguments) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MaskGITSampler(**arguments)


def test_drawing_at_some_positions_alone_changes_nothing() -> None:
    """Each position keeps its own logits and random number; rows have as many positions as they like."""
    sampler, logits = MaskGITSampler(temperature=0.7, top_k=4), torch.randn(9, 8, 6)
    uniforms = CounterRandom(0, torch.arange(9)).uniform(Purpose.TOKEN, 8)
    whole, score = sampler.choose(logits, uniforms)
    where = torch.rand(9, 8) < 0.5
    where[0] = False
    ids, own = draw_at(where, int(where.sum(dim=1).max()), logits, uniforms, sampler.choose)
    assert torch.equal(ids[where], whole[where])
    torch.testing.assert_close(own[where], score[where].double())


def test_the_draw_is_of_the_noise_temperature_and_its_score_the_raw_logit() -> None:
    """argmax(logit + tau Gumbel) has the law softmax(logit / tau); here tau = 4 (1 - 1/2) = 2."""
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0])
    rows = logits.expand(30_000, 1, 4)
    uniforms = CounterRandom(0, torch.arange(30_000)).uniform(Purpose.TOKEN, 1)
    ids, score = TiTokSampler(choice_temperature=4.0).draw_scored(rows, uniforms, r=0.5)
    assert chi_square_p_value(ids.flatten(), (logits.double() / 2).softmax(dim=0)) > 1e-3
    torch.testing.assert_close(score, logits[ids])
    gumbel = -torch.log(-torch.log(torch.rand(30_000, 4, dtype=torch.float64)))
    published = (logits + 2 * gumbel).argmax(dim=-1)
    assert chi_square_p_value(published, (logits.double() / 2).softmax(dim=0)) > 1e-3


def test_the_last_step_takes_the_most_probable() -> None:
    logits = torch.randn(50, 3, 7)
    uniforms = torch.rand(50, 3, dtype=torch.float64)
    ids, _ = TiTokSampler().draw_scored(logits, uniforms, r=1.0)
    assert torch.equal(ids, logits.argmax(dim=-1))


def test_the_temperature_falls_from_thirteen_tenths_to_one_half() -> None:
    sampler = TiTokSampler(temperature=2.0, temperature_annealing=True)
    assert [sampler.temperature_at(r) for r in (0.0, 0.5, 1.0)] == pytest.approx([2.6, 1.8, 1.0])
    assert TiTokSampler(temperature=2.0).temperature_at(0.5) == 2.0
    logits, uniforms = torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, dtype=torch.float64) + 0.5
    _, score = sampler.draw_scored(logits, uniforms, r=1.0)
    assert float(score) == pytest.approx(3.0)
    _, score = TiTokSampler(temperature=2.0).draw_scored(logits, uniforms, r=1.0)
    assert float(score) == pytest.approx(1.5)


def test_raw_logits_order_otherwise_than_log_probabilities(make_backbone) -> None:
    """Without noise the first step keeps the positions of the largest logits, though others are surer of their id."""
    backbone = make_backbone("bidirectional", vocab_size=5, grid=(6,), spread=0.7)
    labels = torch.arange(60) % 3
    with torch.no_grad():
        logits = backbone(torch.full((60, 6), 5), labels)
        random = CounterRandom(0, torch.arange(60))
        titok = TiTokSampler(steps=2, choice_temperature=0)(backbone, labels, random, trace=True).trace[0]
        greedy = MaskGITSampler(2, 0.0, mask_schedule=TiTokSampler().mask_schedule, top_k=1)
        sure = greedy(backbone, labels, random, trace=True)
    kept = titok.changed.sum(dim=1)
    assert (kept == 2).all()
    largest = logits.amax(dim=-1).topk(2, dim=1).indices
    assert torch.equal(titok.changed, torch.zeros(60, 6, dtype=torch.bool).scatter_(1, largest, True))
    surest = logits.log_softmax(dim=-1).amax(dim=-1).topk(2, dim=1).indices
    assert torch.equal(sure.trace[0].changed, torch.zeros(60, 6, dtype=torch.bool).scatter_(1, surest, True))
    assert not torch.equal(titok.changed, sure.trace[0].changed)


def test_maskbit_unmasks_groups_of_a_position_apart(make_case) -> None:
    case = make_case("maskbit")
    sampler = MaskBitSampler(steps=3, guidance_scale=1.0)
    trace = case.draw(sampler, torch.zeros(40, dtype=torch.int64), torch.arange(40), trace=True).trace
    known = (trace[0].tokens != 4).unflatten(1, (3, 2)).sum(dim=2)
    assert (known == 1).any()


def test_maskbits_published_settings() -> None:
    scales = MaskBitSampler().scales(64)
    assert scales[0] == 1 and scales[-1] == pytest.approx(8.1, abs=0.1)
    assert MaskBitSampler().masked_counts(512)[:2] == [506, 501]


def test_each_sequence_counts_its_own_masked_tokens(make_backbone) -> None:
    """4 and 12 tokens to draw beside a whole sequence of 16, in steps that keep their own fractions."""
    known = torch.zeros(3, 16, dtype=torch.int64)
    for row, unknown in enumerate((4, 12, 16)):
        known[row, :unknown] = -1
    sampler, labels = MaskGITSampler(steps=4), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        output = sampler(
            make_backbone("bidirectional", grid=(16,)),
            labels,
            CounterRandom(0, torch.arange(3)),
            known=known,
            trace=True,
        )
    masked = [(step.tokens == 5).sum(dim=1).tolist() for step in output.trace]
    assert masked == [list(counts) for counts in zip(*map(sampler.masked_counts, (4, 12, 16)), strict=True)]
    assert masked[0] == [3, 11, 14]
