"""DimensionwiseSampler: its orders, guidance and filters, its waits, and what it refuses."""

from typing import Any

import pytest
import torch
from helpers.fake_gpu import waits_of_a_draw
from torch import Tensor

from discrete_lit.backbones import ChannelHead, ChannelLayout, MaskedAutoencoder, VectorLayout
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import DimensionwiseSampler, SamplerOutput
from discrete_lit.tokenizers.quantizers import NormalLevels

LEVELS = NormalLevels(4)


def networks() -> tuple[MaskedAutoencoder, ChannelHead]:
    torch.manual_seed(0)
    network = MaskedAutoencoder(VectorLayout(dim=3, grid=(4,), num_classes=2), width=16, depth=1, heads=2, buffer=2)
    head = ChannelHead(ChannelLayout(channels=3, levels=4, condition_width=16), width=8, depth=1, heads=2)
    for parameter in (*network.parameters(), *head.parameters()):
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    return network.eval(), head.eval()


def draw(labels: Tensor, sampler: DimensionwiseSampler, *, modules: Any = None, first: int = 0) -> SamplerOutput:
    network, head = modules or networks()
    random = CounterRandom(11, torch.arange(first, first + len(labels)))
    return sampler(network, head, labels, random, lookup=LEVELS.lookup)


class WatchedHead(ChannelHead):
    """Keeps the hidden states that it draws from."""

    seen: list[Tensor]

    def sample(self, hidden: Tensor, uniforms: Tensor, choose: Any) -> Tensor:
        self.seen.append(hidden)
        return super().sample(hidden, uniforms, choose)


@torch.no_grad()
@pytest.mark.parametrize(("schedule", "scale"), [("known", 1.5), ("constant", 3.0)])
def test_guidance_acts_on_hidden_states(schedule: Any, scale: float) -> None:
    network, head = networks()
    head.__class__ = WatchedHead
    head.seen = []  # type: ignore[attr-defined]
    labels, null = torch.tensor([0, 1]), torch.tensor([2, 2])
    sampler = DimensionwiseSampler(4, guidance_scale=3.0, guidance_schedule=schedule, order="raster")
    output = draw(labels, sampler, modules=(network, head))
    assert (output.network_calls, output.sequential_passes) == (8, 4)
    nothing = torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)
    given, without = (network(*nothing, each, known=0)[:, 0] for each in (labels, null))
    # After the first of four passes a quarter is known: 1 + 2 / 4.
    expected = without + scale * (given - without)
    torch.testing.assert_close(head.seen[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_temperature_and_filters() -> None:
    modules, labels = networks(), torch.zeros(200, dtype=torch.int64)

    def spread(**settings: Any) -> int:
        sampler = DimensionwiseSampler(4, order="raster", **settings)
        return len(draw(labels, sampler, modules=modules).tokens.unique(dim=0))

    assert spread(top_k=1) == spread(top_p=1e-6) == 1
    assert 1 < spread(temperature=0.2) < spread(temperature=2.0)


@torch.no_grad()
def test_each_image_has_an_order_of_its_own() -> None:
    """Greedy draws of one class differ by their orders alone, of which four places have 24."""
    modules, labels = networks(), torch.zeros(100, dtype=torch.int64)
    sampler = DimensionwiseSampler(4, top_k=1)
    drawn = draw(labels, sampler, modules=modules).tokens
    assert 2 < len(drawn.unique(dim=0)) <= 24
    assert torch.equal(draw(labels[:10], sampler, modules=modules, first=30).tokens, drawn[30:40])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_draw_waits_once(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = DimensionwiseSampler(3, guidance_scale=scale)

    def drawn(modules: Any, labels: Tensor, random: CounterRandom) -> Tensor:
        network, head, levels = modules
        return sampler(network, head, labels, random, lookup=levels.lookup).tokens

    assert waits_of_a_draw([*networks(), LEVELS], drawn, monkeypatch) == ([], 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"temperature": 0.0}, r"temperature must be above 0 \(top_k=1 is the greedy choice\)"),
        ({"top_k": 0}, "top_k at least 1"),
        ({"top_p": 1.5}, r"top_p in \(0, 1\], got 1.0, None and 1.5"),
        ({"order": "halton"}, "order must be 'random' or 'raster', got 'halton'"),
        ({"guidance_schedule": "linear"}, "guidance_schedule must be 'known' or 'constant'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DimensionwiseSampler(**settings)


def test_more_steps_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match="steps=5 exceeds the 4 places of an image"):
        draw(torch.zeros(1, dtype=torch.int64), DimensionwiseSampler(5))
