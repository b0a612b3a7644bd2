"""TiTok's draws, their order, and what sets MaskBit's sampler apart."""

import pytest
import torch
from helpers.exact_laws import chi_square_p_value

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.samplers import MaskBitSampler, MaskGITSampler, TiTokSampler


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
    """Without noise the first step keeps the places of the largest logits, though others are surer of their id."""
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


def test_maskbit_reveals_groups_of_a_place_apart(make_case) -> None:
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
    """4 and 12 tokens to draw beside a whole sequence of 16, in steps that keep their own shares."""
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
