"""Raster sampling follows the law of its backbone exactly, and costs single-token passes."""

import pytest
import torch
from exact_laws import all_sequences, chi_square_p_value, raster_log_law, sequence_numbers

from discrete_lit.processes import CounterRandom
from discrete_lit.samplers import RasterSampler


def draw(backbone, sampler: RasterSampler, label: int, count: int) -> torch.Tensor:
    labels = torch.full((count,), label)
    with torch.no_grad():
        return sampler(backbone, labels, CounterRandom(3, torch.arange(count))).tokens


@pytest.mark.parametrize("label", [0, 1])
def test_law_over_all_64_sequences(make_backbone, label: int) -> None:
    backbone = make_backbone("causal", vocab_size=4, grid=(3,), spread=0.5)
    numbers = sequence_numbers(draw(backbone, RasterSampler(), label, 40_000), 4)
    assert chi_square_p_value(numbers, raster_log_law(backbone, label).exp()) > 1e-3
    assert chi_square_p_value(numbers, raster_log_law(backbone, 1 - label).exp()) < 1e-6


def test_law_with_guidance_temperature_and_top_k(make_backbone) -> None:
    """The filtered conditionals multiplied up by hand, from passes over prefixes without a cache."""
    backbone = make_backbone("causal", vocab_size=4, grid=(3,), spread=0.5)
    sampler = RasterSampler(temperature=1.3, top_k=3, guidance_scale=2.5, guidance_schedule="linear")
    sequences = all_sequences(4, 3)
    law = torch.ones(len(sequences), dtype=torch.float64)
    with torch.no_grad():
        for place in range(3):
            prefix = sequences[:, :place]
            p, q = (
                backbone(prefix, torch.full((len(sequences),), label))[:, -1].double().log_softmax(dim=-1)
                for label in (1, 2)
            )
            scale = 1 + 1.5 * place / 3
            logits = (q + scale * (p - q)) / 1.3
            logits[torch.arange(len(sequences)), logits.argmin(dim=-1)] = -torch.inf
            law *= logits.softmax(dim=-1).gather(1, sequences[:, place : place + 1])[:, 0]
    assert float(law.sum()) == pytest.approx(1)
    numbers = sequence_numbers(draw(backbone, sampler, 1, 40_000), 4)
    assert chi_square_p_value(numbers, law) > 1e-3


@pytest.mark.parametrize(
    ("schedule", "scale", "calls"), [("constant", 1.0, 6), ("constant", 1.5, 12), ("linear", 1.5, 12)]
)
def test_what_it_reports_is_what_it_ran(make_backbone, schedule, scale: float, calls: int) -> None:
    backbone = make_backbone("causal", grid=(2, 3))
    seen: list[tuple[int, ...]] = []
    backbone.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    sampler = RasterSampler(guidance_scale=scale, guidance_schedule=schedule)
    with torch.no_grad():
        output = sampler(backbone, torch.zeros(4, dtype=torch.int64), CounterRandom(0, torch.arange(4)))
    rows = 4 * calls // 6
    assert seen == [(rows, 0)] + [(rows, 1)] * 5
    assert (output.network_calls, output.sequential_passes) == (calls, 6)


def test_greedy(make_backbone) -> None:
    backbone = make_backbone("causal", vocab_size=4, grid=(3,))
    tokens = draw(backbone, RasterSampler(top_k=1), 0, 5)
    assert (tokens == tokens[0]).all()
    with torch.no_grad():
        for place in range(3):
            logits = backbone(tokens[:1, :place], torch.tensor([0]))[0, -1]
            assert int(tokens[0, place]) == int(logits.argmax())
