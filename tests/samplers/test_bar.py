"""BAR's steps over the bits of an id, and Open-MAGVIT2's parts with settings of their own: exact laws."""

from math import prod

import pytest
import torch
from helpers.exact_laws import chi_square_p_value

from discrete_lit.backbones import SequenceLayout
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import BARSampler, OpenMAGVIT2Sampler, RasterSampler, SubTokenSettings

ONE_CODE = SequenceLayout(4, (1,), num_classes=2, attention="causal")
ONE_PAIR = SequenceLayout(6, (1,), num_classes=2, attention="causal")


@torch.no_grad()
def draw(backbone, sampler: RasterSampler, count: int = 30_000) -> torch.Tensor:
    labels = torch.ones(count, dtype=torch.int64)
    return sampler(backbone, labels, CounterRandom(3, torch.arange(count))).tokens[:, 0]


@torch.no_grad()
def guided_bits(backbone, bits: list[int], scale: float) -> torch.Tensor:
    """`(b, 2)`: guided logits of the bits of the first id, 2 where one is masked."""
    rows = []
    for label in (1, 2):
        hidden = backbone(torch.zeros(1, 0, dtype=torch.int64), torch.tensor([label]))
        rows.append(backbone.place_head.bit_logits(hidden, torch.tensor([[bits]]))[0, 0].double())
    return rows[1] + scale * (rows[0] - rows[1])


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.8, 2.5)])
def test_law_of_two_bits_one_by_one(make_case, make_layout_backbone, temperature: float, scale: float) -> None:
    """Of two drawn bits the first stays with probability sigmoid of the difference of their logits over tau: the
    difference of two Gumbel draws is logistic. The other is drawn again, given it, at half of tau."""
    backbone, tau = make_layout_backbone(ONE_CODE, **make_case("bar").switches), 1.5
    guidance = {"guidance_scale": scale, "guidance_schedule": "constant"}
    sampler = BARSampler(bit_counts=(1, 1), choice_temperature=tau, temperature=temperature, **guidance)
    law = torch.zeros(4, dtype=torch.float64)
    start = guided_bits(backbone, [2, 2], scale) / temperature
    first = (start / tau).softmax(dim=-1)
    for low in (0, 1):
        for high in (0, 1):
            both = first[0, low] * first[1, high]
            low_stays = torch.sigmoid((start[0, low] - start[1, high]) / tau)
            for stays, known in ((low_stays, [low, 2]), (1 - low_stays, [2, high])):
                second = (guided_bits(backbone, known, scale) / temperature / (tau / 2)).softmax(dim=-1)
                other = known.index(2)
                for bit in (0, 1):
                    bits = [bit if value == 2 else value for value in known]
                    law[bits[0] + 2 * bits[1]] += both * stays * second[other, bit]
    assert float(law.sum()) == pytest.approx(1)
    numbers = draw(backbone, sampler)
    assert chi_square_p_value(numbers, law) > 1e-3
    assert chi_square_p_value(draw(backbone, RasterSampler()), law) < 1e-6


def test_all_bits_at_once_are_independent(make_case, make_layout_backbone) -> None:
    backbone = make_layout_backbone(
        SequenceLayout(8, (1,), num_classes=2, attention="causal"), **make_case("bar").switches
    )
    law = guided_bits(backbone, [2, 2, 2], 1.0).softmax(dim=-1)
    joint = torch.stack([prod(law[bit, number >> bit & 1] for bit in range(3)) for number in range(8)])
    sampler = BARSampler(bit_counts=(3,), choice_temperature=1.0, guidance_scale=1.0)
    assert chi_square_p_value(draw(backbone, sampler), joint) > 1e-3


def test_without_noise_the_surest_bits_come_first(make_case, make_layout_backbone) -> None:
    backbone = make_layout_backbone(
        SequenceLayout(16, (1,), num_classes=2, attention="causal"), **make_case("bar").switches
    )
    bits, counts = [2] * 4, (1, 2, 1)
    for count in counts:
        logits = guided_bits(backbone, bits, 1.7)
        sure = logits.amax(dim=-1).masked_fill(torch.tensor(bits) != 2, -torch.inf)
        for bit in sure.topk(count).indices.tolist():
            bits[bit] = int(logits[bit].argmax())
    sampler = BARSampler(counts, choice_temperature=0.0, guidance_scale=1.7, guidance_schedule="constant")
    assert set(draw(backbone, sampler, 20).tolist()) == {sum(bit << place for place, bit in enumerate(bits))}


@torch.no_grad()
def test_trace_is_the_log_probability_of_the_revealed_bits(make_case) -> None:
    case = make_case("bar")
    sampler = case.build(bit_counts=(3,), guidance_scale=1.0)
    output = case.draw(sampler, torch.zeros(5, dtype=torch.int64), torch.arange(5), trace=True)
    for place in range(6):
        hidden = case.backbone(output.tokens[:, :place], torch.zeros(5, dtype=torch.int64))[:, -1:]
        logits = case.backbone.place_head.bit_logits(hidden, torch.full((5, 1, 3), 2))[:, 0].log_softmax(dim=-1)
        bits = output.tokens[:, place, None] >> torch.arange(3) & 1
        expected = logits.gather(-1, bits[..., None])[..., 0].sum(dim=-1)
        torch.testing.assert_close(output.trace[place].confidence[:, place], expected.double(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guidance_of_bits_grows_over_the_places(make_case) -> None:
    """`linear` is 1 at the first place: its ids are those of no guidance, the last ones are not."""
    case = make_case("bar")
    labels, indices = torch.zeros(60, dtype=torch.int64), torch.arange(60)
    guided = case.draw(case.build(guidance_scale=30.0), labels, indices)
    plain = case.draw(case.build(guidance_scale=1.0), labels, indices)
    assert torch.equal(guided.tokens[:, 0], plain.tokens[:, 0])
    assert not torch.equal(guided.tokens[:, -1], plain.tokens[:, -1])
    assert (guided.network_calls, plain.network_calls) == (12, 6)


def test_each_part_has_its_own_settings(make_case, make_layout_backbone) -> None:
    """Temperature, filter and guidance of both parts, multiplied up by hand."""
    backbone = make_layout_backbone(ONE_PAIR, **make_case("parts").switches)
    head, law = backbone.place_head, torch.zeros(6, dtype=torch.float64)
    with torch.no_grad():
        hidden = [backbone(torch.zeros(1, 0, dtype=torch.int64), torch.tensor([y])) for y in (1, 2)]

        def guided(known: list[int], scale: float) -> torch.Tensor:
            given = torch.tensor([[known]], dtype=torch.int64)
            cond, null = (head.sub_token_logits(state, given)[0, 0].double() for state in hidden)
            return null + scale * (cond - null)

        first = (guided([], 2.0) / 1.3).softmax(dim=-1)
        for low in range(2):
            logits = guided([low], 0.5) / 0.7
            logits[logits.argmin()] = -torch.inf
            for high, probability in enumerate(logits.softmax(dim=-1)):
                law[low + 2 * high] = first[low] * probability
    parts = [
        SubTokenSettings(temperature=1.3, guidance_scale=2.0),
        SubTokenSettings(temperature=0.7, top_k=2, guidance_scale=0.5),
    ]
    numbers = draw(backbone, OpenMAGVIT2Sampler(parts))
    assert chi_square_p_value(numbers, law) > 1e-3


def test_a_part_alone_may_be_guided(make_case) -> None:
    case = make_case("parts")
    parts = [SubTokenSettings(), SubTokenSettings(guidance_scale=2.0)]
    for settings, calls in ((parts, 12), ([SubTokenSettings()] * 2, 6)):
        output = case.draw(OpenMAGVIT2Sampler(settings), torch.zeros(2, dtype=torch.int64), torch.arange(2))
        assert output.network_calls == calls and output.sequential_passes == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BARSampler(bit_counts=()), "bit_counts must have one step or more"),
        (lambda: BARSampler(bit_counts=(2, 0)), r"of at least 1 bit each, got \[2, 0\]"),
        (lambda: BARSampler(choice_temperature=-1.0), "choice_temperature must be >= 0, got -1.0"),
        (lambda: OpenMAGVIT2Sampler(parts=[]), "parts must have settings for each part of an id, got none"),
        (lambda: OpenMAGVIT2Sampler([SubTokenSettings(temperature=0.0)]), "temperature must be > 0, got 0.0"),
        (lambda: OpenMAGVIT2Sampler([SubTokenSettings(top_p=0.0)]), "top_p must lie in"),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("case_name", "sampler", "message"),
    [
        ("bar", BARSampler((2, 2, 5, 7)), r"bit_counts=\[2, 2, 5, 7\] unmask 16 bits, an id of this generator has 3"),
        ("raster", BARSampler((1, 2)), "with a MaskedBitHead, this one has no place_head"),
        ("parts", BARSampler((1, 2)), "with a MaskedBitHead, this one has a FactorisedHead"),
        ("parts", OpenMAGVIT2Sampler([SubTokenSettings()]), "settings for 1 parts of an id, this generator predicts 2"),
        (
            "raster",
            OpenMAGVIT2Sampler([SubTokenSettings()] * 2),
            "settings for 2 parts of an id, this generator predicts 1",
        ),
    ],
)
def test_samplers_of_other_heads(make_case, case_name: str, sampler: RasterSampler, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(make_case(case_name).backbone, sampler, 1)
